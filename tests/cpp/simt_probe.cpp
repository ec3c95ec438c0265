// What simt.h offers, one small kernel per thing. C interface for ctypes; functions return 0, or 1
// with a message in error_text(). Built by a plain C++ compiler for the emulator
// (tests/cpp/test_emulator.py) and by nvcc for a GPU (tests/gpu/test_simt_on_gpu.py), where the
// pointers are the device's and schedules mean nothing.
#if !defined(__CUDACC__)
#define ADM_RT_EMULATOR
#endif
#include <cstring>
#include <exception>
#include <string>

#include "simt/launch.h"

namespace {

using namespace adm_rt;

std::string error;

template <class Run>
int guarded(int schedule, unsigned seed, const Run& run) {
#if defined(ADM_RT_EMULATOR)
  simt::Emulator::get().schedule = static_cast<simt::Schedule>(schedule);
  simt::Emulator::get().seed = seed;
#else
  static_cast<void>(schedule), static_cast<void>(seed);
#endif
  try {
    run();
    return 0;
  } catch (const std::exception& exception) {
    error = exception.what();
    return 1;
  }
}

// out [7][threads]
ADM_RT_KERNEL collectives_kernel(const float* in, float* out) {
  const unsigned t = simt::thread_x(), n = simt::threads_x();
  const float v = in[t];
  out[t] = simt::shuffle(v, (simt::lane() * 7 + 3) % 32);
  out[n + t] = simt::shuffle_xor(v, 5);
  out[2 * n + t] = simt::shuffle_down(v, 3);
  out[3 * n + t] = simt::float_of(simt::ballot(v > 0));
  out[4 * n + t] = static_cast<float>(simt::any(v > 1.5f) + 2 * simt::all(v > -9.0f));
  out[5 * n + t] = simt::warp_sum(v);
  out[6 * n + t] = simt::warp_max(v);
}

// Fragments as they lie in the registers of 32 lanes: a [32][4], b [32][2], d [32][4].
template <class T>
ADM_RT_KERNEL mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const unsigned lane = simt::lane();
  uint32_t left[4], right[2];
  float sums[4];
  memcpy(left, a + 4 * lane, 16);
  memcpy(right, b + 2 * lane, 8);
  memcpy(sums, d + 4 * lane, 16);
  if constexpr (std::is_same_v<T, float>) {
    simt::mma_m16n8k8_tf32(sums, left, right);
  } else {
    simt::mma_m16n8k16<T>(sums, left, right);
  }
  memcpy(d + 4 * lane, sums, 16);
}

// matrix [32][8] words of 16 bits; the rows of four 8 x 8 matrices; out [4 kinds][32][4].
ADM_RT_KERNEL ldmatrix_kernel(const uint16_t* matrix, uint32_t* out) {
  simt::SharedArena shared;
  uint16_t* const rows = shared.take<uint16_t>(32 * 8);
  const unsigned lane = simt::lane();
  for (int i = 0; i < 8; ++i) rows[8 * lane + i] = matrix[8 * lane + i];
  simt::sync_warp();
  uint32_t four[4], two[2];
  simt::ldmatrix_x4(four, rows + 8 * lane);
  memcpy(out + 4 * lane, four, 16);
  simt::ldmatrix_x4_trans(four, rows + 8 * lane);
  memcpy(out + 4 * (32 + lane), four, 16);
  simt::ldmatrix_x2(two, rows + 8 * (lane % 16));
  memcpy(out + 4 * (64 + lane), two, 8);
  simt::ldmatrix_x2_trans(two, rows + 8 * (lane % 16));
  memcpy(out + 4 * (96 + lane), two, 8);
}

