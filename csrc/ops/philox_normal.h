// philox_normal: an array of standard normal noise, one row per seed; philox_words: the raw words.
// The definition is in common/philox.h.
#pragma once

#include <cstdint>

namespace adm_rt {

// out [images, size]; seeds [images].
void philox_normal_cpu(const int64_t* seeds, int64_t images, int64_t size, uint32_t step,
                       uint32_t purpose, float* out);

// out [images, 4 * counters]: the words of counters 0 .. counters - 1.
void philox_words_cpu(const int64_t* seeds, int64_t images, int64_t counters, uint32_t step,
                      uint32_t purpose, uint32_t* out);

#define ADM_RT_DECLARE_PHILOX_NORMAL(ISA)                                                 \
  namespace ISA {                                                                         \
  /* Elements [begin, end) of one row; begin is a multiple of 64. */                      \
  void philox_normal_range(uint64_t seed, uint32_t step, uint32_t purpose, int64_t begin, \
                           int64_t end, float* row);                                      \
  }
ADM_RT_DECLARE_PHILOX_NORMAL(portable)
ADM_RT_DECLARE_PHILOX_NORMAL(avx2)
ADM_RT_DECLARE_PHILOX_NORMAL(avx512)
#undef ADM_RT_DECLARE_PHILOX_NORMAL

}  // namespace adm_rt
