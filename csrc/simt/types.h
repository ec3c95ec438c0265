// 16-bit floats and raw words: plain structs with the same layout on both sides of simt.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace adm_rt::simt {

constexpr unsigned kWarpSize = 32;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What one vector access moves.
struct alignas(16) Bytes16 {
  uint32_t words[4];
};
struct alignas(8) Bytes8 {
  uint32_t words[2];
};

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

// The 16-bit conversions in plain integers: round to nearest even, overflow to infinity, any NaN
// to 0x7fff, as the cvt instructions of PTX do.
namespace portable {

ADM_RT_HOST_DEVICE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return float_of(sign | ((magnitude << 13) + (112u << 23)));
  const float value = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal: exact
  return float_of(sign | bits_of(value));
}

ADM_RT_HOST_DEVICE uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffu;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 rounds to a multiple of 2^-24
    const uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    return static_cast<uint16_t>(sign | rounded);
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return static_cast<uint16_t>(sign | (magnitude - (112u << 23) + 0xfffu + odd) >> 13);
}

ADM_RT_HOST_DEVICE uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// To the 10 bits of fraction of tf32, ties away from zero, as cvt.rna.tf32 does.
ADM_RT_HOST_DEVICE uint32_t float_to_tf32(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace portable

// Bytes of dynamic shared memory that SharedArena::take<T>(count) uses.
template <class T>
ADM_RT_HOST_DEVICE constexpr size_t shared_bytes(size_t count) {
  return (count * sizeof(T) + 15) / 16 * 16;
}

}  // namespace adm_rt::simt
