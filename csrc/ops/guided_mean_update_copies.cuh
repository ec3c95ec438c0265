// Device code of guided_mean_update: x_next once more, pixel-major, as the networks and the viewer
// take it.
#pragma once

#include "common/exact_math.h"
#include "ops/guided_mean_update_cuda.h"
#include "simt/simt.h"

namespace adm_rt {

// Four pixels in up to kPixelMajorChannels channels, in registers: indices that the compiler knows.
struct PixelLanes {
  float values[kPixelMajorChannels][4];  // [channel][pixel]

  ADM_RT_DEVICE void set(int channel, const Float1 (&lanes)[4]) {
    ADM_RT_UNROLL for (int c = 0; c < kPixelMajorChannels; ++c) {
      ADM_RT_UNROLL for (int i = 0; i < 4; ++i) {
        if (c == channel) values[c][i] = lanes[i].v;
      }
    }
  }
};

// The published quantisation, by truncation.
ADM_RT_DEVICE uint32_t to_uint8(float x) {
  const float scaled = simt::mul_rn(simt::add_rn(x, 1.0f), 127.5f);
  return static_cast<uint32_t>(simt::minimum(255.0f, simt::maximum(0.0f, scaled)));
}

// Three channels without a gap: four pixels are 24 bytes.
template <class T>
ADM_RT_DEVICE void store_dense3(T* to, const PixelLanes& lanes) {
  uint32_t words[6];
  ADM_RT_UNROLL for (int i = 0; i < 6; ++i) {
    const int low = 2 * i, high = 2 * i + 1;
    words[i] = simt::pack2<T>(lanes.values[low % 3][low / 3], lanes.values[high % 3][high / 3]);
  }
  ADM_RT_UNROLL for (int i = 0; i < 3; ++i) {
    simt::store8(to + 4 * i, {{words[2 * i], words[2 * i + 1]}});
  }
}

template <bool kVector, class T>
ADM_RT_DEVICE void store_copy(const GuidedMeanUpdateParams& p, const PixelMajor::Copy& copy,
                              int64_t pixel, int n, const PixelLanes& lanes) {
  T* const to = static_cast<T*>(copy.data) + pixel * copy.channels;
  if (kVector && copy.dense3) return store_dense3<T>(to, lanes);
  ADM_RT_UNROLL for (int i = 0; i < 4; ++i) {
    ADM_RT_UNROLL for (int c = 0; c < kPixelMajorChannels; ++c) {
      if (i < n && c < p.channels) {
        to[i * copy.channels + c] = simt::from_float<T>(lanes.values[c][i]);
      }
    }
  }
}

template <bool kVector>
ADM_RT_DEVICE void store_copies(const GuidedMeanUpdateParams& p, const PixelMajor& pixel_major,
                                int64_t image, int64_t pixel, const PixelLanes& lanes) {
  const int64_t at = image * p.pixels + pixel;
  const int n = p.pixels - pixel < 4 ? static_cast<int>(p.pixels - pixel) : 4;
  ADM_RT_UNROLL for (int k = 0; k < 2; ++k) {
    const PixelMajor::Copy& copy = pixel_major.copies[k];
    if (copy.data == nullptr) continue;
    if (copy.dtype == DType::kBFloat16) {
      store_copy<kVector, simt::BFloat16>(p, copy, at, n, lanes);
    } else {
      store_copy<kVector, simt::Half>(p, copy, at, n, lanes);
    }
  }
  if (pixel_major.image == nullptr) return;
  ADM_RT_UNROLL for (int i = 0; i < 4; ++i) {
    ADM_RT_UNROLL for (int c = 0; c < kPixelMajorChannels; ++c) {
      if (i < n && c < p.channels) {
        pixel_major.image[(at + i) * p.channels + c] =
            static_cast<uint8_t>(to_uint8(lanes.values[c][i]));
      }
    }
  }
}

}  // namespace adm_rt
