// The launcher of guided_mean_update on CUDA, for C++ that does not include CUDA's headers.
#pragma once

#include <cstdint>

#include "ops/guided_mean_update.h"

namespace adm_rt {

constexpr int kPixelMajorChannels = 4;  // the most that PixelMajor takes

// What lies pixel-major (NHWC, torch's channels_last), and x_next once more in that order. Needs at
// most kPixelMajorChannels channels. Device pointers; null: not wanted.
struct PixelMajor {
  bool model_output = false;  // model_output and uncond_output: [images, pixels, their channels]
  bool gradient = false;      // [images, pixels, channels]
  struct Copy {
    void* data = nullptr;  // [images, pixels, channels]: x_next in the first ones, for a network;
                           // the others keep what they hold (padding, or an upsampler's input)
    int64_t channels = 0;  // >= the image's
    DType dtype = DType::kBFloat16;  // or kFloat16
    bool dense3 = false;             // set by the launcher: three channels, 8-byte aligned
  } copies[2];
  uint8_t* image =
      nullptr;  // [images, pixels, channels]: (x_next + 1) * 127.5, 0 to 255, truncated

  bool any() const {
    return model_output || gradient || copies[0].data != nullptr || copies[1].data != nullptr ||
           image != nullptr;
  }
};

// What the step has on CUDA beyond the CPU's. Device pointers.
struct GuidedMeanUpdateCuda {
  // Rows of StepCoefficients, float32 [steps, 18], and uint32 [1], the row to use; both null:
  // params.coefficients and params.step.
  const float* table = nullptr;
  uint32_t* step_counter = nullptr;
  // uint32 [1], zero before the first call: given, the kernel adds one to the step counter when all
  // of it have read it, so that a replayed graph goes on by itself. Null: the caller advances.
  uint32_t* arrivals = nullptr;
  float* limits = nullptr;  // float32 [images], for Clip::kDynamic alone
  PixelMajor pixel_major = {};
};

// Enqueues the step on `stream` (a cudaStream_t) and returns: no allocation, no synchronisation, so
// a graph can capture it. All pointers in params are device pointers on the current device;
// model_output, uncond_output and gradient may be float16 too.
//
// Throws std::invalid_argument for bad params, std::runtime_error for what CUDA reports.
void guided_mean_update_cuda(const GuidedMeanUpdateParams& params, const GuidedMeanUpdateCuda& cuda,
                             void* stream);

}  // namespace adm_rt
