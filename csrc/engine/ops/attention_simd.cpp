// Attention on rows of pixels. Logits and probabilities are [key][query], with the queries along
// the vectors: the softmax needs no horizontal reduction. k and v are used as rows, as they lie in
// memory, and the result comes out as rows; only a block of q is transposed.
//
// The keys go by in blocks, with the streaming softmax, so that the logits of a block stay in the
// nearest caches. Whole rows of logits on the products of gemm.h, which fit the second-level cache
// up to 1024 keys, were a tenth slower with AVX-512 and the same with AVX2 (Zen 4).
#include <cstdint>

#include "common/simd.h"
#include "engine/ops/attention_kernels.h"
#include "ops/qkv_attention_tile.h"

namespace adm_rt::ADM_RT_ISA {
namespace {

constexpr int64_t kWidth = Vec::kWidth;
// A tile of the result, as many sums as the registers hold; ADM's 64 channels are whole tiles.
constexpr int kTileRows = ADM_RT_ISA_LEVEL == 1 ? 6 : 4;
constexpr int kTileVecs = ADM_RT_ISA_LEVEL == 2 ? 4 : ADM_RT_ISA_LEVEL == 1 ? 2 : 1;
constexpr int64_t kTileColumns = kTileVecs * kWidth;
static_assert(kPanel % kTileRows == 0);
constexpr int64_t kKeyBlock = 256;  // logits of a block: kKeyBlock * kPanel floats

struct AttentionScratch {
  float* k;       // [keys, head_dim]
  float* v;       // [head_dim / kTileColumns, keys, kTileColumns], zero behind the last channel
  float* q;       // [head_dim, kPanel], scaled by log2(e) / sqrt(head_dim)
  float* logits;  // [kKeyBlock, kPanel], or of all keys where the probabilities are kept
  float* maxima;  // there, [key blocks, kPanel]: what the logits of each block are relative to
  float* sums;    // [kPanel, ld]
  int64_t ld;     // head_dim in whole vectors
  SoftmaxState softmax;
};

int64_t carve(int64_t head_dim, int64_t keys, bool keep, float* base, AttentionScratch* s) {
  int64_t used = 0;
  const auto take = [&](int64_t n) {
    float* p = base == nullptr ? nullptr : base + used;
    used += round_up(n, 16);
    return p;
  };
  s->ld = round_up(head_dim, kWidth);
  s->softmax = {take(kPanel), take(kPanel), take(kPanel), take(kPanel)};
  s->q = take(head_dim * kPanel);
  const int64_t blocks = (keys + kKeyBlock - 1) / kKeyBlock;
  s->logits = take((keep ? blocks : 1) * kKeyBlock * kPanel);
  s->maxima = take(keep ? blocks * kPanel : 0);
  s->sums = take(kPanel * s->ld);
  s->k = take(keys * head_dim);
  s->v = take(keys * round_up(head_dim, kTileColumns));
  return used;
}

// sums[i][j] = sums[i][j] * rescale[i] + sum_k p[k][i] * v[k][j], or only the sum when kFirst, for
// kTileRows queries i and kVecs vectors of channels j; the row strides of p, v and sums are kPanel,
// kTileColumns and ld.
// Every sum is a variable of its own: gcc 12 keeps an array of them in memory.
template <bool kFirst, int kVecs>
inline void weigh_tile(int64_t keys, const float* p, const float* v, int64_t ld,
                       const float* rescale, float* sums) {
#define ADM_RT_FOR_ROWS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define ADM_RT_START(i)                                                             \
  [[maybe_unused]] Vec s##i##0 = Vec::zero(), s##i##1 = s##i##0, s##i##2 = s##i##0, \
                       s##i##3 = s##i##0;
#define ADM_RT_STEP(i)                                          \
  if constexpr (i < kTileRows) {                                \
    const Vec x = Vec::set1(p[i]);                              \
    s##i##0 = mul_add(x, v0, s##i##0);                          \
    if constexpr (kVecs > 1) s##i##1 = mul_add(x, v1, s##i##1); \
    if constexpr (kVecs > 2) s##i##2 = mul_add(x, v2, s##i##2); \
    if constexpr (kVecs > 3) s##i##3 = mul_add(x, v3, s##i##3); \
  }
#define ADM_RT_WRITE(i) \
  if constexpr (i < kTileRows) write_row(i, s##i##0, s##i##1, s##i##2, s##i##3);

  ADM_RT_FOR_ROWS(ADM_RT_START)
  for (int64_t k = 0; k < keys; ++k, p += kPanel, v += kTileColumns) {
    const Vec v0 = Vec::load(v);
    [[maybe_unused]] const Vec v1 = kVecs > 1 ? Vec::load(v + kWidth) : v0;
    [[maybe_unused]] const Vec v2 = kVecs > 2 ? Vec::load(v + 2 * kWidth) : v0;
    [[maybe_unused]] const Vec v3 = kVecs > 3 ? Vec::load(v + 3 * kWidth) : v0;
    ADM_RT_FOR_ROWS(ADM_RT_STEP)
  }
  const auto write_row = [&](int i, Vec a, Vec b, Vec c, Vec d) {
    float* row = sums + i * ld;
    const Vec factor = Vec::set1(rescale[i]);
    const auto put = [&](int j, Vec s) {
      if constexpr (!kFirst) s = mul_add(Vec::load(row + j * kWidth), factor, s);
      s.store(row + j * kWidth);
    };
    put(0, a);
    if constexpr (kVecs > 1) put(1, b);
    if constexpr (kVecs > 2) put(2, c);
    if constexpr (kVecs > 3) put(3, d);
  };
  ADM_RT_FOR_ROWS(ADM_RT_WRITE)
#undef ADM_RT_FOR_ROWS
#undef ADM_RT_START
#undef ADM_RT_STEP
#undef ADM_RT_WRITE
}

// The same for `queries` queries, rounded up to kTileRows, the keys [first, first + keys) and all
// channels.
template <bool kFirst>
void weigh_values(int64_t queries, const float* logits, int64_t first, int64_t keys,
                  int64_t all_keys, const AttentionScratch& s) {
  for (int64_t c = 0; c < s.ld; c += kTileColumns) {
    const float* v = s.v + c * all_keys + first * kTileColumns;
    const int64_t vecs = (s.ld - c) / kWidth < kTileVecs ? (s.ld - c) / kWidth : kTileVecs;
    for (int64_t i = 0; i < queries; i += kTileRows) {
      const float* p = logits + i;
      const float* rescale = s.softmax.rescale + i;
      float* sums = s.sums + i * s.ld + c;
      if (vecs == 1) weigh_tile<kFirst, 1>(keys, p, v, s.ld, rescale, sums);
      if constexpr (kTileVecs >= 2) {
        if (vecs == 2) weigh_tile<kFirst, 2>(keys, p, v, s.ld, rescale, sums);
      }
      if constexpr (kTileVecs >= 4) {
        if (vecs == 3) weigh_tile<kFirst, 3>(keys, p, v, s.ld, rescale, sums);
        if (vecs == 4) weigh_tile<kFirst, 4>(keys, p, v, s.ld, rescale, sums);
      }
    }
  }
}

// The probabilities of queries [begin, begin + count) to where they are kept: the logits, which are
// relative to their blocks' maxima, made relative to the last one and normalised.
template <int kVecs>
void keep_probabilities(const AttentionHead& head, int64_t begin, int64_t count,
                        const AttentionScratch& s) {
  alignas(64) float factors[kPanel];
  const int64_t columns = kVecs * kWidth;
  for (int64_t first = 0; first < head.keys; first += kKeyBlock) {
    const float* maxima = s.maxima + first / kKeyBlock * kPanel;
    for (int64_t j = 0; j < columns; j += kWidth) {
      const Vec scale = exp2_shifted(Vec::load(maxima + j) - Vec::load(s.softmax.maximum + j));
      (scale / Vec::load(s.softmax.normalizer + j)).store(factors + j);
    }
    for (int64_t j = count; j < columns; ++j) factors[j] = 0.0f;
    const int64_t end = head.keys - first < kKeyBlock ? head.keys : first + kKeyBlock;
    for (int64_t i = first; i < end; ++i) {
      const float* logits = s.logits + i * kPanel;
      float* p = head.p + i * head.p_row + begin;
      // Stores wait for their lines: whole rows apart, the hardware fetches none ahead.
      for (int64_t j = 0; j < columns; j += 16) __builtin_prefetch(p + 32 * head.p_row + j, 1, 2);
      for (int64_t j = 0; j < columns; j += kWidth) {
        (Vec::load(logits + j) * Vec::load(factors + j)).store(p + j);
      }
    }
  }
  if (begin + count < head.queries) return;
  for (int64_t i = 0; i < head.keys; ++i) {
    float* p = head.p + i * head.p_row;
    for (int64_t j = begin + columns; j < head.p_row; ++j) p[j] = 0.0f;
  }
}

// Queries [begin, begin + count), which s.q holds, count <= kVecs * width of them: into s.sums, not
// yet normalised.
template <int kVecs>
void query_block(const AttentionHead& head, int64_t begin, int64_t count,
                 const AttentionScratch& s) {
  const int64_t d = head.head_dim;
  for (int64_t j = 0; j < kPanel; ++j) {
    s.softmax.maximum[j] = s.softmax.previous[j] = -INFINITY;
    s.softmax.normalizer[j] = 0.0f;
  }
  for (int64_t first = 0; first < head.keys; first += kKeyBlock) {
    const int64_t rest = head.keys - first;
    const int64_t keys = rest < kKeyBlock ? rest : kKeyBlock;
    float* logits = s.logits + (head.p == nullptr ? 0 : first * kPanel);
    gemm_rows<Write::kStoreMax, kVecs>(keys, d, s.k + first * d, d, s.q, logits, s.softmax.maximum);
    softmax_block<kVecs>(keys, logits, s.softmax);
    if (head.p != nullptr) {
      float* maxima = s.maxima + first / kKeyBlock * kPanel;
      for (int64_t j = 0; j < kPanel; ++j) maxima[j] = s.softmax.maximum[j];
    }
    if (first == 0) {
      weigh_values<true>(count, logits, first, keys, head.keys, s);
    } else {
      weigh_values<false>(count, logits, first, keys, head.keys, s);
    }
  }
  if (head.p != nullptr) keep_probabilities<kVecs>(head, begin, count, s);
}

// 2^(x - maximum) in place, zero up to the next whole vector; returns the sum.
float exponentials(float* x, int64_t n) {
  const int64_t padded = round_up(n, kWidth);
  for (int64_t i = n; i < padded; ++i) x[i] = -INFINITY;
  Vec m = Vec::set1(-INFINITY);
  for (int64_t i = 0; i < padded; i += kWidth) m = max(Vec::load(x + i), m);
  m = Vec::set1(m.reduce_max());
  Vec sum = Vec::zero();
  for (int64_t i = 0; i < padded; i += kWidth) {
    const Vec p = exp2_shifted(Vec::load(x + i) - m);
    p.store(x + i);
    sum = sum + p;
  }
  return sum.reduce_add();
}

}  // namespace

int64_t attention_query_block() { return kPanel; }

int64_t attention_scratch(int64_t head_dim, int64_t keys, bool keep) {
  AttentionScratch s;
  const int64_t blocks = carve(head_dim, keys, keep, nullptr, &s);
  const int64_t single = round_up(keys, 16);
  return blocks > single ? blocks : single;
}

void attention_pack(const AttentionHead& head, float* scratch) {
  const int64_t d = head.head_dim;
  AttentionScratch s;
  carve(d, head.keys, head.p != nullptr, scratch, &s);
  for (int64_t i = 0; i < head.keys; ++i) {
    const float* k = head.k + i * head.row;
    for (int64_t c = 0; c < d; c += kWidth) {
      store_up_to(load_up_to(k + c, d - c), s.k + i * d, DType::kFloat32, c, d - c);
    }
    const float* v = head.v + i * head.row;
    for (int64_t c = 0; c < d; c += kTileColumns) {
      float* to = s.v + c * head.keys + i * kTileColumns;
      for (int64_t j = 0; j < kTileColumns; j += kWidth) {
        (c + j < d ? load_up_to(v + c + j, d - c - j) : Vec::zero()).store(to + j);
      }
    }
  }
}

void attention_queries(const AttentionHead& head, int64_t begin, int64_t end, float* scratch) {
  const int64_t d = head.head_dim, count = end - begin;
  AttentionScratch s;
  carve(d, head.keys, head.p != nullptr, scratch, &s);
  transpose(head.q + begin * head.row, head.row, count, d, s.q, kPanel, logit_scale_base2(d));
  const int64_t vecs = (count + kWidth - 1) / kWidth;
  for (int64_t c = 0; count < vecs * kWidth && c < d; ++c) {
    for (int64_t j = count; j < vecs * kWidth; ++j) s.q[c * kPanel + j] = 0.0f;
  }
  if (vecs == 1) query_block<1>(head, begin, count, s);
  if constexpr (kPanelVecs >= 2) {
    if (vecs == 2) query_block<2>(head, begin, count, s);
  }
  if constexpr (kPanelVecs >= 3) {
    if (vecs == 3) query_block<3>(head, begin, count, s);
  }
  if constexpr (kPanelVecs >= 4) {
    if (vecs == 4) query_block<4>(head, begin, count, s);
  }
  for (int64_t i = 0; i < count; ++i) {
    const Vec factor = Vec::set1(1.0f / s.softmax.normalizer[i]);
    float* out = head.out + (begin + i) * head.out_row;
    for (int64_t c = 0; c < d; c += kWidth) {
      store_up_to(Vec::load(s.sums + i * s.ld + c) * factor, out, DType::kFloat32, c, d - c);
    }
  }
}

void attention_single(const AttentionHead& head, float* scratch) {
  const int64_t d = head.head_dim, keys = head.keys;
  const float scale = logit_scale_base2(d);
  float* logits = scratch;
  for (int64_t i = 0; i < keys; ++i) logits[i] = dot(head.q, head.k + i * head.row, d) * scale;
  const float inverse = 1.0f / exponentials(logits, keys);
  for (int64_t i = 0; head.p != nullptr && i < keys; ++i) {
    float* p = head.p + i * head.p_row;
    p[0] = logits[i] * inverse;
    for (int64_t j = 1; j < head.p_row; ++j) p[j] = 0.0f;
  }
  const Vec factor = Vec::set1(inverse);
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
    store_up_to((even + odd) * factor, head.out, DType::kFloat32, c, rest);
  }
}

}  // namespace adm_rt::ADM_RT_ISA
