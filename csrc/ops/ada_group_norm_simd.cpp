// Kernels of ada_group_norm for one instruction set (compiled once per ISA; see common/simd.h).
//
// Channels first: one (image, group) is a contiguous run of values, so a task reads it for the
// statistics and again, from cache, for the result. Channels last: tasks are blocks of rows,
// vectors run along the channels, and ada_group_norm_cpu.cpp joins the blocks between two passes.
#include <cmath>
#include <cstdint>

#include "ops/ada_group_norm.h"
#include "ops/ada_group_norm_kernels.h"
#include "ops/ada_group_norm_vec.h"

namespace adm_rt::ADM_RT_ISA {
namespace {

// Values per block of the statistics: 16 KiB of floats stay in the first-level cache, and a float
// accumulator takes at most this many / kWidth addends before it is folded into a double.
constexpr int64_t kBlock = 4096;
// Values whose mean is the first pilot. Any value near the mean would do: if these are far from the
// rest, then the variance is large too, and what is lost to cancellation is kBlock / kPilot
// roundings.
constexpr int64_t kPilot = 256;
// Channels whose coefficients are held at a time; ADM's groups have at most 64.
constexpr int64_t kChunk = 64;

// Sums of (x - pilot) and of its square over n <= kBlock values.
struct Deviations {
  double sum;
  double square;
};

template <typename T>
Deviations deviations(const T* x, int64_t n, float pilot) {
  const Vec p = Vec::set1(pilot);
  Vec sum0 = Vec::zero(), sum1 = Vec::zero(), sum2 = Vec::zero(), sum3 = Vec::zero();
  Vec square0 = Vec::zero(), square1 = Vec::zero(), square2 = Vec::zero(), square3 = Vec::zero();
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    const Vec d0 = load_values(x + i) - p;
    const Vec d1 = load_values(x + i + kWidth) - p;
    const Vec d2 = load_values(x + i + 2 * kWidth) - p;
    const Vec d3 = load_values(x + i + 3 * kWidth) - p;
    sum0 = sum0 + d0;
    sum1 = sum1 + d1;
    sum2 = sum2 + d2;
    sum3 = sum3 + d3;
    square0 = fma(d0, d0, square0);
    square1 = fma(d1, d1, square1);
    square2 = fma(d2, d2, square2);
    square3 = fma(d3, d3, square3);
  }
  for (; i < n; i += kWidth) {
    const Vec d = (n - i >= kWidth ? load_values(x + i) : load_tail(x + i, n - i, pilot)) - p;
    sum0 = sum0 + d;
    square0 = fma(d, d, square0);
  }
  return {((sum0 + sum1) + (sum2 + sum3)).reduce_add(),
          ((square0 + square1) + (square2 + square3)).reduce_add()};
}

template <typename T>
float mean_of_first(const T* x, int64_t n) {
  const int64_t count = n < kPilot ? n : kPilot;
  Vec sum0 = Vec::zero(), sum1 = Vec::zero();
  int64_t i = 0;
  for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
    sum0 = sum0 + load_values(x + i);
    sum1 = sum1 + load_values(x + i + kWidth);
  }
  for (; i < count; i += kWidth) {
    const int64_t left = count - i;
    sum0 = sum0 + (left >= kWidth ? load_values(x + i) : load_some(x + i, left));
  }
  return (sum0 + sum1).reduce_add() / static_cast<float>(count);
}

// Mean and sum of squared deviations, joined block by block (Chan, Golub & LeVeque 1979). The pilot
// of a block is the mean so far, so that no difference of large squares is ever taken.
struct Moments {
  double mean;
  double square;
};

template <typename T>
Moments moments(const T* x, int64_t n) {
  Moments all = {mean_of_first(x, n), 0.0};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    const float pilot = static_cast<float>(all.mean);
    const Deviations d = deviations(x + begin, size, pilot);
    const double shift = d.sum / static_cast<double>(size);
    const double mean = static_cast<double>(pilot) + shift;
    const double square = d.square - d.sum * shift;
    if (begin == 0) {
      all = {mean, square};
      continue;
    }
    const double count = static_cast<double>(begin + size);
    const double step = mean - all.mean;
    all.square += square + step * step * static_cast<double>(begin) * (size / count);
    all.mean += step * (size / count);
  }
  return all;
}

