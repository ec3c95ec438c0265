// Attention on rows of pixels: logits and result are two products of gemm.h per block of queries,
// with k (transposed, scaled) and v packed once per head. Keys are taken in tiles that stay in the
// second-level cache; up to kKeyTile of them, which is every ADM model but at 64x64 pixels, there
// is one tile and the softmax is the plain one. Over several tiles it is the streaming softmax of
// Milakov & Gimelshein 2018.
#include <cstdint>

#include "common/simd.h"
#include "engine/gemm.h"
#include "engine/ops/attention_kernels.h"
#include "ops/qkv_attention_tile.h"

namespace adm_rt::ADM_RT_ISA {
namespace {

constexpr int64_t kWidth = Vec::kWidth;
constexpr int64_t kKeyTile = 1024;   // a multiple of every panel width
constexpr int64_t kMaxQueries = 48;  // a multiple of every row block

struct AttentionScratch {
  float* k;       // panels of k, [keys / panel][head_dim][panel]
  float* v;       // of each tile of keys panels of v, [head_dim / panel][keys][panel]
  float* logits;  // [kMaxQueries, ld]
  int64_t ld;
  float* maximum;     // [kMaxQueries], so far
  float* normalizer;  // [kMaxQueries], so far
};

int64_t carve(int64_t head_dim, int64_t keys, float* base, AttentionScratch* s) {
  const int64_t panel = gemm_panel_width();
  int64_t used = 0;
  const auto take = [&](int64_t n) {
    float* p = base == nullptr ? nullptr : base + used;
    used += round_up(n, 16);
    return p;
  };
  const int64_t tile = keys < kKeyTile ? keys : kKeyTile;
  // Rows that are 4 KiB apart would all compete for the same cache lines.
  s->ld = round_up(tile, 16) + 16;
  s->k = take(gemm_packed_floats(keys, head_dim, panel));
  s->v = take(gemm_packed_floats(head_dim, keys, panel));
  s->logits = take(kMaxQueries * s->ld);
  s->maximum = take(kMaxQueries);
  s->normalizer = take(kMaxQueries);
  return used;
}

float row_maximum(const float* x, int64_t n) {
  Vec m0 = Vec::set1(-INFINITY), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  // max() gives its second operand when either is NaN: NaN reaches the logits, not the maximum.
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    m0 = max(Vec::load(x + i), m0);
    m1 = max(Vec::load(x + i + kWidth), m1);
    m2 = max(Vec::load(x + i + 2 * kWidth), m2);
    m3 = max(Vec::load(x + i + 3 * kWidth), m3);
  }
  for (; i + kWidth <= n; i += kWidth) m0 = max(Vec::load(x + i), m0);
  float maximum = max(max(m0, m1), max(m2, m3)).reduce_max();
  for (; i < n; ++i) maximum = x[i] > maximum ? x[i] : maximum;
  return maximum;
}

// x[i] = 2^(x[i] - maximum); returns their sum. Writes up to the next whole vector.
float exponentials(float* x, int64_t n, float maximum) {
  const Vec m = Vec::set1(maximum);
  Vec sum0 = Vec::zero(), sum1 = sum0;
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    const Vec p0 = exp2_shifted(Vec::load(x + i) - m);
    const Vec p1 = exp2_shifted(Vec::load(x + i + kWidth) - m);
    p0.store(x + i);
    p1.store(x + i + kWidth);
    sum0 = sum0 + p0;
    sum1 = sum1 + p1;
  }
  for (; i < n; i += kWidth) {
    for (int64_t j = n; j < i + kWidth; ++j) x[j] = -INFINITY;
    const Vec p0 = exp2_shifted(Vec::load(x + i) - m);
    p0.store(x + i);
    sum0 = sum0 + p0;
  }
  return (sum0 + sum1).reduce_add();
}

void scale_row(float* y, int64_t n, float factor) {
  const Vec f = Vec::set1(factor);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) (Vec::loadu(y + i) * f).storeu(y + i);
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    (Vec::load_partial(y + i, rest) * f).store_partial(y + i, rest);
  }
}

// Panels of `width` columns: dst[panel][row][column], zero behind the last column.
void pack_rows(const float* src, int64_t ld, int64_t rows, int64_t columns, int64_t width,
               float* dst) {
  for (int64_t column = 0; column < columns; column += width) {
    const int64_t count = columns - column < width ? columns - column : width;
    for (int64_t r = 0; r < rows; ++r, dst += width) {
      const float* from = src + r * ld + column;
      for (int64_t j = 0; j < width; j += kWidth) {
        if (j + kWidth <= count) {
          Vec::loadu(from + j).store(dst + j);
        } else if (j < count) {
          Vec::load_partial(from + j, static_cast<int>(count - j)).store(dst + j);
        } else {
          Vec::zero().store(dst + j);
        }
      }
    }
  }
}

}  // namespace

