// Device code of ada_group_norm, backward; the formulas are in ada_group_norm.h.
//
// The activation is computed again from x, mean and rstd. Two sums per channel, of dv and of dv
// times the normalised x, are all that crosses pixels: chunks of pixels give partial sums, a small
// kernel adds them up, and the last one writes dx. Where a block holds whole groups of a small
// image, one kernel does it all and finds x and grad in the cache the second time. Parameter
// gradients are made from the sums of the channels, in a kernel that is left out when nobody asks
// for them.
#pragma once

#include "ops/ada_group_norm_access.cuh"

namespace adm_rt {

constexpr int kNormParameterThreads = 128;
constexpr int kNormBackwardBlocks = 2;  // on a multiprocessor, by their registers

struct NormBackwardInputs {
  const void* grad;        // like the output
  const void* grad_x_out;  // like the output, or null
  NormPair<const void> input;
  const float* mean;  // [batch, groups]
  const float* rstd;
};

// What the gradient of a thread's channels needs: xhat = (x - mean) * rstd, v = xhat * gain +
// offset.
template <int kLanes>
struct NormChannels {
  float mean[kLanes], rstd[kLanes], gain[kLanes], offset[kLanes];

  ADM_RT_DEVICE void load(const NormArgs& a, const NormBackwardInputs& in,
                          const NormModulation& modulation, int64_t image, int first) {
    ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) {
      const int channel = first + i;
      const int64_t group = image * a.groups + channel / a.group_channels;
      const float factor = modulation.one_plus_scale(a, image, channel);
      mean[i] = in.mean[group];
      rstd[i] = in.rstd[group];
      gain[i] = modulation.weight[channel] * factor;
      offset[i] = modulation.bias[channel] * factor + modulation.shift(a, image, channel);
    }
  }
  // x becomes xhat, grad becomes dv.
  ADM_RT_DEVICE void differentiate(const NormArgs& a, float (&x)[kLanes],
                                   float (&grad)[kLanes]) const {
    ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) x[i] = (x[i] - mean[i]) * rstd[i];
    if (!a.silu) return;
    ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) {
      const float v = x[i] * gain[i] + offset[i];
      const float s = sigmoid(v);
      grad[i] *= s * (1.0f + v * (1.0f - s));
    }
  }
};

// The gradient of an input pixel from a tensor like the output: taken back through the resampling.
template <Resample kResample, class Access>
struct GradAt {
  static constexpr int kPixels = kResample == Resample::kNearestUp ? 4 : 1;
  typename Access::Raw raw[kPixels];

  ADM_RT_DEVICE void load(const NormArgs& a, const Access& access,
                          const NormColumn<const void>& column, int pixel) {
    int from = pixel;
    if (kResample != Resample::kNone) {
      const int row = pixel / a.width, at = pixel - row * a.width;
      from = kResample == Resample::kNearestUp ? 2 * row * a.out_width + 2 * at
                                               : row / 2 * a.out_width + at / 2;
    }
    ADM_RT_UNROLL for (int u = 0; u < kPixels; ++u) {
      const int source = from + u / 2 * a.out_width + u % 2;
      raw[u] = access.load(column.base, static_cast<int64_t>(source) * column.stride);
    }
  }
  ADM_RT_DEVICE void get(float (&values)[Access::kLanes]) const {
    Access::unpack(raw[0], values);
    ADM_RT_UNROLL for (int u = 1; u < kPixels; ++u) {
      float more[Access::kLanes];
      Access::unpack(raw[u], more);
      ADM_RT_UNROLL for (int i = 0; i < Access::kLanes; ++i) values[i] += more[i];
    }
    if (kResample == Resample::kAveragePool) {
      ADM_RT_UNROLL for (int i = 0; i < Access::kLanes; ++i) values[i] *= 0.25f;
    }
  }
};

