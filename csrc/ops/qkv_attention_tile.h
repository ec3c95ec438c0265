// Building blocks of the qkv_attention kernels: the register-blocked product, 2^x, transposition,
// and float32 views of one head. Included by qkv_attention*_simd.cpp alone.
#pragma once

#include <math.h>

#include <cstdint>

#include "common/simd.h"
#include "ops/qkv_attention.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace adm_rt::ADM_RT_ISA {

// A tile is kRows rows by at most kPanelVecs vectors: as many sums as the registers hold.
constexpr int kRows = 4;
constexpr int kPanelVecs = ADM_RT_ISA_LEVEL == 2 ? 4 : ADM_RT_ISA_LEVEL == 1 ? 3 : 1;
constexpr int64_t kPanel = kPanelVecs * Vec::kWidth;  // columns of a packed operand

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// 2^x for x <= 1 (logits minus their maximum), at most 1.5 ulp from the exact value; 2^-126 below
// that, NaN for NaN. Polynomial of degree 6 for |r| <= 1/2, relative error 2e-9.
inline Vec exp2_shifted(Vec x) {
  x = max(Vec::set1(-126.0f), x);  // operand order: NaN in x stays
  const Vec biased = x + Vec::set1(kExponentBias);
  const Vec r = x - (biased - Vec::set1(kExponentBias));
  Vec p = Vec::set1(0x1.41d334p-13f);
  p = mul_add(p, r, Vec::set1(0x1.5f456ap-10f));
  p = mul_add(p, r, Vec::set1(0x1.3b2dbcp-7f));
  p = mul_add(p, r, Vec::set1(0x1.c6aed4p-5f));
  p = mul_add(p, r, Vec::set1(0x1.ebfbdap-3f));
  p = mul_add(p, r, Vec::set1(0x1.62e430p-1f));
  p = mul_add(p, r, Vec::set1(1.0f));
  return p * as_exponent(biased);
}

// 1 / sqrt(head_dim), and the same in units of ln 2: then exp(logit) is 2^logit.
inline float logit_scale(int64_t head_dim) {
  return static_cast<float>(1.0 / ::sqrt(static_cast<double>(head_dim)));
}
inline float logit_scale_base2(int64_t head_dim) {
  return static_cast<float>(1.4426950408889634 / ::sqrt(static_cast<double>(head_dim)));
}

// What gemm_rows does with its sums.
enum class Write {
  kStore,     // c = sum
  kStoreMax,  // c = sum; column[j] = max(column[j], sums of column j)
  kAdd,       // c += sum
  kScaleAdd,  // c = c * column[j] + sum
};

template <Write kWrite, int kVecs>
inline void write_row(float* c, float* column, Vec s0, Vec s1, Vec s2, Vec s3) {
  constexpr int w = Vec::kWidth;
  const auto put = [&](int j, Vec s) {
    if constexpr (kWrite == Write::kAdd) s = Vec::load(c + j * w) + s;
    if constexpr (kWrite == Write::kScaleAdd) {
      s = mul_add(Vec::load(c + j * w), Vec::load(column + j * w), s);
    }
    s.store(c + j * w);
  };
  put(0, s0);
  if constexpr (kVecs > 1) put(1, s1);
  if constexpr (kVecs > 2) put(2, s2);
  if constexpr (kVecs > 3) put(3, s3);
}