// d [16][8] = a [16][k] b [k][8], row-major, k a multiple of 16: cp.async in two stages, ldmatrix,
// mma, as the kernels of the package do it.
template <class T>
ADM_RT_KERNEL product_kernel(const T* a, const T* b, int depth, float* d) {
  simt::SharedArena shared;
  T* const left[2] = {shared.take<T>(16 * 16), shared.take<T>(16 * 16)};
  T* const right[2] = {shared.take<T>(16 * 8), shared.take<T>(16 * 8)};
  const unsigned lane = simt::lane(), row = lane % 16, half = lane / 16;
  const auto fetch = [&](int k) {
    const int stage = k / 16 % 2;
    simt::cp_async16(left[stage] + 16 * row + 8 * half, a + row * depth + k + 8 * half);
    if (half == 0) simt::cp_async16(right[stage] + 8 * row, b + (k + row) * 8);
  };
  fetch(0);
  simt::cp_async_commit();
  float sums[4] = {};
  for (int k = 0; k < depth; k += 16) {
    if (k + 16 < depth) fetch(k + 16);
    simt::cp_async_commit();
    simt::cp_async_wait<1>();
    simt::sync_warp();
    uint32_t fragment[4], column[2];
    simt::ldmatrix_x4(fragment, left[k / 16 % 2] + 16 * row + 8 * half);
    simt::ldmatrix_x2_trans(column, right[k / 16 % 2] + 8 * row);
    simt::mma_m16n8k16<T>(sums, fragment, column);
    simt::sync_warp();  // before the next fetch overwrites this stage
  }
  simt::cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// Everything that moves bytes: 16, 8 and 4 words, streaming, zeros for what is not valid.
ADM_RT_KERNEL memory_kernel(const float* in, float* out) {
  simt::SharedArena shared;
  float* const tile = shared.take<float>(8);
  simt::cp_async16(tile, in);
  simt::cp_async16(tile + 4, in + 4, false);
  simt::cp_async_commit();
  simt::cp_async_wait<0>();
  simt::store16(out, simt::load16(tile));
  simt::store16(out + 4, simt::load16(tile + 4));
  simt::store16(out + 8, simt::load16_streaming(in + 8));
  simt::store8(out + 12, simt::load8(in + 12));
  float four[4];
  simt::load4(in + 16, four);
  simt::store4(out + 16, four);
}

// The last block adds up what the others left, in the order of blocks. out [blocks + 1].
ADM_RT_KERNEL last_block_kernel(const float* in, float* out, uint32_t* counter) {
  simt::SharedArena shared;
  bool* const last = shared.take<bool>(1);
  const unsigned blocks = simt::blocks_x() * simt::blocks_y() * simt::blocks_z();
  const unsigned block =
      (simt::block_z() * simt::blocks_y() + simt::block_y()) * simt::blocks_x() + simt::block_x();
  const float sum = simt::warp_sum(in[block * simt::threads_x() + simt::thread_x()]);
  if (simt::thread_x() == 0) {
    out[block] = sum;
    simt::fence_device();
    *last = simt::ticket(counter, blocks) == blocks - 1;
  }
  simt::sync_block();
  if (!*last) return;
  if (simt::thread_x() == 0) {
    float total = 0;
    for (unsigned i = 0; i < blocks; ++i) total += out[i];
    out[blocks] = total;
  }
}

// Two halves of the block, each with its own barrier: the order in which threads passed it.
ADM_RT_KERNEL groups_kernel(int* out, int rounds) {
  simt::SharedArena shared;
  int* const counts = shared.take<int>(2);
  const unsigned group = simt::thread_x() / 64;
  if (simt::thread_x() % 64 == 0) counts[group] = 0;
  for (int i = 0; i < rounds; ++i) {
    simt::sync_group(1 + group, 64);
    if (simt::thread_x() % 64 == i % 64u) ++counts[group];
    simt::sync_group(1 + group, 64);
    if (counts[group] != i + 1) return;  // all of the group or none
  }
  out[simt::thread_x()] = counts[group];
}

ADM_RT_KERNEL uninitialised_kernel(float* out) {
  simt::SharedArena shared;
  float* const tile = shared.take<float>(32);
  if (simt::lane() < 16) tile[simt::lane()] = 1.0f;
  simt::sync_block();
  out[simt::lane()] = tile[simt::lane()];
}

// Conversions of n numbers. kind: 0 float to half and back, 1 to bfloat16 and back, 2 to tf32, 3
// and 4 by the pair functions, 5 exp2, 6 log2, 7 reciprocal.
ADM_RT_KERNEL convert_kernel(int kind, const float* in, float* out, int n) {
  using simt::BFloat16, simt::Half;
  const int stride = static_cast<int>(simt::blocks_x() * simt::threads_x());
  for (int i = static_cast<int>(simt::block_x() * simt::threads_x() + simt::thread_x()); i < n;
       i += stride) {
    float low, high;
    switch (kind) {
      case 0:
        out[i] = simt::to_float(simt::from_float<Half>(in[i]));
        break;
      case 1:
        out[i] = simt::to_float(simt::from_float<BFloat16>(in[i]));
        break;
      case 2:
        out[i] = simt::float_of(simt::to_tf32(in[i]));
        break;
      case 3:
        simt::unpack2<Half>(simt::pack2<Half>(in[i], -in[i]), &low, &high);
        out[i] = low == -high ? low : NAN;
        break;
      case 4:
        simt::unpack2<BFloat16>(simt::pack2<BFloat16>(in[i], -in[i]), &low, &high);
        out[i] = low == -high ? low : NAN;
        break;
      case 5:
        out[i] = simt::exp2_approx(in[i]);
        break;
      case 6:
        out[i] = simt::log2_approx(in[i]);
        break;
      default:
        out[i] = simt::rcp_approx(in[i]);
    }
  }
}

// The order in which the threads of the first block run: out [threads].
ADM_RT_KERNEL order_kernel(uint32_t* place) {
  place[1 + simt::block_x() * simt::threads_x() + simt::thread_x()] = simt::atomic_add(place, 1);
}

}  // namespace