// Per lane the sums of dv and of dv * xhat over the pixels first, first + step, ... below end.
template <Resample kResample, class Access>
ADM_RT_DEVICE void sum_pixels(const NormArgs& a, const Access& access, const NormBackwardInputs& in,
                              const NormChannels<Access::kLanes>& channels, int64_t image,
                              int channel, int first, int end, int step,
                              float (&values)[2 * Access::kLanes]) {
  constexpr int kLanes = Access::kLanes;
  constexpr int kUnroll = kResample == Resample::kNearestUp ? 1 : 2;
  const auto x = input_column(a, access, in.input, image, channel);
  const auto grad = output_column(a, access, in.grad, image, channel);
  for (int pixel = first; pixel < end; pixel += kUnroll * step) {
    typename Access::Raw raw[kUnroll];
    GradAt<kResample, Access> gradient[kUnroll];
    ADM_RT_UNROLL for (int u = 0; u < kUnroll; ++u) {
      const int at = pixel + u * step;
      if (at < end) {
        raw[u] = access.load(x.base, static_cast<int64_t>(at) * x.stride);
        gradient[u].load(a, access, grad, at);
      }
    }
    ADM_RT_UNROLL for (int u = 0; u < kUnroll; ++u) {
      if (pixel + u * step < end) {
        float xhat[kLanes], dv[kLanes];
        Access::unpack(raw[u], xhat);
        gradient[u].get(dv);
        channels.differentiate(a, xhat, dv);
        ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) {
          values[i] += dv[i];
          values[kLanes + i] += dv[i] * xhat[i];
        }
      }
    }
  }
}

// dx of the pixels first, first + step, ...; mean_dv, mean_dv_xhat: of the group, with the gain.
template <Resample kResample, class Access>
ADM_RT_DEVICE void write_pixels(const NormArgs& a, const Access& access,
                                const NormBackwardInputs& in,
                                const NormChannels<Access::kLanes>& channels,
                                const float (&mean_dv)[Access::kLanes],
                                const float (&mean_dv_xhat)[Access::kLanes],
                                const NormPair<void>& out, int64_t image, int channel, int first,
                                int step) {
  constexpr int kLanes = Access::kLanes;
  constexpr int kUnroll = kResample == Resample::kNearestUp ? 1 : 2;
  const auto x = input_column(a, access, in.input, image, channel);
  const auto dx = input_column(a, access, out, image, channel);
  const auto grad = output_column(a, access, in.grad, image, channel);
  const bool has_more = in.grad_x_out != nullptr;
  const auto more = output_column(a, access, has_more ? in.grad_x_out : in.grad, image, channel);
  for (int pixel = first; pixel < a.pixels; pixel += kUnroll * step) {
    typename Access::Raw raw[kUnroll];
    GradAt<kResample, Access> gradient[kUnroll], residual[kUnroll];
    ADM_RT_UNROLL for (int u = 0; u < kUnroll; ++u) {
      const int at = pixel + u * step;
      if (at < a.pixels) {
        raw[u] = access.load(x.base, static_cast<int64_t>(at) * x.stride);
        gradient[u].load(a, access, grad, at);
        if (has_more) residual[u].load(a, access, more, at);
      }
    }
    ADM_RT_UNROLL for (int u = 0; u < kUnroll; ++u) {
      const int at = pixel + u * step;
      if (at < a.pixels) {
        float xhat[kLanes], dv[kLanes];
        Access::unpack(raw[u], xhat);
        gradient[u].get(dv);
        channels.differentiate(a, xhat, dv);
        ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) {
          dv[i] = channels.rstd[i] *
                  (channels.gain[i] * dv[i] - mean_dv[i] - xhat[i] * mean_dv_xhat[i]);
        }
        if (has_more) {
          residual[u].get(xhat);
          ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) dv[i] += xhat[i];
        }
        access.store(dx.base, static_cast<int64_t>(at) * dx.stride, access.pack(dv));
      }
    }
  }
}

