// Choice and launch of the backward kernels of qkv_attention.
#include "ops/qkv_attention_backward.cuh"
#include "ops/qkv_attention_cuda.h"
#include "ops/qkv_attention_float.cuh"
#include "ops/qkv_attention_launch.h"
#include "simt/launch.h"

namespace adm_rt {
namespace {

template <class T>
void qkv_backward(const QkvBackwardArgs& args, const QkvAttentionShape& s, void* stream) {
  simt::launch<qkv_attention_delta_kernel<T>>(
      qkv_grid(s, qkv_blocks(s.num_queries, kQkvDeltaRows), 0), stream, args);
  with_qkv_columns<!std::is_same_v<T, float>>(s.head_dim, [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    if constexpr (std::is_same_v<T, float>) {
      using Config = QkvFloat<kColumns>;
      const unsigned blocks = 3 * qkv_blocks(s.length, Config::kRows);
      simt::launch<qkv_attention_float_backward_kernel<kColumns>>(
          qkv_grid(s, blocks, Config::shared_size(4)), stream, args);
    } else {
      using Config = QkvBackward<T, kColumns>;
      const unsigned blocks = Config::kRoles * qkv_blocks(s.length, Config::kRows);
      simt::launch<qkv_attention_backward_kernel<T, kColumns>>(
          qkv_grid(s, blocks, Config::shared_size()), stream, args);
    }
  });
}

}  // namespace

int64_t qkv_attention_backward_workspace(const QkvAttentionShape& shape) {
  return shape.batch * shape.heads * shape.num_queries * static_cast<int64_t>(sizeof(float));
}

void qkv_attention_backward_cuda(const QkvAttentionBackwardParams& params, QkvLayout layout,
                                 void* workspace, void* stream) {
  const QkvAttentionShape& s = params.shape;
  check_qkv_attention_cuda(s, layout);
  if (s.batch == 0) return;
  ADM_RT_CHECK(params.grad != nullptr && params.qkv != nullptr && params.out != nullptr &&
                   params.dqkv != nullptr,
               "qkv_attention: null pointer");
  ADM_RT_CHECK(workspace != nullptr && params.stats != nullptr,
               "qkv_attention: the backward pass needs stats and a workspace of ",
               qkv_attention_backward_workspace(s), " bytes");
  QkvBackwardArgs args;
  args.geometry = qkv_geometry(s, layout);
  args.geometry.wide =
      qkv_can_be_wide(s, layout, {params.grad, params.qkv, params.out, params.dqkv});
  args.grad = params.grad, args.qkv = params.qkv, args.out = params.out;
  args.stats = params.stats, args.delta = static_cast<float*>(workspace);
  args.dqkv = params.dqkv;
  switch (s.dtype) {
    case DType::kFloat32:
      return qkv_backward<float>(args, s, stream);
    case DType::kBFloat16:
      return qkv_backward<simt::BFloat16>(args, s, stream);
    case DType::kFloat16:
      return qkv_backward<simt::Half>(args, s, stream);
  }
}

}  // namespace adm_rt