extern "C" {

const char* error_text() { return error.c_str(); }

int run_collectives(const float* in, float* out, unsigned threads, int schedule) {
  return guarded(schedule, 1, [&] {
    simt::launch<collectives_kernel>({"collectives", 1, 1, 1, threads}, nullptr, in, out);
  });
}

// dtype: 0 tf32, 1 bfloat16, 2 float16.
int run_mma(int dtype, const uint32_t* a, const uint32_t* b, float* d) {
  return guarded(0, 1, [&] {
    if (dtype == 0) simt::launch<mma_kernel<float>>({"mma"}, nullptr, a, b, d);
    if (dtype == 1) simt::launch<mma_kernel<simt::BFloat16>>({"mma"}, nullptr, a, b, d);
    if (dtype == 2) simt::launch<mma_kernel<simt::Half>>({"mma"}, nullptr, a, b, d);
  });
}

int run_ldmatrix(const uint16_t* matrix, uint32_t* out) {
  return guarded(2, 1, [&] {
    simt::launch<ldmatrix_kernel>({"ldmatrix", 1, 1, 1, 32, simt::shared_bytes<uint16_t>(256)},
                                  nullptr, matrix, out);
  });
}

int run_product(int dtype, const uint16_t* a, const uint16_t* b, int depth, float* d,
                int schedule) {
  return guarded(schedule, 1, [&] {
    const simt::Launch shape = {"product", 1, 1, 1, 32, 2 * (512 + 256)};
    if (dtype == 1) {
      simt::launch<product_kernel<simt::BFloat16>>(
          shape, nullptr, reinterpret_cast<const simt::BFloat16*>(a),
          reinterpret_cast<const simt::BFloat16*>(b), depth, d);
    } else {
      simt::launch<product_kernel<simt::Half>>(shape, nullptr,
                                               reinterpret_cast<const simt::Half*>(a),
                                               reinterpret_cast<const simt::Half*>(b), depth, d);
    }
  });
}

int run_memory(const float* in, float* out) {
  return guarded(0, 1, [&] {
    simt::launch<memory_kernel>({"memory", 1, 1, 1, 1, simt::shared_bytes<float>(8)}, nullptr, in,
                                out);
  });
}

int run_last_block(const float* in, float* out, uint32_t* counter, unsigned x, unsigned y,
                   unsigned z, int schedule) {
  return guarded(schedule, 3, [&] {
    simt::launch<last_block_kernel>({"last_block", x, y, z, 32, simt::shared_bytes<bool>(1)},
                                    nullptr, in, out, counter);
  });
}

int run_groups(int* out, int rounds, int schedule) {
  return guarded(schedule, 5, [&] {
    simt::launch<groups_kernel>({"groups", 1, 1, 1, 128, simt::shared_bytes<int>(2)}, nullptr, out,
                                rounds);
  });
}

int run_uninitialised(float* out) {
  return guarded(0, 1, [&] {
    simt::launch<uninitialised_kernel>({"uninitialised", 1, 1, 1, 32, 128}, nullptr, out);
  });
}

int run_order(uint32_t* place, unsigned blocks, unsigned threads, int schedule, unsigned seed) {
  return guarded(schedule, seed, [&] {
    simt::launch<order_kernel>({"order", blocks, 1, 1, threads}, nullptr, place);
  });
}

int run_launch(unsigned x, unsigned y, unsigned z, unsigned threads, size_t shared, float* out) {
  return guarded(0, 1, [&] {
    simt::launch<uninitialised_kernel>({"launch", x, y, z, threads, shared}, nullptr, out);
  });
}

int run_convert(int kind, const float* in, float* out, int n) {
  return guarded(0, 1, [&] {
    simt::launch<convert_kernel>({"convert", 16, 1, 1, 32}, nullptr, kind, in, out, n);
  });
}

}  // extern "C"
