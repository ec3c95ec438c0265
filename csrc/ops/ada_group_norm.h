// ada_group_norm: GroupNorm, affine, optional AdaGN modulation, optional SiLU, in one call.
//
//   mean, var over the (channels / groups) * spatial values of one (image, group)
//   rstd = 1 / sqrt(var + eps)                                (biased variance)
//   u    = (x - mean) * rstd * weight + bias
//   v    = u * (1 + scale) + shift                            (when scale_shift is given)
//   y    = silu ? v * sigmoid(v) : v
//
// Wu & He, "Group Normalization", 2018; AdaGN: Dhariwal & Nichol, "Diffusion Models Beat GANs on
// Image Synthesis", 2021, section 3.
//
// Statistics, weights and all arithmetic are float32 (sums of blocks in double), whatever the type
// of x. Every (image, group) is reduced in one fixed order, so a result depends neither on the
// number of threads nor on the other images of the batch.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace adm_rt {

enum class AdaGroupNormLayout {
  kChannelsFirst = 0,  // [batch, channels, spatial]
  kChannelsLast = 1,   // [batch, spatial, channels]
};

struct AdaGroupNormParams {
  const void* x = nullptr;             // [batch, channels, spatial] in `layout`, type `dtype`
  const float* weight = nullptr;       // [channels]
  const float* bias = nullptr;         // [channels]
  const float* scale_shift = nullptr;  // [batch, 2 * channels], scale first; null: no modulation
  int64_t scale_shift_stride = 0;      // floats between the rows of scale_shift
  void* y = nullptr;                   // like x; may not overlap it
  float* mean = nullptr;               // [batch, groups]; null: not wanted
  float* rstd = nullptr;               // [batch, groups]; null: not wanted
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t spatial = 0;
  int64_t groups = 0;
  float eps = 1e-5f;
  bool silu = true;
  DType dtype = DType::kFloat32;  // of x and y: float32 or bfloat16
  AdaGroupNormLayout layout = AdaGroupNormLayout::kChannelsFirst;
};

// Gradients. With dv = grad * silu'(v), and per (image, channel) s1 = sum dv, s2 = sum dv * xhat:
//   dshift = s1                       dscale = weight * s2 + bias * s1
//   dbias  = sum_n (1 + scale) * s1   dweight = sum_n (1 + scale) * s2
//   dx     = rstd * (a * dv - mean_g(a * dv) - xhat * mean_g(a * dv * xhat)),
//   a = weight * (1 + scale)
struct AdaGroupNormBackwardParams {
  const void* grad = nullptr;          // like x
  const void* x = nullptr;             // [batch, channels, spatial] in `layout`, type `dtype`
  const float* mean = nullptr;         // [batch, groups], as the forward pass wrote it
  const float* rstd = nullptr;         // [batch, groups]
  const float* weight = nullptr;       // [channels]
  const float* bias = nullptr;         // [channels]
  const float* scale_shift = nullptr;  // [batch, 2 * channels] or null
  int64_t scale_shift_stride = 0;
  void* dx = nullptr;             // like x; null: not wanted, and so for the next three
  float* dweight = nullptr;       // [channels]
  float* dbias = nullptr;         // [channels]
  float* dscale_shift = nullptr;  // [batch, 2 * channels], contiguous
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t spatial = 0;
  int64_t groups = 0;
  bool silu = true;
  DType dtype = DType::kFloat32;
  AdaGroupNormLayout layout = AdaGroupNormLayout::kChannelsFirst;
};

void ada_group_norm_cpu(const AdaGroupNormParams& params);
void ada_group_norm_backward_cpu(const AdaGroupNormBackwardParams& params);

}  // namespace adm_rt
