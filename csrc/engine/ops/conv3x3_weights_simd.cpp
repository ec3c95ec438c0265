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
template <int kTile>
inline void transform(const double (&g)[3][kLanes], double (&out)[kTile + 2][kLanes]) {
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

template <int kTile>
void weights_lanes(const float* weights, int64_t channels_in, int64_t lanes, float* packed,
                   int64_t panel_width, int64_t plane) {
  constexpr int kSize = kTile + 2;
  for (int64_t k = 0; k < channels_in; ++k, packed += panel_width) {
    double g[3][3][kLanes] = {};  // [column][row]
    for (int64_t j = 0; j < lanes; ++j) {
      const float* from = weights + (j * channels_in + k) * 9;
      for (int i = 0; i < 9; ++i) g[i % 3][i / 3][j] = from[i];
    }
    double down[kSize][3][kLanes];
    for (int column = 0; column < 3; ++column) {
      double out[kSize][kLanes];
      transform<kTile>(g[column], out);
      for (int i = 0; i < kSize; ++i) {
        for (int64_t j = 0; j < kLanes; ++j) down[i][column][j] = out[i][j];
      }
    }
    for (int i = 0; i < kSize; ++i) {
      double out[kSize][kLanes];
      transform<kTile>(down[i], out);
      for (int column = 0; column < kSize; ++column) {
        float* to = packed + (i * kSize + column) * plane;
        for (int64_t j = 0; j < kLanes; ++j) to[j] = static_cast<float>(out[column][j]);
      }
    }
  }
}

}  // namespace

void conv3x3_weights(int64_t tile, const float* weights, int64_t channels_in, int64_t channels_out,
                     int64_t first, float* packed, int64_t plane) {
  const int64_t panel_width = gemm_panel_width();
  for (int64_t lane = 0; lane < panel_width; lane += kLanes) {
    const float* from = weights + (first + lane) * channels_in * 9;
    int64_t lanes = channels_out - first - lane;
    lanes = lanes < 0 ? 0 : lanes < kLanes ? lanes : kLanes;
    if (tile == 2) weights_lanes<2>(from, channels_in, lanes, packed + lane, panel_width, plane);
    if (tile == 4) weights_lanes<4>(from, channels_in, lanes, packed + lane, panel_width, plane);
    if (tile == 6) weights_lanes<6>(from, channels_in, lanes, packed + lane, panel_width, plane);
  }
}

}  // namespace adm_rt::ADM_RT_ISA
