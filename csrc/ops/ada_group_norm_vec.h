// What the two *_simd.cpp of ada_group_norm share: loads and stores of both element types, and the
// derivative of SiLU. Like common/simd.h, it is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace adm_rt::ADM_RT_ISA {
namespace {

constexpr int64_t kWidth = Vec::kWidth;

inline Vec load_values(const float* from) { return Vec::loadu(from); }
inline Vec load_values(const uint16_t* from) { return Vec::load_bf16(from); }
inline void store_values(Vec v, float* to) { v.storeu(to); }
inline void store_values(Vec v, uint16_t* to) { v.store_bf16(to); }

// The first `count` values, zero in the other lanes.
inline Vec load_some(const float* from, int64_t count) {
  return Vec::load_partial(from, static_cast<int>(count));
}
inline Vec load_some(const uint16_t* from, int64_t count) {
  return Vec::load_bf16_partial(from, static_cast<int>(count));
}
inline void store_some(Vec v, float* to, int64_t count) {
  v.store_partial(to, static_cast<int>(count));
}
inline void store_some(Vec v, uint16_t* to, int64_t count) {
  v.store_bf16_partial(to, static_cast<int>(count));
}
// The same with `fill` in the other lanes, so that their deviation from `fill` is zero.
template <typename T>
inline Vec load_tail(const T* from, int64_t count, float fill) {
  float lanes[kWidth];
  load_some(from, count).storeu(lanes);
  for (int64_t i = count; i < kWidth; ++i) lanes[i] = fill;
  return Vec::loadu(lanes);
}

template <typename T>
inline Vec load_upto(const T* from, int64_t count) {
  return count >= kWidth ? load_values(from) : load_some(from, count);
}
template <typename T>
inline void store_upto(Vec v, T* to, int64_t count) {
  if (count >= kWidth) {
    store_values(v, to);
  } else {
    store_some(v, to, count);
  }
}

inline float* as_float(float* pointer) { return pointer; }
inline float* as_float(uint16_t*) { return nullptr; }

// grad * silu'(v), or grad.
template <bool kSilu>
inline Vec through_silu(Vec grad, Vec v) {
  if (!kSilu) return grad;
  const Vec s = sigmoid(v);
  return grad * fma(v * s, Vec::set1(1.0f) - s, s);
}

}  // namespace
}  // namespace adm_rt::ADM_RT_ISA

// Calls function<silu, type>(...) for p's silu and dtype.
#define ADM_RT_BY_SILU_AND_TYPE(function, p, ...)                        \
  do {                                                                   \
    const bool is_float = (p).dtype == DType::kFloat32;                  \
    if ((p).silu && is_float) return function<true, float>(__VA_ARGS__); \
    if ((p).silu) return function<true, uint16_t>(__VA_ARGS__);          \
    if (is_float) return function<false, float>(__VA_ARGS__);            \
    return function<false, uint16_t>(__VA_ARGS__);                       \
  } while (false)
