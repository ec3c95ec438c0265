// The per-ISA kernels of the attention op. Each runs on one thread.
#pragma once

#include <cstdint>

namespace adm_rt {

// One head of one image: rows of q, k and v are `row` floats apart, those of out `out_row`. Where
// its probabilities are kept, p[key][query] is that of `key` for `query`; its rows are p_row apart,
// a multiple of 16, and zero behind the last query.
struct AttentionHead {
  const float* q = nullptr;
  const float* k = nullptr;
  const float* v = nullptr;
  float* out = nullptr;
  float* p = nullptr;  // or nullptr
  int64_t row = 0;
  int64_t out_row = 0;
  int64_t p_row = 0;
  int64_t head_dim = 0;
  int64_t keys = 0;
  int64_t queries = 0;
};

#define ADM_RT_DECLARE_ATTENTION(ISA)                                                            \
  namespace ISA {                                                                                \
  /* Queries that attention_queries takes at most. */                                            \
  int64_t attention_query_block();                                                               \
  /* Floats of 64-byte aligned scratch that one thread needs; keep: where p is wanted. */        \
  int64_t attention_scratch(int64_t head_dim, int64_t keys, bool keep);                          \
  /* Copies k and v into the scratch. */                                                         \
  void attention_pack(const AttentionHead& head, float* scratch);                                \
  /* Queries [begin, end), at most a block of them, of the head that was packed. */              \
  void attention_queries(const AttentionHead& head, int64_t begin, int64_t end, float* scratch); \
  /* The first query alone, with nothing packed. */                                              \
  void attention_single(const AttentionHead& head, float* scratch);                              \
  }
ADM_RT_DECLARE_ATTENTION(portable)
ADM_RT_DECLARE_ATTENTION(avx2)
ADM_RT_DECLARE_ATTENTION(avx512)
#undef ADM_RT_DECLARE_ATTENTION

}  // namespace adm_rt
