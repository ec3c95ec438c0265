// Device code of guided_mean_update. Arithmetic: guided_mean_update_element.h, shared with the CPU.
//
// One kernel does the whole step. A thread takes four consecutive elements of an image, which are
// one Philox counter and one 16-byte access per tensor; where pixel-major tensors are read or
// written as well, four pixels in all their channels. Dynamic thresholding needs the image's
// quantile first: the same kernel run as kPredict, then one block per image selects
// (guided_mean_update_select.cuh).
#pragma once

#include "common/philox.h"
#include "ops/guided_mean_update_copies.cuh"
#include "ops/guided_mean_update_element.h"
#include "ops/guided_mean_update_kernels.h"

namespace adm_rt {

constexpr int kUpdateThreads = 256;

// Where a captured graph finds its step: a replay changes neither kernel nor arguments.
struct StepTable {
  const StepCoefficients* rows = nullptr;  // device, [steps]; null: params.coefficients and .step
  uint32_t* step = nullptr;                // device: the row, also the step of the Philox counter
  uint32_t* arrivals = nullptr;            // device: zero; given: the last block adds one to step
};

// ---- Host: which kernel may be launched ----

inline bool aligned(const void* pointer, DType dtype = DType::kFloat32) {
  const uintptr_t mask = dtype == DType::kFloat32 ? 15 : 7;
  return (reinterpret_cast<uintptr_t>(pointer) & mask) == 0;
}

// Whether every access can take four elements at once, of an image or (by_pixels) of a channel.
// Null pointers are aligned.
inline bool vectorizable(const GuidedMeanUpdateParams& p, bool by_pixels = false) {
  const int64_t channels = by_pixels ? 1 : p.channels;
  const int64_t model_channels = by_pixels ? 1 : p.model_channels;
  const int64_t uncond_channels = by_pixels ? 1 : p.uncond_channels;
  return channels * p.pixels % 4 == 0 && model_channels * p.pixels % 4 == 0 &&
         (p.uncond_output == nullptr || uncond_channels * p.pixels % 4 == 0) && aligned(p.x) &&
         aligned(p.model_output, p.model_dtype) && aligned(p.uncond_output, p.model_dtype) &&
         aligned(p.gradient, p.gradient_dtype) && aligned(p.history[0]) && aligned(p.history[1]) &&
         aligned(p.history[2]) && aligned(p.z) && aligned(p.x_next) && aligned(p.x0) &&
         aligned(p.state);
}

// ---- Device ----

template <bool kVector>
ADM_RT_DEVICE void load_lanes(const float* tensor, int64_t at, int n, Float1 (&lanes)[4]) {
  if constexpr (kVector) {
    float values[4];
    simt::load4(tensor + at, values);
    ADM_RT_UNROLL for (int i = 0; i < 4; ++i) lanes[i] = {values[i]};
  } else {
    ADM_RT_UNROLL for (int i = 0; i < 4; ++i) lanes[i] = {i < n ? tensor[at + i] : 0.0f};
  }
}

template <bool kVector>
ADM_RT_DEVICE void store_lanes(float* tensor, int64_t at, int n, const Float1 (&lanes)[4]) {
  if constexpr (kVector) {
    const float values[4] = {lanes[0].v, lanes[1].v, lanes[2].v, lanes[3].v};
    simt::store4(tensor + at, values);
  } else {
    ADM_RT_UNROLL for (int i = 0; i < 4; ++i) {
      if (i < n) tensor[at + i] = lanes[i].v;
    }
  }
}

ADM_RT_DEVICE Float1 widen(uint16_t bits, DType dtype) {
  return dtype == DType::kBFloat16 ? Float1::load_bf16(&bits)
                                   : Float1{simt::to_float(simt::Half{bits})};
}

// Where the elements of a network's tensor lie that a thread takes: at, at + step, ...
struct Run {
  int64_t at = 0, step = 1;
};

template <bool kVector>
ADM_RT_DEVICE void load_lanes(const void* tensor, DType dtype, Run run, int n, Float1 (&lanes)[4]) {
  const bool whole = kVector && run.step == 1;
  if (dtype == DType::kFloat32) {
    const float* from = static_cast<const float*>(tensor) + run.at;
    if (whole) return load_lanes<kVector>(from, 0, n, lanes);
    ADM_RT_UNROLL for (int i = 0; i < 4; ++i) lanes[i] = {i < n ? from[i * run.step] : 0.0f};
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(tensor) + run.at;
  uint16_t values[4];
  if (whole) {
    simt::load4(from, values);
  } else {
    ADM_RT_UNROLL for (int i = 0; i < 4; ++i) {
      values[i] = i < n ? from[i * run.step] : uint16_t{0};
    }
  }
  ADM_RT_UNROLL for (int i = 0; i < 4; ++i) lanes[i] = widen(values[i], dtype);
}

// Normals of the elements from `element` on; only kAligned elements are a whole counter.
template <bool kAligned>
ADM_RT_DEVICE void draw_lanes(uint64_t seed, int64_t element, uint32_t step, Float1 (&z)[4]) {
  const uint32_t counter = static_cast<uint32_t>(element / 4);
  Float1 first[4];
  philox_normals<Float1, Uint1>(seed, counter, step, kPurposeStepNoise, first);
  const int offset = kAligned ? 0 : static_cast<int>(element % 4);
  if (offset == 0) {
    ADM_RT_UNROLL for (int i = 0; i < 4; ++i) z[i] = first[i];
    return;
  }
  Float1 next[4];
  philox_normals<Float1, Uint1>(seed, counter + 1, step, kPurposeStepNoise, next);
  const Float1 both[8] = {first[0], first[1], first[2], first[3],
                          next[0],  next[1],  next[2],  next[3]};
  ADM_RT_UNROLL for (int i = 0; i < 4; ++i) {  // indices the compiler knows keep it in registers
    z[i] = offset == 1 ? both[i + 1] : offset == 2 ? both[i + 2] : both[i + 3];
  }
}

// What one thread works on: n elements of an image from `element` on.
struct UpdatePlace {
  int64_t image = 0, element = 0;
  int n = 4;
  Run out = {}, variance = {}, uncond = {}, gradient = {};
};

// kVector: every tensor is 16-byte aligned (8 in 16 bits) and n is 4.
template <UpdatePass kPass, bool kVector, bool kAligned>
ADM_RT_DEVICE void update_lanes(const GuidedMeanUpdateParams& p, const UpdateForm& form,
                                const StepCoefficients& c, uint32_t step, float limit,
                                const UpdatePlace& place, Float1 (&x_next)[4]) {
  const int64_t at = place.image * p.channels * p.pixels + place.element;
  const int n = place.n;
  Float1 x[4], x0[4];
  load_lanes<kVector>(p.x, at, n, x);
  if (kPass == UpdatePass::kFinish) {
    load_lanes<kVector>(p.x0, at, n, x0);
  } else {
    Float1 out[4], uncond[4] = {};
    load_lanes<kVector>(p.model_output, p.model_dtype, place.out, n, out);
    if (form.uncond) {
      load_lanes<kVector>(p.uncond_output, p.model_dtype, place.uncond, n, uncond);
    }
    ADM_RT_UNROLL for (int i = 0; i < 4; ++i) {
      UpdateInputs<Float1> in = {};
      in.x = x[i], in.out = out[i], in.uncond = uncond[i];
      x0[i] = predict_x0(form, c, in);
    }
  }
  if (kPass == UpdatePass::kPredict) {
    store_lanes<kVector>(p.x0, at, n, x0);
    return;
  }

  Float1 v[4] = {}, gradient[4] = {}, history0[4] = {}, history1[4] = {}, history2[4] = {};
  Float1 z[4] = {}, state[4] = {};
  if (form.learned_variance) {
    load_lanes<kVector>(p.model_output, p.model_dtype, place.variance, n, v);
  }
  if (form.gradient) {
    load_lanes<kVector>(p.gradient, p.gradient_dtype, place.gradient, n, gradient);
  }
  if (form.history > 0) load_lanes<kVector>(p.history[0], at, n, history0);
  if (form.history > 1) load_lanes<kVector>(p.history[1], at, n, history1);
  if (form.history > 2) load_lanes<kVector>(p.history[2], at, n, history2);
  if (form.z && p.z != nullptr) {
    load_lanes<kVector>(p.z, at, n, z);
  } else if (form.z) {
    draw_lanes<kAligned>(static_cast<uint64_t>(p.seeds[place.image]), place.element, step, z);
  }
  ADM_RT_UNROLL for (int i = 0; i < 4; ++i) {
    UpdateInputs<Float1> in = {};
    in.x = x[i], in.v = v[i], in.gradient = gradient[i], in.z = z[i];
    in.history[0] = history0[i], in.history[1] = history1[i], in.history[2] = history2[i];
    x0[i] = clip_x0(form.clip, limit, x0[i]);
    finish_update(form, c, in, &x0[i], &x_next[i], &state[i]);
  }
  store_lanes<kVector>(p.x0, at, n, x0);
  store_lanes<kVector>(p.x_next, at, n, x_next);
  if (form.state) store_lanes<kVector>(p.state, at, n, state);
}

// Four elements of one channel after the other, and what is pixel-major beside them.
template <UpdatePass kPass, bool kVector>
ADM_RT_DEVICE void update_pixels(const GuidedMeanUpdateParams& p, const PixelMajor& pixel_major,
                                 const UpdateForm& form, const StepCoefficients& c, uint32_t step,
                                 float limit, int64_t image, int64_t pixel) {
  UpdatePlace place;
  place.image = image;
  place.n = p.pixels - pixel < 4 ? static_cast<int>(p.pixels - pixel) : 4;
  const auto run = [&](bool by_pixel, int64_t channels, int64_t channel) {
    return by_pixel ? Run{(image * p.pixels + pixel) * channels + channel, channels}
                    : Run{(image * channels + channel) * p.pixels + pixel, 1};
  };
  PixelLanes lanes;
  for (int channel = 0; channel < p.channels; ++channel) {
    place.element = channel * p.pixels + pixel;
    place.out = run(pixel_major.model_output, p.model_channels, channel);
    place.variance = run(pixel_major.model_output, p.model_channels, p.channels + channel);
    place.uncond = run(pixel_major.model_output, p.uncond_channels, channel);
    place.gradient = run(pixel_major.gradient, p.channels, channel);
    Float1 x_next[4] = {};
    update_lanes<kPass, kVector, kVector>(p, form, c, step, limit, place, x_next);
    lanes.set(channel, x_next);
  }
  if (kPass != UpdatePass::kPredict) store_copies<kVector>(p, pixel_major, image, pixel, lanes);
}

// Grid: x over groups of four elements (kPixels: of four pixels), y over images.
template <UpdatePass kPass, bool kVector, bool kPixels>
ADM_RT_KERNEL_BOUNDS(kUpdateThreads, kPixels ? kVector ? 3 : 2 : 4)
guided_mean_update_kernel(const ADM_RT_GRID_CONSTANT GuidedMeanUpdateParams p,
                          const ADM_RT_GRID_CONSTANT PixelMajor pixel_major,
                          const ADM_RT_GRID_CONSTANT StepTable table, const float* limits) {
  const uint32_t step = table.rows == nullptr ? p.step : *table.step;
  const StepCoefficients& c = table.rows == nullptr ? p.coefficients : table.rows[step];
  const UpdateForm form = form_of(p, c);
  const int64_t image = simt::block_y();
  const float limit = kPass == UpdatePass::kFinish ? limits[image] : 1.0f;
  const int64_t size = kPixels ? p.pixels : p.channels * p.pixels;
  const int64_t stride = 4 * static_cast<int64_t>(simt::blocks_x()) * simt::threads_x();
  const int64_t thread = static_cast<int64_t>(simt::block_x()) * simt::threads_x();
  for (int64_t at = 4 * (thread + simt::thread_x()); at < size; at += stride) {
    if constexpr (kPixels) {
      update_pixels<kPass, kVector>(p, pixel_major, form, c, step, limit, image, at);
    } else {
      UpdatePlace place;
      place.image = image, place.element = at;
      place.n = size - at < 4 ? static_cast<int>(size - at) : 4;
      place.out = {image * p.model_channels * p.pixels + at, 1};
      place.variance = {place.out.at + size, 1};
      place.uncond = {image * p.uncond_channels * p.pixels + at, 1};
      place.gradient = {image * size + at, 1};
      Float1 x_next[4];
      update_lanes<kPass, kVector, true>(p, form, c, step, limit, place, x_next);
    }
  }
  if (kPass != UpdatePass::kPredict && table.arrivals != nullptr) {
    simt::sync_block();  // all have read the step
    if (simt::thread_x() == 0) {
      simt::fence_device();
      const uint32_t blocks = simt::blocks_x() * simt::blocks_y();
      if (simt::ticket(table.arrivals, blocks) == blocks - 1) *table.step = step + 1;
    }
  }
}

}  // namespace adm_rt
