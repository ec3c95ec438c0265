// Kernels of ada_group_norm for one instruction set (compiled once per ISA; see common/simd.h).
//
// Channels first: one (image, group) is a contiguous run of values, so a task reads it for the
// statistics and again, from cache, for the result. Channels last: tasks are blocks of rows,
// vectors run along the channels, and ada_group_norm_cpu.cpp joins the blocks between two passes.
#include <cmath>
#include <cstdint>

#include "common/simd.h"
#include "ops/ada_group_norm.h"
#include "ops/ada_group_norm_kernels.h"

namespace adm_rt::ADM_RT_ISA {
namespace {

constexpr int64_t kWidth = Vec::kWidth;
// Values per block of the statistics: 16 KiB of floats stay in the first-level cache, and a float
// accumulator takes at most this many / kWidth addends before it is folded into a double.
constexpr int64_t kBlock = 4096;

inline Vec load_values(const float* from) { return Vec::loadu(from); }
inline Vec load_values(const uint16_t* from) { return Vec::load_bf16(from); }
inline void store_values(Vec v, float* to) { v.storeu(to); }
inline void store_values(Vec v, uint16_t* to) { v.store_bf16(to); }

// The first `count` values, zero in the other lanes.
inline Vec load_some(const float* from, int64_t count) {
  return Vec::load_partial(from, static_cast<int>(count));
}
inline Vec load_some(const uint16_t* from, int64_t count) {
  return Vec::load_bf16_partial(from, static_cast<int>(count));
}
inline void store_some(Vec v, float* to, int64_t count) {
  v.store_partial(to, static_cast<int>(count));
}
inline void store_some(Vec v, uint16_t* to, int64_t count) {
  v.store_bf16_partial(to, static_cast<int>(count));
}
// The same with `fill` in the other lanes, so that their deviation from `fill` is zero.
template <typename T>
inline Vec load_tail(const T* from, int64_t count, float fill) {
  float lanes[kWidth];
  load_some(from, count).storeu(lanes);
  for (int64_t i = count; i < kWidth; ++i) lanes[i] = fill;
  return Vec::loadu(lanes);
}

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

// Mean and sum of squared deviations, joined block by block (Chan, Golub & LeVeque 1979). The pilot
// of a block is the mean so far, so that no difference of large squares is ever taken.
struct Moments {
  double mean;
  double square;
};

template <typename T>
Moments moments(const T* x, int64_t n) {
  const int64_t first = n < kBlock ? n : kBlock;
  Moments all = {deviations(x, first, 0.0f).sum / static_cast<double>(first), 0.0};
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

template <bool kSilu, typename T>
void apply_channel(const T* x, T* y, int64_t n, float center, float slope, float offset) {
  const Vec c = Vec::set1(center), a = Vec::set1(slope), b = Vec::set1(offset);
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

template <typename T>
void planes(const AdaGroupNormParams& p, int64_t begin, int64_t end) {
  const int64_t group_channels = p.channels / p.groups;
  const int64_t count = group_channels * p.spatial;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / p.groups;
    const int64_t channel0 = task % p.groups * group_channels;
    const T* x = static_cast<const T*>(p.x) + task * count;
    T* y = static_cast<T*>(p.y) + task * count;
    const Moments m = moments(x, count);
    const double variance = m.square > 0 ? m.square / static_cast<double>(count) : m.square;
    const double rstd = 1.0 / std::sqrt(variance + static_cast<double>(p.eps));
    const float center = static_cast<float>(m.mean);
    const double rest = m.mean - static_cast<double>(center);  // what float loses of the mean
    p.mean[task] = center;
    p.rstd[task] = static_cast<float>(rstd);
    for (int64_t c = 0; c < group_channels; ++c) {
      const int64_t channel = channel0 + c;
      double slope = rstd * p.weight[channel];
      double offset = p.bias[channel] - rest * slope;
      if (p.scale_shift != nullptr) {
        const float* row = p.scale_shift + image * p.scale_shift_stride;
        const double scale = 1.0 + row[channel];
        slope *= scale;
        offset = offset * scale + row[p.channels + channel];
      }
      const float a = static_cast<float>(slope), b = static_cast<float>(offset);
      const int64_t at = c * p.spatial;
      if (p.silu) {
        apply_channel<true>(x + at, y + at, p.spatial, center, a, b);
      } else {
        apply_channel<false>(x + at, y + at, p.spatial, center, a, b);
      }
    }
  }
}

// grad * silu'(v), or grad.
template <bool kSilu>
inline Vec through_silu(Vec grad, Vec v) {
  if (!kSilu) return grad;
  const Vec s = sigmoid(v);
  return grad * fma(v * s, Vec::set1(1.0f) - s, s);
}

// Sums of dv and dv * (x - center) over one channel; writes dv to `out` unless it is null.
template <bool kSilu, typename T>
Deviations sums_channel(const T* grad, const T* x, float* out, int64_t n, float center, float slope,
                        float offset) {
  const Vec c = Vec::set1(center), a = Vec::set1(slope), b = Vec::set1(offset);
  Deviations total = {0.0, 0.0};
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t stop = n - block < kBlock ? n : block + kBlock;
    Vec sum = Vec::zero(), product = Vec::zero();
    int64_t i = block;
    for (; i + kWidth <= stop; i += kWidth) {
      const Vec d = load_values(x + i) - c;
      const Vec dv = through_silu<kSilu>(load_values(grad + i), fma(d, a, b));
      sum = sum + dv;
      product = fma(dv, d, product);
      if (out != nullptr) dv.storeu(out + i);
    }
    if (i < stop) {
      const Vec d = load_tail(x + i, stop - i, center) - c;
      const Vec dv = through_silu<kSilu>(load_some(grad + i, stop - i), fma(d, a, b));
      sum = sum + dv;
      product = fma(dv, d, product);
      if (out != nullptr) dv.store_partial(out + i, static_cast<int>(stop - i));
    }
    total.sum += sum.reduce_add();
    total.square += product.reduce_add();
  }
  return total;
}

// dx = dv * on_grad + (x - center) * on_x + constant; dv comes from `held` when that is not null.
template <bool kSilu, typename T>
void gradient_channel(const T* grad, const T* x, const float* held, T* dx, int64_t n, float center,
                      float slope, float offset, float on_grad, float on_x, float constant) {
  const Vec c = Vec::set1(center), a = Vec::set1(slope), b = Vec::set1(offset);
  const Vec kg = Vec::set1(on_grad), kx = Vec::set1(on_x), k = Vec::set1(constant);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec d = load_values(x + i) - c;
    const Vec dv = held != nullptr ? Vec::loadu(held + i)
                                   : through_silu<kSilu>(load_values(grad + i), fma(d, a, b));
    store_values(fma(dv, kg, fma(d, kx, k)), dx + i);
  }
  if (i < n) {
    const Vec d = load_some(x + i, n - i) - c;
    const Vec dv = held != nullptr ? load_some(held + i, n - i)
                                   : through_silu<kSilu>(load_some(grad + i, n - i), fma(d, a, b));
    store_some(fma(dv, kg, fma(d, kx, k)), dx + i, n - i);
  }
}

inline float* as_float(float* pointer) { return pointer; }
inline float* as_float(uint16_t*) { return nullptr; }

template <bool kSilu, typename T>
void planes_backward(const AdaGroupNormBackwardParams& p, const AdaGroupNormSums& sums,
                     int64_t begin, int64_t end) {
  const int64_t group_channels = p.channels / p.groups;
  const int64_t count = group_channels * p.spatial;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / p.groups;
    const int64_t channel0 = task % p.groups * group_channels;
    const T* x = static_cast<const T*>(p.x) + task * count;
    const T* grad = static_cast<const T*>(p.grad) + task * count;
    T* dx = p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + task * count;
    // float32: dx holds dv between the two passes, which saves the second sigmoid.
    float* held = as_float(dx);
    const float center = p.mean[task];
    const double rstd = p.rstd[task];
    const float* row =
        p.scale_shift == nullptr ? nullptr : p.scale_shift + image * p.scale_shift_stride;
    double mean1 = 0.0, mean2 = 0.0;
    for (int64_t c = 0; c < group_channels; ++c) {
      const int64_t channel = channel0 + c;
      const double scale = row == nullptr ? 1.0 : 1.0 + row[channel];
      const double shift = row == nullptr ? 0.0 : row[p.channels + channel];
      const double weight = p.weight[channel] * scale;
      const int64_t at = c * p.spatial;
      const Deviations s = sums_channel<kSilu>(
          grad + at, x + at, held == nullptr ? nullptr : held + at, p.spatial, center,
          static_cast<float>(rstd * weight), static_cast<float>(p.bias[channel] * scale + shift));
      const double s2 = s.square * rstd;
      sums.s1[image * p.channels + channel] = s.sum;
      sums.s2[image * p.channels + channel] = s2;
      mean1 += weight * s.sum;
      mean2 += weight * s2;
    }
    if (dx == nullptr) continue;
    mean1 /= static_cast<double>(count);
    mean2 /= static_cast<double>(count);
    for (int64_t c = 0; c < group_channels; ++c) {
      const int64_t channel = channel0 + c;
      const double scale = row == nullptr ? 1.0 : 1.0 + row[channel];
      const double shift = row == nullptr ? 0.0 : row[p.channels + channel];
      const double weight = p.weight[channel] * scale;
      const int64_t at = c * p.spatial;
      gradient_channel<kSilu>(
          grad + at, x + at, held == nullptr ? nullptr : held + at, dx + at, p.spatial, center,
          static_cast<float>(rstd * weight), static_cast<float>(p.bias[channel] * scale + shift),
          static_cast<float>(rstd * weight), static_cast<float>(-rstd * rstd * mean2),
          static_cast<float>(-rstd * mean1));
    }
  }
}

