// The CUDA side of simt.h: indices, barriers, warp collectives, memory, conversions. Nothing
// outside csrc/simt/ names a CUDA builtin or PTX.
#pragma once

#include <cstdint>

#include "simt/types.h"

#define ADM_RT_KERNEL __global__ void
#define ADM_RT_KERNEL_BOUNDS(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define ADM_RT_DEVICE __device__ __forceinline__
#define ADM_RT_GRID_CONSTANT __grid_constant__
#define ADM_RT_SITE  // the emulator's errors name the line of the call
#define ADM_RT_PASS_SITE

namespace adm_rt::simt {

ADM_RT_DEVICE unsigned thread_x() { return threadIdx.x; }
ADM_RT_DEVICE unsigned threads_x() { return blockDim.x; }
ADM_RT_DEVICE unsigned lane() { return threadIdx.x % kWarpSize; }
ADM_RT_DEVICE unsigned warp() { return threadIdx.x / kWarpSize; }
ADM_RT_DEVICE unsigned block_x() { return blockIdx.x; }
ADM_RT_DEVICE unsigned block_y() { return blockIdx.y; }
ADM_RT_DEVICE unsigned block_z() { return blockIdx.z; }
ADM_RT_DEVICE unsigned blocks_x() { return gridDim.x; }
ADM_RT_DEVICE unsigned blocks_y() { return gridDim.y; }
ADM_RT_DEVICE unsigned blocks_z() { return gridDim.z; }

// ---- Barriers and collectives ----

constexpr uint32_t kAllLanes = 0xffffffffu;

ADM_RT_DEVICE void sync_block() { __syncthreads(); }
ADM_RT_DEVICE void sync_warp() { __syncwarp(); }
ADM_RT_DEVICE void sync_group(unsigned id, unsigned threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <class T>
ADM_RT_DEVICE T shuffle(T value, unsigned from) {
  static_assert(sizeof(T) == 4);
  return __shfl_sync(kAllLanes, value, from);
}
template <class T>
ADM_RT_DEVICE T shuffle_xor(T value, unsigned mask) {
  static_assert(sizeof(T) == 4);
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <class T>
ADM_RT_DEVICE T shuffle_down(T value, unsigned delta) {
  static_assert(sizeof(T) == 4);
  return __shfl_down_sync(kAllLanes, value, delta);
}
ADM_RT_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }
ADM_RT_DEVICE bool any(bool predicate) { return __any_sync(kAllLanes, predicate); }
ADM_RT_DEVICE bool all(bool predicate) { return __all_sync(kAllLanes, predicate); }

// ---- Shared memory ----

ADM_RT_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char adm_rt_dynamic_shared[];
  return adm_rt_dynamic_shared;
}

class SharedArena {
 public:
  template <class T>
  ADM_RT_DEVICE T* take(size_t count) {
    T* const array = reinterpret_cast<T*>(dynamic_shared() + used_);
    used_ += static_cast<unsigned>(shared_bytes<T>(count));
    return array;
  }

 private:
  unsigned used_ = 0;
};

// ---- Between blocks and kernels ----

ADM_RT_DEVICE uint32_t atomic_add(uint32_t* address, uint32_t value) {
  return atomicAdd(address, value);
}
ADM_RT_DEVICE uint32_t atomic_min(uint32_t* address, uint32_t value) {
  return atomicMin(address, value);
}
ADM_RT_DEVICE uint32_t ticket(uint32_t* counter, uint32_t count) {
  return atomicInc(counter, count - 1);
}
ADM_RT_DEVICE void fence_device() { __threadfence(); }

ADM_RT_DEVICE void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
ADM_RT_DEVICE void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" :::);
#endif
}

// ---- Memory ----

ADM_RT_DEVICE Bytes16 load16(const void* address) {
  const uint4 four = *static_cast<const uint4*>(address);
  return {{four.x, four.y, four.z, four.w}};
}
ADM_RT_DEVICE Bytes16 load16_streaming(const void* address) {
  Bytes16 bytes;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bytes.words[0]), "=r"(bytes.words[1]), "=r"(bytes.words[2]),
                 "=r"(bytes.words[3])
               : "l"(__cvta_generic_to_global(address)));
  return bytes;
}
ADM_RT_DEVICE Bytes8 load8(const void* address) {
  const uint2 two = *static_cast<const uint2*>(address);
  return {{two.x, two.y}};
}
ADM_RT_DEVICE void store16(void* address, const Bytes16& bytes) {
  *static_cast<uint4*>(address) =
      make_uint4(bytes.words[0], bytes.words[1], bytes.words[2], bytes.words[3]);
}
ADM_RT_DEVICE void store8(void* address, const Bytes8& bytes) {
  *static_cast<uint2*>(address) = make_uint2(bytes.words[0], bytes.words[1]);
}

ADM_RT_DEVICE void load4(const float* address, float (&values)[4]) {
  const float4 four = *reinterpret_cast<const float4*>(address);
  values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
}
ADM_RT_DEVICE void load4(const uint16_t* address, uint16_t (&values)[4]) {
  const ushort4 four = *reinterpret_cast<const ushort4*>(address);
  values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
}
ADM_RT_DEVICE void store4(float* address, const float (&values)[4]) {
  *reinterpret_cast<float4*>(address) = make_float4(values[0], values[1], values[2], values[3]);
}

// ---- 16-bit floats ----

template <class T>
ADM_RT_DEVICE uint32_t pack2(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, BFloat16>);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

template <class T>
ADM_RT_DEVICE void unpack2(uint32_t word, float* low, float* high) {
  if constexpr (std::is_same_v<T, Half>) {
    asm("{.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.f32.f16 %0, l;\n\tcvt.f32.f16 %1, h;}"
        : "=f"(*low), "=f"(*high)
        : "r"(word));
  } else {
    static_assert(std::is_same_v<T, BFloat16>);
    *low = __uint_as_float(word << 16);
    *high = __uint_as_float(word & 0xffff0000u);
  }
}

ADM_RT_DEVICE float to_float(float value) { return value; }
ADM_RT_DEVICE float to_float(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
ADM_RT_DEVICE float to_float(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
template <class T>
ADM_RT_DEVICE T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    T result;
    if constexpr (std::is_same_v<T, Half>) {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    } else {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    }
    return result;
  }
}

// ---- Arithmetic ----

ADM_RT_DEVICE float exp2_approx(float a) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}
ADM_RT_DEVICE float log2_approx(float a) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}
ADM_RT_DEVICE float rcp_approx(float a) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}
ADM_RT_DEVICE float minimum(float a, float b) { return fminf(a, b); }
ADM_RT_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }

namespace device {

ADM_RT_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
ADM_RT_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
ADM_RT_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
ADM_RT_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
ADM_RT_DEVICE float sqrt_rn(float a) { return __fsqrt_rn(a); }

}  // namespace device
}  // namespace adm_rt::simt
