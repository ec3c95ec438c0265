// The per-ISA kernels on rows of pixels that several ops share: what is done to pixels before a
// product, after it, and the statistics of their channels. row_kernels_simd.cpp defines them once
// per instruction set; each runs on one thread. A row is one pixel; vectors run along the channels.
#pragma once

#include <cstdint>

namespace adm_rt {

// The numbers that the attribute `activation` takes.
enum class RowActivation : int { kNone = 0, kSilu = 1, kRelu = 2 };

// Channels that channel_moments takes at a time: their sums stay in registers.
constexpr int64_t kMomentChannels = 32;

#define ADM_RT_DECLARE_ROW_KERNELS(ISA)                                                           \
  namespace ISA {                                                                                 \
  /* y[r][c] = activation(a[c] * x[r][c] + b[c]); a and b may both be null. */                    \
  void activate_rows(int64_t rows, int64_t channels, const float* x, int64_t ldx, const float* a, \
                     const float* b, RowActivation activation, float* y, int64_t ldy);            \
  /* y[r][c] = (y[r][c] + bias[c] + residual[r][c]) * scale; bias and residual may be null. */    \
  void finish_rows(int64_t rows, int64_t channels, float* y, int64_t ldy, const float* bias,      \
                   const float* residual, int64_t ldr, float scale);                              \
  /* Mean and, unless null, biased variance over the rows of channels <= kMomentChannels: sums */ \
  /* in float over blocks of rows, relative to the block's first, joined in double. */            \
  void channel_moments(int64_t rows, int64_t channels, const float* x, int64_t ldx, float* mean,  \
                       float* variance);                                                          \
  }

ADM_RT_DECLARE_ROW_KERNELS(portable)
ADM_RT_DECLARE_ROW_KERNELS(avx2)
ADM_RT_DECLARE_ROW_KERNELS(avx512)
#undef ADM_RT_DECLARE_ROW_KERNELS

}  // namespace adm_rt
