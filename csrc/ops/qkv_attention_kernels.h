// The per-ISA kernels of qkv_attention: what qkv_attention_cpu.cpp calls and the two
// qkv_attention*_simd.cpp define once per instruction set. Each runs on one thread over a range.
#pragma once

#include <cstdint>

#include "ops/qkv_attention.h"

namespace adm_rt {

#define ADM_RT_DECLARE_QKV_ATTENTION(ISA)                                                    \
  namespace ISA {                                                                            \
  /* Queries that one task computes; a task is (image, head, query block), in that order. */ \
  int64_t qkv_attention_query_block();                                                       \
  /* Floats of 64-byte aligned scratch that one thread needs. */                             \
  int64_t qkv_attention_scratch(const QkvAttentionShape& shape);                             \
  void qkv_attention_tasks(const QkvAttentionParams& p, float* scratch, int64_t begin,       \
                           int64_t end);                                                     \
  /* One query: tasks are (image, head). */                                                  \
  void qkv_attention_single(const QkvAttentionParams& p, float* scratch, int64_t begin,      \
                            int64_t end);                                                    \
  /* Backward: tasks are (image, head). */                                                   \
  int64_t qkv_attention_backward_scratch(const QkvAttentionShape& shape);                    \
  void qkv_attention_backward_tasks(const QkvAttentionBackwardParams& p, float* scratch,     \
                                    int64_t begin, int64_t end);                             \
  void qkv_attention_backward_single(const QkvAttentionBackwardParams& p, float* scratch,    \
                                     int64_t begin, int64_t end);                            \
  }

ADM_RT_DECLARE_QKV_ATTENTION(portable)
ADM_RT_DECLARE_QKV_ATTENTION(avx2)
ADM_RT_DECLARE_QKV_ATTENTION(avx512)
#undef ADM_RT_DECLARE_QKV_ATTENTION

}  // namespace adm_rt
