// Device code of guided_mean_update. Arithmetic: guided_mean_update_element.h, shared with the CPU.
//
// One kernel does the whole step: every thread takes four consecutive elements of an image, which
// are one Philox counter and one 16-byte access per tensor. Dynamic thresholding needs the image's
// quantile first: the same kernel run as kPredict, then one block per image selects.
#pragma once

#include "common/philox.h"
#include "ops/guided_mean_update.h"
#include "ops/guided_mean_update_element.h"
#include "ops/guided_mean_update_kernels.h"
#include "simt/simt.h"

namespace adm_rt {

constexpr int kUpdateThreads = 256;
constexpr int kSelectThreads = 1024;
constexpr int kSelectBins = 2048;
constexpr size_t kSelectSharedBytes =
    simt::shared_bytes<uint32_t>(kSelectBins) + simt::shared_bytes<uint32_t>(kSelectThreads) +
    simt::shared_bytes<uint32_t>(2) + simt::shared_bytes<uint32_t>(1);

// Where a captured graph finds its step: a replay changes neither kernel nor arguments.
struct StepTable {
  const StepCoefficients* rows = nullptr;  // device, [steps]; null: params.coefficients and .step
  const uint32_t* step = nullptr;          // device: the row, also the step of the Philox counter
};

// ---- Host: which kernel may be launched ----

inline bool aligned(const void* pointer, DType dtype = DType::kFloat32) {
  const uintptr_t mask = dtype == DType::kFloat32 ? 15 : 7;
  return (reinterpret_cast<uintptr_t>(pointer) & mask) == 0;
}

// Whether every access can take four elements at once. Null pointers are aligned.
inline bool vectorizable(const GuidedMeanUpdateParams& p) {
  return p.channels * p.pixels % 4 == 0 && p.model_channels * p.pixels % 4 == 0 &&
         (p.uncond_output == nullptr || p.uncond_channels * p.pixels % 4 == 0) && aligned(p.x) &&
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
ADM_RT_DEVICE void load_lanes(const void* tensor, DType dtype, int64_t at, int n,
                              Float1 (&lanes)[4]) {
  if (dtype == DType::kFloat32) {
    load_lanes<kVector>(static_cast<const float*>(tensor), at, n, lanes);
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(tensor) + at;
  if constexpr (kVector) {
    uint16_t values[4];
    simt::load4(half, values);
    ADM_RT_UNROLL for (int i = 0; i < 4; ++i) lanes[i] = Float1::load_bf16(values + i);
  } else {
    ADM_RT_UNROLL for (int i = 0; i < 4; ++i) {
      lanes[i] = i < n ? Float1::load_bf16(half + i) : Float1{0.0f};
    }
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

// Grid: x over groups of four elements, y over images. kVector: every tensor is 16-byte aligned (8
// in bfloat16) and an image has a multiple of four elements.
template <UpdatePass kPass, bool kVector>
ADM_RT_DEVICE void update_group(const GuidedMeanUpdateParams& p, const UpdateForm& form,
                                const StepCoefficients& c, uint32_t step, float limit,
                                int64_t image, int64_t element) {
  const int64_t size = p.channels * p.pixels;
  const int64_t at = image * size + element;
  const int64_t model_at = image * p.model_channels * p.pixels + element;
  const int n = size - element < 4 ? static_cast<int>(size - element) : 4;

  Float1 x[4], x0[4];
  load_lanes<kVector>(p.x, at, n, x);
  if (kPass == UpdatePass::kFinish) {
    load_lanes<kVector>(p.x0, at, n, x0);
  } else {
    Float1 out[4], uncond[4] = {};
    load_lanes<kVector>(p.model_output, p.model_dtype, model_at, n, out);
    if (form.uncond) {
      const int64_t uncond_at = image * p.uncond_channels * p.pixels + element;
      load_lanes<kVector>(p.uncond_output, p.model_dtype, uncond_at, n, uncond);
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
  Float1 z[4] = {}, x_next[4], state[4] = {};
  if (form.learned_variance) {
    load_lanes<kVector>(p.model_output, p.model_dtype, model_at + size, n, v);
  }
  if (form.gradient) load_lanes<kVector>(p.gradient, p.gradient_dtype, at, n, gradient);
  if (form.history > 0) load_lanes<kVector>(p.history[0], at, n, history0);
  if (form.history > 1) load_lanes<kVector>(p.history[1], at, n, history1);
  if (form.history > 2) load_lanes<kVector>(p.history[2], at, n, history2);
  if (form.z && p.z != nullptr) {
    load_lanes<kVector>(p.z, at, n, z);
  } else if (form.z) {
    philox_normals<Float1, Uint1>(static_cast<uint64_t>(p.seeds[image]),
                                  static_cast<uint32_t>(element / 4), step, kPurposeStepNoise, z);
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

template <UpdatePass kPass, bool kVector>
ADM_RT_KERNEL guided_mean_update_kernel(const ADM_RT_GRID_CONSTANT GuidedMeanUpdateParams p,
                                        const ADM_RT_GRID_CONSTANT StepTable table,
                                        const float* limits) {
  const uint32_t step = table.rows == nullptr ? p.step : *table.step;
  const StepCoefficients& c = table.rows == nullptr ? p.coefficients : table.rows[step];
  const UpdateForm form = form_of(p, c);
  const int64_t image = simt::block_y();
  const float limit = kPass == UpdatePass::kFinish ? limits[image] : 1.0f;
  const int64_t groups = (p.channels * p.pixels + 3) / 4;
  const int64_t stride = static_cast<int64_t>(simt::blocks_x()) * simt::threads_x();
  for (int64_t group = static_cast<int64_t>(simt::block_x()) * simt::threads_x() + simt::thread_x();
       group < groups; group += stride) {
    update_group<kPass, kVector>(p, form, c, step, limit, image, 4 * group);
  }
}

// Adds up bins[0 .. kSelectBins), finds the one that holds the element of rank `rank` and lowers
// the rank by those below. All threads get the bin. `sums` is scratch, one per thread.
ADM_RT_DEVICE uint32_t find_bin(const uint32_t* bins, uint32_t* sums, uint32_t* found,
                                uint32_t* rank) {
  const unsigned t = simt::thread_x();
  const uint32_t first = bins[2 * t], pair = first + bins[2 * t + 1];
  sums[t] = pair;
  simt::sync_block();
  for (unsigned distance = 1; distance < kSelectThreads; distance *= 2) {
    const uint32_t before = t >= distance ? sums[t - distance] : 0;
    simt::sync_block();
    sums[t] += before;
    simt::sync_block();
  }
  const uint32_t below = sums[t] - pair;
  if (*rank >= below && *rank - below < pair) {  // one thread
    const bool second = *rank - below >= first;
    found[0] = 2 * t + second;
    found[1] = *rank - below - (second ? first : 0);
  }
  simt::sync_block();
  const uint32_t bin = found[0];
  *rank = found[1];
  simt::sync_block();
  return bin;
}

// One block of kSelectThreads per image: limits[image] = max(1, quantile of |x0|) by radix
// selection on the 31 bits of the magnitude, 11 + 10 + 10, then one pass for the next larger value.
ADM_RT_KERNEL guided_mean_update_select_kernel(const float* x0, int64_t size, uint32_t rank,
                                               bool wants_next, float fraction, float* limits) {
  static_assert(kSelectBins == 2 * kSelectThreads);
  simt::SharedArena shared;
  uint32_t* const bins = shared.take<uint32_t>(kSelectBins);
  uint32_t* const sums = shared.take<uint32_t>(kSelectThreads);
  uint32_t* const found = shared.take<uint32_t>(2);
  uint32_t* const next = shared.take<uint32_t>(1);
  const unsigned t = simt::thread_x();
  const float* values = x0 + static_cast<int64_t>(simt::block_x()) * size;

  uint32_t prefix = 0, equal = 0;  // the bits found so far; how many keys are `prefix` in the end
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 20 : pass == 1 ? 10 : 0;
    const int known = pass == 0 ? 31 : pass == 1 ? 20 : 10;  // the bits from here on are fixed
    bins[2 * t] = bins[2 * t + 1] = 0;
    simt::sync_block();
    for (int64_t i = t; i < size; i += kSelectThreads) {
      const uint32_t key = simt::bits_of(values[i]) & 0x7fffffffu;
      if (key >> known == prefix >> known) {
        simt::atomic_add(&bins[(key >> shift) & (pass == 0 ? 2047u : 1023u)], 1u);
      }
    }
    simt::sync_block();
    const uint32_t bin = find_bin(bins, sums, found, &rank);
    prefix |= bin << shift;
    equal = bins[bin];
    simt::sync_block();
  }

  uint32_t high = prefix;
  if (wants_next && rank + 1 >= equal) {  // the same for all threads
    if (t == 0) *next = 0x7fffffffu;
    simt::sync_block();
    uint32_t smallest = 0x7fffffffu;
    for (int64_t i = t; i < size; i += kSelectThreads) {
      const uint32_t key = simt::bits_of(values[i]) & 0x7fffffffu;
      if (key > prefix && key < smallest) smallest = key;
    }
    simt::atomic_min(next, smallest);
    simt::sync_block();
    high = *next;
  }
  if (t == 0) limits[simt::block_x()] = dynamic_limit(prefix, high, fraction);
}

}  // namespace adm_rt
