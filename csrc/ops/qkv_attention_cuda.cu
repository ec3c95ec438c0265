// Choice and launch of the forward kernels of qkv_attention.
#include "ops/qkv_attention.cuh"
#include "ops/qkv_attention_cuda.h"
#include "ops/qkv_attention_float.cuh"
#include "ops/qkv_attention_launch.h"
#include "simt/launch.h"

namespace adm_rt {
namespace {

template <class T, int kColumns, int kRowTiles>
void launch_qkv_forward(const QkvForwardArgs& args, const QkvAttentionShape& s, void* stream) {
  using Config = QkvForward<T, kColumns, kRowTiles>;
  const unsigned blocks = qkv_blocks(s.num_queries, Config::kRows);
  simt::launch<qkv_attention_kernel<T, kColumns, kRowTiles>>(
      qkv_grid(s, blocks, Config::shared_size()), stream, args);
}

template <class T>
void qkv_forward(const QkvForwardArgs& args, const QkvAttentionShape& s, void* stream) {
  if constexpr (std::is_same_v<T, float>) {
    with_qkv_columns<false>(s.head_dim, [&](auto columns) {
      using Config = QkvFloat<decltype(columns)::value>;
      const unsigned blocks = qkv_blocks(s.num_queries, Config::kRows);
      simt::launch<qkv_attention_float_kernel<decltype(columns)::value>>(
          qkv_grid(s, blocks, Config::shared_size(3)), stream, args);
    });
  } else {
    // Twice the rows make better use of shared memory, as long as every multiprocessor gets some.
    const int64_t large_blocks = qkv_blocks(s.num_queries, 128) * s.heads * s.batch;
    if (s.head_dim <= 64 && s.num_queries > 64 &&
        large_blocks >= simt::multiprocessors("qkv_attention")) {
      return launch_qkv_forward<T, 64, 2>(args, s, stream);
    }
    with_qkv_columns<true>(s.head_dim, [&](auto columns) {
      launch_qkv_forward<T, decltype(columns)::value, 1>(args, s, stream);
    });
  }
}

}  // namespace

void qkv_attention_cuda(const QkvAttentionParams& params, QkvLayout layout, void* stream) {
  const QkvAttentionShape& s = params.shape;
  check_qkv_attention_cuda(s, layout);
  if (s.batch == 0) return;
  ADM_RT_CHECK(params.qkv != nullptr && params.out != nullptr, "qkv_attention: null pointer");
  QkvForwardArgs args;
  args.geometry = qkv_geometry(s, layout);
  args.geometry.wide = qkv_can_be_wide(s, layout, {params.qkv, params.out});
  args.qkv = params.qkv, args.out = params.out, args.stats = params.stats;
  switch (s.dtype) {
    case DType::kFloat32:
      return qkv_forward<float>(args, s, stream);
    case DType::kBFloat16:
      return qkv_forward<simt::BFloat16>(args, s, stream);
    case DType::kFloat16:
      return qkv_forward<simt::Half>(args, s, stream);
  }
}

}  // namespace adm_rt
