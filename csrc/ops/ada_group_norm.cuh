// Device code of ada_group_norm, forward.
//
// Two ways. Small images: one block takes whole groups of one image into shared memory, finds their
// statistics there and writes the result: one kernel, every element read once (on_chip). Others:
// chunks of pixels give mean and sum of squared deviations of every channel (moments), a small
// kernel merges the chunks, and the last one applies them (apply); who made the tensor may hand its
// moments over, and then only the last runs.
//
// Statistics are float32 and never a difference of large sums: a thread sums deviations from its
// first value, so at most about (its number of pixels) units of the last place are lost however far
// the mean is from zero, and all merging is of means and squared deviations (Chan, Golub & LeVeque,
// "Updating formulae and a pairwise algorithm for computing sample variances", 1979), in a fixed
// order without atomics.
#pragma once

#include "ops/ada_group_norm_access.cuh"

namespace adm_rt {

constexpr int kNormUnroll = 4;       // loads that a thread has on their way
constexpr int kNormApplyBlocks = 3;  // on a multiprocessor, by their registers

// Per channel lane: mean, sum of squared deviations; then the number of pixels.
template <int kLanes>
struct NormMoments {
  float values[2 * kLanes + 1] = {};
};

template <int kLanes>
struct CombineMoments {
  ADM_RT_DEVICE void operator()(float (&mine)[2 * kLanes + 1],
                                const float (&other)[2 * kLanes + 1]) const {
    const float count = mine[2 * kLanes] + other[2 * kLanes];
    if (count == 0.0f) return;
    const float part = other[2 * kLanes] / count;
    const float weight = mine[2 * kLanes] * part;
    ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) {
      const float delta = other[i] - mine[i];
      mine[i] += delta * part;
      mine[kLanes + i] += other[kLanes + i] + delta * delta * weight;
    }
    mine[2 * kLanes] = count;
  }
};

// Moments of this thread's pixels first, first + step, ... below end. load(pixel) -> Raw.
template <class Access, class Load>
ADM_RT_DEVICE void thread_moments(const Load& load, int first, int end, int step,
                                  float (&values)[2 * Access::kLanes + 1]) {
  constexpr int kLanes = Access::kLanes;
  ADM_RT_UNROLL for (int i = 0; i <= 2 * kLanes; ++i) values[i] = 0.0f;
  if (first >= end) return;
  float origin[kLanes] = {}, sum[kLanes] = {}, squares[kLanes] = {};
  int count = 0;
  for (int pixel = first; pixel < end; pixel += kNormUnroll * step) {
    typename Access::Raw raw[kNormUnroll];
    ADM_RT_UNROLL for (int u = 0; u < kNormUnroll; ++u) {
      if (pixel + u * step < end) raw[u] = load(pixel + u * step);
    }
    ADM_RT_UNROLL for (int u = 0; u < kNormUnroll; ++u) {
      if (pixel + u * step < end) {
        float x[kLanes];
        Access::unpack(raw[u], x);
        if (u == 0 && pixel == first) {
          ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) origin[i] = x[i];
        }
        ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) {
          const float deviation = x[i] - origin[i];
          sum[i] += deviation;
          squares[i] += deviation * deviation;
        }
        ++count;
      }
    }
  }
  const float inverse = 1.0f / static_cast<float>(count);
  ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) {
    const float mean = sum[i] * inverse;
    const float rest = squares[i] - sum[i] * mean;
    values[i] = origin[i] + mean;
    values[kLanes + i] = rest < 0.0f ? 0.0f : rest;  // and a NaN stays one
  }
  values[2 * kLanes] = static_cast<float>(count);
}

// Grid: chunks, slabs of the channels [begin, end), images. partial [batch, chunks, 2, channels]:
// means, then sums of squared deviations; of a single chunk the moments themselves.
template <class Access>
ADM_RT_KERNEL_BOUNDS(kNormThreads, 4)
norm_moments_kernel(const ADM_RT_GRID_CONSTANT NormArgs a, const Access access,
                    const NormPair<const void> input, int begin, int end, int chunk_pixels,
                    float* partial) {
  constexpr int kLanes = Access::kLanes;
  simt::SharedArena shared;
  float* const reduce = shared.take<float>((2 * kLanes + 1) * a.reduce_slots);
  const NormPlace place = norm_place<kLanes>(a, begin, end);
  const int64_t image = simt::block_z();
  const int pixel_begin = static_cast<int>(simt::block_x()) * chunk_pixels;
  const int pixel_end =
      pixel_begin + chunk_pixels < a.pixels ? pixel_begin + chunk_pixels : a.pixels;
  simt::allow_next_kernel();
  simt::wait_for_previous_kernel();

  float values[2 * kLanes + 1] = {};
  if (place.active) {
    const auto column = input_column(a, access, input, image, place.channel);
    thread_moments<Access>(
        [&](int pixel) {
          return access.load(column.base, static_cast<int64_t>(pixel) * column.stride);
        },
        pixel_begin + place.row, pixel_end, a.rows, values);
  }
  merge_rows(a, place, values, reduce, CombineMoments<kLanes>());
  if (!place.active || place.row != 0) return;
  const bool whole = simt::blocks_x() == 1;
  float* const out = partial + (image * simt::blocks_x() + simt::block_x()) * 2 * a.channels;
  ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) {
    out[place.channel + i] = values[i];
    const float squares = values[kLanes + i];
    out[a.channels + place.channel + i] = whole ? squares / static_cast<float>(a.pixels) : squares;
  }
}

