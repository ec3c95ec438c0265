// The per-ISA kernels of norm_backward. Each runs on one thread; a row is one pixel.
#pragma once

#include <cstdint>

namespace adm_rt {

// A gradient that is read by `repeat` neighbouring pixels in a row, each taking `scale` of it.
struct SharedGradient {
  const float* data = nullptr;  // null: none
  int64_t repeat = 1;
  float scale = 1.0f;
};

#define ADM_RT_DECLARE_NORM_BACKWARD(ISA)                                                          \
  namespace ISA {                                                                                  \
  /* dv = grad * silu'(a x + b), or grad without silu, for pixels rows [channels]; */              \
  /* sums[c] += sum dv and sums[channels + c] += sum dv * (x - mean[c]) over them. */              \
  void norm_backward_sums(int64_t pixels, int64_t channels, const float* x, SharedGradient grad,   \
                          const float* a, const float* b, const float* mean, bool silu, float* dv, \
                          float* sums);                                                            \
  /* dx = a dv - slope (x - mean) - offset (+ residual), in the place of dv. */                    \
  void norm_backward_apply(int64_t pixels, int64_t channels, const float* x, const float* a,       \
                           const float* mean, const float* slope, const float* offset,             \
                           SharedGradient residual, float* dx);                                    \
  /* y = add + shared; add may be null. */                                                         \
  void add_shared_gradient(int64_t pixels, int64_t channels, const float* add, int64_t ld_shared,  \
                           SharedGradient shared, float* y);                                       \
  }
ADM_RT_DECLARE_NORM_BACKWARD(portable)
ADM_RT_DECLARE_NORM_BACKWARD(avx2)
ADM_RT_DECLARE_NORM_BACKWARD(avx512)
#undef ADM_RT_DECLARE_NORM_BACKWARD

}  // namespace adm_rt
