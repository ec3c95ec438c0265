// ada_group_norm on [batch, spatial, channels] for one instruction set (compiled once per ISA, see
// common/simd.h). Tasks are blocks of rows and vectors run along the channels; what the blocks
// found is joined in ada_group_norm_cpu.cpp between two passes.
#include <cstdint>

#include "ops/ada_group_norm.h"
#include "ops/ada_group_norm_kernels.h"
#include "ops/ada_group_norm_vec.h"

namespace adm_rt::ADM_RT_ISA {
namespace {

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

}  // namespace adm_rt::ADM_RT_ISA