// Grid: groups of kNormMergeChannels channels of [begin, end), 1, images. moments [batch, 2,
// channels] from partial [batch, chunks, 2, channels].
ADM_RT_KERNEL norm_merge_moments_kernel(const float* partial, int chunks, int chunk_pixels,
                                        int pixels, int channels, int begin, int end,
                                        float* moments) {
  simt::SharedArena shared;
  float* const scratch = shared.take<float>(kNormThreads);
  const int t = static_cast<int>(simt::thread_x());
  const int channel =
      begin + static_cast<int>(simt::block_x()) * kNormMergeChannels + t % kNormMergeChannels;
  const int part = t / kNormMergeChannels, parts = kNormThreads / kNormMergeChannels;
  const int64_t image = simt::block_z();
  const bool active = channel < end;
  const float* const chunk0 = partial + image * chunks * 2 * channels + channel;
  simt::allow_next_kernel();
  simt::wait_for_previous_kernel();

  const auto pixels_of = [&](int chunk) {
    return static_cast<float>(chunk + 1 < chunks ? chunk_pixels : pixels - chunk * chunk_pixels);
  };
  const float inverse = 1.0f / static_cast<float>(pixels);
  const float origin = active ? chunk0[0] : 0.0f;
  float sum = 0.0f;
  ADM_RT_UNROLL_BY(4)
  for (int k = part; active && k < chunks; k += parts) {
    sum += pixels_of(k) * (chunk0[static_cast<int64_t>(k) * 2 * channels] - origin);
  }
  const float mean = origin + sum_over_parts(sum, scratch) * inverse;
  float squares = 0.0f;
  ADM_RT_UNROLL_BY(4)
  for (int k = part; active && k < chunks; k += parts) {
    const float* const chunk = chunk0 + static_cast<int64_t>(k) * 2 * channels;
    const float delta = chunk[0] - mean;
    squares += chunk[channels] + pixels_of(k) * delta * delta;
  }
  const float variance = sum_over_parts(squares, scratch) * inverse;
  if (active && part == 0) {
    moments[(image * 2 + 0) * channels + channel] = mean;
    moments[(image * 2 + 1) * channels + channel] = variance;
  }
}

// Moments [batch, 2, its channels] of the two inputs, wherever they lie.
struct NormMomentsView {
  const float* x = nullptr;
  const float* skip = nullptr;
  int x_row = 0, skip_row = 0;  // floats from means to variances; twice that between images

  ADM_RT_DEVICE void get(const NormArgs& a, int64_t image, int channel, float* mean,
                         float* variance) const {
    const bool first = channel < a.x_channels;
    const int row = first ? x_row : skip_row;
    const float* const at =
        (first ? x : skip) + image * 2 * row + (first ? channel : channel - a.x_channels);
    *mean = at[0];
    *variance = at[row];
  }
};

struct NormOutputs {
  void* y;
  void* x_out;
  float* mean;  // [batch, groups]
  float* rstd;
};

// mean and rstd of the slab's groups into shared memory, and to who asked for them. get(channel,
// &mean, &variance).
template <class Get>
ADM_RT_DEVICE void group_moments(const NormArgs& a, const NormPlace& place, int64_t image,
                                 const Get& get, const NormOutputs& out, bool writes,
                                 float* group_mean, float* group_rstd) {
  const float inverse = 1.0f / static_cast<float>(a.group_channels);
  for_slab_groups(a, place, [&](int group, int lane, int lanes) {
    const int begin = group < 0 ? 0 : group * a.group_channels;
    const int end = group < 0 ? 0 : begin + a.group_channels;
    float mean = 0.0f, variance = 0.0f;
    for (int channel = begin + lane; channel < end; channel += lanes) {
      float channel_mean, channel_variance;
      get(channel, &channel_mean, &channel_variance);
      mean += channel_mean;
    }
    mean = segment_sum(mean, lanes) * inverse;
    for (int channel = begin + lane; channel < end; channel += lanes) {
      float channel_mean, channel_variance;
      get(channel, &channel_mean, &channel_variance);
      variance += channel_variance + (channel_mean - mean) * (channel_mean - mean);
    }
    variance = segment_sum(variance, lanes) * inverse;
    if (group >= 0 && lane == 0) {
      const float rstd = simt::div_rn(1.0f, simt::sqrt_rn(variance + a.eps));
      const int slot = group - place.slab_begin / a.group_channels;
      group_mean[slot] = mean;
      group_rstd[slot] = rstd;
      if (writes && begin >= place.slab_begin) {  // one slab has a group's first channel
        if (out.mean != nullptr) out.mean[image * a.groups + group] = mean;
        if (out.rstd != nullptr) out.rstd[image * a.groups + group] = rstd;
      }
    }
  });
}

