// The CUDA side of simt.h. Nothing outside csrc/simt/ names a CUDA builtin in device code.
#pragma once

#include <cstdint>

#define ADM_RT_KERNEL __global__ void
#define ADM_RT_DEVICE __device__ __forceinline__
#define ADM_RT_SHARED __shared__
#define ADM_RT_GRID_CONSTANT __grid_constant__  // a kernel parameter that stays in constant memory

namespace adm_rt::simt {

ADM_RT_DEVICE unsigned thread_x() { return threadIdx.x; }
ADM_RT_DEVICE unsigned block_x() { return blockIdx.x; }
ADM_RT_DEVICE unsigned block_y() { return blockIdx.y; }
ADM_RT_DEVICE unsigned threads_x() { return blockDim.x; }
ADM_RT_DEVICE unsigned blocks_x() { return gridDim.x; }

ADM_RT_DEVICE void sync_block() { __syncthreads(); }
ADM_RT_DEVICE uint32_t atomic_add(uint32_t* address, uint32_t value) {
  return atomicAdd(address, value);
}
ADM_RT_DEVICE uint32_t atomic_min(uint32_t* address, uint32_t value) {
  return atomicMin(address, value);
}

// Four 32-bit or 16-bit words at once; the address is a multiple of their size.
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

namespace device {

ADM_RT_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
ADM_RT_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
ADM_RT_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
ADM_RT_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
ADM_RT_DEVICE float sqrt_rn(float a) { return __fsqrt_rn(a); }

}  // namespace device
}  // namespace adm_rt::simt
