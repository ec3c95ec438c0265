// How the kernels of ada_group_norm reach their tensors: the memory layouts, the accesses, and sums
// over the threads of a block.
//
// A block covers a slab of channels and some pixels. A thread keeps its channels (kLanes of them,
// one access) and walks over pixels, so what belongs to a channel stays in registers, and two
// tensors side by side along the channels cost nothing: the thread knows from the start which one
// it reads.
#pragma once

#include "ops/ada_group_norm_plan.h"
#include "simt/simt.h"

namespace adm_rt {

// Sixteen bytes along the channels.
template <class T>
struct WideAccess {
  static constexpr int kLanes = 16 / sizeof(T);
  using Raw = simt::Bytes16;

  ADM_RT_DEVICE const void* at(const void* base, int64_t element) const {
    return static_cast<const T*>(base) + element;
  }
  ADM_RT_DEVICE void* at(void* base, int64_t element) const {
    return static_cast<T*>(base) + element;
  }
  ADM_RT_DEVICE Raw load(const void* base, int64_t element) const {
    return simt::load16_streaming(at(base, element));
  }
  ADM_RT_DEVICE void store(void* base, int64_t element, const Raw& raw) const {
    simt::store16(at(base, element), raw);
  }
  ADM_RT_DEVICE static void unpack(const Raw& raw, float (&values)[kLanes]) {
    simt::unpack<T>(raw, values);
  }
  ADM_RT_DEVICE Raw pack(const float (&values)[kLanes]) const { return simt::pack<T>(values); }
};

ADM_RT_DEVICE float load_element(const void* base, int64_t element, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(base)[element];
  if (dtype == DType::kFloat16) {
    return simt::to_float(static_cast<const simt::Half*>(base)[element]);
  }
  return simt::to_float(static_cast<const simt::BFloat16*>(base)[element]);
}

// One element of any type, at any address.
struct NarrowAccess {
  static constexpr int kLanes = 1;
  struct Raw {
    float value;
  };
  DType dtype;

