// The CUDA kernels and launcher of guided_mean_update under the emulator. C interface for ctypes;
// returns 0, or 1 with a message in error_text().
#define ADM_RT_EMULATOR
#include <cstring>
#include <exception>
#include <string>

#include "ops/guided_mean_update_cuda.cu"

namespace {

using namespace adm_rt;

std::string error;

// As the launcher does, with a number of blocks and a width of the test's choice.
void run_with(const GuidedMeanUpdateParams& p, const StepTable& steps, unsigned blocks,
              bool vector) {
  simt::Launch shape = {"guided_mean_update"};
  shape.blocks_x = blocks, shape.blocks_y = static_cast<unsigned>(p.images);
  shape.threads = kUpdateThreads;
  const float* limits = nullptr;
  if (vector) {
    simt::launch<guided_mean_update_kernel<UpdatePass::kWhole, true>>(shape, nullptr, p, steps,
                                                                      limits);
  } else {
    simt::launch<guided_mean_update_kernel<UpdatePass::kWhole, false>>(shape, nullptr, p, steps,
                                                                       limits);
  }
}

}  // namespace

extern "C" {

const char* error_text() { return error.c_str(); }

// shape: images, channels, pixels, model_channels, uncond_channels. vector: -1 as the launcher does
// it (*used_vector tells how), 1 four elements at once or 0 one at a time, in `blocks` blocks.
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
  simt::Emulator::get().schedule = static_cast<simt::Schedule>(schedule_code);
  *used_vector = vector < 0 ? vectorizable(p) : vector != 0;
  try {
    if (vector < 0) {
      guided_mean_update_cuda(p, table, step_counter, limits, nullptr);
    } else {
      run_with(p, steps, blocks, vector != 0);
    }
    return 0;
  } catch (const std::exception& exception) {
    error = exception.what();
    return 1;
  }
}

}  // extern "C"
