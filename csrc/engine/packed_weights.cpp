#include "engine/packed_weights.h"

#include <algorithm>
#include <vector>

#include "common/check.h"
#include "common/thread_pool.h"

namespace adm_rt::engine {
namespace {

constexpr size_t kChunkWords = size_t{1} << 17;  // 1 MiB: the result does not depend on threads
constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;   // 2^64 / golden ratio

// Every step maps a lane's state one to one, so two inputs that differ in one word never meet.
uint64_t chunk_checksum(const uint64_t* words, size_t count) {
  constexpr size_t kLanes = 8;
  uint64_t lanes[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8};
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) lanes[j] = (lanes[j] ^ words[i + j]) * kOdd;
  }
  for (; i < count; ++i) lanes[i % kLanes] = (lanes[i % kLanes] ^ words[i]) * kOdd;
  uint64_t sum = count;
  for (const uint64_t lane : lanes) {
    sum = (sum ^ lane) * kOdd;
    sum ^= sum >> 32;
  }
  return sum;
}

}  // namespace

uint64_t checksum(const void* data, size_t bytes) {
  ADM_RT_CHECK(bytes % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 8 == 0,
               "checksum: data and bytes=", bytes, " must be multiples of 8");
  const uint64_t* const words = static_cast<const uint64_t*>(data);
  const size_t count = bytes / 8;
  std::vector<uint64_t> sums((count + kChunkWords - 1) / kChunkWords);
  parallel_for(static_cast<int64_t>(sums.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const size_t first = static_cast<size_t>(i) * kChunkWords;
      sums[static_cast<size_t>(i)] =
          chunk_checksum(words + first, std::min(kChunkWords, count - first));
    }
  });
  return chunk_checksum(sums.data(), sums.size());
}

}  // namespace adm_rt::engine
