// Float1 and Uint1: one float and one uint32 with the interface of the SIMD vectors, and elementary
// functions that give the same bits everywhere.
//
// Code written once as a template over the float type F runs on CUDA and in the portable CPU build
// with F = Float1 and in the AVX builds with F = Vec (common/simd.h). Every operation rounds once
// in IEEE single precision and the order is fixed, so all of them agree bit for bit.
#pragma once

#include <cstdint>

#include "simt/simt.h"

namespace adm_rt {

struct Uint1 {
  static constexpr int kWidth = 1;
  uint32_t v;

  ADM_RT_HOST_DEVICE static Uint1 set1(uint32_t x) { return {x}; }
  // Counter offsets of the lanes; see philox.h.
  ADM_RT_HOST_DEVICE static Uint1 counter_lanes() { return {0}; }
};

ADM_RT_HOST_DEVICE Uint1 operator+(Uint1 a, Uint1 b) { return {a.v + b.v}; }
ADM_RT_HOST_DEVICE Uint1 operator-(Uint1 a, Uint1 b) { return {a.v - b.v}; }
ADM_RT_HOST_DEVICE Uint1 operator^(Uint1 a, Uint1 b) { return {a.v ^ b.v}; }
ADM_RT_HOST_DEVICE Uint1 operator&(Uint1 a, Uint1 b) { return {a.v & b.v}; }
template <int n>
ADM_RT_HOST_DEVICE Uint1 shift_left(Uint1 a) {
  return {a.v << n};
}
template <int n>
ADM_RT_HOST_DEVICE Uint1 shift_right(Uint1 a) {
  return {a.v >> n};
}
template <int n>
ADM_RT_HOST_DEVICE Uint1 shift_right_signed(Uint1 a) {
  return {static_cast<uint32_t>(static_cast<int32_t>(a.v) >> n)};
}
// The 64-bit product as two words.
ADM_RT_HOST_DEVICE void multiply_wide(Uint1 a, uint32_t b, Uint1* high, Uint1* low) {
  const uint64_t product = static_cast<uint64_t>(a.v) * b;
  *high = {static_cast<uint32_t>(product >> 32)};
  *low = {static_cast<uint32_t>(product)};
}

struct Float1 {
  static constexpr int kWidth = 1;
  float v;