// One block of rows of one image: x [rows, channels].
struct Block {
  int64_t image;
  int64_t offset;  // of the first value, in elements
  int64_t rows;
};

inline Block block_at(int64_t task, const AdaGroupNormRows& rows, int64_t spatial,
                      int64_t channels) {
  const int64_t image = task / rows.blocks;
  const int64_t first = task % rows.blocks * rows.rows_per_block;
  const int64_t left = spatial - first;
  return {image, (image * spatial + first) * channels,
          left < rows.rows_per_block ? left : rows.rows_per_block};
}

template <typename T>
inline Vec load_upto(const T* from, int64_t count) {
  return count >= kWidth ? load_values(from) : load_some(from, count);
}
template <typename T>
inline void store_upto(Vec v, T* to, int64_t count) {
  if (count >= kWidth) {
    store_values(v, to);
  } else {
    store_some(v, to, count);
  }
}

// Moments of the kColumns * kWidth channels that begin at x; `width` of them exist. Several columns
// at a time read whole stretches of a row and keep more than one chain of additions going.
template <int kColumns, typename T>
inline void column_moments(const T* x, int64_t rows, int64_t stride, int64_t width, float* pilots,
                           float* sums, float* squares) {
  const Vec inverse = Vec::set1(1.0f / static_cast<float>(rows));
  Vec pilot[kColumns], sum[kColumns], square[kColumns];
  for (int k = 0; k < kColumns; ++k) sum[k] = square[k] = Vec::zero();
  for (int64_t r = 0; r < rows; ++r) {
    for (int k = 0; k < kColumns; ++k) {
      const int64_t at = k * kWidth;
      sum[k] = sum[k] + (kColumns > 1 ? load_values(x + r * stride + at)
                                      : load_upto(x + r * stride + at, width));
    }
  }
  for (int k = 0; k < kColumns; ++k) {
    pilot[k] = sum[k] * inverse;
    sum[k] = Vec::zero();
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int k = 0; k < kColumns; ++k) {
      const int64_t at = k * kWidth;
      const Vec d = (kColumns > 1 ? load_values(x + r * stride + at)
                                  : load_upto(x + r * stride + at, width)) -
                    pilot[k];
      sum[k] = sum[k] + d;
      square[k] = fma(d, d, square[k]);
    }
  }
  for (int k = 0; k < kColumns; ++k) {
    const int64_t at = k * kWidth;
    store_upto(pilot[k], pilots + at, width - at);
    store_upto(sum[k], sums + at, width - at);
    store_upto(square[k], squares + at, width - at);
  }
}

