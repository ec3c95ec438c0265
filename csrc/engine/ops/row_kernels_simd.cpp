// Kernels of row_kernels.h for one instruction set (compiled once per ISA; see common/simd.h).
#include <cstdint>

#include "common/simd.h"
#include "engine/ops/row_kernels.h"

namespace adm_rt::ADM_RT_ISA {
namespace {

constexpr int64_t kWidth = Vec::kWidth;
// Rows whose deviations are summed in float: chains of kBlockRows / 2 additions.
constexpr int64_t kBlockRows = 128;

// Whole vectors take the plain instructions: masked ones are slow on some CPUs.
inline Vec load_up_to(const float* p, int64_t n) {
  return n >= kWidth ? Vec::loadu(p) : Vec::load_partial(p, static_cast<int>(n));
}
inline void store_up_to(Vec v, float* p, int64_t n) {
  n >= kWidth ? v.storeu(p) : v.store_partial(p, static_cast<int>(n));
}

template <RowActivation kActivation>
inline Vec activate(Vec v) {
  if constexpr (kActivation == RowActivation::kSilu) return silu(v);
  if constexpr (kActivation == RowActivation::kRelu) return max(Vec::zero(), v);  // NaN stays
  return v;
}

template <RowActivation kActivation>
void activate_all(int64_t rows, int64_t channels, const float* x, int64_t ldx, const float* a,
                  const float* b, float* y, int64_t ldy) {
  for (int64_t r = 0; r < rows; ++r, x += ldx, y += ldy) {
    if (a == nullptr) {
      for (int64_t c = 0; c < channels; c += kWidth) {
        store_up_to(activate<kActivation>(load_up_to(x + c, channels - c)), y + c, channels - c);
      }
      continue;
    }
    int64_t c = 0;
    for (; c + kWidth <= channels; c += kWidth) {
      const Vec v = fma(Vec::loadu(a + c), Vec::loadu(x + c), Vec::loadu(b + c));
      activate<kActivation>(v).storeu(y + c);
    }
    if (c < channels) {
      const int n = static_cast<int>(channels - c);
      const Vec v = fma(Vec::load_partial(a + c, n), Vec::load_partial(x + c, n),
                        Vec::load_partial(b + c, n));
      activate<kActivation>(v).store_partial(y + c, n);
    }
  }
}

template <bool kResidual>
void finish_all(int64_t rows, int64_t channels, float* y, int64_t ldy, const float* bias,
                const float* residual, int64_t ldr, float scale) {
  const Vec factor = Vec::set1(scale);
  for (int64_t r = 0; r < rows; ++r, y += ldy) {
    for (int64_t c = 0; c < channels; c += kWidth) {
      const int64_t n = channels - c;
      Vec v = load_up_to(y + c, n) + (bias == nullptr ? Vec::zero() : load_up_to(bias + c, n));
      if constexpr (kResidual) v = v + load_up_to(residual + r * ldr + c, n);
      store_up_to(v * factor, y + c, n);
    }
  }
}

// Sums of x - pilot and of its square over the rows, where pilot is the first row.
struct BlockSums {
  float sum[kMomentChannels];
  float square[kMomentChannels];
};

// Channels [c, c + kVecs * width) of a block.
template <int kVecs>
void sum_block(int64_t rows, const float* x, int64_t ldx, int64_t c, BlockSums* sums) {
  static_assert(kVecs == 1 || kVecs == 2);
  const Vec pilot0 = Vec::loadu(x + c), pilot1 = Vec::loadu(x + c + (kVecs - 1) * kWidth);
  Vec sum00 = Vec::zero(), sum01 = sum00, sum10 = sum00, sum11 = sum00;
  Vec square00 = sum00, square01 = sum00, square10 = sum00, square11 = sum00;
  const float* row = x + c;
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2, row += 2 * ldx) {
    const Vec d00 = Vec::loadu(row) - pilot0, d10 = Vec::loadu(row + ldx) - pilot0;
    sum00 = sum00 + d00;
    sum10 = sum10 + d10;
    square00 = fma(d00, d00, square00);
    square10 = fma(d10, d10, square10);
    if constexpr (kVecs == 2) {
      const Vec d01 = Vec::loadu(row + kWidth) - pilot1;
      const Vec d11 = Vec::loadu(row + ldx + kWidth) - pilot1;
      sum01 = sum01 + d01;
      sum11 = sum11 + d11;
      square01 = fma(d01, d01, square01);
      square11 = fma(d11, d11, square11);
    }
  }
  if (r < rows) {
    const Vec d00 = Vec::loadu(row) - pilot0;
    sum00 = sum00 + d00;
    square00 = fma(d00, d00, square00);
    if constexpr (kVecs == 2) {
      const Vec d01 = Vec::loadu(row + kWidth) - pilot1;
      sum01 = sum01 + d01;
      square01 = fma(d01, d01, square01);
    }
  }
  (sum00 + sum10).storeu(sums->sum + c);
  (square00 + square10).storeu(sums->square + c);
  if constexpr (kVecs == 2) {
    (sum01 + sum11).storeu(sums->sum + c + kWidth);
    (square01 + square11).storeu(sums->square + c + kWidth);
  }
}

// The last channels, fewer than a vector; the same additions as above.
void sum_block_tail(int64_t rows, int64_t channels, const float* x, int64_t ldx, int64_t c,
                    BlockSums* sums) {
  for (; c < channels; ++c) {
    float sum[2] = {}, square[2] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const float d = x[r * ldx + c] - x[c];
      sum[r % 2] += d;
      square[r % 2] = __builtin_fmaf(d, d, square[r % 2]);
    }
    sums->sum[c] = sum[0] + sum[1];
    sums->square[c] = square[0] + square[1];
  }
}

}  // namespace