  ADM_RT_HOST_DEVICE static Float1 set1(float x) { return {x}; }
  ADM_RT_HOST_DEVICE static Float1 loadu(const float* p) { return {*p}; }
  ADM_RT_HOST_DEVICE static Float1 load_partial(const float* p, int) { return {*p}; }
  ADM_RT_HOST_DEVICE static Float1 load_bf16(const uint16_t* p) {
    return {simt::float_of(static_cast<uint32_t>(*p) << 16)};
  }
  ADM_RT_HOST_DEVICE static Float1 load_bf16_partial(const uint16_t* p, int) {
    return load_bf16(p);
  }
  ADM_RT_HOST_DEVICE void storeu(float* p) const { *p = v; }
  ADM_RT_HOST_DEVICE void store_partial(float* p, int) const { *p = v; }
};

ADM_RT_HOST_DEVICE Float1 operator+(Float1 a, Float1 b) { return {simt::add_rn(a.v, b.v)}; }
ADM_RT_HOST_DEVICE Float1 operator-(Float1 a, Float1 b) { return {simt::add_rn(a.v, -b.v)}; }
ADM_RT_HOST_DEVICE Float1 operator*(Float1 a, Float1 b) { return {simt::mul_rn(a.v, b.v)}; }
ADM_RT_HOST_DEVICE Float1 operator/(Float1 a, Float1 b) { return {simt::div_rn(a.v, b.v)}; }
ADM_RT_HOST_DEVICE Float1 fma(Float1 a, Float1 b, Float1 c) {
  return {simt::fma_rn(a.v, b.v, c.v)};
}
ADM_RT_HOST_DEVICE Float1 sqrt(Float1 a) { return {simt::sqrt_rn(a.v)}; }
// The second operand when either is NaN, as in SSE.
ADM_RT_HOST_DEVICE Float1 max(Float1 a, Float1 b) { return {a.v > b.v ? a.v : b.v}; }
ADM_RT_HOST_DEVICE Float1 min(Float1 a, Float1 b) { return {a.v < b.v ? a.v : b.v}; }
ADM_RT_HOST_DEVICE Uint1 bits_of(Float1 a) { return {simt::bits_of(a.v)}; }
ADM_RT_HOST_DEVICE Float1 float_of(Uint1 bits) { return {simt::float_of(bits.v)}; }
// Of the words as signed integers.
ADM_RT_HOST_DEVICE Float1 convert(Uint1 a) {
  return {static_cast<float>(static_cast<int32_t>(a.v))};
}
ADM_RT_HOST_DEVICE Float1 select(Uint1 all_ones_or_zero, Float1 if_ones, Float1 if_zero) {
  return {all_ones_or_zero.v != 0 ? if_ones.v : if_zero.v};
}

// e^x: the same operations in the same order as exp(Vec) of common/simd.h, see there.
ADM_RT_HOST_DEVICE Float1 exp(Float1 x) {
  x = min(Float1{89.0f}, max(Float1{-104.0f}, x));  // operand order: NaN in x stays
  // Adding 1.5 * 2^23 leaves the nearest whole number (ties to even) in the low bits.
  const Float1 product = x * Float1{0x1.715476p+0f};
  const Float1 shifted = product + Float1{0x1.8p+23f};
  const Float1 n = shifted - Float1{0x1.8p+23f};
  Float1 r = fma(n, Float1{-0x1.62e400p-1f}, x);
  r = fma(n, Float1{-0x1.7f7d1cp-20f}, r);
  Float1 p = {0x1.6a23cep-10f};
  p = fma(p, r, Float1{0x1.123a20p-7f});
  p = fma(p, r, Float1{0x1.5558f2p-5f});
  p = fma(p, r, Float1{0x1.555492p-3f});
  p = fma(p, r, Float1{0x1.fffffcp-2f});
  const Float1 y = fma(r * r, p, r) + Float1{1.0f};
  // y * 2^n in two exact steps and one rounding: 2^n alone may not be a float.
  const Uint1 whole = bits_of(shifted) - Uint1{0x4b400000u};
  const Uint1 half = shift_right_signed<1>(whole);
  const Uint1 bias = {127};
  return y * float_of(shift_left<23>(half + bias)) * float_of(shift_left<23>(whole - half + bias));
}

// -2 ln((v + 1/2) / 2^24) for words v < 2^24; error about 2 ulp.
// The number is m * 2^e, m in [sqrt(1/2), sqrt(2)); ln m = t - t^2 / 2 + t^3 p(t), t = m - 1, p of
// degree 7 (minimax, relative error 6e-9). From 1/2 on the number itself has 25 bits and is
// rounded; where that matters, next to 1 (e = 0), t comes out of the integer exactly.
template <class F, class U>
ADM_RT_HOST_DEVICE F minus_two_log_u24(U v) {
  const U above_root = bits_of(convert(v) + F::set1(0.5f)) - U::set1(0x3f3504f3u);
  const U exponent = shift_right_signed<23>(above_root) - U::set1(24);  // in [-25, 0]
  const F e = convert(exponent);
  const F m = float_of((above_root & U::set1(0x007fffffu)) + U::set1(0x3f3504f3u));
  const F next_to_one = (convert(v - U::set1(1u << 24)) + F::set1(0.5f)) * F::set1(0x1p-24f);
  const F t = select(shift_right_signed<31>(exponent), m - F::set1(1.0f), next_to_one);
  F p = F::set1(-0.07634493024795577f);
  p = fma(p, t, F::set1(0.1276157564406917f));
  p = fma(p, t, F::set1(-0.13160183062463165f));
  p = fma(p, t, F::set1(0.14201758233723044f));
  p = fma(p, t, F::set1(-0.166233572981094f));
  p = fma(p, t, F::set1(0.2000122686540833f));
  p = fma(p, t, F::set1(-0.2500082103550064f));
  p = fma(p, t, F::set1(0.33333331707804553f));
  const F log_m = fma(t * t, fma(p, t, F::set1(-0.5f)), t);
  const F log_u = fma(e, F::set1(0x1.62e400p-1f), fma(e, F::set1(0x1.7f7d1cp-20f), log_m));
  return log_u * F::set1(-2.0f);
}

// cos and sin of 2 pi (v + 1/2) / 2^24 for words v < 2^24; errors about 1 ulp of 1.
// The quadrant and the rest come out of the integer exactly; sin(pi/2 f) = f p(f^2) and
// cos(pi/2 f) = 1 + f^2 q(f^2) for |f| <= 1/2 (minimax, errors 5e-9 and 5e-11).
template <class F, class U>
ADM_RT_HOST_DEVICE void cos_sin_u24(U v, F* cosine, F* sine) {
  const U quadrant = shift_right<22>(v + U::set1(1u << 21));
  const U rest = v - shift_left<22>(quadrant);  // in [-2^21, 2^21)
  const F f = (convert(rest) + F::set1(0.5f)) * F::set1(0x1p-22f);
  const F f2 = f * f;
  F p = F::set1(-0.004602176993314139f);
  p = fma(p, f2, F::set1(0.07968022806574201f));
  p = fma(p, f2, F::set1(-0.6459634786415328f));
  p = fma(p, f2, F::set1(1.5707963219667995f));
  const F s = f * p;
  F q = F::set1(0.0009040216685114267f);
  q = fma(q, f2, F::set1(-0.02086028850710254f));
  q = fma(q, f2, F::set1(0.25366924402976143f));
  q = fma(q, f2, F::set1(-1.2337005433534742f));
  const F c = fma(q, f2, F::set1(1.0f));
  const U odd = U::set1(0) - (quadrant & U::set1(1));
  const U cosine_sign = shift_left<30>((quadrant + U::set1(1)) & U::set1(2));
  const U sine_sign = shift_left<30>(quadrant & U::set1(2));
  *cosine = float_of(bits_of(select(odd, s, c)) ^ cosine_sign);
  *sine = float_of(bits_of(select(odd, c, s)) ^ sine_sign);
}

}  // namespace adm_rt
