// The one door to what a GPU thread needs: qualifiers, indices, barriers, atomics and arithmetic
// with fixed rounding. Device code (*.cuh) and code for host and device include this and nothing of
// CUDA.
//
// Compiled by nvcc, simt/cuda.cuh supplies the device side. A plain C++ compiler gets the
// arithmetic alone, which is what CPU kernels use; with ADM_RT_EMULATOR it gets the device side as
// well, from simt/emulator.h, so that the same *.cuh runs on a CPU under sanitizers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ADM_RT_HOST_DEVICE __host__ __device__ __forceinline__
#define ADM_RT_UNROLL _Pragma("unroll")
#include "simt/cuda.cuh"
#else
#define ADM_RT_HOST_DEVICE inline __attribute__((always_inline))
#define ADM_RT_UNROLL _Pragma("GCC unroll 16")
#if defined(ADM_RT_EMULATOR)
#include "simt/emulator.h"
#endif
#endif

namespace adm_rt::simt {

// IEEE single precision, round to nearest even, never contracted: nvcc would turn a * b + c into
// one fma, and host and device would differ in the last bit. Host code needs -ffp-contract=off.
ADM_RT_HOST_DEVICE float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return device::add_rn(a, b);
#else
  return a + b;
#endif
}

ADM_RT_HOST_DEVICE float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return device::mul_rn(a, b);
#else
  return a * b;
#endif
}

ADM_RT_HOST_DEVICE float div_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return device::div_rn(a, b);
#else
  return a / b;
#endif
}

ADM_RT_HOST_DEVICE float fma_rn(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return device::fma_rn(a, b, c);
#else
  return std::fmaf(a, b, c);
#endif
}

ADM_RT_HOST_DEVICE float sqrt_rn(float a) {
#if defined(__CUDA_ARCH__)
  return device::sqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}

ADM_RT_HOST_DEVICE uint32_t bits_of(float a) {
  uint32_t bits;
  memcpy(&bits, &a, 4);
  return bits;
}

ADM_RT_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

}  // namespace adm_rt::simt