// weight and bias of `count` channels with the modulation and the group's statistics folded in:
// v = (x - center) * slope + offset. `row` is the image's row of scale_shift or null; `rest` is
// what the float `center` has lost of the mean.
inline void fold_channels(const float* weight, const float* bias, const float* row,
                          int64_t channels, int64_t count, double rstd, double rest, float* slope,
                          float* offset) {
  if (row == nullptr) {
    for (int64_t c = 0; c < count; ++c) {
      const double a = rstd * weight[c];
      slope[c] = static_cast<float>(a);
      offset[c] = static_cast<float>(bias[c] - rest * a);
    }
    return;
  }
  for (int64_t c = 0; c < count; ++c) {
    const double scale = 1.0 + row[c];
    const double a = rstd * weight[c] * scale;
    slope[c] = static_cast<float>(a);
    offset[c] = static_cast<float>(bias[c] * scale + row[channels + c] - rest * a);
  }
}

template <bool kSilu, typename T>
void apply_channels(const T* x, T* y, int64_t channels, int64_t n, float center, const float* slope,
                    const float* offset) {
  const Vec c = Vec::set1(center);
  for (int64_t channel = 0; channel < channels; ++channel, x += n, y += n) {
    const Vec a = Vec::set1(slope[channel]), b = Vec::set1(offset[channel]);
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      const Vec v = fma(load_values(x + i) - c, a, b);
      store_values(kSilu ? silu(v) : v, y + i);
    }
    if (i < n) {
      const Vec v = fma(load_some(x + i, n - i) - c, a, b);
      store_some(kSilu ? silu(v) : v, y + i, n - i);
    }
  }
}

template <bool kSilu, typename T>
void planes(const AdaGroupNormParams& p, int64_t begin, int64_t end) {
  const int64_t group_channels = p.channels / p.groups;
  const int64_t count = group_channels * p.spatial;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / p.groups;
    const int64_t channel0 = task % p.groups * group_channels;
    const T* x = static_cast<const T*>(p.x) + task * count;
    T* y = static_cast<T*>(p.y) + task * count;
    const Moments m = moments(x, count);
    // Not below zero by rounding; NaN stays NaN.
    const double variance = (m.square < 0 ? 0.0 : m.square) / static_cast<double>(count);
    const double rstd = 1.0 / std::sqrt(variance + static_cast<double>(p.eps));
    const float center = static_cast<float>(m.mean);
    if (p.mean != nullptr) p.mean[task] = center;
    if (p.rstd != nullptr) p.rstd[task] = static_cast<float>(rstd);
    const double rest = m.mean - static_cast<double>(center);
    const float* row =
        p.scale_shift == nullptr ? nullptr : p.scale_shift + image * p.scale_shift_stride;
    for (int64_t c = 0; c < group_channels; c += kChunk) {
      const int64_t chunk = group_channels - c < kChunk ? group_channels - c : kChunk;
      const int64_t channel = channel0 + c;
      float slope[kChunk], offset[kChunk];
      fold_channels(p.weight + channel, p.bias + channel, row == nullptr ? nullptr : row + channel,
                    p.channels, chunk, rstd, rest, slope, offset);
      apply_channels<kSilu>(x + c * p.spatial, y + c * p.spatial, chunk, p.spatial, center, slope,
                            offset);
    }
  }
}

// Sums of dv and dv * (x - center) over each channel; writes dv to `out` unless that is null.
template <bool kSilu, typename T>
void channel_sums(const T* grad, const T* x, float* out, int64_t channels, int64_t n, float center,
                  const float* slope, const float* offset, double* s1, double* s2) {
  const Vec c = Vec::set1(center);
  for (int64_t channel = 0; channel < channels; ++channel, x += n, grad += n) {
    const Vec a = Vec::set1(slope[channel]), b = Vec::set1(offset[channel]);
    double total1 = 0.0, total2 = 0.0;
    for (int64_t block = 0; block < n; block += kBlock) {
      const int64_t stop = n - block < kBlock ? n : block + kBlock;
      Vec sum = Vec::zero(), product = Vec::zero();
      int64_t i = block;
      for (; i + kWidth <= stop; i += kWidth) {
        const Vec d = load_values(x + i) - c;
        const Vec dv = through_silu<kSilu>(load_values(grad + i), fma(d, a, b));
        sum = sum + dv;
        product = fma(dv, d, product);
        if (out != nullptr) dv.storeu(out + channel * n + i);
      }
      if (i < stop) {
        const Vec d = load_tail(x + i, stop - i, center) - c;
        const Vec dv = through_silu<kSilu>(load_some(grad + i, stop - i), fma(d, a, b));
        sum = sum + dv;
        product = fma(dv, d, product);
        if (out != nullptr) dv.store_partial(out + channel * n + i, static_cast<int>(stop - i));
      }
      total1 += sum.reduce_add();
      total2 += product.reduce_add();
    }
    s1[channel] = total1;
    s2[channel] = total2;
  }
}

