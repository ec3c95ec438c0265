// Checks, threads and dispatch of philox_normal; philox_words.
#include <algorithm>

#include "common/check.h"
#include "common/cpu_isa.h"
#include "common/philox.h"
#include "common/thread_pool.h"
#include "ops/philox_normal.h"

namespace adm_rt {

namespace {

constexpr int64_t kChunk = 4096;  // elements, a multiple of 64
constexpr int64_t kGrain = 4;     // chunks

}  // namespace

void philox_normal_cpu(const int64_t* seeds, int64_t images, int64_t size, uint32_t step,
                       uint32_t purpose, float* out) {
  ADM_RT_CHECK(images >= 0 && size >= 0 && size / 4 <= 0xffffffffll, "philox_normal: shape [",
               images, ", ", size, "] is out of range");
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  parallel_for(images * chunks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / chunks, first = i % chunks * kChunk;
      ADM_RT_DISPATCH(philox_normal_range(static_cast<uint64_t>(seeds[image]), step, purpose, first,
                                          std::min(size, first + kChunk), out + image * size));
    }
  });
}

void philox_words_cpu(const int64_t* seeds, int64_t images, int64_t counters, uint32_t step,
                      uint32_t purpose, uint32_t* out) {
  ADM_RT_CHECK(images >= 0 && counters >= 0 && counters <= 0x100000000ll, "philox_words: shape [",
               images, ", 4 * ", counters, "] is out of range");
  for (int64_t image = 0; image < images; ++image) {
    const uint64_t seed = static_cast<uint64_t>(seeds[image]);
    for (int64_t i = 0; i < counters; ++i) {
      Uint1 words[4] = {{static_cast<uint32_t>(i)}, {step}, {purpose}, {0}};
      philox4x32(words, Uint1{static_cast<uint32_t>(seed)},
                 Uint1{static_cast<uint32_t>(seed >> 32)});
      for (const Uint1& word : words) *out++ = word.v;
    }
  }
}

}  // namespace adm_rt
