// qkv_attention, backward: five products per (key block, query block), as in FlashAttention-2
// (Dao, 2023, algorithm 2), with the probabilities recomputed from q, k and the saved maxima and
// sums. Probabilities and their gradients are [key][query] tiles, queries along the vectors; the
// products that sum over queries (dk, dv) take q and grad transposed, channels along the vectors.
#include <string.h>

#include "ops/qkv_attention_kernels.h"
#include "ops/qkv_attention_tile.h"

namespace adm_rt::ADM_RT_ISA {
namespace {

constexpr int64_t kKeyBlock = 64;

// Panels: [block][row][kPanel]. A query block holds kPanel queries, a channel block kPanel
// channels.
struct BackwardScratch {
  float* q;        // [query block][head_dim, kPanel], scaled by log2(e) / sqrt(head_dim)
  float* grad;     // [query block][head_dim, kPanel]
  float* q_t;      // [channel block][query, kPanel]: transposed and unscaled
  float* grad_t;   // [channel block][query, kPanel]
  float* dq;       // [query block][head_dim rounded up, kPanel]
  float* maximum;  // [query], padded to whole blocks, as the next two
  float* inverse;  // 1 / sum of exp(logit - maximum)
  float* delta;
  float* k_t;   // [kKeyBlock, head_dim]
  float* v_t;   // [kKeyBlock, head_dim]
  float* p;     // [kKeyBlock, kPanel]
  float* ds;    // [kKeyBlock, kPanel]
  float* dk;    // [channel block][kKeyBlock, kPanel]
  float* dv;    // [channel block][kKeyBlock, kPanel]
  float* rows;  // [kPanel, kKeyBlock]
  float*
      converted;  // bfloat16 only: q, k, v [3, head_dim, length], grad, out [2, head_dim, queries]
};

int64_t carve(const QkvAttentionShape& shape, float* base, BackwardScratch* s) {
  const int64_t d = shape.head_dim, queries = shape.num_queries;
  const int64_t query_blocks = (queries + kPanel - 1) / kPanel;
  const int64_t channel_blocks = (d + kPanel - 1) / kPanel;
  int64_t used = 0;
  const auto take = [&](int64_t n) {
    float* p = base == nullptr ? nullptr : base + used;
    used += round_up(n, 16);
    return p;
  };
  s->q = take(query_blocks * d * kPanel);
  s->grad = take(query_blocks * d * kPanel);
  s->q_t = take(channel_blocks * queries * kPanel);
  s->grad_t = take(channel_blocks * queries * kPanel);
  s->dq = take(query_blocks * round_up(d, kRows) * kPanel);
  s->maximum = take(query_blocks * kPanel);
  s->inverse = take(query_blocks * kPanel);
  s->delta = take(query_blocks * kPanel);
  s->k_t = take(kKeyBlock * d);
  s->v_t = take(kKeyBlock * d);
  s->p = take(kKeyBlock * kPanel);
  s->ds = take(kKeyBlock * kPanel);
  s->dk = take(channel_blocks * kKeyBlock * kPanel);
  s->dv = take(channel_blocks * kKeyBlock * kPanel);
  s->rows = take(kPanel * kKeyBlock);
  const bool convert = shape.dtype != DType::kFloat32;
  s->converted = take(convert ? d * (3 * shape.length + 2 * queries) : 0);
  return used;
}

// One head's operands as float32.
struct Head {
  const float* q;  // [head_dim, length] each
  const float* k;
  const float* v;
  const float* grad;  // [head_dim, queries] each
  const float* out;
};

Head load_head(const QkvAttentionBackwardParams& p, int64_t image, int64_t head, float* buffer) {
  const QkvAttentionShape& shape = p.shape;
  const int64_t n = shape.head_dim * shape.length, m = shape.head_dim * shape.num_queries;
  const int64_t at = out_offset(shape, image, head);
  Head h;
  h.q = as_float(p.qkv, shape.dtype, head_offset(shape, image, head, 0), n, buffer);
  h.k = as_float(p.qkv, shape.dtype, head_offset(shape, image, head, 1), n, buffer + n);
  h.v = as_float(p.qkv, shape.dtype, head_offset(shape, image, head, 2), n, buffer + 2 * n);
  h.grad = as_float(p.grad, shape.dtype, at, m, buffer + 3 * n);
  h.out = as_float(p.out, shape.dtype, at, m, buffer + 3 * n + m);
  return h;
}

// n elements from `src`, times `scale`, to position `at` of dqkv.
void store_row(const QkvAttentionBackwardParams& p, int64_t at, const float* src, int64_t n,
               float scale) {
  constexpr int w = Vec::kWidth;
  const Vec factor = Vec::set1(scale);
  for (int64_t i = 0; i < n; i += w) {
    store_up_to(load_up_to(src + i, n - i) * factor, p.dqkv, p.shape.dtype, at + i, n - i);
  }
}

void zero_row(const QkvAttentionBackwardParams& p, int64_t at, int64_t n) {
  const int64_t size = p.shape.dtype == DType::kFloat32 ? 4 : 2;
  memset(static_cast<char*>(p.dqkv) + at * size, 0, static_cast<size_t>(n * size));
}

// Everything that depends on the queries alone.
void pack_queries(const QkvAttentionShape& shape, const Head& h, const float* stats,
                  const BackwardScratch& s) {
  const int64_t d = shape.head_dim, length = shape.length, queries = shape.num_queries;
  const int64_t blocks = (queries + kPanel - 1) / kPanel;
  const float scale = logit_scale_base2(d);
  for (int64_t j = 0; j < blocks * kPanel; ++j) {
    s.maximum[j] = j < queries ? stats[j] : 0.0f;
    s.inverse[j] = j < queries ? 1.0f / stats[queries + j] : 0.0f;
    s.delta[j] = 0.0f;
  }
  for (int64_t c = 0; c < d; ++c) {
    const float* g = h.grad + c * queries;
    const float* y = h.out + c * queries;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kPanel;
      const int64_t count = queries - first < kPanel ? queries - first : kPanel;
      const int64_t at = (block * d + c) * kPanel;
      copy_scaled(h.q + c * length + first, count, s.q + at, scale);
      copy_scaled(g + first, count, s.grad + at, 1.0f);
    }
    for (int64_t j = 0; j < queries; j += Vec::kWidth) {
      // In the order of the product that makes dp: where the softmax is saturated, dp - delta is
      // then exactly zero.
      const Vec sum = Vec::load(s.delta + j);
      mul_add(load_up_to(g + j, queries - j), load_up_to(y + j, queries - j), sum)
          .store(s.delta + j);
    }
  }
  for (int64_t first = 0; first < d; first += kPanel) {
    const int64_t count = d - first < kPanel ? d - first : kPanel;
    const int64_t width = round_up(count, Vec::kWidth);
    float* q_t = s.q_t + first * queries;
    float* grad_t = s.grad_t + first * queries;
    transpose(h.q + first * length, length, count, queries, q_t, kPanel);
    transpose(h.grad + first * queries, queries, count, queries, grad_t, kPanel);
    for (int64_t t = 0; count < width && t < queries; ++t) {
      for (int64_t c = count; c < width; ++c) q_t[t * kPanel + c] = grad_t[t * kPanel + c] = 0.0f;
    }
  }
}

// p = 2^(logit - maximum) / sum and ds = p * (dp - delta), where p holds logits and ds dp.
void softmax_gradient(int64_t keys, int64_t columns, const float* maximum, const float* inverse,
                      const float* delta, float* p, float* ds) {
  for (int64_t j = 0; j < columns; j += Vec::kWidth) {
    const Vec m = Vec::load(maximum + j), r = Vec::load(inverse + j), t = Vec::load(delta + j);
    for (int64_t i = 0; i < keys; ++i) {
      const int64_t at = i * kPanel + j;
      const Vec e = exp2_shifted(Vec::load(p + at) - m) * r;
      e.store(p + at);
      (e * (Vec::load(ds + at) - t)).store(ds + at);
    }
  }
}

void backward_head(const QkvAttentionBackwardParams& p, int64_t image, int64_t head, float scale,
                   const BackwardScratch& s) {
  const QkvAttentionShape& shape = p.shape;
  const int64_t d = shape.head_dim, length = shape.length, queries = shape.num_queries;
  const Head h = load_head(p, image, head, s.converted);
  pack_queries(shape, h, p.stats + (image * shape.heads + head) * 2 * queries, s);
  for (int64_t first = 0; first < length; first += kKeyBlock) {
    const int64_t keys = length - first < kKeyBlock ? length - first : kKeyBlock;
    transpose(h.k + first, length, d, keys, s.k_t, d);
    transpose(h.v + first, length, d, keys, s.v_t, d);
    for (int64_t t = 0; t < queries; t += kPanel) {
      const int64_t count = queries - t < kPanel ? queries - t : kPanel;
      gemm_panel<Write::kStore>(keys, count, d, s.k_t, d, s.q + t * d, s.p);
      gemm_panel<Write::kStore>(keys, count, d, s.v_t, d, s.grad + t * d, s.ds);
      softmax_gradient(keys, count, s.maximum + t, s.inverse + t, s.delta + t, s.p, s.ds);
      for (int64_t c = 0; c < d; c += kPanel) {
        const int64_t width = d - c < kPanel ? d - c : kPanel;
        float* dv = s.dv + c * kKeyBlock;
        float* dk = s.dk + c * kKeyBlock;
        const float* grad_t = s.grad_t + c * queries + t * kPanel;
        const float* q_t = s.q_t + c * queries + t * kPanel;
        if (t == 0) {
          gemm_panel<Write::kStore>(keys, width, count, s.p, kPanel, grad_t, dv);
          gemm_panel<Write::kStore>(keys, width, count, s.ds, kPanel, q_t, dk);
        } else {
          gemm_panel<Write::kAdd>(keys, width, count, s.p, kPanel, grad_t, dv);
          gemm_panel<Write::kAdd>(keys, width, count, s.ds, kPanel, q_t, dk);
        }
      }
      float* dq = s.dq + t * round_up(d, kRows);
      if (first == 0) {
        gemm_panel<Write::kStore>(d, count, keys, h.k + first, length, s.ds, dq);
      } else {
        gemm_panel<Write::kAdd>(d, count, keys, h.k + first, length, s.ds, dq);
      }
    }
    for (int which = 1; which <= 2; ++which) {
      const float* source = which == 1 ? s.dk : s.dv;
      const float factor = which == 1 ? scale : 1.0f;
      for (int64_t c = 0; c < d; c += kPanel) {
        const int64_t width = d - c < kPanel ? d - c : kPanel;
        transpose(source + c * kKeyBlock, kPanel, keys, width, s.rows, kKeyBlock);
        const int64_t at = head_offset(shape, image, head, which) + c * length + first;
        for (int64_t i = 0; i < width; ++i) {
          store_row(p, at + i * length, s.rows + i * kKeyBlock, keys, factor);
        }
      }
    }
  }
  for (int64_t c = 0; c < d; ++c) {
    const int64_t at = head_offset(shape, image, head, 0) + c * length;
    for (int64_t t = 0; t < queries; t += kPanel) {
      const int64_t count = queries - t < kPanel ? queries - t : kPanel;
      store_row(p, at + t, s.dq + t * round_up(d, kRows) + c * kPanel, count, scale);
    }
    zero_row(p, at + queries, length - queries);
  }
}

}  // namespace