  ADM_RT_DEVICE int64_t bytes(int64_t element) const {
    return dtype == DType::kFloat32 ? 4 * element : 2 * element;
  }
  ADM_RT_DEVICE const void* at(const void* base, int64_t element) const {
    return static_cast<const char*>(base) + bytes(element);
  }
  ADM_RT_DEVICE void* at(void* base, int64_t element) const {
    return static_cast<char*>(base) + bytes(element);
  }
  ADM_RT_DEVICE Raw load(const void* base, int64_t element) const {
    return {load_element(base, element, dtype)};
  }
  ADM_RT_DEVICE void store(void* base, int64_t element, const Raw& raw) const {
    if (dtype == DType::kFloat32) {
      static_cast<float*>(base)[element] = raw.value;
    } else if (dtype == DType::kFloat16) {
      static_cast<simt::Half*>(base)[element] = simt::from_float<simt::Half>(raw.value);
    } else {
      static_cast<simt::BFloat16*>(base)[element] = simt::from_float<simt::BFloat16>(raw.value);
    }
  }
  ADM_RT_DEVICE static void unpack(const Raw& raw, float (&values)[1]) { values[0] = raw.value; }
  ADM_RT_DEVICE Raw pack(const float (&values)[1]) const { return {values[0]}; }
};

// Sizes and options as the kernels use them.
struct NormArgs {
  int channels = 0, x_channels = 0, group_channels = 0, groups = 0;
  int pixels = 0, width = 0, out_pixels = 0, out_width = 0;
  int columns = 0, rows = 0, slab_channels = 0;  // of a block; see NormTiling
  int reduce_slots = 0;                          // threads that hand over sums at a time
  int slab_groups = 0;                           // that may have channels in a slab, at most
  float eps = 0;
  bool silu = false, channels_last = false;
  Resample resample = Resample::kNone;
  DType scale_shift_dtype = DType::kFloat32;
  int64_t scale_shift_stride = 0;
};

// Two tensors side by side along the channels; the second may be missing.
template <class Void>
struct NormPair {
  Void* x = nullptr;
  Void* skip = nullptr;
};

// The elements of some channel of an image, `stride` apart.
template <class Void>
struct NormColumn {
  Void* base;
  int stride;
};

template <class Access, class Void>
ADM_RT_DEVICE NormColumn<Void> norm_column(const NormArgs& a, const Access& access, Void* tensor,
                                           int tensor_channels, int pixels, int64_t image,
                                           int channel) {
  if (a.channels_last) {
    return {access.at(tensor, image * pixels * tensor_channels + channel), tensor_channels};
  }
  return {access.at(tensor, (image * tensor_channels + channel) * pixels), 1};
}

// A tensor like the input: one of the pair.
template <class Access, class Void>
ADM_RT_DEVICE NormColumn<Void> input_column(const NormArgs& a, const Access& access,
                                            const NormPair<Void>& pair, int64_t image,
                                            int channel) {
  if (channel < a.x_channels) {
    return norm_column(a, access, pair.x, a.x_channels, a.pixels, image, channel);
  }
  return norm_column(a, access, pair.skip, a.channels - a.x_channels, a.pixels, image,
                     channel - a.x_channels);
}

// A tensor like the output.
template <class Access, class Void>
ADM_RT_DEVICE NormColumn<Void> output_column(const NormArgs& a, const Access& access, Void* tensor,
                                             int64_t image, int channel) {
  return norm_column(a, access, tensor, a.channels, a.out_pixels, image, channel);
}

// Where a thread stands in its block's slab.
struct NormPlace {
  int column, row;
  int slab_begin, slab_end;  // channels
  int channel;               // the first of this thread's
  bool active;               // whether it has any
};

template <int kLanes>
ADM_RT_DEVICE NormPlace norm_place(const NormArgs& a, int begin, int end) {
  NormPlace place;
  const int t = static_cast<int>(simt::thread_x());
  place.row = t / a.columns;
  place.column = t - place.row * a.columns;
  place.slab_begin = begin + static_cast<int>(simt::block_y()) * a.slab_channels;
  place.slab_end =
      place.slab_begin + a.slab_channels < end ? place.slab_begin + a.slab_channels : end;
  place.channel = place.slab_begin + place.column * kLanes;
  place.active = place.row < a.rows && place.channel < place.slab_end;
  return place;
}

// Combines what the rows of a block have found for the same channels, in a fixed tree; the threads
// of row 0 get it. shared: kCount * reduce_slots floats.
template <int kCount, class Combine>
ADM_RT_DEVICE void merge_rows(const NormArgs& a, const NormPlace& place, float (&values)[kCount],
                              float* shared, const Combine& combine) {
  int half = 1;
  while (2 * half < a.rows) half *= 2;
  const int slots = a.reduce_slots;
  for (; a.rows > 1 && half > 0; half /= 2) {
    if (place.row >= half && place.row < 2 * half && place.row < a.rows) {
      const int slot = (place.row - half) * a.columns + place.column;
      ADM_RT_UNROLL for (int i = 0; i < kCount; ++i) shared[i * slots + slot] = values[i];
    }
    simt::sync_block();
    if (place.row < half && place.row + half < a.rows) {
      const int slot = place.row * a.columns + place.column;
      float other[kCount];
      ADM_RT_UNROLL for (int i = 0; i < kCount; ++i) other[i] = shared[i * slots + slot];
      combine(values, other);
    }
    simt::sync_block();
  }
}

// Sums of `value` over the threads with the same thread % kNormMergeChannels, in a fixed order, for
// all of them. shared: kNormThreads floats.
ADM_RT_DEVICE float sum_over_parts(float value, float* shared) {
  const int t = static_cast<int>(simt::thread_x());
  simt::sync_block();
  shared[t] = value;
  simt::sync_block();
  float sum = 0.0f;
  ADM_RT_UNROLL for (int part = 0; part < kNormThreads / kNormMergeChannels; ++part) {
    sum += shared[part * kNormMergeChannels + t % kNormMergeChannels];
  }
  return sum;
}

// Sum over the `lanes` (a power of two up to 32) neighbours of this lane's aligned group of lanes.
ADM_RT_DEVICE float segment_sum(float value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) value += simt::shuffle_xor(value, mask);
  return value;
}

// Calls body(group, lane, lanes) for the groups that have channels in the slab, each by `lanes`
// neighbouring threads. group < a.groups and inside the slab, or -1: the thread has none, but takes
// part in the collectives.
template <class Body>
ADM_RT_DEVICE void for_slab_groups(const NormArgs& a, const NormPlace& place, const Body& body) {
  int lanes = 1;
  while (lanes < a.group_channels && lanes < 32) lanes *= 2;
  const int t = static_cast<int>(simt::thread_x());
  const int at_once = static_cast<int>(simt::threads_x()) / lanes;
  const int begin = place.slab_begin / a.group_channels;
  const int end = (place.slab_end - 1) / a.group_channels + 1;
  for (int first = begin; first < end; first += at_once) {
    const int group = first + t / lanes;
    body(group < end ? group : -1, t % lanes, lanes);
  }
}

ADM_RT_DEVICE float sigmoid(float v) {
  constexpr float kLog2E = 1.44269504088896340736f;
  return simt::rcp_approx(1.0f + simt::exp2_approx(-kLog2E * v));
}

// The modulation of an image: (1 + scale) and shift of a channel, or 1 and 0.
struct NormModulation {
  const float* weight;  // [channels]
  const float* bias;
  const void* scale_shift;  // [batch, 2 * channels] or null

  ADM_RT_DEVICE float one_plus_scale(const NormArgs& a, int64_t image, int channel) const {
    if (scale_shift == nullptr) return 1.0f;
    return 1.0f +
           load_element(scale_shift, image * a.scale_shift_stride + channel, a.scale_shift_dtype);
  }
  ADM_RT_DEVICE float shift(const NormArgs& a, int64_t image, int channel) const {
    if (scale_shift == nullptr) return 0.0f;
    return load_element(scale_shift, image * a.scale_shift_stride + a.channels + channel,
                        a.scale_shift_dtype);
  }
};

}  // namespace adm_rt