// c[i][j] (kWrite) sum_k a[i][k] * b[k][j] for i in [0, 4), j in [0, kVecs * width).
// Every sum is a variable of its own: gcc 12 keeps an array of them in memory.
template <Write kWrite, int kVecs>
inline void gemm_tile(int64_t depth, const float* a0, const float* a1, const float* a2,
                      const float* a3, const float* b, int64_t ldb, float* c, int64_t ldc,
                      float* column) {
  static_assert(kVecs >= 1 && kVecs <= 4);
  constexpr int w = Vec::kWidth;
  const Vec zero = Vec::zero();
  Vec s00 = zero, s01 = zero, s02 = zero, s03 = zero;
  Vec s10 = zero, s11 = zero, s12 = zero, s13 = zero;
  Vec s20 = zero, s21 = zero, s22 = zero, s23 = zero;
  Vec s30 = zero, s31 = zero, s32 = zero, s33 = zero;
  for (int64_t k = 0; k < depth; ++k, b += ldb) {
    Vec b0 = Vec::load(b), b1 = zero, b2 = zero, b3 = zero;
    if constexpr (kVecs > 1) b1 = Vec::load(b + w);
    if constexpr (kVecs > 2) b2 = Vec::load(b + 2 * w);
    if constexpr (kVecs > 3) b3 = Vec::load(b + 3 * w);
    Vec x = Vec::set1(a0[k]);
    s00 = mul_add(x, b0, s00);
    if constexpr (kVecs > 1) s01 = mul_add(x, b1, s01);
    if constexpr (kVecs > 2) s02 = mul_add(x, b2, s02);
    if constexpr (kVecs > 3) s03 = mul_add(x, b3, s03);
    x = Vec::set1(a1[k]);
    s10 = mul_add(x, b0, s10);
    if constexpr (kVecs > 1) s11 = mul_add(x, b1, s11);
    if constexpr (kVecs > 2) s12 = mul_add(x, b2, s12);
    if constexpr (kVecs > 3) s13 = mul_add(x, b3, s13);
    x = Vec::set1(a2[k]);
    s20 = mul_add(x, b0, s20);
    if constexpr (kVecs > 1) s21 = mul_add(x, b1, s21);
    if constexpr (kVecs > 2) s22 = mul_add(x, b2, s22);
    if constexpr (kVecs > 3) s23 = mul_add(x, b3, s23);
    x = Vec::set1(a3[k]);
    s30 = mul_add(x, b0, s30);
    if constexpr (kVecs > 1) s31 = mul_add(x, b1, s31);
    if constexpr (kVecs > 2) s32 = mul_add(x, b2, s32);
    if constexpr (kVecs > 3) s33 = mul_add(x, b3, s33);
  }
  if constexpr (kWrite == Write::kStoreMax) {
    const auto raise = [&](int j, Vec s0, Vec s1, Vec s2, Vec s3) {
      float* m = column + j * w;
      max(max(max(s0, s1), max(s2, s3)), Vec::load(m)).store(m);
    };
    raise(0, s00, s10, s20, s30);
    if constexpr (kVecs > 1) raise(1, s01, s11, s21, s31);
    if constexpr (kVecs > 2) raise(2, s02, s12, s22, s32);
    if constexpr (kVecs > 3) raise(3, s03, s13, s23, s33);
  }
  write_row<kWrite, kVecs>(c, column, s00, s01, s02, s03);
  write_row<kWrite, kVecs>(c + ldc, column, s10, s11, s12, s13);
  write_row<kWrite, kVecs>(c + 2 * ldc, column, s20, s21, s22, s23);
  write_row<kWrite, kVecs>(c + 3 * ldc, column, s30, s31, s32, s33);
}

// The same for any number of rows: a [rows, depth] with row stride lda, b [depth, kVecs * width]
// and c with row stride kPanel. c has room for rows rounded up to kRows; the rows beyond `rows` get
// copies of the last one, which leaves the column maxima as they are.
// Not inlined: next to a softmax gcc keeps that one's constants in the registers and b in memory.
template <Write kWrite, int kVecs>
[[gnu::noinline]] void gemm_rows(int64_t rows, int64_t depth, const float* a, int64_t lda,
                                 const float* b, float* c, float* column) {
  for (int64_t i = 0; i < rows; i += kRows) {
    const float* a0 = a + i * lda;
    const float* a1 = i + 1 < rows ? a0 + lda : a0;
    const float* a2 = i + 2 < rows ? a1 + lda : a1;
    const float* a3 = i + 3 < rows ? a2 + lda : a2;
    gemm_tile<kWrite, kVecs>(depth, a0, a1, a2, a3, b, kPanel, c + i * kPanel, kPanel, column);
  }
}

// gemm_rows for `columns` columns (rounded up to whole vectors), at most kPanel.
template <Write kWrite>
inline void gemm_panel(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda,
                       const float* b, float* c, float* column = nullptr) {
  const int64_t vecs = (columns + Vec::kWidth - 1) / Vec::kWidth;
  if (vecs == 1) return gemm_rows<kWrite, 1>(rows, depth, a, lda, b, c, column);
  if constexpr (kPanelVecs >= 2) {
    if (vecs == 2) return gemm_rows<kWrite, 2>(rows, depth, a, lda, b, c, column);
  }
  if constexpr (kPanelVecs >= 3) {
    if (vecs == 3) return gemm_rows<kWrite, 3>(rows, depth, a, lda, b, c, column);
  }
  if constexpr (kPanelVecs >= 4) {
    if (vecs == 4) return gemm_rows<kWrite, 4>(rows, depth, a, lda, b, c, column);
  }
}