// dx = dv * slope + (x - center) * on_x + constant; dv is in dx already when kHeld.
template <bool kSilu, bool kHeld, typename T>
void channel_gradients(const T* grad, const T* x, T* dx, int64_t channels, int64_t n, float center,
                       const float* slope, const float* offset, float on_x, float constant) {
  const Vec c = Vec::set1(center), kx = Vec::set1(on_x), k = Vec::set1(constant);
  for (int64_t channel = 0; channel < channels; ++channel, x += n, grad += n, dx += n) {
    const Vec a = Vec::set1(slope[channel]), b = Vec::set1(offset[channel]);
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      const Vec d = load_values(x + i) - c;
      const Vec dv =
          kHeld ? load_values(dx + i) : through_silu<kSilu>(load_values(grad + i), fma(d, a, b));
      store_values(fma(dv, a, fma(d, kx, k)), dx + i);
    }
    if (i < n) {
      const Vec d = load_some(x + i, n - i) - c;
      const Vec dv = kHeld ? load_some(dx + i, n - i)
                           : through_silu<kSilu>(load_some(grad + i, n - i), fma(d, a, b));
      store_some(fma(dv, a, fma(d, kx, k)), dx + i, n - i);
    }
  }
}

template <bool kSilu, typename T>
void planes_backward(const AdaGroupNormBackwardParams& p, const AdaGroupNormSums& sums,
                     int64_t begin, int64_t end) {
  // float32: dx holds dv between the two passes, which saves the second sigmoid.
  constexpr bool kHeld = sizeof(T) == sizeof(float);
  const int64_t group_channels = p.channels / p.groups;
  const int64_t count = group_channels * p.spatial;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / p.groups;
    const int64_t channel0 = task % p.groups * group_channels;
    const T* x = static_cast<const T*>(p.x) + task * count;
    const T* grad = static_cast<const T*>(p.grad) + task * count;
    T* dx = p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + task * count;
    const float center = p.mean[task];
    const double rstd = p.rstd[task];
    const float* row = p.scale_shift == nullptr
                           ? nullptr
                           : p.scale_shift + image * p.scale_shift_stride + channel0;
    double* s1 = sums.s1 + image * p.channels + channel0;
    double* s2 = sums.s2 + image * p.channels + channel0;
    float slope[kChunk], offset[kChunk];
    double mean1 = 0.0, mean2 = 0.0;
    for (int64_t c = 0; c < group_channels; c += kChunk) {
      const int64_t chunk = group_channels - c < kChunk ? group_channels - c : kChunk;
      const int64_t at = c * p.spatial;
      fold_channels(p.weight + channel0 + c, p.bias + channel0 + c,
                    row == nullptr ? nullptr : row + c, p.channels, chunk, rstd, 0.0, slope,
                    offset);
      channel_sums<kSilu>(grad + at, x + at, dx == nullptr ? nullptr : as_float(dx + at), chunk,
                          p.spatial, center, slope, offset, s1 + c, s2 + c);
      for (int64_t k = 0; k < chunk; ++k) {
        s2[c + k] *= rstd;
        mean1 += slope[k] * s1[c + k];
        mean2 += slope[k] * s2[c + k];
      }
    }
    if (dx == nullptr) continue;
    const float on_x = static_cast<float>(-rstd * mean2 / static_cast<double>(count));
    const float constant = static_cast<float>(-mean1 / static_cast<double>(count));
    for (int64_t c = 0; c < group_channels; c += kChunk) {
      const int64_t chunk = group_channels - c < kChunk ? group_channels - c : kChunk;
      const int64_t at = c * p.spatial;
      if (group_channels > kChunk) {
        fold_channels(p.weight + channel0 + c, p.bias + channel0 + c,
                      row == nullptr ? nullptr : row + c, p.channels, chunk, rstd, 0.0, slope,
                      offset);
      }
      channel_gradients<kSilu, kHeld>(grad + at, x + at, dx + at, chunk, p.spatial, center, slope,
                                      offset, on_x, constant);
    }
  }
}

}  // namespace

void ada_group_norm_planes(const AdaGroupNormParams& p, int64_t begin, int64_t end) {
  ADM_RT_BY_SILU_AND_TYPE(planes, p, p, begin, end);
}

void ada_group_norm_planes_backward(const AdaGroupNormBackwardParams& p,
                                    const AdaGroupNormSums& sums, int64_t begin, int64_t end) {
  ADM_RT_BY_SILU_AND_TYPE(planes_backward, p, p, sums, begin, end);
}

}  // namespace adm_rt::ADM_RT_ISA
