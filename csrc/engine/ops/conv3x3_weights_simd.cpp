// Weight transform of conv3x3: U = G g G' in double, packed for gemm.h.
#include <cstdint>

#include "common/simd.h"
#include "engine/gemm.h"
#include "engine/ops/conv3x3_kernels.h"
#include "engine/ops/conv3x3_winograd.h"

namespace adm_rt::ADM_RT_ISA {
namespace {

constexpr int64_t kLanes = 16;  // output channels at a time: arrays of them are vectorised

// G g for a column or row of three, for kLanes channels.
template <int kProducts>
inline void transform(const double (&g)[3][kLanes], double (&out)[kProducts][kLanes]) {
  constexpr int kTile = outputs_of(kProducts);
  constexpr Winograd<kTile> w;
  for (int64_t j = 0; j < kLanes; ++j) {
    out[0][j] = w.weight_zero * g[0][j];
    out[kTile + 1][j] = g[2][j];
  }
  for (int i = 0; i < kTile / 2; ++i) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const double even = w.weight[i][0] * g[0][j] + w.weight[i][2] * g[2][j];
      const double odd = w.weight[i][1] * g[1][j];
      out[1 + 2 * i][j] = even + odd;
      out[2 + 2 * i][j] = even - odd;
    }
  }
}

// The same for an image that is up-sampled.
inline void transform(const double (&g)[3][kLanes], double (&out)[kUpProducts][kLanes]) {
  for (int64_t j = 0; j < kLanes; ++j) {
    out[0][j] = -g[0][j];
    out[1][j] = 0.5 * (g[0][j] + g[1][j] + g[2][j]);
    out[2][j] = 0.5 * (g[0][j] - (g[1][j] + g[2][j]));
    out[3][j] = 0.5 * (g[2][j] - (g[0][j] + g[1][j]));
    out[4][j] = g[2][j];
  }
}

// Of `channels` input channels, zeros behind them up to a whole chunk. Returns the end of `packed`.
template <int kDown, int kAlong>
float* weights_lanes(const float* weights, int64_t channels_in, int64_t channels, int64_t lanes,
                     float* packed, int64_t panel_width, int64_t plane) {
  const int64_t rows = (channels + kConvChunk - 1) / kConvChunk * kConvChunk;
  for (int64_t k = 0; k < rows; ++k, packed += panel_width) {
    double g[3][3][kLanes] = {};  // [column][row]
    for (int64_t j = 0; j < (k < channels ? lanes : 0); ++j) {
      const float* from = weights + (j * channels_in + k) * 9;
      for (int i = 0; i < 9; ++i) g[i % 3][i / 3][j] = from[i];
    }
    double down[kDown][3][kLanes];
    for (int column = 0; column < 3; ++column) {
      double out[kDown][kLanes];
      transform(g[column], out);
      for (int i = 0; i < kDown; ++i) {
        for (int64_t j = 0; j < kLanes; ++j) down[i][column][j] = out[i][j];
      }
    }
    for (int i = 0; i < kDown; ++i) {
      double out[kAlong][kLanes];
      transform(down[i], out);
      for (int column = 0; column < kAlong; ++column) {
        float* to = packed + (i * kAlong + column) * plane;
        for (int64_t j = 0; j < kLanes; ++j) to[j] = static_cast<float>(out[column][j]);
      }
    }
  }
  return packed;
}

}  // namespace

void conv3x3_weights(const Conv3x3Shape& s, const float* weights, int64_t first, float* packed,
                     int64_t plane) {
  const int64_t panel_width = gemm_panel_width(), channels_in = s.channels1 + s.channels2;
  for (int64_t lane = 0; lane < panel_width; lane += kLanes) {
    const float* from = weights + (first + lane) * channels_in * 9;
    int64_t lanes = s.channels_out - first - lane;
    lanes = lanes < 0 ? 0 : lanes < kLanes ? lanes : kLanes;
    with_products(s.products_down, s.products_along, [&](auto kDown, auto kAlong) {
      float* to = weights_lanes<kDown, kAlong>(from, channels_in, s.channels1, lanes, packed + lane,
                                               panel_width, plane);
      weights_lanes<kDown, kAlong>(from + s.channels1 * 9, channels_in, s.channels2, lanes, to,
                                   panel_width, plane);
    });
  }
}

}  // namespace adm_rt::ADM_RT_ISA
