// The CPU side of simt.h, for tests: runs the threads of a block as fibers on one CPU thread, so
// that device code can be checked, and run under sanitizers, where there is no GPU.
//
// What is checked: results; barriers and warp collectives that only some threads reach; accesses
// beyond shared arrays; reading what a cp.async has not delivered; alignment; shared memory that
// nobody wrote (it is NaN); several orders of blocks, warps and lanes (Schedule). An error is a
// std::logic_error that names block, thread and line; AddressSanitizer names the access itself.
// What is not: memory ordering, bank conflicts, registers, the order of sums inside an mma, speed.
//
// Two rules beyond CUDA's: warp collectives are for all 32 lanes, and no thread leaves the kernel
// while others of its block wait for it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "simt/emulator_block.h"

#define ADM_RT_KERNEL inline void
#define ADM_RT_KERNEL_BOUNDS(threads, blocks) inline void
#define ADM_RT_DEVICE inline
#define ADM_RT_GRID_CONSTANT
// The last parameter of what errors are to name by its caller's line, and how to hand it on.
#define ADM_RT_SITE , ::adm_rt::simt::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}
#define ADM_RT_PASS_SITE , site
#define ADM_RT_ONLY_SITE ::adm_rt::simt::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace adm_rt::simt {

inline unsigned thread_x() { return Emulator::get().thread; }
inline unsigned threads_x() { return Emulator::get().grid.threads; }
inline unsigned lane() { return Emulator::get().thread % kWarpSize; }
inline unsigned warp() { return Emulator::get().thread / kWarpSize; }
inline unsigned block_x() { return Emulator::get().block_x; }
inline unsigned block_y() { return Emulator::get().block_y; }
inline unsigned block_z() { return Emulator::get().block_z; }
inline unsigned blocks_x() { return Emulator::get().grid.blocks_x; }
inline unsigned blocks_y() { return Emulator::get().grid.blocks_y; }
inline unsigned blocks_z() { return Emulator::get().grid.blocks_z; }

// ---- Barriers and collectives ----

inline void sync_block(ADM_RT_ONLY_SITE) {
  Emulator::get().barrier(0, Emulator::get().grid.threads, site);
}
inline void sync_group(unsigned id, unsigned threads ADM_RT_SITE) {
  if (id < 1 || id > 15 || threads % kWarpSize != 0 || threads > threads_x()) {
    Emulator::get().fail(site, "waits at barrier ", id, " for ", threads,
                         " threads; allowed: 1 to 15, whole warps of the block");
  }
  Emulator::get().barrier(id, threads, site);
}
inline void sync_warp(ADM_RT_ONLY_SITE) {
  Emulator::get().collective("sync_warp", {}, site, [](auto&) {});
}

namespace emulator {

template <class T>
uint32_t word_of(T value) {
  static_assert(sizeof(T) == 4);
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}

// shuffle: lane i gets the value of lane source(i, argument of i).
template <class T, class Source>
T shuffle(const char* name, T value, unsigned argument, Site site, const Source& source) {
  Exchange mine = {};
  mine.in[0] = word_of(value);
  mine.in[1] = argument;
  const Exchange& done = Emulator::get().collective(name, mine, site, [&](auto& lanes) {
    for (unsigned i = 0; i < kWarpSize; ++i) {
      lanes[i].out[0] = lanes[source(i, lanes[i].in[1])].in[0];
    }
  });
  T result;
  std::memcpy(&result, &done.out[0], 4);
  return result;
}

}  // namespace emulator

template <class T>
T shuffle(T value, unsigned from ADM_RT_SITE) {
  return emulator::shuffle("shuffle", value, from, site,
                           [](unsigned, unsigned from) { return from % kWarpSize; });
}
template <class T>
T shuffle_xor(T value, unsigned mask ADM_RT_SITE) {
  return emulator::shuffle("shuffle_xor", value, mask, site, [](unsigned i, unsigned mask) {
    return (i ^ mask) < kWarpSize ? i ^ mask : i;
  });
}
template <class T>
T shuffle_down(T value, unsigned delta ADM_RT_SITE) {
  return emulator::shuffle("shuffle_down", value, delta, site, [](unsigned i, unsigned delta) {
    return i + delta < kWarpSize ? i + delta : i;
  });
}
inline uint32_t ballot(bool predicate ADM_RT_SITE) {
  emulator::Exchange mine = {};
  mine.in[0] = predicate;
  return Emulator::get()
      .collective("ballot", mine, site,
                  [](auto& lanes) {
                    uint32_t votes = 0;
                    for (unsigned i = 0; i < kWarpSize; ++i) votes |= lanes[i].in[0] << i;
                    for (unsigned i = 0; i < kWarpSize; ++i) lanes[i].out[0] = votes;
                  })
      .out[0];
}
inline bool any(bool predicate ADM_RT_SITE) { return ballot(predicate, site) != 0; }
inline bool all(bool predicate ADM_RT_SITE) { return ballot(predicate, site) == 0xffffffffu; }