int64_t qkv_attention_backward_scratch(const QkvAttentionShape& shape) {
  BackwardScratch scratch;
  const int64_t tiles = carve(shape, nullptr, &scratch);
  const int64_t single =
      3 * round_up(shape.length, Vec::kWidth) + shape.head_dim * (3 * shape.length + 2);
  return tiles > single ? tiles : round_up(single, 16);
}

void qkv_attention_backward_tasks(const QkvAttentionBackwardParams& p, float* scratch,
                                  int64_t begin, int64_t end) {
  const float scale = logit_scale(p.shape.head_dim);
  BackwardScratch s;
  carve(p.shape, scratch, &s);
  for (int64_t pair = begin; pair < end; ++pair) {
    backward_head(p, pair / p.shape.heads, pair % p.shape.heads, scale, s);
  }
}

void qkv_attention_backward_single(const QkvAttentionBackwardParams& p, float* scratch,
                                   int64_t begin, int64_t end) {
  constexpr int w = Vec::kWidth;
  const QkvAttentionShape& shape = p.shape;
  const int64_t d = shape.head_dim, length = shape.length, padded = round_up(length, w);
  const float scale = logit_scale(d);
  float* probabilities = scratch;
  float* ds = scratch + padded;
  float* row = scratch + 2 * padded;
  float* buffer = scratch + 3 * padded;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t image = pair / shape.heads, head = pair % shape.heads;
    const Head h = load_head(p, image, head, buffer);
    // grad has one column: the same loop as for the logits, with v for k.
    weighted_rows(h.q, length, logit_scale_base2(d), h.k, d, length, -INFINITY, probabilities);
    weighted_rows(h.grad, 1, 1.0f, h.v, d, length, 0.0f, ds);
    const Vec maximum = Vec::set1(p.stats[2 * pair]);
    const Vec inverse = Vec::set1(1.0f / p.stats[2 * pair + 1]);
    for (int64_t i = 0; i < padded; i += w) {
      (exp2_shifted(Vec::load(probabilities + i) - maximum) * inverse).store(probabilities + i);
    }
    const Vec delta = Vec::set1(dot(probabilities, ds, length));
    for (int64_t i = 0; i < padded; i += w) {
      (Vec::load(probabilities + i) * (Vec::load(ds + i) - delta)).store(ds + i);
    }
    for (int64_t c = 0; c < d; ++c) {
      const int64_t at = head_offset(shape, image, head, 0) + c * length;
      row[0] = dot(ds, h.k + c * length, length);
      store_row(p, at, row, 1, scale);
      zero_row(p, at + 1, length - 1);
      store_row(p, head_offset(shape, image, head, 1) + c * length, ds, length,
                scale * h.q[c * length]);
      store_row(p, head_offset(shape, image, head, 2) + c * length, probabilities, length,
                h.grad[c]);
    }
  }
}

}  // namespace adm_rt::ADM_RT_ISA
