// What conv3x3.cpp and its per-ISA kernels share.
//
// A tile is tile_height x tile_width outputs. A strip is a column of tiles, strip_tiles wide and as
// high as the image; one tile row of it is a segment, the unit in which work is cut. Segments are
// numbered image by image, strip by strip, downwards, so that neighbours in number share two rows
// of input. A block is a range of segments whose transformed inputs (V) and products (M) stay in
// cache:
//   V[plane][chunk of x, then of x2][tile of the block][channel of the chunk]
//   M[plane][chunk of y][tile of the block][channel of the chunk]
// with zeros behind the last channel of x and of x2.
// Up-sampled images are transformed as they were before: the input side sees the shape of an F(2x2)
// on x, which has as many tiles.
#pragma once

#include <cstdint>

#include "engine/gemm.h"

namespace adm_rt {

// Channels that the transforms take at a time: one cache line, and a chunk of gemm.h.
constexpr int64_t kConvChunk = kGemmChunk;
// The widest segment, in pixels of the output.
constexpr int64_t kConvSegmentPixels = 36;

enum class Resample : int64_t { kNone = 0, kAveragePool = 1, kNearestUp = 2 };

struct Conv3x3Shape {
  int64_t height = 0, width = 0;        // of y
  int64_t in_height = 0, in_width = 0;  // of x and x2
  int64_t channels1 = 0, channels2 = 0, channels_out = 0;
  int64_t residual_height = 0, residual_width = 0;
  Resample resample = Resample::kNone;
  Resample residual_resample = Resample::kNone;
  bool silu = false;
  float output_scale = 1.0f;

  int64_t tile_height = 4, tile_width = 4;        // in outputs
  int64_t products_down = 6, products_along = 6;  // of a tile
  int64_t tile_rows = 0, tile_columns = 0;
  int64_t strip_tiles = 0;
  int64_t segments = 0;  // of an image

  int64_t planes() const { return products_down * products_along; }
};

struct Conv3x3Tensors {
  const float* x = nullptr;         // [batch, in_height, in_width, channels1]
  const float* x2 = nullptr;        // [batch, in_height, in_width, channels2] or null
  const float* affine = nullptr;    // [batch, 2, channels1 + channels2] or null
  const float* residual = nullptr;  // like y before residual_resample, or null
  const float* bias = nullptr;      // [channels_out] or null
  float* y = nullptr;               // [batch, height, width, channels_out]
  // Mean and sum of squared deviations of every segment, [batch * segments, 2, channels_out], or
  // null.
  float* moments = nullptr;
};

struct Conv3x3Block {
  int64_t segment_begin = 0, segment_end = 0;  // of all images
  int64_t tiles = 0;
  float* v = nullptr;
  float* m = nullptr;
  int64_t chunk = 0;                 // floats from chunk to chunk
  int64_t v_plane = 0, m_plane = 0;  // and from plane to plane
};

struct Conv3x3Segment {
  int64_t image, row, column;  // of the first tile
  int64_t tiles;
};

// Internal linkage: each instruction set has a copy of its own.
static inline Conv3x3Segment conv3x3_segment(const Conv3x3Shape& s, int64_t index) {
  const int64_t image = index / s.segments;
  const int64_t strip = index % s.segments / s.tile_rows;
  const int64_t column = strip * s.strip_tiles;
  const int64_t left = s.tile_columns - column;
  return {image, index % s.tile_rows, column, left < s.strip_tiles ? left : s.strip_tiles};
}

// Tiles of all images before segment `index`.
static inline int64_t conv3x3_tiles_before(const Conv3x3Shape& s, int64_t index) {
  const int64_t image = index / s.segments;
  const int64_t strip = index % s.segments / s.tile_rows;
  const int64_t row = index % s.tile_rows;
  const int64_t left = s.tile_columns - strip * s.strip_tiles;
  return (image * s.tile_columns + strip * s.strip_tiles) * s.tile_rows +
         row * (left < s.strip_tiles ? left : s.strip_tiles);
}

static inline int64_t conv3x3_segment_pixels(const Conv3x3Shape& s, const Conv3x3Segment& segment) {
  const int64_t rows = s.height - segment.row * s.tile_height;
  const int64_t columns = s.width - segment.column * s.tile_width;
  const int64_t widest = segment.tiles * s.tile_width;
  return (rows < s.tile_height ? rows : s.tile_height) * (columns < widest ? columns : widest);
}

// Chunks of input channels: those of x, then those of x2; a chunk never holds both.
static inline int64_t conv3x3_input_chunks(const Conv3x3Shape& s) {
  return (s.channels1 + kConvChunk - 1) / kConvChunk + (s.channels2 + kConvChunk - 1) / kConvChunk;
}

static inline int64_t conv3x3_output_chunks(const Conv3x3Shape& s) {
  return (s.channels_out + kConvChunk - 1) / kConvChunk;
}

#define ADM_RT_DECLARE_CONV3X3(ISA)                                                               \
  namespace ISA {                                                                                 \
  /* V of input chunk `chunk` for segments [begin, end) of the block. */                          \
  void conv3x3_input(const Conv3x3Shape& s, const Conv3x3Tensors& t, const Conv3x3Block& block,   \
                     int64_t chunk, int64_t begin, int64_t end);                                  \
  /* y, and the moments, of output chunk `chunk` for segments [begin, end). */                    \
  void conv3x3_output(const Conv3x3Shape& s, const Conv3x3Tensors& t, const Conv3x3Block& block,  \
                      int64_t chunk, int64_t begin, int64_t end);                                 \
  /* One panel of transformed weights for every plane: packed[plane][channel of the chunks of x   \
     and x2][j] for output channel first + j, zero behind the last channels; `plane` floats from  \
     plane to plane. weights is [channels_out, channels_in, 3, 3]. */                             \
  void conv3x3_weights(const Conv3x3Shape& s, const float* weights, int64_t first, float* packed, \
                       int64_t plane);                                                            \
  }
ADM_RT_DECLARE_CONV3X3(portable)
ADM_RT_DECLARE_CONV3X3(avx2)
ADM_RT_DECLARE_CONV3X3(avx512)
#undef ADM_RT_DECLARE_CONV3X3

}  // namespace adm_rt