// ---- Shared memory ----

class SharedArena {
 public:
  template <class T>
  T* take(size_t count ADM_RT_SITE) {
    void* array = Emulator::get().shared_array(taken_++, used_, count * sizeof(T), site);
    used_ += shared_bytes<T>(count);
    return static_cast<T*>(array);
  }

 private:
  size_t taken_ = 0, used_ = 0;
};

// ---- Between blocks and kernels: blocks run one after the other ----

inline uint32_t atomic_add(uint32_t* address, uint32_t value) {
  const uint32_t before = *address;
  *address += value;
  return before;
}
inline uint32_t atomic_min(uint32_t* address, uint32_t value) {
  const uint32_t before = *address;
  if (value < before) *address = value;
  return before;
}
inline uint32_t ticket(uint32_t* counter, uint32_t count) {
  const uint32_t before = *counter;
  *counter = before >= count - 1 ? 0 : before + 1;
  return before;
}
inline void fence_device() {}
inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

// ---- Memory ----

inline Bytes16 load16(const void* address ADM_RT_SITE) {
  Emulator::get().check_aligned(address, 16, site);
  return *static_cast<const Bytes16*>(address);
}
inline Bytes16 load16_streaming(const void* address ADM_RT_SITE) { return load16(address, site); }
inline Bytes8 load8(const void* address ADM_RT_SITE) {
  Emulator::get().check_aligned(address, 8, site);
  return *static_cast<const Bytes8*>(address);
}
inline void store16(void* address, const Bytes16& bytes ADM_RT_SITE) {
  Emulator::get().check_aligned(address, 16, site);
  *static_cast<Bytes16*>(address) = bytes;
}
inline void store8(void* address, const Bytes8& bytes ADM_RT_SITE) {
  Emulator::get().check_aligned(address, 8, site);
  *static_cast<Bytes8*>(address) = bytes;
}
inline void load4(const float* address, float (&values)[4] ADM_RT_SITE) {
  Emulator::get().check_aligned(address, 16, site);
  for (int i = 0; i < 4; ++i) values[i] = address[i];
}
inline void load4(const uint16_t* address, uint16_t (&values)[4] ADM_RT_SITE) {
  Emulator::get().check_aligned(address, 8, site);
  for (int i = 0; i < 4; ++i) values[i] = address[i];
}
inline void store4(float* address, const float (&values)[4] ADM_RT_SITE) {
  Emulator::get().check_aligned(address, 16, site);
  for (int i = 0; i < 4; ++i) address[i] = values[i];
}

// ---- 16-bit floats ----

inline float to_float(float value) { return value; }
inline float to_float(Half value) { return portable::half_to_float(value.bits); }
inline float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
template <class T>
T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, Half>) {
    return {portable::float_to_half(value)};
  } else {
    static_assert(std::is_same_v<T, BFloat16>);
    return {portable::float_to_bfloat16(value)};
  }
}
template <class T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T>
void unpack2(uint32_t word, float* low, float* high) {
  *low = to_float(T{static_cast<uint16_t>(word)});
  *high = to_float(T{static_cast<uint16_t>(word >> 16)});
}

// ---- Arithmetic: what the approximations approximate, with subnormals as zero ----

namespace emulator {

inline float flush(float a) { return std::fabs(a) < 0x1p-126f ? std::copysign(0.0f, a) : a; }

}  // namespace emulator

inline float exp2_approx(float a) { return emulator::flush(std::exp2(emulator::flush(a))); }
inline float log2_approx(float a) { return std::log2(emulator::flush(a)); }
inline float rcp_approx(float a) { return emulator::flush(1.0f / emulator::flush(a)); }
inline float minimum(float a, float b) { return std::fmin(a, b); }
inline float maximum(float a, float b) { return std::fmax(a, b); }

}  // namespace adm_rt::simt

#include "simt/emulator_tensor.h"
