// Argument checks of guided_mean_update, for its CPU and its CUDA launcher.
#pragma once

#include "common/check.h"
#include "ops/guided_mean_update.h"

namespace adm_rt {

// Throws std::invalid_argument when the params contradict themselves.
inline void check_guided_mean_update(const GuidedMeanUpdateParams& p, bool takes_float16 = false) {
  ADM_RT_CHECK(p.images >= 0 && p.channels > 0 && p.pixels > 0, "guided_mean_update: shape [",
               p.images, ", ", p.channels, ", ", p.pixels, "] has no elements");
  ADM_RT_CHECK(p.channels * p.pixels / 4 <= 0xffffffffll,
               "guided_mean_update: an image has more elements than the noise counter can name");
  ADM_RT_CHECK(p.model_channels >= (p.learned_variance ? 2 : 1) * p.channels,
               "guided_mean_update: model_output has ", p.model_channels, " channels; x has ",
               p.channels, (p.learned_variance ? " and learned variances need twice as many" : ""));
  ADM_RT_CHECK(p.uncond_output == nullptr || p.uncond_channels >= p.channels,
               "guided_mean_update: uncond_output has ", p.uncond_channels, " channels, x has ",
               p.channels);
  ADM_RT_CHECK(
      takes_float16 || (p.model_dtype != DType::kFloat16 && p.gradient_dtype != DType::kFloat16),
      "guided_mean_update: float16 is to be converted to float32 first");
  ADM_RT_CHECK(p.clip != Clip::kDynamic || (p.quantile > 0 && p.quantile <= 1),
               "guided_mean_update: quantile is ", p.quantile, "; allowed: 0 < quantile <= 1");
  ADM_RT_CHECK(p.images == 0 || (p.x != nullptr && p.model_output != nullptr &&
                                 p.x_next != nullptr && p.x0 != nullptr),
               "guided_mean_update: x, model_output, x_next and x0 are required");
  ADM_RT_CHECK((p.history[0] != nullptr || p.history[1] == nullptr) &&
                   (p.history[1] != nullptr || p.history[2] == nullptr),
               "guided_mean_update: history has a gap");
}

}  // namespace adm_rt
