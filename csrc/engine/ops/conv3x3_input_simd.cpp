// Input transform of conv3x3: V = B' d B for every tile, of d = pad(resample(act(a x + b))).
//
// For 16 channels and one segment, the rows of input are read, activated once per pixel and kept in
// a buffer (the last two serve the segment below as well); then B' runs down all columns, each
// shared by the tiles that overlap there, and B along the rows of each tile.
#include <cstdint>

#include "common/simd.h"
#include "engine/ops/conv3x3_kernels.h"
#include "engine/ops/conv3x3_winograd.h"

namespace adm_rt::ADM_RT_ISA {
namespace {

constexpr int64_t kWidth = Vec::kWidth;
constexpr int64_t kVecs = kConvChunk / kWidth;
constexpr int64_t kMaxSize = 8;  // of an input tile
constexpr int64_t kMaxColumns = kConvSegmentPixels + 2;
constexpr int64_t kRowFloats = kMaxColumns * kConvChunk;

// The 16 channels at hand: where they come from and go to.
struct Channels {
  const float* x;  // pixel (0, 0) of the image
  int64_t stride;  // floats from pixel to pixel
  int64_t count;   // <= kConvChunk
  Vec a[kVecs];
  Vec b[kVecs];
};

inline Vec load_channels(const float* p, int64_t count, int64_t vec) {
  if (count == kConvChunk) return Vec::loadu(p + vec * kWidth);
  const int64_t left = count - vec * kWidth;
  return left <= 0 ? Vec::zero() : Vec::load_partial(p + vec * kWidth, static_cast<int>(left));
}

template <bool kAffine, bool kSilu>
inline Vec activate(const Channels& c, const float* pixel, int64_t vec) {
  Vec x = load_channels(pixel, c.count, vec);
  if constexpr (kAffine) x = mul_add(c.a[vec], x, c.b[vec]);
  if constexpr (kSilu) x = silu(x);
  return x;
}

// Row `row` of the convolution's input, columns [first, first + columns), with zeros outside.
template <bool kAffine, bool kSilu>
void fill_row(const Conv3x3Shape& s, const Channels& c, int64_t row, int64_t first, int64_t columns,
              float* out) {
  int64_t begin = first < 0 ? -first : 0;  // columns inside the image
  int64_t end = s.width - first < columns ? s.width - first : columns;
  if (row < 0 || row >= s.height) begin = end = columns;
  for (int64_t i = 0; i < begin * kConvChunk; i += kWidth) Vec::zero().store(out + i);
  for (int64_t i = end * kConvChunk; i < columns * kConvChunk; i += kWidth) {
    Vec::zero().store(out + i);
  }
  switch (s.resample) {
    case Resample::kNone: {
      const float* in = c.x + (row * s.in_width + first) * c.stride;
      // SiLU takes so long that few pixels are under way at a time: fetch those of the next row.
      const float* below = in + s.in_width * c.stride;
      for (int64_t i = begin; i < end; ++i) {
        __builtin_prefetch(below + i * c.stride);
        for (int64_t v = 0; v < kVecs; ++v) {
          activate<kAffine, kSilu>(c, in + i * c.stride, v)
              .store(out + i * kConvChunk + v * kWidth);
        }
      }
      break;
    }
    case Resample::kAveragePool: {
      const float* upper = c.x + (2 * row * s.in_width + 2 * first) * c.stride;
      const float* lower = upper + s.in_width * c.stride;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t left = 2 * i * c.stride, right = left + c.stride;
        for (int64_t ahead = 2; ahead <= 3; ++ahead) {
          __builtin_prefetch(upper + ahead * s.in_width * c.stride + left);
          __builtin_prefetch(upper + ahead * s.in_width * c.stride + right);
        }
        for (int64_t v = 0; v < kVecs; ++v) {
          const Vec sum = (activate<kAffine, kSilu>(c, upper + left, v) +
                           activate<kAffine, kSilu>(c, upper + right, v)) +
                          (activate<kAffine, kSilu>(c, lower + left, v) +
                           activate<kAffine, kSilu>(c, lower + right, v));
          (sum * Vec::set1(0.25f)).store(out + i * kConvChunk + v * kWidth);
        }
      }
      break;
    }
    case Resample::kNearestUp:
      break;  // conv3x3_kernels.h: the input side never sees it
  }
}

void fill(const Conv3x3Shape& s, const Channels& c, bool affine, int64_t row, int64_t first,
          int64_t columns, float* out) {
  if (affine) {
    return s.silu ? fill_row<true, true>(s, c, row, first, columns, out)
                  : fill_row<true, false>(s, c, row, first, columns, out);
  }
  return s.silu ? fill_row<false, true>(s, c, row, first, columns, out)
                : fill_row<false, false>(s, c, row, first, columns, out);
}

// sum + c * x for a constant of the transform.
inline Vec add_scaled(Vec sum, double c, Vec x) {
  if (c == 1.0) return sum + x;
  if (c == -1.0) return sum - x;
  return mul_add(Vec::set1(static_cast<float>(c)), x, sum);
}

// B' d for one column or row of a tile.
template <int kTile>
inline void transform(const Vec (&d)[kTile + 2], Vec (&out)[kTile + 2]) {
  constexpr Winograd<kTile> w;
  constexpr int kPairs = kTile / 2;
  Vec first = d[kTile], last = d[kTile + 1];  // the leading coefficient is 1
  ADM_RT_UNROLL
  for (int j = 0; j < kPairs; ++j) {
    first = add_scaled(first, w.even[j], d[2 * j]);
    last = add_scaled(last, w.even[j], d[2 * j + 1]);
  }
  out[0] = first;
  out[kTile + 1] = last;
  ADM_RT_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    Vec even = d[kTile], odd = d[kTile - 1];
    ADM_RT_UNROLL
    for (int j = 0; j < kPairs - 1; ++j) {
      even = add_scaled(even, w.odd[i][j], d[2 * j + 2]);
      odd = add_scaled(odd, w.odd[i][j], d[2 * j + 1]);
    }
    out[1 + 2 * i] = add_scaled(even, w.power[i][1], odd);
    out[2 + 2 * i] = add_scaled(even, -w.power[i][1], odd);
  }
}

