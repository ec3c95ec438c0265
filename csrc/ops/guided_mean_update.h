// guided_mean_update: the arithmetic that ends every sampler step, in one pass.
//
//   out  = has uncond ? uncond + cfg * (out - uncond) : out        (classifier-free guidance)
//   x0   = x0_x * x + x0_out * out
//   x0   = clip(x0)                  none | static: to [-1, 1] | dynamic: see below
//   x0  += guide_x0 * gradient                                     (never clipped again)
//   L    = learned ? f * max_log + (1 - f) * min_log, f = (v + 1) / 2 : max_log
//   x'   = next_x * x + next_x0 * x0 + sum_j next_h[j] * history[j]
//          + guide_mean * exp(L) * gradient + noise * exp(L / 2) * z
//   s    = state_x * x + state_x0 * x0 + sum_j state_h[j] * history[j]
//
// Dynamic thresholding (Saharia et al., "Imagen", 2022): per image, s = max(1, quantile of |x0|
// over its channels * pixels values, linear between order statistics), x0 = clamp(x0, -s, s) / s.
//
// Every update of DDPM, DDIM, DPM-Solver++ and UniPC is a choice of coefficients. Values are
// float32; all instruction sets and CUDA give the same bits, for any batch and number of threads.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace adm_rt {

// One row of the coefficient table; the order is that of StepCoefficients in Python.
struct StepCoefficients {
  float cfg;
  float x0_x, x0_out;
  float guide_x0, guide_mean;
  float next_x, next_x0, next_h[3];
  float state_x, state_x0, state_h[3];
  float min_log, max_log;
  float noise;
};
constexpr int kStepCoefficients = 18;
static_assert(sizeof(StepCoefficients) == kStepCoefficients * sizeof(float));

enum class Clip : int { kNone = 0, kStatic = 1, kDynamic = 2 };

// All tensors are contiguous [images, channels, pixels]; the model's have `model_channels`
// channels, of which [0, channels) are the prediction and [channels, 2 * channels) the variance v.
struct GuidedMeanUpdateParams {
  const float* x = nullptr;
  const void* model_output = nullptr;   // float32 or bfloat16: model_dtype
  const void* uncond_output = nullptr;  // likewise; null: no classifier-free guidance
  const void* gradient = nullptr;       // float32 or bfloat16: gradient_dtype; null: no guidance
  const float* history[3] = {};         // null from the first unused one on
  const float* z = nullptr;             // noise as a tensor; null: from seeds
  const int64_t* seeds = nullptr;       // [images], for Philox; null too: no noise
  float* x_next = nullptr;
  float* x0 = nullptr;
  float* state = nullptr;  // null: not wanted
  int64_t images = 0;
  int64_t channels = 0;
  int64_t pixels = 0;
  int64_t model_channels = 0;   // >= channels, >= 2 * channels with learned_variance
  int64_t uncond_channels = 0;  // >= channels
  uint32_t step = 0;            // for Philox
  bool learned_variance = false;
  Clip clip = Clip::kStatic;
  DType model_dtype = DType::kFloat32;
  DType gradient_dtype = DType::kFloat32;
  double quantile = 0.995;  // in (0, 1], for Clip::kDynamic
  StepCoefficients coefficients = {};
};

// Throws std::invalid_argument when the params contradict themselves.
void guided_mean_update_cpu(const GuidedMeanUpdateParams& params);

// counts[i] = how many of the `size` values of image i are NaN or infinite.
void count_nonfinite_cpu(const float* values, int64_t images, int64_t size, int64_t* counts);

// The quantile of n sorted values: values[low] + fraction * (values[high] - values[low]).
struct QuantileRank {
  int64_t low, high;
  float fraction;
};

inline QuantileRank quantile_rank(double quantile, int64_t n) {
  const double position = quantile * static_cast<double>(n - 1);
  const int64_t low = static_cast<int64_t>(std::floor(position));
  const double fraction = position - static_cast<double>(low);
  return {low, fraction > 0 && low + 1 < n ? low + 1 : low, static_cast<float>(fraction)};
}

}  // namespace adm_rt
