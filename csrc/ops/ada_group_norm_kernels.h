// The per-ISA kernels of ada_group_norm: what ada_group_norm_cpu.cpp calls and
// ada_group_norm_simd.cpp defines once per instruction set. Each runs on one thread over a range.
#pragma once

#include <cstdint>

#include "ops/ada_group_norm.h"

namespace adm_rt {

// Channels-last work is cut into blocks of rows; the cut depends on the shape alone.
struct AdaGroupNormRows {
  int64_t rows_per_block = 0;
  int64_t blocks = 0;  // per image
};

// Sums over one image's plane, per channel: s1 = sum dv, s2 = sum dv * xhat. Each [batch,
// channels].
struct AdaGroupNormSums {
  double* s1 = nullptr;
  double* s2 = nullptr;
};

// One channel's affine map, y = silu?((x - center) * slope + offset), structure of arrays,
// each [batch, channels].
struct AdaGroupNormAffine {
  float* center = nullptr;
  float* slope = nullptr;
  float* offset = nullptr;
};

// dx = dv * on_grad + (x - center) * on_x + constant, each [batch, channels].
struct AdaGroupNormGradient {
  float* on_grad = nullptr;
  float* on_x = nullptr;
  float* constant = nullptr;
};

#define ADM_RT_DECLARE_ADA_GROUP_NORM(ISA)                                                         \
  namespace ISA {                                                                                  \
  /* Channels first, pairs (image, group) [begin, end): statistics and result. */                  \
  void ada_group_norm_planes(const AdaGroupNormParams& p, int64_t begin, int64_t end);             \
  /* Gradient of the same: fills `sums` and, where wanted, dx. */                                  \
  void ada_group_norm_planes_backward(const AdaGroupNormBackwardParams& p,                         \
                                      const AdaGroupNormSums& sums, int64_t begin, int64_t end);   \
  /* Channels last, row blocks [begin, end) of batch * blocks: for every channel a value near */   \
  /* its mean (the pilot) and the sums of (x - pilot) and its square; [batch * blocks, channels]   \
   */                                                                                              \
  void ada_group_norm_rows_moments(const AdaGroupNormParams& p, const AdaGroupNormRows& rows,      \
                                   float* pilots, float* sums, float* squares, int64_t begin,      \
                                   int64_t end);                                                   \
  void ada_group_norm_rows_apply(const AdaGroupNormParams& p, const AdaGroupNormRows& rows,        \
                                 const AdaGroupNormAffine& affine, int64_t begin, int64_t end);    \
  /* Block sums s1, s2 in float, each [batch * blocks, channels]. */                               \
  void ada_group_norm_rows_sums(const AdaGroupNormBackwardParams& p, const AdaGroupNormRows& rows, \
                                const AdaGroupNormAffine& affine, float* s1, float* s2,            \
                                int64_t begin, int64_t end);                                       \
  void ada_group_norm_rows_backward(const AdaGroupNormBackwardParams& p,                           \
                                    const AdaGroupNormRows& rows,                                  \
                                    const AdaGroupNormAffine& affine,                              \
                                    const AdaGroupNormGradient& gradient, int64_t begin,           \
                                    int64_t end);                                                  \
  }

ADM_RT_DECLARE_ADA_GROUP_NORM(portable)
ADM_RT_DECLARE_ADA_GROUP_NORM(avx2)
ADM_RT_DECLARE_ADA_GROUP_NORM(avx512)
#undef ADM_RT_DECLARE_ADA_GROUP_NORM

}  // namespace adm_rt
