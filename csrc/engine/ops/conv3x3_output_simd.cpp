// Output transform of conv3x3: Y = A' M A for every tile, then
// y = (Y + bias + resample(residual)) * output_scale, and the moments of the segment.
#include <cstdint>

#include "common/simd.h"
#include "engine/ops/conv3x3_kernels.h"
#include "engine/ops/conv3x3_winograd.h"

namespace adm_rt::ADM_RT_ISA {
namespace {

constexpr int64_t kWidth = Vec::kWidth;
constexpr int64_t kVecs = kConvChunk / kWidth;

// A' m for one column or row of a tile.
template <int kTile>
inline void transform(const Vec (&m)[kTile + 2], Vec (&y)[kTile]) {
  constexpr Winograd<kTile> w;
  constexpr int kPairs = kTile / 2;
  Vec sum[kPairs], difference[kPairs];
  ADM_RT_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    sum[i] = m[1 + 2 * i] + m[2 + 2 * i];
    difference[i] = m[1 + 2 * i] - m[2 + 2 * i];
  }
  ADM_RT_UNROLL
  for (int k = 0; k < kTile; ++k) {
    const Vec* half = k % 2 == 0 ? sum : difference;
    Vec value = k == 0 ? m[0] + half[0] : Vec::set1(static_cast<float>(w.power[0][k])) * half[0];
    ADM_RT_UNROLL
    for (int i = 1; i < kPairs; ++i) {
      value = k == 0 ? value + half[i]
                     : mul_add(Vec::set1(static_cast<float>(w.power[i][k])), half[i], value);
    }
    y[k] = k == kTile - 1 ? value + m[kTile + 1] : value;
  }
}

// The same for an up-sampled image.
inline void transform(const Vec (&m)[kUpProducts], Vec (&y)[4]) {
  y[0] = m[0] + (m[1] + m[2]);
  y[1] = m[1] + m[3];
  y[2] = m[1] - m[2];
  y[3] = (m[1] - m[3]) + m[4];
}

// The 16 channels at hand.
struct Channels {
  int64_t first;
  int64_t count;  // <= kConvChunk
  Vec bias[kVecs];
};

inline Vec load_channels(const float* p, int64_t count) {
  return count >= kWidth ? Vec::loadu(p) : Vec::load_partial(p, static_cast<int>(count));
}

inline void store_channels(Vec v, float* p, int64_t count) {
  if (count >= kWidth) {
    v.storeu(p);
  } else {
    v.store_partial(p, static_cast<int>(count));
  }
}

// The residual at pixel (row, column) of y; `image` is the residual's first pixel.
inline Vec load_residual(const Conv3x3Shape& s, const float* image, int64_t row, int64_t column,
                         int64_t count) {
  const int64_t channels = s.channels_out;
  switch (s.residual_resample) {
    case Resample::kNone:
      break;
    case Resample::kNearestUp:
      return load_channels(image + (row / 2 * (s.width / 2) + column / 2) * channels, count);
    case Resample::kAveragePool: {
      const float* upper = image + (2 * row * s.residual_width + 2 * column) * channels;
      const float* lower = upper + s.residual_width * channels;
      const Vec sum = (load_channels(upper, count) + load_channels(upper + channels, count)) +
                      (load_channels(lower, count) + load_channels(lower + channels, count));
      return sum * Vec::set1(0.25f);
    }
  }
  return load_channels(image + (row * s.width + column) * channels, count);
}

// What the next tile reads and writes: its lines are so far apart that the hardware fetches none
// ahead. `row`, `column`: its first pixel.
template <int kDown, int kAlong, bool kResidual>
inline void fetch_tile(const Conv3x3Shape& s, const float* m, int64_t m_plane, const float* y_image,
                       const float* residual, int64_t row, int64_t column) {
  for (int64_t plane = 0; plane < kDown * kAlong; ++plane) __builtin_prefetch(m + plane * m_plane);
  if (column >= s.width) return;
  const int64_t below = s.height - row;
  for (int64_t i = 0; i < outputs_of(kDown) && i < below; ++i) {
    const int64_t pixel = ((row + i) * s.width + column) * s.channels_out;
    for (int64_t j = 0; j < outputs_of(kAlong); ++j) {
      __builtin_prefetch(y_image + pixel + j * s.channels_out, 0, 2);
      if (kResidual && s.residual_resample == Resample::kNone) {
        __builtin_prefetch(residual + pixel + j * s.channels_out);
      }
    }
  }
}

// Sums of (y - pilot) and its square, where the pilot is the segment's first value.
struct Moments {
  Vec pilot, sum, square;
};

// A' M A of one tile: pixels row by row, kWidth channels each. Not inlined: one copy for all
// variants of what follows.
template <int kDown, int kAlong>
[[gnu::noinline]] void inverse(const float* m, int64_t m_plane, float* y) {
  constexpr int kTileHeight = outputs_of(kDown), kTileWidth = outputs_of(kAlong);
  Vec down[kTileHeight][kAlong];
  ADM_RT_UNROLL
  for (int j = 0; j < kAlong; ++j) {
    Vec column[kDown], out[kTileHeight];
    ADM_RT_UNROLL
    for (int i = 0; i < kDown; ++i) column[i] = Vec::load(m + (i * kAlong + j) * m_plane);
    transform(column, out);
    ADM_RT_UNROLL
    for (int i = 0; i < kTileHeight; ++i) down[i][j] = out[i];
  }
  ADM_RT_UNROLL
  for (int i = 0; i < kTileHeight; ++i) {
    Vec out[kTileWidth];
    transform(down[i], out);
    ADM_RT_UNROLL
    for (int j = 0; j < kTileWidth; ++j) out[j].store(y + (i * kTileWidth + j) * kWidth);
  }
}

template <int kDown, int kAlong, bool kResidual, bool kMoments>
void output_segment(const Conv3x3Shape& s, const Conv3x3Tensors& t, const Conv3x3Segment& segment,
                    const Channels& c, const float* m, int64_t m_plane, Moments* moments) {
  constexpr int64_t kTileHeight = outputs_of(kDown), kTileWidth = outputs_of(kAlong);
  const Vec scale = Vec::set1(s.output_scale);
  float* y_image = t.y + segment.image * s.height * s.width * s.channels_out + c.first;
  const float* residual = nullptr;
  if constexpr (kResidual) {
    residual = t.residual + segment.image * s.residual_height * s.residual_width * s.channels_out +
               c.first;
  }
  alignas(64) float out[kTileHeight * kTileWidth * kWidth];
  const int64_t row0 = segment.row * kTileHeight;
  const int64_t rows = s.height - row0 < kTileHeight ? s.height - row0 : kTileHeight;
  for (int64_t tile = 0; tile < segment.tiles; ++tile, m += kConvChunk) {
    const int64_t column0 = (segment.column + tile) * kTileWidth;
    const int64_t columns = s.width - column0 < kTileWidth ? s.width - column0 : kTileWidth;
    fetch_tile<kDown, kAlong, kResidual>(s, m + kConvChunk, m_plane, y_image, residual, row0,
                                         column0 + kTileWidth);
    for (int64_t v = 0; v < kVecs && v * kWidth < c.count; ++v) {
      const int64_t first = v * kWidth, count = c.count - first;
      inverse<kDown, kAlong>(m + first, m_plane, out);
      [[maybe_unused]] Moments sum;  // not moments[v] itself, or gcc keeps it in memory
      if constexpr (kMoments) {
        if (tile > 0) {
          sum = moments[v];
        } else {
          Vec pilot = Vec::load(out) + c.bias[v];
          if constexpr (kResidual) {
            pilot = pilot + load_residual(s, residual + first, row0, column0, count);
          }
          sum = {pilot * scale, Vec::zero(), Vec::zero()};
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        float* y = y_image + first + ((row0 + i) * s.width + column0) * s.channels_out;
        for (int64_t j = 0; j < columns; ++j) {
          Vec value = Vec::load(out + (i * kTileWidth + j) * kWidth) + c.bias[v];
          if constexpr (kResidual) {
            value = value + load_residual(s, residual + first, row0 + i, column0 + j, count);
          }
          value = value * scale;
          store_channels(value, y + j * s.channels_out, count);
          if constexpr (kMoments) {
            const Vec d = value - sum.pilot;
            sum.sum = sum.sum + d;
            sum.square = mul_add(d, d, sum.square);
          }
        }
      }
      if constexpr (kMoments) moments[v] = sum;
    }
  }
}

template <int kDown, int kAlong>
void output(const Conv3x3Shape& s, const Conv3x3Tensors& t, const Conv3x3Block& block,
            int64_t chunk, int64_t begin, int64_t end) {
  const int64_t tiles_before = conv3x3_tiles_before(s, block.segment_begin);
  Channels c;
  c.first = chunk * kConvChunk;
  c.count = s.channels_out - c.first < kConvChunk ? s.channels_out - c.first : kConvChunk;
  for (int64_t v = 0; v < kVecs; ++v) {
    const int64_t left = c.count - v * kWidth;
    c.bias[v] = t.bias == nullptr || left <= 0 ? Vec::zero()
                                               : load_channels(t.bias + c.first + v * kWidth, left);
  }
  for (int64_t index = begin; index < end; ++index) {
    const Conv3x3Segment segment = conv3x3_segment(s, index);
    const int64_t tile = conv3x3_tiles_before(s, index) - tiles_before;
    const float* m = block.m + chunk * block.chunk + tile * kConvChunk;
    if (t.moments == nullptr) {
      if (t.residual == nullptr) {
        output_segment<kDown, kAlong, false, false>(s, t, segment, c, m, block.m_plane, nullptr);
      } else {
        output_segment<kDown, kAlong, true, false>(s, t, segment, c, m, block.m_plane, nullptr);
      }
      continue;
    }
    Moments sums[kVecs];
    if (t.residual == nullptr) {
      output_segment<kDown, kAlong, false, true>(s, t, segment, c, m, block.m_plane, sums);
    } else {
      output_segment<kDown, kAlong, true, true>(s, t, segment, c, m, block.m_plane, sums);
    }
    const Vec share = Vec::set1(1.0f / static_cast<float>(conv3x3_segment_pixels(s, segment)));
    float* moments = t.moments + index * 2 * s.channels_out + c.first;
    for (int64_t v = 0; v < kVecs && v * kWidth < c.count; ++v, moments += kWidth) {
      const int64_t left = c.count - v * kWidth;
      const Vec shift = sums[v].sum * share;
      store_channels(sums[v].pilot + shift, moments, left);
      store_channels(max(Vec::zero(), sums[v].square - sums[v].sum * shift),
                     moments + s.channels_out, left);
    }
  }
}

}  // namespace

void conv3x3_output(const Conv3x3Shape& s, const Conv3x3Tensors& t, const Conv3x3Block& block,
                    int64_t chunk, int64_t begin, int64_t end) {
  with_products(s.products_down, s.products_along, [&](auto kDown, auto kAlong) {
    output<kDown, kAlong>(s, t, block, chunk, begin, end);
  });
}

}  // namespace adm_rt::ADM_RT_ISA