// y = silu(scale * (x - mean) + offset) of a thread's channels. Folding the mean into the offset
// would save an addition and lose the digits of channels that are nearly constant.
template <int kLanes>
struct NormAffine {
  float mean[kLanes], scale[kLanes], offset[kLanes];

  ADM_RT_DEVICE void fold(const NormArgs& a, const NormPlace& place, int64_t image,
                          const NormModulation& modulation, const float* group_mean,
                          const float* group_rstd) {
    ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) {
      const int channel = place.channel + i;
      const int slot = channel / a.group_channels - place.slab_begin / a.group_channels;
      const float factor = modulation.one_plus_scale(a, image, channel);
      mean[i] = group_mean[slot];
      scale[i] = group_rstd[slot] * modulation.weight[channel] * factor;
      offset[i] =
          simt::fma_rn(modulation.bias[channel], factor, modulation.shift(a, image, channel));
    }
  }
  ADM_RT_DEVICE void apply(const NormArgs& a, float (&values)[kLanes]) const {
    ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) {
      values[i] = simt::fma_rn(values[i] - mean[i], scale[i], offset[i]);
    }
    if (a.silu) {
      ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) values[i] *= sigmoid(values[i]);
    }
  }
};

// Writes this thread's part of the outputs: pixels (of the smaller of input and output) first,
// first + step, ... load(pixel) -> Raw of the input.
template <class Access, class Load>
ADM_RT_DEVICE void write_outputs(const NormArgs& a, const Access& access, const Load& load,
                                 const NormAffine<Access::kLanes>& affine, const NormOutputs& out,
                                 int64_t image, int channel, int first, int step) {
  constexpr int kLanes = Access::kLanes;
  const auto y = output_column(a, access, out.y, image, channel);
  const bool wants_x = out.x_out != nullptr;
  void* const x_out = wants_x ? output_column(a, access, out.x_out, image, channel).base : nullptr;
  const auto element = [&](int pixel) { return static_cast<int64_t>(pixel) * y.stride; };
  float values[kLanes];

  if (a.resample == Resample::kNone) {
    for (int pixel = first; pixel < a.pixels; pixel += kNormUnroll * step) {
      typename Access::Raw raw[kNormUnroll];
      ADM_RT_UNROLL for (int u = 0; u < kNormUnroll; ++u) {
        if (pixel + u * step < a.pixels) raw[u] = load(pixel + u * step);
      }
      ADM_RT_UNROLL for (int u = 0; u < kNormUnroll; ++u) {
        if (pixel + u * step < a.pixels) {
          if (wants_x) access.store(x_out, element(pixel + u * step), raw[u]);
          Access::unpack(raw[u], values);
          affine.apply(a, values);
          access.store(y.base, element(pixel + u * step), access.pack(values));
        }
      }
    }
  } else if (a.resample == Resample::kAveragePool) {
    for (int pixel = first; pixel < a.out_pixels; pixel += step) {
      const int row = pixel / a.out_width;
      const int source = 2 * row * a.width + 2 * (pixel - row * a.out_width);
      typename Access::Raw raw[4];
      ADM_RT_UNROLL for (int u = 0; u < 4; ++u) raw[u] = load(source + u / 2 * a.width + u % 2);
      float sum[kLanes] = {}, x_sum[kLanes] = {};
      ADM_RT_UNROLL for (int u = 0; u < 4; ++u) {
        Access::unpack(raw[u], values);
        ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) x_sum[i] += values[i];
        affine.apply(a, values);
        ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) sum[i] += values[i];
      }
      ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) sum[i] *= 0.25f, x_sum[i] *= 0.25f;
      access.store(y.base, element(pixel), access.pack(sum));
      if (wants_x) access.store(x_out, element(pixel), access.pack(x_sum));
    }
  } else {
    for (int pixel = first; pixel < a.pixels; pixel += step) {
      const typename Access::Raw raw = load(pixel);
      const int row = pixel / a.width;
      const int target = 2 * row * a.out_width + 2 * (pixel - row * a.width);
      Access::unpack(raw, values);
      affine.apply(a, values);
      const typename Access::Raw result = access.pack(values);
      ADM_RT_UNROLL for (int u = 0; u < 4; ++u) {
        const int64_t at = element(target + u / 2 * a.out_width + u % 2);
        access.store(y.base, at, result);
        if (wants_x) access.store(x_out, at, raw);
      }
    }
  }
}