void activate_rows(int64_t rows, int64_t channels, const float* x, int64_t ldx, const float* a,
                   const float* b, RowActivation activation, float* y, int64_t ldy) {
  switch (activation) {
    case RowActivation::kNone:
      return activate_all<RowActivation::kNone>(rows, channels, x, ldx, a, b, y, ldy);
    case RowActivation::kSilu:
      return activate_all<RowActivation::kSilu>(rows, channels, x, ldx, a, b, y, ldy);
    case RowActivation::kRelu:
      return activate_all<RowActivation::kRelu>(rows, channels, x, ldx, a, b, y, ldy);
  }
}

void finish_rows(int64_t rows, int64_t channels, float* y, int64_t ldy, const float* bias,
                 const float* residual, int64_t ldr, float scale) {
  if (bias == nullptr && residual == nullptr && scale == 1.0f) return;
  if (residual == nullptr) {
    finish_all<false>(rows, channels, y, ldy, bias, residual, ldr, scale);
  } else {
    finish_all<true>(rows, channels, y, ldy, bias, residual, ldr, scale);
  }
}

void channel_moments(int64_t rows, int64_t channels, const float* x, int64_t ldx, float* mean,
                     float* variance) {
  double means[kMomentChannels], squares[kMomentChannels];
  BlockSums sums;
  for (int64_t first = 0; first < rows; first += kBlockRows) {
    const int64_t count = rows - first < kBlockRows ? rows - first : kBlockRows;
    const float* block = x + first * ldx;
    int64_t c = 0;
    for (; c + 2 * kWidth <= channels; c += 2 * kWidth) sum_block<2>(count, block, ldx, c, &sums);
    for (; c + kWidth <= channels; c += kWidth) sum_block<1>(count, block, ldx, c, &sums);
    sum_block_tail(count, channels, block, ldx, c, &sums);
    // Joined as Chan, Golub & LeVeque (1979) do.
    const double size = static_cast<double>(count);
    const double share = size / static_cast<double>(first + count);
    for (c = 0; c < channels; ++c) {
      const double sum = sums.sum[c], shift = sum / size;
      const double block_mean = block[c] + shift;
      const double block_square = sums.square[c] - sum * shift;
      if (first == 0) {
        means[c] = block_mean;
        squares[c] = block_square;
        continue;
      }
      const double step = block_mean - means[c];
      squares[c] += block_square + step * step * static_cast<double>(first) * share;
      means[c] += step * share;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<float>(means[c]);
    if (variance == nullptr) continue;
    // Not below zero by rounding; NaN stays NaN.
    const double square = squares[c] < 0 ? 0.0 : squares[c];
    variance[c] = static_cast<float>(square / static_cast<double>(rows));
  }
}

}  // namespace adm_rt::ADM_RT_ISA
