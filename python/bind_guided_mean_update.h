// The arguments of guided_mean_update from Python, shared by the modules _C and _cuda.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>

#include "ops/guided_mean_update.h"

constexpr char kGuidedMeanUpdateDoc[] =
    "(coefficients: 18 floats, shape: (images, channels, pixels, model_channels, "
    "uncond_channels),\n"
    " inputs: (x, model_output, uncond_output, gradient, history0, history1, history2, z, seeds),\n"
    " outputs: (x_next, x0, state), dtypes: (model_output, gradient), step, learned_variance, "
    "clip,\n"
    " quantile). Tensors are addresses, 0 for none. clip: 0 none, 1 static, 2 dynamic.";

inline adm_rt::GuidedMeanUpdateParams guided_mean_update_params(
    const std::array<float, adm_rt::kStepCoefficients>& coefficients,
    const std::array<int64_t, 5>& shape, const std::array<uintptr_t, 9>& inputs,
    const std::array<uintptr_t, 3>& outputs, const std::array<int, 2>& dtypes, uint32_t step,
    bool learned_variance, int clip, double quantile) {
  const auto input = [&](int i) { return reinterpret_cast<const float*>(inputs[i]); };
  adm_rt::GuidedMeanUpdateParams p;
  std::memcpy(&p.coefficients, coefficients.data(), sizeof(p.coefficients));
  p.images = shape[0];
  p.channels = shape[1];
  p.pixels = shape[2];
  p.model_channels = shape[3];
  p.uncond_channels = shape[4];
  p.x = input(0);
  p.model_output = input(1);
  p.uncond_output = input(2);
  p.gradient = input(3);
  for (int j = 0; j < 3; ++j) p.history[j] = input(4 + j);
  p.z = input(7);
  p.seeds = reinterpret_cast<const int64_t*>(inputs[8]);
  p.x_next = reinterpret_cast<float*>(outputs[0]);
  p.x0 = reinterpret_cast<float*>(outputs[1]);
  p.state = reinterpret_cast<float*>(outputs[2]);
  p.model_dtype = adm_rt::dtype_from_int(dtypes[0]);
  p.gradient_dtype = adm_rt::dtype_from_int(dtypes[1]);
  p.step = step;
  p.learned_variance = learned_variance;
  ADM_RT_CHECK(clip >= 0 && clip <= 2, "clip code ", clip, " is not 0, 1 or 2");
  p.clip = static_cast<adm_rt::Clip>(clip);
  p.quantile = quantile;
  return p;
}

// What module.def takes: `run` gets the params and the module's own further arguments with the GIL
// released.
template <class... More, class Run>
auto guided_mean_update_binding(Run run) {
  return [run](const std::array<float, adm_rt::kStepCoefficients>& coefficients,
               const std::array<int64_t, 5>& shape, const std::array<uintptr_t, 9>& inputs,
               const std::array<uintptr_t, 3>& outputs, const std::array<int, 2>& dtypes,
               uint32_t step, bool learned_variance, int clip, double quantile, More... more) {
    const auto params = guided_mean_update_params(coefficients, shape, inputs, outputs, dtypes,
                                                  step, learned_variance, clip, quantile);
    pybind11::gil_scoped_release release;
    run(params, more...);
  };
}
