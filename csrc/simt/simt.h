// The one door to what a GPU thread needs: qualifiers, indices, barriers, warp collectives, shared
// memory, asynchronous copies, tensor cores, atomics and arithmetic with fixed rounding. Device
// code
// (*.cuh) and code for host and device include this and nothing of CUDA; launchers include
// simt/launch.h.
//
// Compiled by nvcc, simt/cuda*.cuh supply the device side. A plain C++ compiler gets the arithmetic
// alone, which is what CPU kernels use; with ADM_RT_EMULATOR it gets the device side as well, from
// simt/emulator*.h, so that the same *.cuh runs on a CPU under sanitizers.
//
// Qualifiers
//   ADM_RT_KERNEL name(...)                          a kernel; parameters by value
//   ADM_RT_KERNEL_BOUNDS(threads, blocks) name(...)  the same with launch bounds
//   ADM_RT_DEVICE type name(...)                     code of a GPU thread
//   ADM_RT_HOST_DEVICE type name(...)                arithmetic for both
//   ADM_RT_GRID_CONSTANT                             a const parameter that stays in constant
//   memory
// Where am I (blocks are one-dimensional)
//   thread_x threads_x lane warp  block_x block_y block_z  blocks_x blocks_y blocks_z
// Block and warp (all threads, respectively all 32 lanes, reach the same call; none has left)
//   sync_block() sync_warp() sync_group(id 1..15, threads: a multiple of 32)
//   shuffle(v, lane) shuffle_xor(v, mask) shuffle_down(v, delta): v of 32 bits
//   ballot(p) any(p) all(p) warp_sum(v) warp_max(v): every lane gets the same bits
// Shared memory (every thread makes the same calls; contents start undefined: NaN in the emulator)
//   SharedArena shared; float* sums = shared.take<float>(32);
//   The launch gives shared_bytes<float>(32) + ...; never walk from one array into the next.
// Memory
//   load16 load8 store16 store8: aligned, generic. load16_streaming: global memory that this kernel
//   does not write, past L1. load4 store4: four floats or four 16-bit words.
//   cp_async16(shared, global, valid = true) (zeros when not valid; 16-byte aligned),
//   cp_async_commit(), cp_async_wait<groups still allowed>(); then sync before others read.
// Tensor cores (all 32 lanes; fragments as in the PTX ISA, "Matrix Fragments for mma")
//   ldmatrix_x4(r, row) ldmatrix_x4_trans ldmatrix_x2 ldmatrix_x2_trans: row = this lane's address
//   mma_m16n8k16<Half | BFloat16>(d, a, b): d += a b; d float[4], a uint32_t[4], b uint32_t[2]
//   mma_m16n8k8_tf32(d, a, b): likewise, operands from to_tf32
// 16-bit floats
//   Half BFloat16; to_float(h) from_float<T>(f); pack2<T>(low, high) unpack2<T>(word, &low, &high);
//   pack<T>(values) unpack<T>(bytes16, values): 8 values of 16 bits, 4 floats
// Arithmetic
//   add_rn mul_rn div_rn fma_rn sqrt_rn: IEEE, the same bits on host and device
//   exp2_approx log2_approx rcp_approx (2 ulp or so; subnormals are zero) minimum maximum (a NaN
//   operand is ignored)
// Between blocks and kernels
//   atomic_add atomic_min; ticket(counter, count): 0 .. count - 1 in order of arrival, then again
//   from 0; fence_device(): what this thread wrote is seen before what it writes next
//   wait_for_previous_kernel() allow_next_kernel(): programmatic dependent launch, see launch.h
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ADM_RT_HOST_DEVICE __host__ __device__ __forceinline__
#define ADM_RT_UNROLL _Pragma("unroll")
#define ADM_RT_UNROLL_BY(count) ADM_RT_PRAGMA(unroll count)  // so far and no further
#define ADM_RT_PRAGMA(text) _Pragma(#text)
#elif defined(ADM_RT_EMULATOR)  // for tests: what is not inlined compiles several times faster
#define ADM_RT_HOST_DEVICE inline
#define ADM_RT_UNROLL
#define ADM_RT_UNROLL_BY(count)
#else
#define ADM_RT_HOST_DEVICE inline __attribute__((always_inline))
#define ADM_RT_UNROLL _Pragma("GCC unroll 16")
#endif

#include "simt/types.h"

#if defined(__CUDACC__)
#include "simt/cuda.cuh"
#include "simt/cuda_tensor.cuh"
#elif defined(ADM_RT_EMULATOR)
#include "simt/emulator.h"
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

#if defined(__CUDACC__) || defined(ADM_RT_EMULATOR)

// A vector access as floats.
template <class T, int kCount>
ADM_RT_DEVICE void unpack(const Bytes16& bytes, float (&values)[kCount]) {
  static_assert(kCount * sizeof(T) == 16);
  if constexpr (sizeof(T) == 4) {
    ADM_RT_UNROLL for (int i = 0; i < kCount; ++i) values[i] = float_of(bytes.words[i]);
  } else {
    ADM_RT_UNROLL for (int i = 0; i < kCount / 2; ++i) {
      unpack2<T>(bytes.words[i], &values[2 * i], &values[2 * i + 1]);
    }
  }
}

template <class T, int kCount>
ADM_RT_DEVICE Bytes16 pack(const float (&values)[kCount]) {
  static_assert(kCount * sizeof(T) == 16);
  Bytes16 bytes;
  if constexpr (sizeof(T) == 4) {
    ADM_RT_UNROLL for (int i = 0; i < kCount; ++i) bytes.words[i] = bits_of(values[i]);
  } else {
    ADM_RT_UNROLL for (int i = 0; i < kCount / 2; ++i) {
      bytes.words[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
    }
  }
  return bytes;
}

// Over the 32 lanes, in the order of a butterfly: every lane gets the same bits.
ADM_RT_DEVICE float warp_sum(float value ADM_RT_SITE) {
  ADM_RT_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    value = add_rn(value, shuffle_xor(value, mask ADM_RT_PASS_SITE));
  }
  return value;
}

ADM_RT_DEVICE float warp_max(float value ADM_RT_SITE) {
  ADM_RT_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    value = maximum(value, shuffle_xor(value, mask ADM_RT_PASS_SITE));
  }
  return value;
}

#endif

}  // namespace adm_rt::simt
