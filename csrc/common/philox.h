// Philox4x32-10 and normal noise from it, the same bits on CPU and CUDA.
//
// Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. Noise is a
// pure function of (seed, step, purpose, element): key = the 64-bit seed of one image, counter =
// (element / 4, step, purpose, 0), and the four words w of a counter serve elements 4k .. 4k + 3:
//
//   u(w) = ((w >> 8) + 1/2) * 2^-24
//   z[4k]     = sqrt(-2 ln u(w0)) cos(2 pi u(w1))       z[4k + 1] = the same radius, sin
//   z[4k + 2] = sqrt(-2 ln u(w2)) cos(2 pi u(w3))       z[4k + 3] = the same radius, sin
//
// (Box & Muller 1958). Templates over the float and word types: see exact_math.h.
#pragma once

#include <cstdint>

#include "common/exact_math.h"

namespace adm_rt {

// What a number is for; part of the counter, so that purposes never share numbers.
constexpr uint32_t kPurposeInitialNoise = 0;  // x_T, at step 0
constexpr uint32_t kPurposeStepNoise = 1;     // the noise that sampler step `step` adds
constexpr uint32_t kPurposeLabels = 2;        // random class labels

// Ten rounds on counter[4], in place.
template <class U>
ADM_RT_HOST_DEVICE void philox4x32(U (&counter)[4], U key0, U key1) {
  ADM_RT_UNROLL
  for (int round = 0; round < 10; ++round) {
    U high0, low0, high1, low1;
    multiply_wide(counter[0], 0xD2511F53u, &high0, &low0);
    multiply_wide(counter[2], 0xCD9E8D57u, &high1, &low1);
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 = key0 + U::set1(0x9E3779B9u);
    key1 = key1 + U::set1(0xBB67AE85u);
  }
}

// Two independent standard normals from two words.
template <class F, class U>
ADM_RT_HOST_DEVICE void box_muller(U word0, U word1, F* first, F* second) {
  const F radius = sqrt(minus_two_log_u24<F>(shift_right<8>(word0)));
  F cosine, sine;
  cos_sin_u24(shift_right<8>(word1), &cosine, &sine);
  *first = radius * cosine;
  *second = radius * sine;
}

// normals[0..3]: lane l holds elements 4k .. 4k + 3 of counter k = first + U::counter_lanes()[l].
template <class F, class U>
ADM_RT_HOST_DEVICE void philox_normals(uint64_t seed, uint32_t first, uint32_t step,
                                       uint32_t purpose, F (&normals)[4]) {
  U counter[4] = {U::set1(first) + U::counter_lanes(), U::set1(step), U::set1(purpose), U::set1(0)};
  philox4x32(counter, U::set1(static_cast<uint32_t>(seed)),
             U::set1(static_cast<uint32_t>(seed >> 32)));
  box_muller(counter[0], counter[1], &normals[0], &normals[1]);
  box_muller(counter[2], counter[3], &normals[2], &normals[3]);
}

}  // namespace adm_rt