template <class Access, class... Args>
ADM_RT_DEVICE void sum_pixels_of(const NormArgs& a, const Access& access, Args&&... args) {
  if (a.resample == Resample::kNone) {
    sum_pixels<Resample::kNone>(a, access, args...);
  } else if (a.resample == Resample::kAveragePool) {
    sum_pixels<Resample::kAveragePool>(a, access, args...);
  } else {
    sum_pixels<Resample::kNearestUp>(a, access, args...);
  }
}
template <class Access, class... Args>
ADM_RT_DEVICE void write_pixels_of(const NormArgs& a, const Access& access, Args&&... args) {
  if (a.resample == Resample::kNone) {
    write_pixels<Resample::kNone>(a, access, args...);
  } else if (a.resample == Resample::kAveragePool) {
    write_pixels<Resample::kAveragePool>(a, access, args...);
  } else {
    write_pixels<Resample::kNearestUp>(a, access, args...);
  }
}

template <int kLanes>
struct AddSums {
  ADM_RT_DEVICE void operator()(float (&mine)[2 * kLanes], const float (&other)[2 * kLanes]) const {
    ADM_RT_UNROLL for (int i = 0; i < 2 * kLanes; ++i) mine[i] += other[i];
  }
};

// Grid: chunks, slabs, images. partial [batch, chunks, 2, channels].
template <class Access>
ADM_RT_KERNEL_BOUNDS(kNormThreads, kNormBackwardBlocks)
norm_backward_sums_kernel(const ADM_RT_GRID_CONSTANT NormArgs a, const Access access,
                          const NormBackwardInputs in, const NormModulation modulation,
                          int chunk_pixels, float* partial) {
  constexpr int kLanes = Access::kLanes;
  simt::SharedArena shared;
  float* const reduce = shared.take<float>(2 * kLanes * a.reduce_slots);
  const NormPlace place = norm_place<kLanes>(a, 0, a.channels);
  const int64_t image = simt::block_z();
  const int begin = static_cast<int>(simt::block_x()) * chunk_pixels;
  const int end = begin + chunk_pixels < a.pixels ? begin + chunk_pixels : a.pixels;
  simt::allow_next_kernel();
  simt::wait_for_previous_kernel();

  float values[2 * kLanes] = {};
  if (place.active) {
    NormChannels<kLanes> channels;
    channels.load(a, in, modulation, image, place.channel);
    sum_pixels_of(a, access, in, channels, image, place.channel, begin + place.row, end, a.rows,
                  values);
  }
  merge_rows(a, place, values, reduce, AddSums<kLanes>());
  if (!place.active || place.row != 0) return;
  float* const out = partial + (image * simt::blocks_x() + simt::block_x()) * 2 * a.channels;
  ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) {
    out[place.channel + i] = values[i];
    out[a.channels + place.channel + i] = values[kLanes + i];
  }
}

// Grid: groups of kNormMergeChannels of the 2 * channels sums, 1, images. sums [batch, 2, channels]
// from partial [batch, chunks, 2, channels].
ADM_RT_KERNEL norm_merge_sums_kernel(const float* partial, int chunks, int channels, float* sums) {
  simt::SharedArena shared;
  float* const scratch = shared.take<float>(kNormThreads);
  const int t = static_cast<int>(simt::thread_x());
  const int at = static_cast<int>(simt::block_x()) * kNormMergeChannels + t % kNormMergeChannels;
  const int part = t / kNormMergeChannels, parts = kNormThreads / kNormMergeChannels;
  const int64_t image = simt::block_z();
  const bool active = at < 2 * channels;
  simt::allow_next_kernel();
  simt::wait_for_previous_kernel();

  float sum = 0.0f;
  ADM_RT_UNROLL_BY(4)
  for (int k = part; active && k < chunks; k += parts) {
    sum += partial[(image * chunks + k) * 2 * channels + at];
  }
  sum = sum_over_parts(sum, scratch);
  if (active && part == 0) sums[image * 2 * channels + at] = sum;
}

