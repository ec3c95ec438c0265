// The CPU side of simt.h: asynchronous copies into shared memory and tensor cores.
//
// Lane maps after the PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions". Sums are made
// in double precision and rounded once; a GPU adds in an order of its own.
#pragma once

#include <cstdint>
#include <cstring>

#include "simt/emulator.h"

namespace adm_rt::simt {

inline void cp_async16(void* shared, const void* global, bool valid ADM_RT_SITE) {
  Emulator& emulator = Emulator::get();
  emulator.check_in_shared(shared, 16, site, "copies to 16 bytes");
  emulator.check_aligned(shared, 16, site);
  emulator.check_aligned(global, 16, site);
  emulator.copies().copy(shared, global, valid);
}
inline void cp_async16(void* shared, const void* global ADM_RT_SITE) {
  cp_async16(shared, global, true, site);
}
inline void cp_async_commit() { Emulator::get().copies().commit(); }
template <int kAllowed>
void cp_async_wait() {
  static_assert(kAllowed >= 0);
  Emulator::get().copies().wait(kAllowed);
}

namespace emulator {

// Matrix j of 8x8 words of 16 bits has its row i at the address of lane 8 j + i. Lane l gets, per
// matrix, the pair (l / 4, 2 (l % 4)), (l / 4, 2 (l % 4) + 1) of it or of its transpose.
template <int kMatrices>
void ldmatrix(const char* name, uint32_t (&r)[kMatrices], const void* row, bool transposed,
              Site site) {
  Emulator& emulator = Emulator::get();
  if (lane() < 8 * kMatrices) {
    emulator.check_in_shared(row, 16, site, "reads a matrix row of 16 bytes");
    emulator.check_aligned(row, 16, site);
  }
  Exchange mine = {};
  mine.address = row;
  const Exchange& done = emulator.collective(name, mine, site, [&](auto& lanes) {
    for (int j = 0; j < kMatrices; ++j) {
      uint16_t matrix[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], lanes[8 * j + i].address, 16);
      for (unsigned l = 0; l < kWarpSize; ++l) {
        const unsigned a = l / 4, b = 2 * (l % 4);
        const uint16_t low = transposed ? matrix[b][a] : matrix[a][b];
        const uint16_t high = transposed ? matrix[b + 1][a] : matrix[a][b + 1];
        lanes[l].out[j] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
  for (int j = 0; j < kMatrices; ++j) r[j] = done.out[j];
}

// Where the elements of D [16, 8] and of the operands of one mma lie: lane and register.
struct Place {
  unsigned lane, reg;
};
inline Place place_of_d(unsigned row, unsigned column) {
  return {row % 8 * 4 + column / 2, row / 8 * 2 + column % 2};
}
// Words of 16 bits: register and which half of it. A [16, 16], B [16, 8].
inline Place place_of_a16(unsigned row, unsigned k) {
  return {row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2};
}
inline Place place_of_b16(unsigned k, unsigned column) { return {column * 4 + k % 8 / 2, k / 8}; }
// tf32: A [16, 8], B [8, 8].
inline Place place_of_a32(unsigned row, unsigned k) {
  return {row % 8 * 4 + k % 4, row / 8 + k / 4 * 2};
}
inline Place place_of_b32(unsigned k, unsigned column) { return {column * 4 + k % 4, k / 4}; }

// element(lanes, matrix 'a' or 'b', row or column, k) -> float.
template <int kDepth, class Element>
void mma(const char* name, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site,
         const Element& element) {
  Exchange mine = {};
  for (int i = 0; i < 4; ++i) mine.in[i] = a[i];
  for (int i = 0; i < 2; ++i) mine.in[4 + i] = b[i];
  for (int i = 0; i < 4; ++i) mine.in[6 + i] = bits_of(d[i]);
  const Exchange& done = Emulator::get().collective(name, mine, site, [&](auto& lanes) {
    float left[16][kDepth], right[8][kDepth];
    for (unsigned k = 0; k < kDepth; ++k) {
      for (unsigned row = 0; row < 16; ++row) left[row][k] = element(lanes, 'a', row, k);
      for (unsigned column = 0; column < 8; ++column) {
        right[column][k] = element(lanes, 'b', column, k);
      }
    }
    for (unsigned row = 0; row < 16; ++row) {
      for (unsigned column = 0; column < 8; ++column) {
        const Place at = place_of_d(row, column);
        double sum = float_of(lanes[at.lane].in[6 + at.reg]);
        for (unsigned k = 0; k < kDepth; ++k) {
          sum += static_cast<double>(left[row][k]) * right[column][k];
        }
        lanes[at.lane].out[at.reg] = bits_of(static_cast<float>(sum));
      }
    }
  });
  for (int i = 0; i < 4; ++i) d[i] = float_of(done.out[i]);
}

}  // namespace emulator

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row ADM_RT_SITE) {
  emulator::ldmatrix("ldmatrix_x4", r, row, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row ADM_RT_SITE) {
  emulator::ldmatrix("ldmatrix_x4_trans", r, row, true, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row ADM_RT_SITE) {
  emulator::ldmatrix("ldmatrix_x2", r, row, false, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row ADM_RT_SITE) {
  emulator::ldmatrix("ldmatrix_x2_trans", r, row, true, site);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] ADM_RT_SITE) {
  emulator::mma<16>(
      "mma_m16n8k16", d, a, b, site, [](auto& lanes, char matrix, unsigned index, unsigned k) {
        const emulator::Place at =
            matrix == 'a' ? emulator::place_of_a16(index, k) : emulator::place_of_b16(k, index);
        const uint32_t word = lanes[at.lane].in[at.reg + (matrix == 'a' ? 0 : 4)];
        return to_float(T{static_cast<uint16_t>(word >> 16 * (k % 2))});
      });
}

inline uint32_t to_tf32(float value) { return portable::float_to_tf32(value); }

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                             const uint32_t (&b)[2] ADM_RT_SITE) {
  emulator::mma<8>(
      "mma_m16n8k8_tf32", d, a, b, site, [](auto& lanes, char matrix, unsigned index, unsigned k) {
        const emulator::Place at =
            matrix == 'a' ? emulator::place_of_a32(index, k) : emulator::place_of_b32(k, index);
        const uint32_t word = lanes[at.lane].in[at.reg + (matrix == 'a' ? 0 : 4)];
        return float_of(word & 0xffffe000u);  // the low bits are not looked at
      });
}

}  // namespace adm_rt::simt
