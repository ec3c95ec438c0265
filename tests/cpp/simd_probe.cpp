// The functions of csrc/common/simd.h as plain C functions over arrays, for test_simd.py.
#include "common/simd.h"

using adm_rt::ADM_RT_ISA::Vec;

namespace {

template <typename Function>
void map(const float* x, float* y, int n, Function function) {
  for (int i = 0; i < n; i += Vec::kWidth) {
    function(Vec::load_partial(x + i, n - i)).store_partial(y + i, n - i);
  }
}

}  // namespace

extern "C" {

int width() { return Vec::kWidth; }

void map_exp(const float* x, float* y, int n) {
  map(x, y, n, [](Vec v) { return exp(v); });
}
void map_sigmoid(const float* x, float* y, int n) {
  map(x, y, n, [](Vec v) { return sigmoid(v); });
}
void map_silu(const float* x, float* y, int n) {
  map(x, y, n, [](Vec v) { return silu(v); });
}
void map_round(const float* x, float* y, int n) {
  map(x, y, n, [](Vec v) { return round(v); });
}
void map_sqrt(const float* x, float* y, int n) {
  map(x, y, n, [](Vec v) { return sqrt(v); });
}
void map_negative_abs(const float* x, float* y, int n) {
  map(x, y, n, [](Vec v) { return -abs(v); });
}

// y = {a*b+c, -a*b+c, max(a,b), min(a,b), a+b, a-b, a*b, a/b} of whole vectors, loaded and stored
// unaligned.
void arithmetic(const float* a, const float* b, const float* c, float* y) {
  const Vec va = Vec::loadu(a), vb = Vec::loadu(b), vc = Vec::loadu(c);
  const Vec results[] = {fma(va, vb, vc), fnma(va, vb, vc), max(va, vb), min(va, vb),
                         va + vb,         va - vb,          va * vb,     va / vb};
  for (const Vec& result : results) {
    result.storeu(y);
    y += Vec::kWidth;
  }
}

float reduce_add(const float* x, int n) { return Vec::load_partial(x, n).reduce_add(); }
float reduce_max(const float* x) { return Vec::loadu(x).reduce_max(); }

// bf16 -> float -> bf16, and float -> bf16, whole vectors and a tail.
void bf16_to_float(const uint16_t* x, float* y, int n) {
  int i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) Vec::load_bf16(x + i).storeu(y + i);
  Vec::load_bf16_partial(x + i, n - i).store_partial(y + i, n - i);
}
void float_to_bf16(const float* x, uint16_t* y, int n) {
  int i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) Vec::loadu(x + i).store_bf16(y + i);
  Vec::load_partial(x + i, n - i).store_bf16_partial(y + i, n - i);
}

}  // extern "C"
