// The CPU kernels of guided_mean_update, compiled once per instruction set.
#include "common/philox_simd.h"
#include "ops/guided_mean_update_element.h"
#include "ops/guided_mean_update_kernels.h"

namespace adm_rt::ADM_RT_ISA {

namespace {

using Float = NoiseFloat;

inline Float load(const float* p, int n) {
  return n >= kNoiseWidth ? Float::loadu(p) : Float::load_partial(p, n);
}

// From a float32 or bfloat16 tensor.
inline Float load(const void* p, DType dtype, int64_t offset, int n) {
  if (dtype == DType::kFloat32) return load(static_cast<const float*>(p) + offset, n);
  const uint16_t* half = static_cast<const uint16_t*>(p) + offset;
  return n >= kNoiseWidth ? Float::load_bf16(half) : Float::load_bf16_partial(half, n);
}

inline void store(Float value, float* p, int n) {
  if (n >= kNoiseWidth) {
    value.storeu(p);
  } else {
    value.store_partial(p, n);
  }
}

// The n <= kNoiseWidth elements from `element` of an image on.
template <UpdatePass pass>
inline __attribute__((always_inline)) void update_vector(const GuidedMeanUpdateParams& p,
                                                         const UpdateForm& form, int64_t image,
                                                         int64_t element, float limit, int n,
                                                         Float z) {
  const StepCoefficients& c = p.coefficients;
  const int64_t size = p.channels * p.pixels;
  const int64_t at = image * size + element;
  const int64_t model_at = image * p.model_channels * p.pixels + element;
  UpdateInputs<Float> in;
  in.x = load(p.x + at, n);
  Float x0;
  if (pass == UpdatePass::kFinish) {
    x0 = load(p.x0 + at, n);
  } else {
    in.out = load(p.model_output, p.model_dtype, model_at, n);
    if (form.uncond) {
      const int64_t uncond_at = image * p.uncond_channels * p.pixels + element;
      in.uncond = load(p.uncond_output, p.model_dtype, uncond_at, n);
    }
    x0 = predict_x0(form, c, in);
  }
  if (pass == UpdatePass::kPredict) {
    store(x0, p.x0 + at, n);
    return;
  }
  if (form.gradient) in.gradient = load(p.gradient, p.gradient_dtype, at, n);
  if (form.learned_variance) in.v = load(p.model_output, p.model_dtype, model_at + size, n);
  for (int j = 0; j < form.history; ++j) in.history[j] = load(p.history[j] + at, n);
  in.z = z;
  x0 = clip_x0(form.clip, limit, x0);
  Float x_next, state;
  finish_update(form, c, in, &x0, &x_next, &state);
  store(x0, p.x0 + at, n);
  store(x_next, p.x_next + at, n);
  if (form.state) store(state, p.state + at, n);
}

template <UpdatePass pass>
void update_range(const GuidedMeanUpdateParams& p, int64_t image, float limit, int64_t begin,
                  int64_t end) {
  const UpdateForm form = form_of(p, p.coefficients);
  const bool draw = pass != UpdatePass::kPredict && form.z && p.z == nullptr;
  const bool read = pass != UpdatePass::kPredict && form.z && p.z != nullptr;
  const uint64_t seed = draw ? static_cast<uint64_t>(p.seeds[image]) : 0;
  const float* given = read ? p.z + image * p.channels * p.pixels : nullptr;
  for (int64_t block = begin; block < end; block += kNoiseBlock) {
    NoiseFloat z[4] = {};
    if (draw) noise_block(seed, block, p.step, kPurposeStepNoise, z);
    for (int j = 0; j < 4; ++j) {
      const int64_t element = block + j * kNoiseWidth;
      if (element >= end) break;
      const int n = static_cast<int>(end - element < kNoiseWidth ? end - element : kNoiseWidth);
      if (read) z[j] = load(given + element, n);
      update_vector<pass>(p, form, image, element, limit, n, z[j]);
    }
  }
}

}  // namespace

void guided_mean_update_range(const GuidedMeanUpdateParams& params, UpdatePass pass, int64_t image,
                              float limit, int64_t begin, int64_t end) {
  switch (pass) {
    case UpdatePass::kWhole:
      return update_range<UpdatePass::kWhole>(params, image, limit, begin, end);
    case UpdatePass::kPredict:
      return update_range<UpdatePass::kPredict>(params, image, limit, begin, end);
    case UpdatePass::kFinish:
      return update_range<UpdatePass::kFinish>(params, image, limit, begin, end);
  }
}

int64_t count_finite(const float* values, int64_t n) {
  int64_t count = 0;  // integers in any order: the compiler may vectorise
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, 4);
    count += (bits & 0x7f800000u) != 0x7f800000u;
  }
  return count;
}

}  // namespace adm_rt::ADM_RT_ISA
