// The arithmetic of guided_mean_update on one lane or vector, shared by all CPU kernels and CUDA: a
// template over the float type (common/exact_math.h, common/simd.h) with explicit fma and a fixed
// order, so that all of them give the same bits.
#pragma once

#include "common/exact_math.h"
#include "ops/guided_mean_update.h"

namespace adm_rt {

// What the step has, the same for every element.
struct UpdateForm {
  bool uncond, gradient, learned_variance, z, state;
  int history;
  Clip clip;
};

ADM_RT_HOST_DEVICE UpdateForm form_of(const GuidedMeanUpdateParams& p,
                                      const StepCoefficients& coefficients) {
  UpdateForm form;
  form.uncond = p.uncond_output != nullptr;
  form.gradient = p.gradient != nullptr;
  form.learned_variance = p.learned_variance;
  form.z = (p.z != nullptr || p.seeds != nullptr) && coefficients.noise != 0.0f;
  form.state = p.state != nullptr;
  form.history = p.history[0] == nullptr   ? 0
                 : p.history[1] == nullptr ? 1
                 : p.history[2] == nullptr ? 2
                                           : 3;
  form.clip = p.clip;
  return form;
}

// The inputs of one element; those that the form lacks are not read.
template <class F>
struct UpdateInputs {
  F x, out, uncond, v, gradient, history[3], z;
};

// x0 before clipping.
template <class F>
ADM_RT_HOST_DEVICE F predict_x0(const UpdateForm& form, const StepCoefficients& c,
                                const UpdateInputs<F>& in) {
  F out = in.out;
  if (form.uncond) out = fma(F::set1(c.cfg), in.out - in.uncond, in.uncond);
  return fma(F::set1(c.x0_x), in.x, F::set1(c.x0_out) * out);
}

// `limit` is the image's threshold with Clip::kDynamic. NaN stays NaN.
template <class F>
ADM_RT_HOST_DEVICE F clip_x0(Clip clip, float limit, F x0) {
  if (clip == Clip::kStatic) return min(F::set1(1.0f), max(F::set1(-1.0f), x0));
  if (clip == Clip::kDynamic) {
    return min(F::set1(limit), max(F::set1(-limit), x0)) / F::set1(limit);
  }
  return x0;
}

template <class F>
ADM_RT_HOST_DEVICE F combine(const UpdateForm& form, float on_x, float on_x0,
                             const float* on_history, const UpdateInputs<F>& in, F x0) {
  F total = fma(F::set1(on_x0), x0, F::set1(on_x) * in.x);
  if (form.history > 0) total = fma(F::set1(on_history[0]), in.history[0], total);
  if (form.history > 1) total = fma(F::set1(on_history[1]), in.history[1], total);
  if (form.history > 2) total = fma(F::set1(on_history[2]), in.history[2], total);
  return total;
}

// Everything after clipping. *x0 is the clipped one on entry and the guided one on return; *state
// is written only when the form has one.
template <class F>
ADM_RT_HOST_DEVICE void finish_update(const UpdateForm& form, const StepCoefficients& c,
                                      const UpdateInputs<F>& in, F* x0, F* x_next, F* state) {
  if (form.gradient) *x0 = fma(F::set1(c.guide_x0), in.gradient, *x0);
  F next = combine(form, c.next_x, c.next_x0, c.next_h, in, *x0);
  const bool guide_mean = form.gradient && c.guide_mean != 0.0f;
  if (guide_mean || form.z) {
    F log_variance = F::set1(c.max_log);
    if (form.learned_variance) {
      const F fraction = fma(in.v, F::set1(0.5f), F::set1(0.5f));
      log_variance = fma(fraction, F::set1(c.max_log) - F::set1(c.min_log), F::set1(c.min_log));
    }
    const F deviation = exp(log_variance * F::set1(0.5f));
    if (guide_mean) {
      next = fma(F::set1(c.guide_mean) * (deviation * deviation), in.gradient, next);
    }
    if (form.z) next = fma(F::set1(c.noise) * deviation, in.z, next);
  }
  *x_next = next;
  if (form.state) *state = combine(form, c.state_x, c.state_x0, c.state_h, in, *x0);
}

// max(1, quantile) from the order statistics around it, given as bits of |x0|: for non-negative
// floats their order is that of the values, with NaN last. NaN stays NaN.
ADM_RT_HOST_DEVICE float dynamic_limit(uint32_t low_bits, uint32_t high_bits, float fraction) {
  const Float1 low = {simt::float_of(low_bits)}, high = {simt::float_of(high_bits)};
  Float1 value = low;
  if (low_bits != high_bits) value = fma(Float1{fraction}, high - low, low);
  return max(Float1{1.0f}, value).v;
}

}  // namespace adm_rt