template <typename T>
void rows_moments(const AdaGroupNormParams& p, const AdaGroupNormRows& rows, float* pilots,
                  float* sums, float* squares, int64_t begin, int64_t end) {
  const int64_t channels = p.channels;
  for (int64_t task = begin; task < end; ++task) {
    const Block block = block_at(task, rows, p.spatial, channels);
    const T* x = static_cast<const T*>(p.x) + block.offset;
    const int64_t at = task * channels;
    int64_t c = 0;
    for (; c + 4 * kWidth <= channels; c += 4 * kWidth) {
      column_moments<4>(x + c, block.rows, channels, channels - c, pilots + at + c, sums + at + c,
                        squares + at + c);
    }
    for (; c < channels; c += kWidth) {
      column_moments<1>(x + c, block.rows, channels, channels - c, pilots + at + c, sums + at + c,
                        squares + at + c);
    }
  }
}

template <bool kSilu, typename T>
void rows_apply(const AdaGroupNormParams& p, const AdaGroupNormRows& rows,
                const AdaGroupNormAffine& affine, int64_t begin, int64_t end) {
  const int64_t channels = p.channels;
  for (int64_t task = begin; task < end; ++task) {
    const Block block = block_at(task, rows, p.spatial, channels);
    const float* center = affine.center + block.image * channels;
    const float* slope = affine.slope + block.image * channels;
    const float* offset = affine.offset + block.image * channels;
    for (int64_t r = 0; r < block.rows; ++r) {
      const T* x = static_cast<const T*>(p.x) + block.offset + r * channels;
      T* y = static_cast<T*>(p.y) + block.offset + r * channels;
      for (int64_t c = 0; c < channels; c += kWidth) {
        const int64_t width = channels - c;
        const Vec d = load_upto(x + c, width) - load_upto(center + c, width);
        const Vec v = fma(d, load_upto(slope + c, width), load_upto(offset + c, width));
        store_upto(kSilu ? silu(v) : v, y + c, width);
      }
    }
  }
}