template <int kTile>
void columns_down(float* const* rows, int64_t columns, float* out) {
  constexpr int kSize = kTile + 2;
  for (int64_t i = 0; i < columns * kConvChunk; i += kWidth) {
    Vec d[kSize], v[kSize];
    ADM_RT_UNROLL
    for (int r = 0; r < kSize; ++r) d[r] = Vec::load(rows[r] + i);
    transform<kTile>(d, v);
    ADM_RT_UNROLL
    for (int r = 0; r < kSize; ++r) v[r].store(out + r * kRowFloats + i);
  }
}

template <int kTile>
void rows_along(const float* in, int64_t rows, int64_t tiles, float* v, int64_t v_plane) {
  constexpr int kSize = kTile + 2;
  for (int64_t r = 0; r < rows; ++r, in += kRowFloats, v += kSize * v_plane) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      ADM_RT_UNROLL
      for (int64_t vec = 0; vec < kVecs; ++vec) {
        const float* from = in + tile * kTile * kConvChunk + vec * kWidth;
        Vec d[kSize], out[kSize];
        ADM_RT_UNROLL
        for (int i = 0; i < kSize; ++i) d[i] = Vec::load(from + i * kConvChunk);
        transform<kTile>(d, out);
        float* to = v + tile * kConvChunk + vec * kWidth;
        ADM_RT_UNROLL
        for (int i = 0; i < kSize; ++i) out[i].store(to + i * v_plane);
      }
    }
  }
}