// What a streaming softmax keeps of each query (Milakov & Gimelshein 2018), [kPanel] each.
struct SoftmaxState {
  float* maximum;     // of all logits so far, the block at hand included
  float* previous;    // the maximum before that block
  float* rescale;     // out: what the sums so far are to be multiplied with
  float* normalizer;  // sum of the probabilities so far
};

// Turns a block of logits [keys, kPanel] into probabilities relative to the new maximum, and brings
// the state up to date.
template <int kVecs>
inline void softmax_block(int64_t keys, float* logits, const SoftmaxState& s) {
  constexpr int w = Vec::kWidth;
  for (int j = 0; j < kVecs; ++j) {
    const Vec m = Vec::load(s.maximum + j * w);
    exp2_shifted(Vec::load(s.previous + j * w) - m).store(s.rescale + j * w);
  }
  for (int j = 0; j < kVecs; ++j) {
    const Vec m = Vec::load(s.maximum + j * w);
    float* row = logits + j * w;
    Vec even = Vec::zero(), odd = Vec::zero();
    int64_t i = 0;
    for (; i + 2 <= keys; i += 2, row += 2 * kPanel) {
      const Vec p0 = exp2_shifted(Vec::load(row) - m);
      const Vec p1 = exp2_shifted(Vec::load(row + kPanel) - m);
      p0.store(row);
      p1.store(row + kPanel);
      even = even + p0;
      odd = odd + p1;
    }
    if (i < keys) {
      const Vec p0 = exp2_shifted(Vec::load(row) - m);
      p0.store(row);
      even = even + p0;
    }
    float* sum = s.normalizer + j * w;
    mul_add(Vec::load(sum), Vec::load(s.rescale + j * w), even + odd).store(sum);
    m.store(s.previous + j * w);
  }
}

// dst[j][i] = src[i][j] * scale for i in [0, rows), j in [0, columns).
inline void transpose(const float* src, int64_t ld_src, int64_t rows, int64_t columns, float* dst,
                      int64_t ld_dst, float scale = 1.0f) {
  int64_t i = 0;
#if defined(__SSE2__)
  const __m128 factor = _mm_set1_ps(scale);
  for (; i + 4 <= rows; i += 4) {
    const float* s = src + i * ld_src;
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      __m128 r0 = _mm_loadu_ps(s + j);
      __m128 r1 = _mm_loadu_ps(s + ld_src + j);
      __m128 r2 = _mm_loadu_ps(s + 2 * ld_src + j);
      __m128 r3 = _mm_loadu_ps(s + 3 * ld_src + j);
      _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
      float* d = dst + j * ld_dst + i;
      _mm_storeu_ps(d, _mm_mul_ps(r0, factor));
      _mm_storeu_ps(d + ld_dst, _mm_mul_ps(r1, factor));
      _mm_storeu_ps(d + 2 * ld_dst, _mm_mul_ps(r2, factor));
      _mm_storeu_ps(d + 3 * ld_dst, _mm_mul_ps(r3, factor));
    }
    for (; j < columns; ++j) {
      for (int64_t l = 0; l < 4; ++l) dst[j * ld_dst + i + l] = s[l * ld_src + j] * scale;
    }
  }
#endif
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) dst[j * ld_dst + i] = src[i * ld_src + j] * scale;
  }
}

// Whole vectors take the plain instruction: masked ones are slow on some CPUs.
inline Vec load_up_to(const float* p, int64_t n) {
  return n >= Vec::kWidth ? Vec::loadu(p) : Vec::load_partial(p, static_cast<int>(n));
}

// The first n floats of y to element `at` of data, rounded to its type.
inline void store_up_to(Vec y, void* data, DType dtype, int64_t at, int64_t n) {
  if (dtype == DType::kFloat32) {
    float* p = static_cast<float*>(data) + at;
    n >= Vec::kWidth ? y.storeu(p) : y.store_partial(p, static_cast<int>(n));
  } else {
    uint16_t* p = static_cast<uint16_t*>(data) + at;
    n >= Vec::kWidth ? y.store_bf16(p) : y.store_bf16_partial(p, static_cast<int>(n));
  }
}