// Of the slab's groups into shared memory: the means over their elements of gain * dv and of
// gain * dv * xhat. get(channel, &sum_dv, &sum_dv_xhat).
template <class Get>
ADM_RT_DEVICE void group_sums(const NormArgs& a, const NormPlace& place, int64_t image,
                              const NormModulation& modulation, const Get& get, float* group_dv,
                              float* group_dv_xhat) {
  const float inverse =
      1.0f / (static_cast<float>(a.group_channels) * static_cast<float>(a.pixels));
  for_slab_groups(a, place, [&](int group, int lane, int lanes) {
    const int begin = group < 0 ? 0 : group * a.group_channels;
    const int end = group < 0 ? 0 : begin + a.group_channels;
    float sum_dv = 0.0f, sum_dv_xhat = 0.0f;
    for (int channel = begin + lane; channel < end; channel += lanes) {
      float dv, dv_xhat;
      get(channel, &dv, &dv_xhat);
      const float gain = modulation.weight[channel] * modulation.one_plus_scale(a, image, channel);
      sum_dv += gain * dv;
      sum_dv_xhat += gain * dv_xhat;
    }
    sum_dv = segment_sum(sum_dv, lanes);
    sum_dv_xhat = segment_sum(sum_dv_xhat, lanes);
    if (group >= 0 && lane == 0) {
      const int slot = group - place.slab_begin / a.group_channels;
      group_dv[slot] = sum_dv * inverse;
      group_dv_xhat[slot] = sum_dv_xhat * inverse;
    }
  });
}

// The end of both ways: dx of this thread's channels, from the groups' means in shared memory.
template <class Access>
ADM_RT_DEVICE void write_dx(const NormArgs& a, const Access& access, const NormPlace& place,
                            const NormBackwardInputs& in,
                            const NormChannels<Access::kLanes>& channels, const float* group_dv,
                            const float* group_dv_xhat, const NormPair<void>& out, int64_t image,
                            int first, int step) {
  float mean_dv[Access::kLanes], mean_dv_xhat[Access::kLanes];
  ADM_RT_UNROLL for (int i = 0; i < Access::kLanes; ++i) {
    const int slot = (place.channel + i) / a.group_channels - place.slab_begin / a.group_channels;
    mean_dv[i] = group_dv[slot];
    mean_dv_xhat[i] = group_dv_xhat[slot];
  }
  write_pixels_of(a, access, in, channels, mean_dv, mean_dv_xhat, out, image, place.channel, first,
                  step);
}

// Grid: along the pixels, slabs, images. sums [batch, 2, channels].
template <class Access>
ADM_RT_KERNEL_BOUNDS(kNormThreads, kNormBackwardBlocks)
norm_backward_apply_kernel(const ADM_RT_GRID_CONSTANT NormArgs a, const Access access,
                           const NormBackwardInputs in, const NormModulation modulation,
                           const float* sums, const NormPair<void> out) {
  constexpr int kLanes = Access::kLanes;
  simt::SharedArena shared;
  float* const group_dv = shared.take<float>(a.slab_groups);
  float* const group_dv_xhat = shared.take<float>(a.slab_groups);
  const NormPlace place = norm_place<kLanes>(a, 0, a.channels);
  const int64_t image = simt::block_z();
  simt::allow_next_kernel();
  simt::wait_for_previous_kernel();

  const float* const image_sums = sums + image * 2 * a.channels;
  group_sums(
      a, place, image, modulation,
      [&](int channel, float* dv, float* dv_xhat) {
        *dv = image_sums[channel];
        *dv_xhat = image_sums[a.channels + channel];
      },
      group_dv, group_dv_xhat);
  simt::sync_block();
  if (!place.active) return;
  NormChannels<kLanes> channels;
  channels.load(a, in, modulation, image, place.channel);
  write_dx(a, access, place, in, channels, group_dv, group_dv_xhat, out, image,
           static_cast<int>(simt::block_x()) * a.rows + place.row,
           static_cast<int>(simt::blocks_x()) * a.rows);
}

