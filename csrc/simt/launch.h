// Launching kernels, and what a launcher asks the device. The same launcher runs on CUDA and, built
// with ADM_RT_EMULATOR by a plain C++ compiler, under the emulator.
//
//   simt::launch<my_kernel<Half, true>>(shape, stream, arguments...);  // shape: a Launch
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "simt/simt.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <atomic>
#endif

namespace adm_rt::simt {

struct Launch {
  const char* name = "kernel";  // of the op, for errors
  unsigned blocks_x = 1, blocks_y = 1, blocks_z = 1;
  unsigned threads = 32;
  size_t shared_bytes = 0;  // dynamic; above 48 KiB is opted into here
  // Programmatic dependent launch (code for sm_90 and up; else nothing): may start before the
  // kernel ahead of it in the stream has ended, so it calls wait_for_previous_kernel() before it
  // touches what that one writes, or what that one reads and it writes itself.
  bool programmatic = false;
};

#if defined(__CUDACC__)

inline void check_cuda(cudaError_t error, const char* name, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(name) + ": " + what + ": " + cudaGetErrorString(error));
  }
}

inline int current_device(const char* name) {
  int device = 0;
  check_cuda(cudaGetDevice(&device), name, "CUDA has no current device");
  return device;
}

inline int device_attribute(cudaDeviceAttr attribute, const char* name) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, current_device(name)), name,
             "CUDA device attribute");
  return value;
}

// Multiprocessors of the current device.
inline unsigned multiprocessors(const char* name) {
  return static_cast<unsigned>(device_attribute(cudaDevAttrMultiProcessorCount, name));
}
// The most dynamic shared memory that a block can have on the current device.
inline size_t max_shared_bytes(const char* name) {
  return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, name));
}
// Enqueues a fill of `bytes` bytes with zero.
inline void fill_zero(const char* name, void* memory, size_t bytes, void* stream) {
  check_cuda(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), name, "memset");
}

constexpr int kKnownDevices = 64;  // what is asked once for each of them is asked anew for others

// Whether the kernel's code on the current device has wait_for_previous_kernel in it. The device
// does not tell: sm_90 runs what the driver makes of compute_80's PTX, too, and that would not
// wait.
template <auto kKernel>
bool waits_for_previous_kernel(const char* name, int device) {
  enum : int { kUnknown, kNo, kYes };
  static std::atomic<int> known[kKnownDevices];
  if (device < kKnownDevices && known[device].load() != kUnknown) return known[device] == kYes;
  cudaFuncAttributes attributes = {};
  check_cuda(cudaFuncGetAttributes(&attributes, kKernel), name, "attributes of the kernel");
  const bool waits = attributes.ptxVersion >= 90;
  if (device < kKnownDevices) known[device].store(waits ? kYes : kNo);
  return waits;
}

// Enqueues kKernel on `stream` (a cudaStream_t): no allocation, no synchronisation, so a graph can
// capture it. Throws std::runtime_error for what CUDA reports.
template <auto kKernel, class... Args>
void launch(const Launch& shape, void* stream, Args... args) {
  const int device = current_device(shape.name);
  if (shape.shared_bytes > 48 * 1024) {
    // Once per kernel and device; asking again would do no harm.
    static std::atomic<size_t> granted[kKnownDevices];
    if (device >= kKnownDevices || granted[device].load() < shape.shared_bytes) {
      check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shape.shared_bytes)),
                 shape.name, "shared memory of the kernel");
      if (device < kKnownDevices) granted[device].store(shape.shared_bytes);
    }
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks_x, shape.blocks_y, shape.blocks_z);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  if (shape.programmatic && waits_for_previous_kernel<kKernel>(shape.name, device)) {
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  check_cuda(cudaLaunchKernelEx(&config, kKernel, args...), shape.name, "CUDA launch failed");
}

#elif defined(ADM_RT_EMULATOR)

inline unsigned multiprocessors(const char*) { return Emulator::get().multiprocessors; }
inline size_t max_shared_bytes(const char*) { return Emulator::get().max_shared_bytes; }
inline void fill_zero(const char*, void* memory, size_t bytes, void*) {
  std::memset(memory, 0, bytes);
}

template <auto kKernel, class... Args>
void launch(const Launch& shape, void*, Args... args) {
  const emulator::Grid grid = {shape.blocks_x, shape.blocks_y, shape.blocks_z, shape.threads,
                               shape.shared_bytes};
  Emulator::get().launch(grid, [&] { kKernel(args...); });
}

#endif

}  // namespace adm_rt::simt
