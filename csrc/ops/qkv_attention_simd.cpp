// qkv_attention, forward. Everything is laid out with the queries along the vectors: logits and
// probabilities are [key][query], sums are [channel][query]. So the softmax needs no horizontal
// reduction, v is read where it lies (channel-major) and the result is written without a transpose;
// only k is transposed, once per head.
#include <string.h>

#include "ops/qkv_attention_kernels.h"
#include "ops/qkv_attention_tile.h"

namespace adm_rt::ADM_RT_ISA {
namespace {

// Keys per pass of the streamed softmax: their logits (kKeyBlock * kPanel floats) stay in L1 or L2.
constexpr int64_t kKeyBlock = 128;

struct ForwardScratch {
  float* query;    // [head_dim, kPanel], scaled by log2(e) / sqrt(head_dim)
  float* logits;   // [kKeyBlock, kPanel]
  float* sums;     // [head_dim rounded up, kPanel]
  float* maximum;  // [kPanel] each of the next four
  float* previous;
  float* rescale;
  float* normalizer;
  float* key;        // [length, head_dim]: k transposed
  float* converted;  // [head_dim, length] q, k or v from bfloat16
  float* value;      // [head_dim, length] v from bfloat16
};

int64_t carve(const QkvAttentionShape& shape, float* base, ForwardScratch* scratch) {
  const int64_t d = shape.head_dim;
  int64_t used = 0;
  const auto take = [&](int64_t n) {
    float* p = base == nullptr ? nullptr : base + used;
    used += round_up(n, 16);
    return p;
  };
  scratch->query = take(d * kPanel);
  scratch->logits = take(kKeyBlock * kPanel);
  scratch->sums = take(round_up(d, kRows) * kPanel);
  scratch->maximum = take(kPanel);
  scratch->previous = take(kPanel);
  scratch->rescale = take(kPanel);
  scratch->normalizer = take(kPanel);
  scratch->key = take(d * shape.length);
  const bool convert = shape.dtype != DType::kFloat32;
  scratch->converted = take(convert ? d * shape.length : 0);
  scratch->value = take(convert ? d * shape.length : 0);
  return used;
}

// One head, queries [first, first + count), count <= kVecs * width. v has row stride length.
template <int kVecs>
void query_block(const QkvAttentionShape& shape, const float* v, int64_t count,
                 const ForwardScratch& s) {
  const int64_t d = shape.head_dim;
  for (int64_t j = 0; j < kPanel; ++j) {
    s.maximum[j] = s.previous[j] = -INFINITY;
    s.normalizer[j] = 0.0f;
  }
  for (int64_t first = 0; first < shape.length; first += kKeyBlock) {
    const int64_t rest = shape.length - first;
    const int64_t keys = rest < kKeyBlock ? rest : kKeyBlock;
    gemm_rows<Write::kStoreMax, kVecs>(keys, d, s.key + first * d, d, s.query, s.logits, s.maximum);
    softmax_block<kVecs>(keys, s.logits, {s.maximum, s.previous, s.rescale, s.normalizer});
    if (first == 0) {
      gemm_rows<Write::kStore, kVecs>(d, keys, v, shape.length, s.logits, s.sums, nullptr);
    } else {
      gemm_rows<Write::kScaleAdd, kVecs>(d, keys, v + first, shape.length, s.logits, s.sums,
                                         s.rescale);
    }
  }
  for (int64_t j = 0; j < kPanel; ++j) s.rescale[j] = j < count ? 1.0f / s.normalizer[j] : 0.0f;
}

void store_queries(const QkvAttentionShape& shape, void* out, int64_t offset, int64_t count,
                   const ForwardScratch& s) {
  constexpr int w = Vec::kWidth;
  for (int64_t c = 0; c < shape.head_dim; ++c, offset += shape.num_queries) {
    for (int64_t j = 0; j < count; j += w) {
      const Vec y = Vec::load(s.sums + c * kPanel + j) * Vec::load(s.rescale + j);
      store_up_to(y, out, shape.dtype, offset + j, count - j);
    }
  }
}

}  // namespace

int64_t qkv_attention_query_block() { return kPanel; }

int64_t qkv_attention_scratch(const QkvAttentionShape& shape) {
  ForwardScratch scratch;
  const int64_t tiles = carve(shape, nullptr, &scratch);
  const int64_t single = round_up(shape.length, Vec::kWidth) + 3 * shape.head_dim * shape.length;
  return tiles > single ? tiles : round_up(single, 16);
}

void qkv_attention_tasks(const QkvAttentionParams& p, float* scratch, int64_t begin, int64_t end) {
  const QkvAttentionShape& shape = p.shape;
  const int64_t d = shape.head_dim, length = shape.length, queries = shape.num_queries;
  const int64_t blocks = (queries + kPanel - 1) / kPanel;
  const float scale = logit_scale_base2(d);
  ForwardScratch s;
  carve(shape, scratch, &s);
  int64_t packed = -1;  // the head whose k lies in s.key
  const float* v = nullptr;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / blocks, image = pair / shape.heads, head = pair % shape.heads;
    if (pair != packed) {
      const float* k =
          as_float(p.qkv, shape.dtype, head_offset(shape, image, head, 1), d * length, s.converted);
      transpose(k, length, d, length, s.key, d);
      v = as_float(p.qkv, shape.dtype, head_offset(shape, image, head, 2), d * length, s.value);
      packed = pair;
    }
    const int64_t first = task % blocks * kPanel;
    const int64_t count = queries - first < kPanel ? queries - first : kPanel;
    for (int64_t c = 0; c < d; ++c) {
      const int64_t at = head_offset(shape, image, head, 0) + c * length + first;
      copy_scaled(as_float(p.qkv, shape.dtype, at, count, s.logits), count, s.query + c * kPanel,
                  scale);
    }
    const int64_t vecs = (count + Vec::kWidth - 1) / Vec::kWidth;
    if (vecs == 1) query_block<1>(shape, v, count, s);
    if constexpr (kPanelVecs >= 2) {
      if (vecs == 2) query_block<2>(shape, v, count, s);
    }
    if constexpr (kPanelVecs >= 3) {
      if (vecs == 3) query_block<3>(shape, v, count, s);
    }
    if constexpr (kPanelVecs >= 4) {
      if (vecs == 4) query_block<4>(shape, v, count, s);
    }
    store_queries(shape, p.out, out_offset(shape, image, head) + first, count, s);
    if (p.stats != nullptr) {
      float* stats = p.stats + pair * 2 * queries + first;
      memcpy(stats, s.maximum, static_cast<size_t>(count) * sizeof(float));
      memcpy(stats + queries, s.normalizer, static_cast<size_t>(count) * sizeof(float));
    }
  }
}