template <bool kSilu, typename T>
void rows_sums(const AdaGroupNormBackwardParams& p, const AdaGroupNormRows& rows,
               const AdaGroupNormAffine& affine, float* s1, float* s2, int64_t begin, int64_t end) {
  const int64_t channels = p.channels;
  for (int64_t task = begin; task < end; ++task) {
    const Block block = block_at(task, rows, p.spatial, channels);
    const T* x = static_cast<const T*>(p.x) + block.offset;
    const T* grad = static_cast<const T*>(p.grad) + block.offset;
    float* held = p.dx == nullptr ? nullptr : as_float(static_cast<T*>(p.dx));
    if (held != nullptr) held += block.offset;
    for (int64_t c = 0; c < channels; c += kWidth) {
      const int64_t width = channels - c;
      const int64_t channel = block.image * channels + c;
      const Vec center = load_upto(affine.center + channel, width);
      const Vec slope = load_upto(affine.slope + channel, width);
      const Vec offset = load_upto(affine.offset + channel, width);
      Vec sum = Vec::zero(), product = Vec::zero();
      for (int64_t r = 0; r < block.rows; ++r) {
        const int64_t at = r * channels + c;
        const Vec d = load_upto(x + at, width) - center;
        const Vec dv = through_silu<kSilu>(load_upto(grad + at, width), fma(d, slope, offset));
        sum = sum + dv;
        product = fma(dv, d, product);
        if (held != nullptr) store_upto(dv, held + at, width);
      }
      store_upto(sum, s1 + task * channels + c, width);
      store_upto(product, s2 + task * channels + c, width);
    }
  }
}

