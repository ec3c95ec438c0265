// Vec: the float vector of the CPU kernels, one definition per instruction set.
//
// Only csrc/ops/*_simd.cpp may include this file. CMake compiles those with -DADM_RT_ISA=portable,
// avx2 or avx512 (and ADM_RT_ISA_LEVEL=0, 1, 2) and everything in them lives in namespace
// adm_rt::ADM_RT_ISA. They use no standard containers or templates: the linker keeps one copy of an
// inline std function, and it must not be the one that was compiled for AVX-512.
//
// fma() rounds once in every instruction set, and exp(), sigmoid() and silu() are made of the same
// operations in the same order, so element-wise code gives the same bits everywhere. Reductions do
// not: their trees depend on kWidth. mul_add() is a*b+c in whichever way is fast; only the portable
// version rounds twice (fma() is a library call there): for matrix products.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef ADM_RT_ISA
#error "simd.h is for csrc/ops/*_simd.cpp, which CMake compiles with -DADM_RT_ISA=..."
#endif

#if ADM_RT_ISA_LEVEL > 0
#include <immintrin.h>
#endif

namespace adm_rt::ADM_RT_ISA {

// ---- Scalars, for tails and for the portable version ----

inline float bf16_to_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace adm_rt::ADM_RT_ISA

#if ADM_RT_ISA_LEVEL == 2
#include "common/simd_avx512.h"
#elif ADM_RT_ISA_LEVEL == 1
#include "common/simd_avx2.h"
#else
#include "common/simd_portable.h"
#endif

namespace adm_rt::ADM_RT_ISA {

// e^x, at most 1 ulp from the exact value; 0 below -104, inf above 88.73, NaN for NaN.
// x = n ln2 + r, |r| <= ln2/2; e^r = 1 + r + r^2 p(r), p of degree 4 (minimax, relative error
// 3e-9).
inline Vec exp(Vec x) {
  x = min(Vec::set1(89.0f), max(Vec::set1(-104.0f), x));  // operand order: NaN in x stays
  const Vec n = round(x * Vec::set1(0x1.715476p+0f));
  Vec r = fnma(n, Vec::set1(0x1.62e400p-1f), x);  // ln2 in two parts, the first with
  r = fnma(n, Vec::set1(0x1.7f7d1cp-20f), r);     // trailing zeros: n * part is exact
  Vec p = Vec::set1(0x1.6a23cep-10f);
  p = fma(p, r, Vec::set1(0x1.123a20p-7f));
  p = fma(p, r, Vec::set1(0x1.5558f2p-5f));
  p = fma(p, r, Vec::set1(0x1.555492p-3f));
  p = fma(p, r, Vec::set1(0x1.fffffcp-2f));
  const Vec y = fma(r * r, p, r) + Vec::set1(1.0f);
  return scale_by_power_of_two(y, n);
}

// Adding this to a number rounds it to the nearest whole one, n, and leaves 127 + n, the exponent
// of 2^n, in the low bits.
constexpr float kExponentBias = 12583039.0f;  // 1.5 * 2^23 + 127

// e^-x as exactly as exp, for -88 <= x <= 87; inf from -88.4 down to -89; NaN for NaN.
// x = r - n ln2; e^-r = 1 - r + r^2 p(r).
inline Vec exp_of_minus(Vec x) {
  const Vec biased = fma(x, Vec::set1(-0x1.715476p+0f), Vec::set1(kExponentBias));
  const Vec n = biased - Vec::set1(kExponentBias);
  Vec r = fma(n, Vec::set1(0x1.62e400p-1f), x);  // as in exp
  r = fma(n, Vec::set1(0x1.7f7d1cp-20f), r);
  Vec p = Vec::set1(0x1.6a4154p-10f);
  p = fma(p, r, Vec::set1(-0x1.1239c6p-7f));
  p = fma(p, r, Vec::set1(0x1.5558bcp-5f));
  p = fma(p, r, Vec::set1(-0x1.555492p-3f));
  p = fma(p, r, Vec::set1(0x1.fffffcp-2f));
  const Vec y = Vec::set1(1.0f) + fma(r * r, p, -r);
  return y * as_exponent(biased);
}

// 1 / (1 + e^-x), at most 2.5 ulp from the exact value; 0 below -88.4.
inline Vec sigmoid(Vec x) {
  const Vec one = Vec::set1(1.0f);
  x = min(Vec::set1(87.0f), max(Vec::set1(-89.0f), x));  // operand order: NaN in x stays
  return one / (one + exp_of_minus(x));
}

// x / (1 + e^-x), at most 2.5 ulp from the exact value; -0 below -88.4.
inline Vec silu(Vec x) {
  x = max(Vec::set1(-89.0f), x);
  return x / (Vec::set1(1.0f) + exp_of_minus(min(Vec::set1(87.0f), x)));
}

}  // namespace adm_rt::ADM_RT_ISA
