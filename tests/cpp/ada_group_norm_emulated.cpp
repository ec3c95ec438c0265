// The CUDA kernels of ada_group_norm and their launchers under the emulator. C interface for
// ctypes; the arguments are those of python/bind_cuda_ada_group_norm.cpp as arrays. Returns 0, or 1
// with a message in error_text().
#define ADM_RT_EMULATOR
#include <cstdint>
#include <exception>
#include <string>

#include "ops/ada_group_norm_backward_cuda.cu"
#include "ops/ada_group_norm_cuda.cu"

namespace {

using namespace adm_rt;

std::string error;

template <class Run>
int guarded(const Run& run) {
  try {
    run();
    return 0;
  } catch (const std::exception& exception) {
    error = exception.what();
    return 1;
  }
}

AdaGroupNormCudaShape shape_of(const int64_t* sizes, const double* options) {
  AdaGroupNormCudaShape s;
  s.batch = sizes[0], s.channels = sizes[1], s.skip_channels = sizes[2];
  s.height = sizes[3], s.width = sizes[4], s.groups = sizes[5];
  s.eps = static_cast<float>(options[0]);
  s.silu = options[1] != 0;
  s.dtype = static_cast<DType>(options[2]);
  s.layout =
      options[3] != 0 ? AdaGroupNormLayout::kChannelsLast : AdaGroupNormLayout::kChannelsFirst;
  s.resample = static_cast<Resample>(options[4]);
  s.scale_shift_dtype = static_cast<DType>(options[5]);
  s.scale_shift_stride = static_cast<int64_t>(options[6]);
  return s;
}

template <class T>
T* at(const uintptr_t* addresses, int i) {
  return reinterpret_cast<T*>(addresses[i]);
}

}  // namespace

extern "C" {

const char* error_text() { return error.c_str(); }

// 0 forward, 1 reverse, 2 shuffled with that seed.
void set_schedule(int schedule, unsigned seed) {
  simt::Emulator::get().schedule = static_cast<simt::Schedule>(schedule);
  simt::Emulator::get().seed = seed;
}

int64_t workspace_bytes(const int64_t* sizes, const double* options) {
  int64_t bytes = -1;
  guarded([&] { bytes = ada_group_norm_cuda_workspace(shape_of(sizes, options)); });
  return bytes;
}

// 1 when the forward pass of aligned tensors is one kernel.
int is_on_chip(const int64_t* sizes, const double* options) {
  const AdaGroupNormCudaShape s = shape_of(sizes, options);
  return norm_slab(s, norm_wide_shape(s)).channels > 0;
}

int chunk_count(const int64_t* sizes, const double* options) {
  return norm_chunks(shape_of(sizes, options)).count;
}

int run_forward(const int64_t* sizes, const double* options, const uintptr_t* inputs,
                const uintptr_t* outputs, void* workspace) {
  return guarded([&] {
    AdaGroupNormCudaParams p;
    p.shape = shape_of(sizes, options);
    p.x = at<const void>(inputs, 0), p.skip = at<const void>(inputs, 1);
    p.weight = at<const float>(inputs, 2), p.bias = at<const float>(inputs, 3);
    p.scale_shift = at<const void>(inputs, 4);
    p.x_moments = at<const float>(inputs, 5), p.skip_moments = at<const float>(inputs, 6);
    p.y = at<void>(outputs, 0), p.x_out = at<void>(outputs, 1);
    p.mean = at<float>(outputs, 2), p.rstd = at<float>(outputs, 3);
    ada_group_norm_cuda(p, workspace, nullptr);
  });
}

int run_backward(const int64_t* sizes, const double* options, const uintptr_t* inputs,
                 const uintptr_t* outputs, void* workspace) {
  return guarded([&] {
    AdaGroupNormCudaBackwardParams p;
    p.shape = shape_of(sizes, options);
    p.grad = at<const void>(inputs, 0), p.grad_x_out = at<const void>(inputs, 1);
    p.x = at<const void>(inputs, 2), p.skip = at<const void>(inputs, 3);
    p.mean = at<const float>(inputs, 4), p.rstd = at<const float>(inputs, 5);
    p.weight = at<const float>(inputs, 6), p.bias = at<const float>(inputs, 7);
    p.scale_shift = at<const void>(inputs, 8);
    p.dx = at<void>(outputs, 0), p.dskip = at<void>(outputs, 1);
    p.dweight = at<float>(outputs, 2), p.dbias = at<float>(outputs, 3);
    p.dscale_shift = at<float>(outputs, 4);
    ada_group_norm_backward_cuda(p, workspace, nullptr);
  });
}

int run_moments(const int64_t* sizes, const double* options, const void* x, float* moments,
                void* workspace) {
  return guarded(
      [&] { channel_moments_cuda(shape_of(sizes, options), x, moments, workspace, nullptr); });
}

}  // extern "C"