template <bool kSilu, typename T>
void rows_backward(const AdaGroupNormBackwardParams& p, const AdaGroupNormRows& rows,
                   const AdaGroupNormAffine& affine, const AdaGroupNormGradient& gradient,
                   int64_t begin, int64_t end) {
  const int64_t channels = p.channels;
  for (int64_t task = begin; task < end; ++task) {
    const Block block = block_at(task, rows, p.spatial, channels);
    const int64_t row0 = block.image * channels;
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t base = block.offset + r * channels;
      const T* x = static_cast<const T*>(p.x) + base;
      const T* grad = static_cast<const T*>(p.grad) + base;
      T* dx = static_cast<T*>(p.dx) + base;
      const float* held = as_float(dx);
      for (int64_t c = 0; c < channels; c += kWidth) {
        const int64_t width = channels - c;
        const int64_t channel = row0 + c;
        const Vec d = load_upto(x + c, width) - load_upto(affine.center + channel, width);
        Vec dv;
        if (held != nullptr) {
          dv = load_upto(held + c, width);
        } else {
          const Vec v = fma(d, load_upto(affine.slope + channel, width),
                            load_upto(affine.offset + channel, width));
          dv = through_silu<kSilu>(load_upto(grad + c, width), v);
        }
        const Vec rest = fma(d, load_upto(gradient.on_x + channel, width),
                             load_upto(gradient.constant + channel, width));
        store_upto(fma(dv, load_upto(gradient.on_grad + channel, width), rest), dx + c, width);
      }
    }
  }
}

}  // namespace

// Calls function<silu, type>(...) for p's silu and dtype.
#define ADM_RT_BY_SILU_AND_TYPE(function, p, ...)                        \
  do {                                                                   \
    const bool is_float = (p).dtype == DType::kFloat32;                  \
    if ((p).silu && is_float) return function<true, float>(__VA_ARGS__); \
    if ((p).silu) return function<true, uint16_t>(__VA_ARGS__);          \
    if (is_float) return function<false, float>(__VA_ARGS__);            \
    return function<false, uint16_t>(__VA_ARGS__);                       \
  } while (false)

void ada_group_norm_planes(const AdaGroupNormParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::kFloat32) {
    planes<float>(p, begin, end);
  } else {
    planes<uint16_t>(p, begin, end);
  }
}

void ada_group_norm_planes_backward(const AdaGroupNormBackwardParams& p,
                                    const AdaGroupNormSums& sums, int64_t begin, int64_t end) {
  ADM_RT_BY_SILU_AND_TYPE(planes_backward, p, p, sums, begin, end);
}

void ada_group_norm_rows_moments(const AdaGroupNormParams& p, const AdaGroupNormRows& rows,
                                 float* pilots, float* sums, float* squares, int64_t begin,
                                 int64_t end) {
  if (p.dtype == DType::kFloat32) {
    rows_moments<float>(p, rows, pilots, sums, squares, begin, end);
  } else {
    rows_moments<uint16_t>(p, rows, pilots, sums, squares, begin, end);
  }
}

void ada_group_norm_rows_apply(const AdaGroupNormParams& p, const AdaGroupNormRows& rows,
                               const AdaGroupNormAffine& affine, int64_t begin, int64_t end) {
  ADM_RT_BY_SILU_AND_TYPE(rows_apply, p, p, rows, affine, begin, end);
}

void ada_group_norm_rows_sums(const AdaGroupNormBackwardParams& p, const AdaGroupNormRows& rows,
                              const AdaGroupNormAffine& affine, float* s1, float* s2, int64_t begin,
                              int64_t end) {
  ADM_RT_BY_SILU_AND_TYPE(rows_sums, p, p, rows, affine, s1, s2, begin, end);
}

void ada_group_norm_rows_backward(const AdaGroupNormBackwardParams& p, const AdaGroupNormRows& rows,
                                  const AdaGroupNormAffine& affine,
                                  const AdaGroupNormGradient& gradient, int64_t begin,
                                  int64_t end) {
  ADM_RT_BY_SILU_AND_TYPE(rows_backward, p, p, rows, affine, gradient, begin, end);
}

#undef ADM_RT_BY_SILU_AND_TYPE

}  // namespace adm_rt::ADM_RT_ISA
