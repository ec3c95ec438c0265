// The CUDA kernels of guided_mean_update under the emulator, launched as guided_mean_update_cuda.cu
// launches them. C interface for ctypes; returns 0, or 1 with a message in error_text().
#define ADM_RT_EMULATOR
#include <cstring>
#include <exception>
#include <string>

#include "ops/guided_mean_update.cuh"
#include "simt/simt.h"

namespace {

using namespace adm_rt;

std::string error;

template <UpdatePass pass, bool vector>
void launch(const GuidedMeanUpdateParams& p, const StepTable& table, const float* limits,
            unsigned blocks, simt::Schedule schedule) {
  simt::Emulator::get().launch(blocks, static_cast<unsigned>(p.images), kUpdateThreads, schedule,
                               [&] { guided_mean_update_kernel<pass, vector>(p, table, limits); });
}

template <UpdatePass pass>
void launch(const GuidedMeanUpdateParams& p, const StepTable& table, const float* limits,
            unsigned blocks, simt::Schedule schedule, bool vector) {
  if (vector) {
    launch<pass, true>(p, table, limits, blocks, schedule);
  } else {
    launch<pass, false>(p, table, limits, blocks, schedule);
  }
}

}  // namespace

extern "C" {

const char* error_text() { return error.c_str(); }

// shape: images, channels, pixels, model_channels, uncond_channels. vector: 1 four elements at
// once, 0 one at a time, -1 as the launcher decides; *used_vector tells.
int run_update(const float* coefficients, const int64_t* shape, const uintptr_t* inputs,
               const uintptr_t* outputs, const int* dtypes, uint32_t step, int learned_variance,
               int clip, double quantile, const float* table, const uint32_t* step_counter,
               float* limits, unsigned blocks, int schedule_code, int vector, int* used_vector) {
  GuidedMeanUpdateParams p;
  std::memcpy(&p.coefficients, coefficients, sizeof(p.coefficients));
  p.images = shape[0], p.channels = shape[1], p.pixels = shape[2];
  p.model_channels = shape[3], p.uncond_channels = shape[4];
  const auto input = [&](int i) { return reinterpret_cast<const float*>(inputs[i]); };
  p.x = input(0), p.model_output = input(1), p.uncond_output = input(2), p.gradient = input(3);
  for (int j = 0; j < 3; ++j) p.history[j] = input(4 + j);
  p.z = input(7);
  p.seeds = reinterpret_cast<const int64_t*>(inputs[8]);
  p.x_next = reinterpret_cast<float*>(outputs[0]);
  p.x0 = reinterpret_cast<float*>(outputs[1]);
  p.state = reinterpret_cast<float*>(outputs[2]);
  p.model_dtype = static_cast<DType>(dtypes[0]);
  p.gradient_dtype = static_cast<DType>(dtypes[1]);
  p.step = step;
  p.learned_variance = learned_variance != 0;
  p.clip = static_cast<Clip>(clip);
  p.quantile = quantile;
  const StepTable steps = {reinterpret_cast<const StepCoefficients*>(table), step_counter};
  const auto schedule = static_cast<simt::Schedule>(schedule_code);
  const bool wide = vector < 0 ? vectorizable(p) : vector != 0;
  *used_vector = wide;
  try {
    if (p.clip != Clip::kDynamic) {
      launch<UpdatePass::kWhole>(p, steps, nullptr, blocks, schedule, wide);
      return 0;
    }
    const int64_t size = p.channels * p.pixels;
    const QuantileRank rank = quantile_rank(p.quantile, size);
    launch<UpdatePass::kPredict>(p, steps, nullptr, blocks, schedule, wide);
    simt::Emulator::get().launch(static_cast<unsigned>(p.images), 1, kSelectThreads, schedule, [&] {
      guided_mean_update_select_kernel(p.x0, size, static_cast<uint32_t>(rank.low),
                                       rank.high > rank.low, rank.fraction, limits);
    });
    launch<UpdatePass::kFinish>(p, steps, limits, blocks, schedule, wide);
    return 0;
  } catch (const std::exception& exception) {
    error = exception.what();
    return 1;
  }
}

}  // extern "C"
