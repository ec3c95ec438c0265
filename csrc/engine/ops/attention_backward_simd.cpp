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
// Queries per block, by the number of keys alone: their p and ds are 384 KiB each, where keys allow
// it.
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
  float* grad;    // panels of grad^T: B of v grad^T
  float* q_rows;  // panels of q: B of ds q
  float* grad_rows;
  float* ds;    // [keys, ld]: dp, then ds
  float* dots;  // [ld]
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
  s->grad = take(gemm_packed_floats(queries, head_dim, panel));
  s->q_rows = take(gemm_packed_floats(head_dim, queries, panel));
  s->grad_rows = take(gemm_packed_floats(head_dim, queries, panel));
  s->ds = take(keys * s->ld);
  s->dots = take(s->ld);
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

// The same of the transposed matrix: rows of src become columns.
void pack_columns(const float* src, int64_t ld, int64_t rows, int64_t columns, int64_t width,
                  float* dst) {
  for (int64_t row = 0; row < rows; row += width, dst += columns * width) {
    const int64_t count = rows - row < width ? rows - row : width;
    transpose(src + row * ld, ld, count, columns, dst, width);
    for (int64_t c = 0; count < width && c < columns; ++c) {
      for (int64_t j = count; j < width; ++j) dst[c * width + j] = 0.0f;
    }
  }
}

// ds: dp -> p (dp - sum_keys p dp) * scale, for `columns` queries, a multiple of the vector width.
void softmax_gradient(int64_t keys, int64_t columns, const float* p, int64_t p_row, float scale,
                      const Scratch& s) {
  alignas(64) float chain[kMaxQueries];
  for (int64_t j = 0; j < columns; j += kWidth) Vec::zero().store(s.dots + j);
  for (int64_t first = 0; first < keys; first += kChain) {
    const int64_t stop = first + kChain < keys ? first + kChain : keys;
    for (int64_t j = 0; j < columns; j += kWidth) Vec::zero().store(chain + j);
    for (int64_t i = first; i < stop; ++i) {
      const float* weight = p + i * p_row;
      const float* dp = s.ds + i * s.ld;
      for (int64_t j = 0; j < columns; j += kWidth) {
        mul_add(Vec::load(weight + j), Vec::load(dp + j), Vec::load(chain + j)).store(chain + j);
      }
    }
    for (int64_t j = 0; j < columns; j += kWidth) {
      (Vec::load(s.dots + j) + Vec::load(chain + j)).store(s.dots + j);
    }
  }
  const Vec factor = Vec::set1(scale);
  for (int64_t i = 0; i < keys; ++i) {
    const float* weight = p + i * p_row;
    float* ds = s.ds + i * s.ld;
    for (int64_t j = 0; j < columns; j += kWidth) {
      const Vec difference = Vec::load(ds + j) - Vec::load(s.dots + j);
      (Vec::load(weight + j) * difference * factor).store(ds + j);
    }
  }
}

// Queries [0, count) of a block, whose rows begin at q, grad and dq.
void run_block(const AttentionBackwardHead& head, int64_t first, int64_t count, bool accumulate,
               const Scratch& s) {
  const int64_t d = head.head_dim, keys = head.keys, panel = gemm_panel_width();
  const float* q = head.q + first * head.row;
  const float* grad = head.grad + first * head.grad_row;
  const float* p = head.p + first;
  pack_columns(grad, head.grad_row, count, d, panel, s.grad);
  pack_rows(q, head.row, count, d, panel, s.q_rows);
  pack_rows(grad, head.grad_row, count, d, panel, s.grad_rows);
  gemm(keys, d, count, {p, head.p_row}, s.grad_rows, {head.dv, head.partial_row}, accumulate);
  gemm(keys, count, d, {head.v, head.row}, s.grad, {s.ds, s.ld}, false);
  // The columns behind the last query are their own affair: whatever they hold is not read again.
  softmax_gradient(keys, round_up(count, kWidth), p, head.p_row, logit_scale(d), s);
  gemm(keys, d, count, {s.ds, s.ld}, s.q_rows, {head.dk, head.partial_row}, accumulate);
  pack_rows(s.ds, s.ld, keys, count, panel, s.ds_b);
  gemm(d, count, keys, {s.k_t, s.ld_k}, s.ds_b, {s.dq_t, s.ld}, false);
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
