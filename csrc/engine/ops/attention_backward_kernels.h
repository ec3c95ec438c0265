// The per-ISA kernels of attention_backward. Each runs on one thread.
#pragma once

#include <cstdint>

namespace adm_rt {

// One head of one image. Rows of q, k, v and their gradients are `row` floats apart, those of the
// upstream gradient `grad_row`. p: see AttentionHead. dk and dv may point elsewhere, to rows
// `partial_row` apart.
struct AttentionBackwardHead {
  const float* q = nullptr;
  const float* k = nullptr;
  const float* v = nullptr;
  const float* grad = nullptr;
  const float* p = nullptr;
  float* dq = nullptr;
  float* dk = nullptr;
  float* dv = nullptr;
  int64_t row = 0;
  int64_t grad_row = 0;
  int64_t p_row = 0;
  int64_t partial_row = 0;
  int64_t head_dim = 0;
  int64_t keys = 0;
};

#define ADM_RT_DECLARE_ATTENTION_BACKWARD(ISA)                                                   \
  namespace ISA {                                                                                \
  /* Floats of 64-byte aligned scratch that one thread needs. */                                 \
  int64_t attention_backward_scratch(int64_t head_dim, int64_t keys);                            \
  /* Queries [begin, end): writes their dq, and dk and dv as far as they come from them. */      \
  void attention_backward_queries(const AttentionBackwardHead& head, int64_t begin, int64_t end, \
                                  float* scratch);                                               \
  /* y[r][c] = the sum of parts[p][r][c] over p, in order. */                                    \
  void add_parts(int64_t rows, int64_t channels, const float* parts, int64_t count,              \
                 int64_t part_floats, int64_t part_row, float* y, int64_t row);                  \
  }
ADM_RT_DECLARE_ATTENTION_BACKWARD(portable)
ADM_RT_DECLARE_ATTENTION_BACKWARD(avx2)
ADM_RT_DECLARE_ATTENTION_BACKWARD(avx512)
#undef ADM_RT_DECLARE_ATTENTION_BACKWARD

}  // namespace adm_rt