// Grid: along the pixels, slabs, images.
template <class Access>
ADM_RT_KERNEL_BOUNDS(kNormThreads, kNormApplyBlocks)
norm_apply_kernel(const ADM_RT_GRID_CONSTANT NormArgs a, const Access access,
                  const NormPair<const void> input, const NormMomentsView moments,
                  const NormModulation modulation, const NormOutputs out) {
  constexpr int kLanes = Access::kLanes;
  simt::SharedArena shared;
  float* const group_mean = shared.take<float>(a.slab_groups);
  float* const group_rstd = shared.take<float>(a.slab_groups);
  const NormPlace place = norm_place<kLanes>(a, 0, a.channels);
  const int64_t image = simt::block_z();
  simt::allow_next_kernel();
  simt::wait_for_previous_kernel();

  group_moments(
      a, place, image,
      [&](int channel, float* mean, float* variance) {
        moments.get(a, image, channel, mean, variance);
      },
      out, simt::block_x() == 0, group_mean, group_rstd);
  simt::sync_block();
  if (!place.active) return;
  NormAffine<kLanes> affine;
  affine.fold(a, place, image, modulation, group_mean, group_rstd);
  const auto column = input_column(a, access, input, image, place.channel);
  write_outputs(
      a, access,
      [&](int pixel) {
        return access.load(column.base, static_cast<int64_t>(pixel) * column.stride);
      },
      affine, out, image, place.channel, static_cast<int>(simt::block_x()) * a.rows + place.row,
      static_cast<int>(simt::blocks_x()) * a.rows);
}

// Grid: 1, slabs of whole groups, images. The slab stays in shared memory from the first to the
// last use.
template <class Access>
ADM_RT_KERNEL_BOUNDS(kNormThreads, 2)
norm_on_chip_kernel(const ADM_RT_GRID_CONSTANT NormArgs a, const Access access,
                    const NormPair<const void> input, const NormModulation modulation,
                    const NormOutputs out) {
  constexpr int kLanes = Access::kLanes;
  simt::SharedArena shared;
  simt::Bytes16* const tile = shared.take<simt::Bytes16>(a.pixels * a.columns);
  float* const reduce = shared.take<float>((2 * kLanes + 1) * a.reduce_slots);
  float* const channel_mean = shared.take<float>(a.slab_channels);
  float* const channel_variance = shared.take<float>(a.slab_channels);
  float* const group_mean = shared.take<float>(a.slab_groups);
  float* const group_rstd = shared.take<float>(a.slab_groups);
  const NormPlace place = norm_place<kLanes>(a, 0, a.channels);
  const int64_t image = simt::block_z();
  simt::allow_next_kernel();
  simt::wait_for_previous_kernel();

  const auto load = [&](int pixel) { return tile[pixel * a.columns + place.column]; };
  float values[2 * kLanes + 1] = {};
  if (place.active) {
    const auto column = input_column(a, access, input, image, place.channel);
    for (int pixel = place.row; pixel < a.pixels; pixel += a.rows) {
      simt::cp_async16(&tile[pixel * a.columns + place.column],
                       access.at(column.base, static_cast<int64_t>(pixel) * column.stride));
    }
  }
  simt::cp_async_commit();
  simt::cp_async_wait<0>();
  if (place.active) thread_moments<Access>(load, place.row, a.pixels, a.rows, values);
  merge_rows(a, place, values, reduce, CombineMoments<kLanes>());
  if (place.active && place.row == 0) {
    const float inverse = 1.0f / static_cast<float>(a.pixels);
    ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) {
      channel_mean[place.column * kLanes + i] = values[i];
      channel_variance[place.column * kLanes + i] = values[kLanes + i] * inverse;
    }
  }
  simt::sync_block();  // also: the whole tile is there, for pooling reads other threads' pixels
  group_moments(
      a, place, image,
      [&](int channel, float* mean, float* variance) {
        *mean = channel_mean[channel - place.slab_begin];
        *variance = channel_variance[channel - place.slab_begin];
      },
      out, true, group_mean, group_rstd);
  simt::sync_block();
  if (!place.active) return;
  NormAffine<kLanes> affine;
  affine.fold(a, place, image, modulation, group_mean, group_rstd);
  write_outputs(a, access, load, affine, out, image, place.channel, place.row, a.rows);
}

}  // namespace adm_rt