// Grid: 1, slabs of whole groups, images. sums [batch, 2, channels], or null: not wanted.
template <class Access>
ADM_RT_KERNEL_BOUNDS(kNormThreads, kNormBackwardBlocks)
norm_backward_slab_kernel(const ADM_RT_GRID_CONSTANT NormArgs a, const Access access,
                          const NormBackwardInputs in, const NormModulation modulation, float* sums,
                          const NormPair<void> out) {
  constexpr int kLanes = Access::kLanes;
  simt::SharedArena shared;
  float* const reduce = shared.take<float>(2 * kLanes * a.reduce_slots);
  float* const channel_dv = shared.take<float>(a.slab_channels);
  float* const channel_dv_xhat = shared.take<float>(a.slab_channels);
  float* const group_dv = shared.take<float>(a.slab_groups);
  float* const group_dv_xhat = shared.take<float>(a.slab_groups);
  const NormPlace place = norm_place<kLanes>(a, 0, a.channels);
  const int64_t image = simt::block_z();
  simt::allow_next_kernel();
  simt::wait_for_previous_kernel();

  float values[2 * kLanes] = {};
  NormChannels<kLanes> channels;
  if (place.active) {
    channels.load(a, in, modulation, image, place.channel);
    sum_pixels_of(a, access, in, channels, image, place.channel, place.row, a.pixels, a.rows,
                  values);
  }
  merge_rows(a, place, values, reduce, AddSums<kLanes>());
  if (place.active && place.row == 0) {
    ADM_RT_UNROLL for (int i = 0; i < kLanes; ++i) {
      channel_dv[place.column * kLanes + i] = values[i];
      channel_dv_xhat[place.column * kLanes + i] = values[kLanes + i];
      if (sums != nullptr) {
        float* const image_sums = sums + image * 2 * a.channels + place.channel + i;
        image_sums[0] = values[i];
        image_sums[a.channels] = values[kLanes + i];
      }
    }
  }
  simt::sync_block();
  group_sums(
      a, place, image, modulation,
      [&](int channel, float* dv, float* dv_xhat) {
        *dv = channel_dv[channel - place.slab_begin];
        *dv_xhat = channel_dv_xhat[channel - place.slab_begin];
      },
      group_dv, group_dv_xhat);
  simt::sync_block();
  if (!place.active) return;
  write_dx(a, access, place, in, channels, group_dv, group_dv_xhat, out, image, place.row, a.rows);
}

// Grid: along the channels, one thread each. Sums over the batch in double: in float32 their error
// would grow with it. Outputs that are null are not wanted.
ADM_RT_KERNEL norm_parameter_gradients_kernel(const ADM_RT_GRID_CONSTANT NormArgs a, int batch,
                                              const NormModulation modulation, const float* sums,
                                              float* dweight, float* dbias, float* dscale_shift) {
  const int channel = static_cast<int>(simt::block_x() * simt::threads_x() + simt::thread_x());
  simt::allow_next_kernel();
  simt::wait_for_previous_kernel();
  if (channel >= a.channels) return;
  const float weight = modulation.weight[channel], bias = modulation.bias[channel];
  double weight_sum = 0.0, bias_sum = 0.0;
  for (int image = 0; image < batch; ++image) {
    const float* const at = sums + static_cast<int64_t>(image) * 2 * a.channels + channel;
    const float dv = at[0], dv_xhat = at[a.channels];
    const float factor = modulation.one_plus_scale(a, image, channel);
    bias_sum += static_cast<double>(factor) * dv;
    weight_sum += static_cast<double>(factor) * dv_xhat;
    if (dscale_shift != nullptr) {
      float* const row = dscale_shift + static_cast<int64_t>(image) * 2 * a.channels + channel;
      row[0] = weight * dv_xhat + bias * dv;
      row[a.channels] = dv;
    }
  }
  if (dweight != nullptr) dweight[channel] = static_cast<float>(weight_sum);
  if (dbias != nullptr) dbias[channel] = static_cast<float>(bias_sum);
}

}  // namespace adm_rt