void qkv_attention_single(const QkvAttentionParams& p, float* scratch, int64_t begin, int64_t end) {
  constexpr int w = Vec::kWidth;
  const QkvAttentionShape& shape = p.shape;
  const int64_t d = shape.head_dim, length = shape.length, padded = round_up(length, w);
  const float scale = logit_scale_base2(d);
  float* probabilities = scratch;
  float* buffer = scratch + padded;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t image = pair / shape.heads, head = pair % shape.heads, n = d * length;
    const float* q = as_float(p.qkv, shape.dtype, head_offset(shape, image, head, 0), n, buffer);
    const float* k =
        as_float(p.qkv, shape.dtype, head_offset(shape, image, head, 1), n, buffer + n);
    const float* v =
        as_float(p.qkv, shape.dtype, head_offset(shape, image, head, 2), n, buffer + 2 * n);
    weighted_rows(q, length, scale, k, d, length, -INFINITY, probabilities);
    Vec m = Vec::set1(-INFINITY);
    for (int64_t i = 0; i < padded; i += w) m = max(Vec::load(probabilities + i), m);
    const float maximum = m.reduce_max();
    Vec sum = Vec::zero();
    for (int64_t i = 0; i < padded; i += w) {
      const Vec e = exp2_shifted(Vec::load(probabilities + i) - Vec::set1(maximum));
      e.store(probabilities + i);
      sum = sum + e;
    }
    const float normalizer = sum.reduce_add();
    const int64_t at = out_offset(shape, image, head);
    for (int64_t c = 0; c < d; ++c) {
      const float y = dot(probabilities, v + c * length, length) / normalizer;
      if (shape.dtype == DType::kFloat32) {
        static_cast<float*>(p.out)[at + c] = y;
      } else {
        static_cast<uint16_t*>(p.out)[at + c] = float_to_bf16(y);
      }
    }
    if (p.stats != nullptr) {
      p.stats[2 * pair] = maximum;
      p.stats[2 * pair + 1] = normalizer;
    }
  }
}

}  // namespace adm_rt::ADM_RT_ISA
