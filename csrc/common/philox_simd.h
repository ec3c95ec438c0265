// Philox noise in vectors, for *_simd.cpp alone: Noise::Float and Noise::Uint are the types that
// the templates of philox.h run with in this instruction set.
#pragma once

#include "common/philox.h"
#include "common/simd.h"

namespace adm_rt::ADM_RT_ISA {

#if ADM_RT_ISA_LEVEL == 0

// The scalars that CUDA uses: testing this build tests that arithmetic.
using NoiseFloat = Float1;
using NoiseUint = Uint1;

inline void to_element_order(NoiseFloat (&)[4]) {}

#else

using NoiseFloat = Vec;

#if ADM_RT_ISA_LEVEL == 2

struct NoiseUint {
  static constexpr int kWidth = 16;
  __m512i v;

  static NoiseUint set1(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  static NoiseUint counter_lanes() {
    return {_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)};
  }
};

inline NoiseUint operator+(NoiseUint a, NoiseUint b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline NoiseUint operator-(NoiseUint a, NoiseUint b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline NoiseUint operator^(NoiseUint a, NoiseUint b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline NoiseUint operator&(NoiseUint a, NoiseUint b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int n>
inline NoiseUint shift_left(NoiseUint a) {
  return {_mm512_slli_epi32(a.v, n)};
}
template <int n>
inline NoiseUint shift_right(NoiseUint a) {
  return {_mm512_srli_epi32(a.v, n)};
}
template <int n>
inline NoiseUint shift_right_signed(NoiseUint a) {
  return {_mm512_srai_epi32(a.v, n)};
}
inline void multiply_wide(NoiseUint a, uint32_t b, NoiseUint* high, NoiseUint* low) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(a.v, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  *high = {_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)};
  *low = {_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))};
}
inline NoiseUint bits_of(Vec a) { return {_mm512_castps_si512(a.v)}; }
inline Vec float_of(NoiseUint a) { return {_mm512_castsi512_ps(a.v)}; }
inline Vec convert(NoiseUint a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Vec select(NoiseUint all_ones_or_zero, Vec if_ones, Vec if_zero) {
  return {_mm512_mask_blend_ps(_mm512_movepi32_mask(all_ones_or_zero.v), if_zero.v, if_ones.v)};
}
inline Vec interleave_low(Vec a, Vec b) { return {_mm512_unpacklo_ps(a.v, b.v)}; }
inline Vec interleave_high(Vec a, Vec b) { return {_mm512_unpackhi_ps(a.v, b.v)}; }
inline Vec join_low(Vec a, Vec b) { return {_mm512_shuffle_ps(a.v, b.v, 0x44)}; }
inline Vec join_high(Vec a, Vec b) { return {_mm512_shuffle_ps(a.v, b.v, 0xee)}; }

#else

struct NoiseUint {
  static constexpr int kWidth = 8;
  __m256i v;

  static NoiseUint set1(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
  static NoiseUint counter_lanes() { return {_mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)}; }
};

inline NoiseUint operator+(NoiseUint a, NoiseUint b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline NoiseUint operator-(NoiseUint a, NoiseUint b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline NoiseUint operator^(NoiseUint a, NoiseUint b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline NoiseUint operator&(NoiseUint a, NoiseUint b) { return {_mm256_and_si256(a.v, b.v)}; }
template <int n>
inline NoiseUint shift_left(NoiseUint a) {
  return {_mm256_slli_epi32(a.v, n)};
}
template <int n>
inline NoiseUint shift_right(NoiseUint a) {
  return {_mm256_srli_epi32(a.v, n)};
}
template <int n>
inline NoiseUint shift_right_signed(NoiseUint a) {
  return {_mm256_srai_epi32(a.v, n)};
}
inline void multiply_wide(NoiseUint a, uint32_t b, NoiseUint* high, NoiseUint* low) {
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32(a.v, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), factor);
  *high = {_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa)};
  *low = {_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)};
}
inline NoiseUint bits_of(Vec a) { return {_mm256_castps_si256(a.v)}; }
inline Vec float_of(NoiseUint a) { return {_mm256_castsi256_ps(a.v)}; }
inline Vec convert(NoiseUint a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Vec select(NoiseUint all_ones_or_zero, Vec if_ones, Vec if_zero) {
  return {_mm256_blendv_ps(if_zero.v, if_ones.v, _mm256_castsi256_ps(all_ones_or_zero.v))};
}
inline Vec interleave_low(Vec a, Vec b) { return {_mm256_unpacklo_ps(a.v, b.v)}; }
inline Vec interleave_high(Vec a, Vec b) { return {_mm256_unpackhi_ps(a.v, b.v)}; }
inline Vec join_low(Vec a, Vec b) { return {_mm256_shuffle_ps(a.v, b.v, 0x44)}; }
inline Vec join_high(Vec a, Vec b) { return {_mm256_shuffle_ps(a.v, b.v, 0xee)}; }

#endif

// From one counter per lane to element order. A 4x4 transposition inside each 128-bit part brings
// the four words of a counter together; counter_lanes() deals the counters out so that the parts of
// one vector are then consecutive and nothing has to cross them.
inline void to_element_order(NoiseFloat (&normals)[4]) {
  const Vec a = interleave_low(normals[0], normals[1]), b = interleave_low(normals[2], normals[3]);
  const Vec c = interleave_high(normals[0], normals[1]),
            d = interleave_high(normals[2], normals[3]);
  normals[0] = join_low(a, b);
  normals[1] = join_high(a, b);
  normals[2] = join_low(c, d);
  normals[3] = join_high(c, d);
}

#endif

constexpr int kNoiseWidth = NoiseFloat::kWidth;
constexpr int kNoiseBlock = 4 * kNoiseWidth;  // elements of one noise_block call

// Normals of elements first .. first + kNoiseBlock - 1 in order, kNoiseWidth to a vector; first is
// a multiple of 4.
inline void noise_block(uint64_t seed, int64_t first, uint32_t step, uint32_t purpose,
                        NoiseFloat (&normals)[4]) {
  philox_normals<NoiseFloat, NoiseUint>(seed, static_cast<uint32_t>(first / 4), step, purpose,
                                        normals);
  to_element_order(normals);
}

}  // namespace adm_rt::ADM_RT_ISA
