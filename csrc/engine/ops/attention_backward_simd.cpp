// The gradient of attention with respect to q, k and v. Everything of size keys x queries lies with
// the keys as rows, so that softmax and its gradient run down the columns, a vector of queries at a
// time, and k, v, p and ds are left operands of products (gemm.h) as they are.
#include <cstdint>

#include "common/simd.h"
#include "engine/gemm.h"
#include "engine/ops/attention_backward_kernels.h"
#include "ops/qkv_attention_tile.h"

namespace adm_rt::ADM_RT_ISA {
namespace {

constexpr int64_t kWidth = Vec::kWidth;
// Queries per block, by the number of keys alone: p and ds take 384 KiB each, where keys allow it.
constexpr int64_t kTileFloats = 96 * 1024;
constexpr int64_t kMinQueries = 48, kMaxQueries = 192;  // multiples of every vector and row block
// Rows whose values are summed in one chain.
constexpr int64_t kChain = 64;

int64_t query_block(int64_t keys) {
  const int64_t fitting = kTileFloats / keys / kMinQueries * kMinQueries;
  return fitting < kMinQueries ? kMinQueries : fitting > kMaxQueries ? kMaxQueries : fitting;
}

struct Scratch {
  float* k_t;     // [head_dim, ld_k]: k transposed
  float* q;       // panels of q^T, scaled: B of k q^T
  float* grad;    // panels of grad^T
  float* q_rows;  // panels of q: B of ds q
  float* grad_rows;
  float* p;     // [keys, ld]: logits, then probabilities
  float* ds;    // [keys, ld]: dp, then ds
  float* ds_b;  // panels of ds: B of k^T ds
  float* dq_t;  // [head_dim, ld]
  int64_t ld_k;
  int64_t ld;
};

int64_t carve(int64_t head_dim, int64_t keys, float* base, Scratch* s) {
  const int64_t panel = gemm_panel_width(), queries = query_block(keys);
  int64_t used = 0;
  const auto take = [&](int64_t n) {
    float* p = base == nullptr ? nullptr : base + used;
    used += round_up(n, 16);
    return p;
  };
  // Rows that are 4 KiB apart would all compete for the same cache lines.
  s->ld_k = round_up(keys, 16) + 16;
  s->ld = queries + 16;
  s->k_t = take(head_dim * s->ld_k);
  s->q = take(gemm_packed_floats(queries, head_dim, panel));
  s->grad = take(gemm_packed_floats(queries, head_dim, panel));
  s->q_rows = take(gemm_packed_floats(head_dim, queries, panel));
  s->grad_rows = take(gemm_packed_floats(head_dim, queries, panel));
  s->p = take(keys * s->ld);
  s->ds = take(keys * s->ld);
  s->ds_b = take(gemm_packed_floats(queries, keys, panel));
  s->dq_t = take(head_dim * s->ld);
  return used;
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

// The same of the transposed matrix, times `scale`: rows of src become columns.
void pack_columns(const float* src, int64_t ld, int64_t rows, int64_t columns, int64_t width,
                  float scale, float* dst) {
  for (int64_t row = 0; row < rows; row += width, dst += columns * width) {
    const int64_t count = rows - row < width ? rows - row : width;
    transpose(src + row * ld, ld, count, columns, dst, width, scale);
    for (int64_t c = 0; count < width && c < columns; ++c) {
      for (int64_t j = count; j < width; ++j) dst[c * width + j] = 0.0f;
    }
  }
}

// One vector of queries down all keys. p: logits in units of ln 2 -> probabilities; ds: dp -> p (dp
// - sum p dp) * scale.
void softmax_gradient(int64_t keys, int64_t ld, float scale, float* p, float* ds) {
  // max() gives its second operand when either is NaN: NaN reaches the result by the exponential.
  Vec even = Vec::set1(-INFINITY), odd = even;
  int64_t i = 0;
  for (; i + 2 <= keys; i += 2) {
    even = max(Vec::load(p + i * ld), even);
    odd = max(Vec::load(p + (i + 1) * ld), odd);
  }
  if (i < keys) even = max(Vec::load(p + i * ld), even);
  const Vec maximum = max(even, odd);
  Vec sum = Vec::zero(), dot = sum;
  for (int64_t first = 0; first < keys; first += kChain) {
    const int64_t stop = first + kChain < keys ? first + kChain : keys;
    Vec chain_sum = Vec::zero(), chain_dot = chain_sum;
    for (i = first; i < stop; ++i) {
      const Vec e = exp2_shifted(Vec::load(p + i * ld) - maximum);
      e.store(p + i * ld);
      chain_sum = chain_sum + e;
      chain_dot = mul_add(e, Vec::load(ds + i * ld), chain_dot);
    }
    sum = sum + chain_sum;
    dot = dot + chain_dot;
  }
  const Vec inverse = Vec::set1(1.0f) / sum, delta = dot / sum, factor = Vec::set1(scale);
  for (i = 0; i < keys; ++i) {
    const Vec probability = Vec::load(p + i * ld) * inverse;
    probability.store(p + i * ld);
    (probability * (Vec::load(ds + i * ld) - delta) * factor).store(ds + i * ld);
  }
}

// Queries [0, count) of a block, whose rows begin at q, grad and dq.
void run_block(const AttentionBackwardHead& head, int64_t first, int64_t count, bool accumulate,
               const Scratch& s) {
  const int64_t d = head.head_dim, keys = head.keys, panel = gemm_panel_width();
  const float* q = head.q + first * head.row;
  const float* grad = head.grad + first * head.grad_row;
  pack_columns(q, head.row, count, d, panel, logit_scale_base2(d), s.q);
  pack_columns(grad, head.grad_row, count, d, panel, 1.0f, s.grad);
  pack_rows(q, head.row, count, d, panel, s.q_rows);
  pack_rows(grad, head.grad_row, count, d, panel, s.grad_rows);
  gemm(keys, count, d, head.k, head.row, s.q, s.p, s.ld, false);
  gemm(keys, count, d, head.v, head.row, s.grad, s.ds, s.ld, false);
  for (int64_t j = 0; j < count; j += kWidth) {
    if (count - j < kWidth) {  // the columns behind the last query: any finite values
      for (int64_t i = 0; i < keys; ++i) {
        for (int64_t l = count; l < j + kWidth; ++l) s.p[i * s.ld + l] = s.ds[i * s.ld + l] = 0.0f;
      }
    }
    softmax_gradient(keys, s.ld, logit_scale(d), s.p + j, s.ds + j);
  }
  gemm(keys, d, count, s.p, s.ld, s.grad_rows, head.dv, head.partial_row, accumulate);
  gemm(keys, d, count, s.ds, s.ld, s.q_rows, head.dk, head.partial_row, accumulate);
  pack_rows(s.ds, s.ld, keys, count, panel, s.ds_b);
  gemm(d, count, keys, s.k_t, s.ld_k, s.ds_b, s.dq_t, s.ld, false);
  transpose(s.dq_t, s.ld, d, count, head.dq + first * head.row, head.row);
}

}  // namespace

int64_t attention_backward_scratch(int64_t head_dim, int64_t keys) {
  Scratch s;
  return carve(head_dim, keys, nullptr, &s);
}

void attention_backward_queries(const AttentionBackwardHead& head, int64_t begin, int64_t end,
                                float* scratch) {
  Scratch s;
  carve(head.head_dim, head.keys, scratch, &s);
  transpose(head.k, head.row, head.keys, head.head_dim, s.k_t, s.ld_k);
  const int64_t block = query_block(head.keys);
  for (int64_t first = begin; first < end; first += block) {
    run_block(head, first, end - first < block ? end - first : block, first > begin, s);
  }
}

void add_parts(int64_t rows, int64_t channels, const float* parts, int64_t count,
               int64_t part_floats, int64_t part_row, float* y, int64_t row) {
  for (int64_t r = 0; r < rows; ++r, parts += part_row, y += row) {
    for (int64_t c = 0; c < channels; c += kWidth) {
      const int64_t n = channels - c;
      Vec sum = load_up_to(parts + c, n);
      for (int64_t p = 1; p < count; ++p) sum = sum + load_up_to(parts + p * part_floats + c, n);
      store_up_to(sum, y, DType::kFloat32, c, n);
    }
  }
}

}  // namespace adm_rt::ADM_RT_ISA
