// Vec in plain C++: 8 floats in an array, which the compiler maps to what the target has.
// Included by simd.h alone.
#pragma once

namespace adm_rt::ADM_RT_ISA {

struct Vec {
  static constexpr int kWidth = 8;
  float v[kWidth];

  static Vec zero() { return set1(0.0f); }
  static Vec set1(float x) {
    Vec r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = x;
    return r;
  }
  static Vec load(const float* p) { return loadu(p); }
  static Vec loadu(const float* p) {
    Vec r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  static Vec load_partial(const float* p, int n) {
    Vec r = zero();
    for (int i = 0; i < n && i < kWidth; ++i) r.v[i] = p[i];
    return r;
  }
  static Vec load_bf16(const uint16_t* p) { return load_bf16_partial(p, kWidth); }
  static Vec load_bf16_partial(const uint16_t* p, int n) {
    Vec r = zero();
    for (int i = 0; i < n && i < kWidth; ++i) r.v[i] = bf16_to_float(p[i]);
    return r;
  }

  void store(float* p) const { storeu(p); }
  void storeu(float* p) const { std::memcpy(p, v, sizeof(v)); }
  void store_partial(float* p, int n) const {
    for (int i = 0; i < n && i < kWidth; ++i) p[i] = v[i];
  }
  void store_bf16(uint16_t* p) const { store_bf16_partial(p, kWidth); }
  void store_bf16_partial(uint16_t* p, int n) const {
    for (int i = 0; i < n && i < kWidth; ++i) p[i] = float_to_bf16(v[i]);
  }

  float reduce_add() const {
    const float a = v[0] + v[4], b = v[1] + v[5], c = v[2] + v[6], d = v[3] + v[7];
    return (a + c) + (b + d);
  }
  float reduce_max() const {
    float r = v[0];
    for (int i = 1; i < kWidth; ++i) r = r > v[i] ? r : v[i];
    return r;
  }
};

#define ADM_RT_MAP(signature, expression)   \
  inline Vec signature {                    \
    Vec r;                                  \
    for (int i = 0; i < Vec::kWidth; ++i) { \
      r.v[i] = (expression);                \
    }                                       \
    return r;                               \
  }

ADM_RT_MAP(operator+(const Vec & a, const Vec & b), a.v[i] + b.v[i])
ADM_RT_MAP(operator-(const Vec & a, const Vec & b), a.v[i] - b.v[i])
ADM_RT_MAP(operator*(const Vec & a, const Vec & b), a.v[i] * b.v[i])
ADM_RT_MAP(operator/(const Vec & a, const Vec & b), a.v[i] / b.v[i])
ADM_RT_MAP(operator-(const Vec & a), -a.v[i])
ADM_RT_MAP(fma(const Vec& a, const Vec& b, const Vec& c), __builtin_fmaf(a.v[i], b.v[i], c.v[i]))
ADM_RT_MAP(fnma(const Vec& a, const Vec& b, const Vec& c), __builtin_fmaf(-a.v[i], b.v[i], c.v[i]))
ADM_RT_MAP(mul_add(const Vec& a, const Vec& b, const Vec& c), a.v[i] * b.v[i] + c.v[i])
// As in SSE: the second operand when either is NaN.
ADM_RT_MAP(max(const Vec& a, const Vec& b), a.v[i] > b.v[i] ? a.v[i] : b.v[i])
ADM_RT_MAP(min(const Vec& a, const Vec& b), a.v[i] < b.v[i] ? a.v[i] : b.v[i])
ADM_RT_MAP(sqrt(const Vec& a), __builtin_sqrtf(a.v[i]))
ADM_RT_MAP(abs(const Vec& a), __builtin_fabsf(a.v[i]))

// To nearest even, for |a| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
ADM_RT_MAP(round(const Vec& a), (a.v[i] + 12582912.0f) - 12582912.0f)

#undef ADM_RT_MAP

// The low bits of x as the exponent of a float: 2^n from 127 + n.
inline Vec as_exponent(const Vec& x) {
  Vec r;
  for (int i = 0; i < Vec::kWidth; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &x.v[i], 4);
    bits <<= 23;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
inline float power_of_two(int n) {
  const uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
  float r;
  std::memcpy(&r, &bits, 4);
  return r;
}
// y * 2^n for whole n in [-150, 128], rounded once: 2^n alone may not be a float, its halves are.
inline Vec scale_by_power_of_two(const Vec& y, const Vec& n) {
  Vec r;
  for (int i = 0; i < Vec::kWidth; ++i) {
    const int whole = n.v[i] == n.v[i] ? static_cast<int>(n.v[i]) : 0;
    const int half = whole >> 1;
    r.v[i] = y.v[i] * power_of_two(half) * power_of_two(whole - half);
  }
  return r;
}

}  // namespace adm_rt::ADM_RT_ISA