int64_t attention_query_block(int64_t, int64_t) { return kMaxQueries; }

int64_t attention_scratch(int64_t head_dim, int64_t keys) {
  AttentionScratch s;
  return carve(head_dim, keys, nullptr, &s);
}

void attention_pack(const AttentionHead& head, float* scratch) {
  const int64_t d = head.head_dim, keys = head.keys, panel = gemm_panel_width();
  const float scale = logit_scale_base2(d);
  AttentionScratch s;
  carve(d, keys, scratch, &s);
  float* k = s.k;
  for (int64_t first = 0; first < keys; first += panel, k += d * panel) {
    const int64_t count = keys - first < panel ? keys - first : panel;
    transpose(head.k + first * head.row, head.row, count, d, k, panel, scale);
    for (int64_t c = 0; count < panel && c < d; ++c) {
      for (int64_t j = count; j < panel; ++j) k[c * panel + j] = 0.0f;
    }
  }
  const int64_t padded = round_up(d, panel);
  for (int64_t first = 0; first < keys; first += kKeyTile) {
    const int64_t count = keys - first < kKeyTile ? keys - first : kKeyTile;
    pack_rows(head.v + first * head.row, head.row, count, d, panel, s.v + first * padded);
  }
}

void attention_queries(const AttentionHead& head, int64_t begin, int64_t end, float* scratch) {
  const int64_t d = head.head_dim, keys = head.keys, queries = end - begin;
  const int64_t padded = round_up(d, gemm_panel_width());
  AttentionScratch s;
  carve(d, keys, scratch, &s);
  const float* q = head.q + begin * head.row;
  float* out = head.out + begin * head.out_row;
  for (int64_t first = 0; first < keys; first += kKeyTile) {
    const int64_t count = keys - first < kKeyTile ? keys - first : kKeyTile;
    gemm(queries, count, d, q, head.row, s.k + first * d, s.logits, s.ld, false);
    for (int64_t i = 0; i < queries; ++i) {
      float* row = s.logits + i * s.ld;
      float maximum = row_maximum(row, count);
      if (first == 0) {
        s.normalizer[i] = exponentials(row, count, maximum);
      } else {
        maximum = maximum > s.maximum[i] ? maximum : s.maximum[i];
        alignas(64) float shift[kWidth];
        exp2_shifted(Vec::set1(s.maximum[i] - maximum)).store(shift);
        const float sum = exponentials(row, count, maximum);
        s.normalizer[i] = s.normalizer[i] * shift[0] + sum;
        scale_row(out + i * head.out_row, d, shift[0]);
      }
      s.maximum[i] = maximum;
    }
    gemm(queries, d, count, s.logits, s.ld, s.v + first * padded, out, head.out_row, first > 0);
  }
  for (int64_t i = 0; i < queries; ++i) {
    scale_row(out + i * head.out_row, d, 1.0f / s.normalizer[i]);
  }
}

void attention_single(const AttentionHead& head, float* scratch) {
  const int64_t d = head.head_dim, keys = head.keys;
  const float scale = logit_scale_base2(d);
  float* logits = scratch;
  for (int64_t i = 0; i < keys; ++i) logits[i] = dot(head.q, head.k + i * head.row, d) * scale;
  const float normalizer = exponentials(logits, keys, row_maximum(logits, keys));
  const float factor = 1.0f / normalizer;
  for (int64_t c = 0; c < d; c += kWidth) {
    const int64_t rest = d - c;
    Vec even = Vec::zero(), odd = Vec::zero();
    const float* v = head.v + c;
    int64_t i = 0;
    for (; i + 2 <= keys; i += 2, v += 2 * head.row) {
      even = mul_add(Vec::set1(logits[i]), load_up_to(v, rest), even);
      odd = mul_add(Vec::set1(logits[i + 1]), load_up_to(v + head.row, rest), odd);
    }
    if (i < keys) even = mul_add(Vec::set1(logits[i]), load_up_to(v, rest), even);
    store_up_to((even + odd) * Vec::set1(factor), head.out + c, DType::kFloat32, 0, rest);
  }
}

}  // namespace adm_rt::ADM_RT_ISA