// dst[i] = src[i] * scale for i < n, zero up to the next multiple of the vector width.
inline void copy_scaled(const float* src, int64_t n, float* dst, float scale) {
  const Vec factor = Vec::set1(scale);
  for (int64_t i = 0; i < n; i += Vec::kWidth) {
    (load_up_to(src + i, n - i) * factor).storeu(dst + i);
  }
}

inline void convert_from_bf16(const uint16_t* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) Vec::load_bf16(src + i).storeu(dst + i);
  const int rest = static_cast<int>(n - i);
  if (rest > 0) Vec::load_bf16_partial(src + i, rest).store_partial(dst + i, rest);
}

// y[i] = scale * sum_c q[c * step] * rows[c * ld + i] for i < ld; `fill` up to the next whole
// vector.
inline void weighted_rows(const float* q, int64_t step, float scale, const float* rows,
                          int64_t channels, int64_t ld, float fill, float* y) {
  constexpr int w = Vec::kWidth;
  const Vec factor = Vec::set1(scale);
  int64_t i = 0;
  for (; i + 4 * w <= ld; i += 4 * w) {
    Vec s0 = Vec::zero(), s1 = s0, s2 = s0, s3 = s0;
    for (int64_t c = 0; c < channels; ++c) {
      const Vec x = Vec::set1(q[c * step]);
      const float* row = rows + c * ld + i;
      s0 = mul_add(x, Vec::loadu(row), s0);
      s1 = mul_add(x, Vec::loadu(row + w), s1);
      s2 = mul_add(x, Vec::loadu(row + 2 * w), s2);
      s3 = mul_add(x, Vec::loadu(row + 3 * w), s3);
    }
    (s0 * factor).store(y + i);
    (s1 * factor).store(y + i + w);
    (s2 * factor).store(y + i + 2 * w);
    (s3 * factor).store(y + i + 3 * w);
  }
  for (; i < ld; i += w) {
    const int n = static_cast<int>(ld - i < w ? ld - i : w);
    Vec even = Vec::zero(), odd = Vec::zero();
    int64_t c = 0;
    for (; c + 2 <= channels; c += 2) {
      const float* row = rows + c * ld + i;
      even = mul_add(Vec::set1(q[c * step]), Vec::load_partial(row, n), even);
      odd = mul_add(Vec::set1(q[(c + 1) * step]), Vec::load_partial(row + ld, n), odd);
    }
    if (c < channels) {
      even = mul_add(Vec::set1(q[c * step]), Vec::load_partial(rows + c * ld + i, n), even);
    }
    ((even + odd) * factor).store(y + i);
    for (int j = n; j < w; ++j) y[i + j] = fill;
  }
}

// sum_i x[i] * y[i]
inline float dot(const float* x, const float* y, int64_t n) {
  constexpr int w = Vec::kWidth;
  Vec s0 = Vec::zero(), s1 = s0;
  int64_t i = 0;
  for (; i + 2 * w <= n; i += 2 * w) {
    s0 = mul_add(Vec::loadu(x + i), Vec::loadu(y + i), s0);
    s1 = mul_add(Vec::loadu(x + i + w), Vec::loadu(y + i + w), s1);
  }
  for (; i < n; i += w) {
    const int rest = static_cast<int>(n - i);
    s0 = mul_add(Vec::load_partial(x + i, rest), Vec::load_partial(y + i, rest), s0);
  }
  return (s0 + s1).reduce_add();
}

// First element of q (which = 0), k (1) or v (2) of one head in qkv; its channels follow each
// other at a distance of `length`.
inline int64_t head_offset(const QkvAttentionShape& shape, int64_t image, int64_t head, int which) {
  const int64_t block =
      shape.order == QkvOrder::kLegacy ? head * 3 + which : which * shape.heads + head;
  return (image * shape.heads * 3 + block) * shape.head_dim * shape.length;
}

// The same in out.
inline int64_t out_offset(const QkvAttentionShape& shape, int64_t image, int64_t head) {
  return (image * shape.heads + head) * shape.head_dim * shape.num_queries;
}

// n elements of `data` from `offset` on as float32: in place, or converted into `buffer`.
inline const float* as_float(const void* data, DType dtype, int64_t offset, int64_t n,
                             float* buffer) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data) + offset;
  convert_from_bf16(static_cast<const uint16_t*>(data) + offset, n, buffer);
  return buffer;
}

}  // namespace adm_rt::ADM_RT_ISA
