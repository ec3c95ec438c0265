// What the launchers of qkv_attention share: checks of the arguments, grids, choice by head_dim.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "common/check.h"
#include "ops/qkv_attention_cuda.h"
#include "ops/qkv_attention_shared.cuh"
#include "simt/launch.h"

namespace adm_rt {

inline void check_qkv_attention_cuda(const QkvAttentionShape& s, QkvLayout layout) {
  ADM_RT_CHECK(s.batch >= 0 && s.batch <= 65535, "qkv_attention: batch=", s.batch,
               "; CUDA takes 0 to 65535");
  ADM_RT_CHECK(s.heads >= 1 && s.heads <= 65535, "qkv_attention: heads=", s.heads,
               "; CUDA takes 1 to 65535");
  ADM_RT_CHECK(s.head_dim >= 1 && s.head_dim <= kMaxCudaHeadDim,
               "qkv_attention: head_dim=", s.head_dim, "; CUDA takes 1 to ", kMaxCudaHeadDim);
  ADM_RT_CHECK(s.num_queries >= 1 && s.num_queries <= s.length,
               "qkv_attention: num_queries=", s.num_queries, " is not in [1, length=", s.length,
               "]");
  ADM_RT_CHECK(s.length < (int64_t{1} << 31) / (3 * s.heads * s.head_dim),
               "qkv_attention: an image of ", s.length, " tokens and ", 3 * s.heads * s.head_dim,
               " channels; CUDA takes fewer than 2^31 elements");
  ADM_RT_CHECK(s.order == QkvOrder::kLegacy || s.order == QkvOrder::kNew,
               "qkv_attention: order=", static_cast<int>(s.order), " is not 0 (legacy) or 1 (new)");
  ADM_RT_CHECK(layout == QkvLayout::kChannelMajor || layout == QkvLayout::kTokenMajor,
               "qkv_attention: layout=", static_cast<int>(layout),
               " is not 0 (channel-major) or 1 (token-major)");
}

inline bool qkv_can_be_wide(const QkvAttentionShape& s, QkvLayout layout,
                            std::initializer_list<const void*> pointers) {
  const int64_t size = s.dtype == DType::kFloat32 ? 4 : 2;
  return layout == QkvLayout::kTokenMajor && s.head_dim * size % 16 == 0 &&
         std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) {
           return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
         });
}

inline unsigned qkv_blocks(int64_t rows, int64_t size) {
  return static_cast<unsigned>((rows + size - 1) / size);
}

inline simt::Launch qkv_grid(const QkvAttentionShape& s, unsigned blocks, size_t shared_bytes) {
  simt::Launch launch;
  launch.name = "qkv_attention";
  launch.blocks_x = blocks;
  launch.blocks_y = static_cast<unsigned>(s.heads);
  launch.blocks_z = static_cast<unsigned>(s.batch);
  launch.threads = kQkvThreads;
  launch.shared_bytes = shared_bytes;
  launch.programmatic = true;
  return launch;
}

template <int kColumns>
using QkvColumns = std::integral_constant<int, kColumns>;

// run(QkvColumns<columns>()) with the width of tiles that head_dim needs.
template <bool kHas192, class Run>
void with_qkv_columns(int64_t head_dim, const Run& run) {
  if (head_dim <= 64) return run(QkvColumns<64>());
  if (head_dim <= 128) return run(QkvColumns<128>());
  if constexpr (kHas192) {
    if (head_dim <= 192) return run(QkvColumns<192>());
  }
  run(QkvColumns<256>());
}

}  // namespace adm_rt
