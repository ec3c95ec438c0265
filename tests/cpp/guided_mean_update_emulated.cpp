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
template <bool kVector, bool kPixels>
void run_with(const GuidedMeanUpdateParams& p, const GuidedMeanUpdateCuda& cuda, unsigned blocks) {
  simt::Launch shape = {"guided_mean_update"};
  shape.blocks_x = blocks, shape.blocks_y = static_cast<unsigned>(p.images);
  shape.threads = kUpdateThreads;
  const StepTable steps = {reinterpret_cast<const StepCoefficients*>(cuda.table), cuda.step_counter,
                           cuda.arrivals};
  const float* limits = nullptr;
  simt::launch<guided_mean_update_kernel<UpdatePass::kWhole, kVector, kPixels>>(
      shape, nullptr, p, cuda.pixel_major, steps, limits);
}

template <class Run>
int guarded(int schedule, const Run& run) {
  simt::Emulator::get().schedule = static_cast<simt::Schedule>(schedule);
  try {
    run();
    return 0;
  } catch (const std::exception& exception) {
    error = exception.what();
    return 1;
  }
}

ADM_RT_KERNEL philox_kernel(const uint32_t* counter, const uint32_t* key, uint32_t* words) {
  Uint1 state[4] = {{counter[0]}, {counter[1]}, {counter[2]}, {counter[3]}};
  philox4x32(state, Uint1{key[0]}, Uint1{key[1]});
  for (int i = 0; i < 4; ++i) words[i] = state[i].v;
}

// normals [images, size]: block_x over counters, block_y over images.
ADM_RT_KERNEL normals_kernel(const int64_t* seeds, int64_t size, uint32_t step, uint32_t purpose,
                             float* normals) {
  const unsigned counter = simt::block_x() * simt::threads_x() + simt::thread_x();
  const int64_t image = simt::block_y();
  Float1 four[4];
  philox_normals<Float1, Uint1>(static_cast<uint64_t>(seeds[image]), counter, step, purpose, four);
  for (int64_t i = 4 * int64_t{counter}; i < size && i < 4 * int64_t{counter} + 4; ++i) {
    normals[image * size + i] = four[i % 4].v;
  }
}

}  // namespace

extern "C" {

const char* error_text() { return error.c_str(); }

int run_philox(const uint32_t* counter, const uint32_t* key, uint32_t* words) {
  return guarded(0, [&] {
    simt::launch<philox_kernel>({"philox", 1, 1, 1, 1}, nullptr, counter, key, words);
  });
}

int run_normals(const int64_t* seeds, unsigned images, int64_t size, uint32_t step,
                uint32_t purpose, float* normals) {
  return guarded(0, [&] {
    const unsigned blocks = static_cast<unsigned>((size + 4 * 64 - 1) / (4 * 64));
    simt::launch<normals_kernel>({"normals", blocks, images, 1, 64}, nullptr, seeds, size, step,
                                 purpose, normals);
  });
}

// shape: images, channels, pixels, model_channels, uncond_channels. device: addresses of table,
// step counter, arrivals, limits, two copies, image. layout: model_output and gradient by pixels;
// channels and dtype of the two copies. vector: -1 as the launcher does it (*used_vector tells
// how), 1 four elements at once or 0 one at a time, in `blocks` blocks.
int run_update(const float* coefficients, const int64_t* shape, const uintptr_t* inputs,
               const uintptr_t* outputs, const int* dtypes, uint32_t step, int learned_variance,
               int clip, double quantile, const uintptr_t* device, const int* layout,
               unsigned blocks, int schedule, int vector, int* used_vector) {
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
  GuidedMeanUpdateCuda cuda;
  cuda.table = reinterpret_cast<const float*>(device[0]);
  cuda.step_counter = reinterpret_cast<uint32_t*>(device[1]);
  cuda.arrivals = reinterpret_cast<uint32_t*>(device[2]);
  cuda.limits = reinterpret_cast<float*>(device[3]);
  cuda.pixel_major.model_output = layout[0] != 0;
  cuda.pixel_major.gradient = layout[1] != 0;
  for (int k = 0; k < 2; ++k) {
    cuda.pixel_major.copies[k].data = reinterpret_cast<void*>(device[4 + k]);
    cuda.pixel_major.copies[k].channels = layout[2 + 2 * k];
    cuda.pixel_major.copies[k].dtype = static_cast<DType>(layout[3 + 2 * k]);
  }
  cuda.pixel_major.image = reinterpret_cast<uint8_t*>(device[6]);
  const bool pixels = cuda.pixel_major.any();
  *used_vector = vector < 0 ? vectorizable(p, pixels) : vector != 0;
  return guarded(schedule, [&] {
    if (vector < 0) return guided_mean_update_cuda(p, cuda, nullptr);
    if (pixels)
      return vector ? run_with<true, true>(p, cuda, blocks)
                    : run_with<false, true>(p, cuda, blocks);
    return vector ? run_with<true, false>(p, cuda, blocks)
                  : run_with<false, false>(p, cuda, blocks);
  });
}

}  // extern "C"