// Stores wait for their lines: so many planes apart, the hardware fetches none ahead.
inline void fetch_planes(const float* v, int64_t planes, int64_t tiles, int64_t v_plane) {
  for (int64_t plane = 0; plane < planes; ++plane) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      __builtin_prefetch(v + plane * v_plane + tile * kConvChunk, 1, 2);
    }
  }
}

template <int kTileHeight, int kTileWidth>
void input(const Conv3x3Shape& s, const Conv3x3Tensors& t, const Conv3x3Block& block, int64_t chunk,
           int64_t begin, int64_t end) {
  constexpr int kRows = kTileHeight + 2, kColumns = kTileWidth + 2;  // of an input tile
  alignas(64) float buffer[kMaxSize * kRowFloats];
  alignas(64) float down[kMaxSize * kRowFloats];
  float* rows[kRows];
  for (int64_t r = 0; r < kRows; ++r) rows[r] = buffer + r * kRowFloats;

  // The chunk's source, and its first channel there and in the concatenation.
  const int64_t chunks1 = (s.channels1 + kConvChunk - 1) / kConvChunk;
  const bool second = chunk >= chunks1;
  const int64_t channels = second ? s.channels2 : s.channels1;
  const int64_t channel = (second ? chunk - chunks1 : chunk) * kConvChunk;
  const int64_t joined = channel + (second ? s.channels1 : 0);
  Channels c;
  c.stride = channels;
  c.count = channels - channel < kConvChunk ? channels - channel : kConvChunk;

  const int64_t tiles_before = conv3x3_tiles_before(s, block.segment_begin);
  int64_t image = -1;
  for (int64_t index = begin; index < end; ++index) {
    const Conv3x3Segment segment = conv3x3_segment(s, index);
    if (segment.image != image) {
      image = segment.image;
      c.x = (second ? t.x2 : t.x) + image * s.in_height * s.in_width * channels + channel;
      if (t.affine != nullptr) {
        const int64_t all = s.channels1 + s.channels2;
        const float* a = t.affine + image * 2 * all + joined;
        for (int64_t v = 0; v < kVecs; ++v) {
          c.a[v] = load_channels(a, c.count, v);
          c.b[v] = load_channels(a + all, c.count, v);
        }
      }
    }
    const int64_t columns = segment.tiles * kTileWidth + 2;
    int64_t have = 0;  // rows left over from the segment above
    if (index > begin && segment.row > 0) {
      have = 2;
      float* old[kRows];
      for (int64_t r = 0; r < kRows; ++r) old[r] = rows[r];
      for (int64_t r = 0; r < kRows; ++r) rows[r] = old[(r + kTileHeight) % kRows];
    }
    const int64_t tile = conv3x3_tiles_before(s, index) - tiles_before;
    float* v = block.v + chunk * block.chunk + tile * kConvChunk;
    for (int64_t r = have; r < kRows; ++r) {
      const int64_t before = (r - have) * kRows / (kRows - have) * kColumns;
      const int64_t after = (r - have + 1) * kRows / (kRows - have) * kColumns;
      fetch_planes(v + before * block.v_plane, after - before, segment.tiles, block.v_plane);
      fill(s, c, t.affine != nullptr, segment.row * kTileHeight - 1 + r,
           segment.column * kTileWidth - 1, columns, rows[r]);
    }
    columns_down<kTileHeight>(rows, columns, down);
    rows_along<kTileWidth>(down, kRows, segment.tiles, v, block.v_plane);
  }
}

}  // namespace

void conv3x3_input(const Conv3x3Shape& s, const Conv3x3Tensors& t, const Conv3x3Block& block,
                   int64_t chunk, int64_t begin, int64_t end) {
  with_products(s.products_down, s.products_along, [&](auto kDown, auto kAlong) {
    if constexpr (kDown != kUpProducts) {  // never asked for: conv3x3_kernels.h
      input<outputs_of(kDown), outputs_of(kAlong)>(s, t, block, chunk, begin, end);
    }
  });
}

}  // namespace adm_rt::ADM_RT_ISA
