// philox_normal in vectors, compiled once per instruction set.
#include "common/philox_simd.h"
#include "ops/philox_normal.h"

namespace adm_rt::ADM_RT_ISA {

void philox_normal_range(uint64_t seed, uint32_t step, uint32_t purpose, int64_t begin, int64_t end,
                         float* row) {
  int64_t element = begin;
  NoiseFloat z[4];
  for (; element + kNoiseBlock <= end; element += kNoiseBlock) {
    noise_block(seed, element, step, purpose, z);
    for (int j = 0; j < 4; ++j) z[j].storeu(row + element + j * kNoiseWidth);
  }
  if (element < end) {
    float rest[kNoiseBlock];
    noise_block(seed, element, step, purpose, z);
    for (int j = 0; j < 4; ++j) z[j].storeu(rest + j * kNoiseWidth);
    std::memcpy(row + element, rest, static_cast<size_t>(end - element) * sizeof(float));
  }
}

}  // namespace adm_rt::ADM_RT_ISA
