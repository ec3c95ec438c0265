// Kernels with one bug each, beside the same kernel without it: test_planted_bugs.py shows that the
// emulator lets the right one pass and catches the other. C interface for ctypes. Built by nvcc
// with ADM_RT_PLANTED_MAIN it is a program for compute-sanitizer on a GPU (tests/gpu): name, 0
// or 1.
#if !defined(__CUDACC__)
#define ADM_RT_EMULATOR
#endif
#include <cstring>
#include <exception>
#include <string>

#include "simt/launch.h"

// Named like the package's own, for compute-sanitizer's choice of kernels.
namespace adm_rt::planted {

std::string error;

constexpr unsigned kThreads = 128;

// out[0] = the sum of in [kThreads]; every thread takes its part from its neighbour's slot.
template <bool kBug>
ADM_RT_KERNEL missing_barrier_kernel(const float* in, float* out) {
  simt::SharedArena shared;
  float* const slots = shared.take<float>(kThreads);
  float* const sums = shared.take<float>(kThreads / 32);
  const unsigned t = simt::thread_x();
  slots[t] = in[t];
  if (!kBug) simt::sync_block();
  const float sum = simt::warp_sum(slots[(t + 40) % kThreads]);
  if (simt::lane() == 0) sums[simt::warp()] = sum;
  simt::sync_block();
  if (t == 0) out[0] = sums[0] + sums[1] + sums[2] + sums[3];
}

// A tile used twice: the barrier before it is overwritten is missing.
template <bool kBug>
ADM_RT_KERNEL missing_second_barrier_kernel(const float* in, float* out) {
  simt::SharedArena shared;
  float* const tile = shared.take<float>(kThreads);
  const unsigned t = simt::thread_x();
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    tile[t] = in[round * kThreads + t];
    simt::sync_block();
    sum += tile[kThreads - 1 - t];
    if (!kBug) simt::sync_block();
  }
  out[t] = sum;
}

template <bool kBug>
ADM_RT_KERNEL beyond_shared_kernel(const float* in, float* out) {
  simt::SharedArena shared;
  float* const tile = shared.take<float>(kThreads);
  float* const other = shared.take<float>(kThreads);
  const unsigned t = simt::thread_x();
  other[t] = 0;
  tile[kBug ? t + 1 : t] = in[t];
  simt::sync_block();
  out[t] = tile[t] + other[t];
}

template <bool kBug>
ADM_RT_KERNEL missing_wait_kernel(const float* in, float* out) {
  simt::SharedArena shared;
  float* const tile = shared.take<float>(4 * kThreads);
  const unsigned t = simt::thread_x();
  simt::cp_async16(tile + 4 * t, in + 4 * t);
  simt::cp_async_commit();
  if (!kBug) simt::cp_async_wait<0>();
  simt::sync_block();
  for (int i = 0; i < 4; ++i) out[4 * t + i] = tile[4 * kThreads - 1 - (4 * t + i)];
  if (kBug) simt::cp_async_wait<0>();
}

// A pipeline of two stages that allows one group too many to be under way.
template <bool kBug>
ADM_RT_KERNEL wrong_wait_kernel(const float* in, float* out) {
  simt::SharedArena shared;
  float* const tile = shared.take<float>(8 * 32);
  const unsigned t = simt::thread_x();
  float sum = 0;
  simt::cp_async16(tile + 4 * t, in + 4 * t);
  simt::cp_async_commit();
  for (int round = 0; round < 3; ++round) {
    if (round < 2)
      simt::cp_async16(tile + (round + 1) % 2 * 128 + 4 * t, in + (round + 1) * 128 + 4 * t);
    simt::cp_async_commit();
    simt::cp_async_wait<kBug ? 2 : 1>();
    simt::sync_block();
    sum += tile[round % 2 * 128 + 127 - t];
    simt::sync_block();
  }
  simt::cp_async_wait<0>();
  out[t] = sum;
}

template <bool kBug>
ADM_RT_KERNEL abandoned_copy_kernel(const float* in, float* out) {
  simt::SharedArena shared;
  float* const tile = shared.take<float>(4 * kThreads);
  const unsigned t = simt::thread_x();
  simt::cp_async16(tile + 4 * t, in + 4 * t);
  simt::cp_async_commit();
  if (!kBug) simt::cp_async_wait<0>();
  out[t] = 1;
}

template <bool kBug>
ADM_RT_KERNEL divergent_barrier_kernel(const float* in, float* out) {
  const unsigned t = simt::thread_x();
  if (kBug && in[t] < 0) {
    simt::sync_block();
  } else {
    simt::sync_block();
  }
  out[t] = in[t];
}

template <bool kBug>
ADM_RT_KERNEL early_return_kernel(const float* in, float* out) {
  const unsigned t = simt::thread_x();
  if (kBug && t >= 100) return;
  simt::sync_block();
  out[t] = in[t];
}

