// Device code of guided_mean_update: the threshold of dynamic clipping, by radix selection.
#pragma once

#include "ops/guided_mean_update_element.h"
#include "simt/simt.h"

namespace adm_rt {

constexpr int kSelectThreads = 1024;
constexpr int kSelectBins = 2048;
constexpr size_t kSelectSharedBytes =
    simt::shared_bytes<uint32_t>(kSelectBins) + simt::shared_bytes<uint32_t>(kSelectThreads) +
    simt::shared_bytes<uint32_t>(2) + simt::shared_bytes<uint32_t>(1);

// Adds up bins[0 .. kSelectBins), finds the one that holds the element of rank `rank` and lowers
// the rank by those below. All threads get the bin. `sums` is scratch, one per thread.
ADM_RT_DEVICE uint32_t find_bin(const uint32_t* bins, uint32_t* sums, uint32_t* found,
                                uint32_t* rank) {
  const unsigned t = simt::thread_x();
  const uint32_t first = bins[2 * t], pair = first + bins[2 * t + 1];
  sums[t] = pair;
  simt::sync_block();
  for (unsigned distance = 1; distance < kSelectThreads; distance *= 2) {
    const uint32_t before = t >= distance ? sums[t - distance] : 0;
    simt::sync_block();
    sums[t] += before;
    simt::sync_block();
  }
  const uint32_t below = sums[t] - pair;
  if (*rank >= below && *rank - below < pair) {  // one thread
    const bool second = *rank - below >= first;
    found[0] = 2 * t + second;
    found[1] = *rank - below - (second ? first : 0);
  }
  simt::sync_block();
  const uint32_t bin = found[0];
  *rank = found[1];
  simt::sync_block();
  return bin;
}

// One block of kSelectThreads per image: limits[image] = max(1, quantile of |x0|) by radix
// selection on the 31 bits of the magnitude, 11 + 10 + 10, then one pass for the next larger value.
ADM_RT_KERNEL guided_mean_update_select_kernel(const float* x0, int64_t size, uint32_t rank,
                                               bool wants_next, float fraction, float* limits) {
  static_assert(kSelectBins == 2 * kSelectThreads);
  simt::SharedArena shared;
  uint32_t* const bins = shared.take<uint32_t>(kSelectBins);
  uint32_t* const sums = shared.take<uint32_t>(kSelectThreads);
  uint32_t* const found = shared.take<uint32_t>(2);
  uint32_t* const next = shared.take<uint32_t>(1);
  const unsigned t = simt::thread_x();
  const float* values = x0 + static_cast<int64_t>(simt::block_x()) * size;

  uint32_t prefix = 0, equal = 0;  // the bits found so far; how many keys are `prefix` in the end
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 20 : pass == 1 ? 10 : 0;
    const int known = pass == 0 ? 31 : pass == 1 ? 20 : 10;  // the bits from here on are fixed
    bins[2 * t] = bins[2 * t + 1] = 0;
    simt::sync_block();
    for (int64_t i = t; i < size; i += kSelectThreads) {
      const uint32_t key = simt::bits_of(values[i]) & 0x7fffffffu;
      if (key >> known == prefix >> known) {
        simt::atomic_add(&bins[(key >> shift) & (pass == 0 ? 2047u : 1023u)], 1u);
      }
    }
    simt::sync_block();
    const uint32_t bin = find_bin(bins, sums, found, &rank);
    prefix |= bin << shift;
    equal = bins[bin];
    simt::sync_block();
  }

  uint32_t high = prefix;
  if (wants_next && rank + 1 >= equal) {  // the same for all threads
    if (t == 0) *next = 0x7fffffffu;
    simt::sync_block();
    uint32_t smallest = 0x7fffffffu;
    for (int64_t i = t; i < size; i += kSelectThreads) {
      const uint32_t key = simt::bits_of(values[i]) & 0x7fffffffu;
      if (key > prefix && key < smallest) smallest = key;
    }
    simt::atomic_min(next, smallest);
    simt::sync_block();
    high = *next;
  }
  if (t == 0) limits[simt::block_x()] = dynamic_limit(prefix, high, fraction);
}

}  // namespace adm_rt