template <bool kBug>
ADM_RT_KERNEL divergent_warp_kernel(const float* in, float* out) {
  const unsigned t = simt::thread_x();
  float v = in[t];
  if (!kBug || simt::lane() < 16) v += simt::shuffle_xor(v, 8);
  if (kBug && simt::lane() >= 16) v += simt::shuffle_xor(v, 4);
  out[t] = v;
}

template <bool kBug>
ADM_RT_KERNEL lane_missing_kernel(const float* in, float* out) {
  const unsigned t = simt::thread_x();
  out[t] = kBug && simt::lane() == 31 ? in[t] : simt::warp_sum(in[t]);
}

// One warp at the barrier of the block, another in a collective that its last lane skips.
template <bool kBug>
ADM_RT_KERNEL deadlock_kernel(const float* in, float* out) {
  const unsigned t = simt::thread_x();
  if (kBug && simt::warp() == 1 && simt::lane() < 31) {
    out[t] = simt::warp_sum(in[t]);
    simt::sync_block();
  } else {
    out[t] = in[t];
    simt::sync_block();
  }
}

template <bool kBug>
ADM_RT_KERNEL misaligned_kernel(const float* in, float* out) {
  const unsigned t = simt::thread_x();
  simt::store16(out + 4 * t, simt::load16(in + 4 * t + (kBug && t == 7 ? 1 : 0)));
}

template <bool kBug>
ADM_RT_KERNEL different_shared_kernel(const float* in, float* out) {
  simt::SharedArena shared;
  const unsigned t = simt::thread_x();
  float* const tile = shared.take<float>(kBug ? kThreads + t : kThreads);
  tile[t] = in[t];
  out[t] = tile[t];
}

// Written by one block, read by another of the same launch.
template <bool kBug>
ADM_RT_KERNEL between_blocks_kernel(const float* in, float* out) {
  const unsigned t = simt::thread_x(), block = simt::block_x();
  const float mine = in[block * kThreads + t];
  out[block * kThreads + t] = kBug && block > 0 ? mine + out[t] : mine;
}

using Kernel = void (*)(const float*, float*);
template <Kernel kRight, Kernel kWrong>
void launch(bool bug, const simt::Launch& shape, const float* in, float* out) {
  if (bug) {
    simt::launch<kWrong>(shape, nullptr, in, out);
  } else {
    simt::launch<kRight>(shape, nullptr, in, out);
  }
}

}  // namespace adm_rt::planted

using namespace adm_rt;
using namespace adm_rt::planted;

extern "C" {

const char* error_text() { return error.c_str(); }

// in and out: float [512], 16-byte aligned.
int run(const char* which, int bug, int schedule, unsigned seed, const float* in, float* out) {
#if defined(ADM_RT_EMULATOR)
  simt::Emulator::get().schedule = static_cast<simt::Schedule>(schedule);
  simt::Emulator::get().seed = seed;
#else
  static_cast<void>(schedule), static_cast<void>(seed);
#endif
  const std::string name = which;
  const simt::Launch shape = {which, 1, 1, 1, kThreads, 8192};
  const simt::Launch two_blocks = {which, 2, 1, 1, kThreads, 8192};
  const simt::Launch one_warp = {which, 1, 1, 1, 32, 8192};
#define ADM_RT_CASE(kernel, shape)                                              \
  if (name == #kernel) {                                                        \
    launch<kernel##_kernel<false>, kernel##_kernel<true>>(bug, shape, in, out); \
    return 0;                                                                   \
  }
  try {
    ADM_RT_CASE(missing_barrier, shape)
    ADM_RT_CASE(missing_second_barrier, shape)
    ADM_RT_CASE(beyond_shared, shape)
    ADM_RT_CASE(missing_wait, shape)
    ADM_RT_CASE(wrong_wait, one_warp)
    ADM_RT_CASE(abandoned_copy, shape)
    ADM_RT_CASE(divergent_barrier, shape)
    ADM_RT_CASE(early_return, shape)
    ADM_RT_CASE(divergent_warp, shape)
    ADM_RT_CASE(lane_missing, shape)
    ADM_RT_CASE(deadlock, shape)
    ADM_RT_CASE(misaligned, shape)
    ADM_RT_CASE(different_shared, shape)
    ADM_RT_CASE(between_blocks, two_blocks)
    error = "no kernel " + name;
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  return 1;
}

}  // extern "C"

#if defined(ADM_RT_PLANTED_MAIN)
// name, whether with the bug, whether `in` is written first: exit status 0 when the kernel ran.
int main(int count, char** arguments) {
  if (count != 4) return 2;
  float *in = nullptr, *out = nullptr;
  if (cudaMalloc(&in, 512 * 4) != cudaSuccess || cudaMalloc(&out, 512 * 4) != cudaSuccess) return 3;
  if (arguments[3][0] == '1') cudaMemset(in, 0, 512 * 4);
  const int failed = run(arguments[1], arguments[2][0] == '1', 0, 0, in, out);
  const cudaError_t error = cudaDeviceSynchronize();
  cudaFree(in), cudaFree(out);
  return failed ? 4 : error == cudaSuccess ? 0 : 5;
}
#endif
