#include "engine/gemm.h"

#include <algorithm>

namespace adm_rt {

void gemm_pack(const float* weights, int64_t n, int64_t k, int64_t ldb, bool transposed,
               int64_t panel_width, float* packed) {
  for (int64_t begin = 0; begin < n; begin += panel_width) {
    const int64_t width = std::min(panel_width, n - begin);
    for (int64_t row = 0; row < k; ++row, packed += panel_width) {
      const float* from = transposed ? weights + row * ldb + begin : weights + begin * ldb + row;
      const int64_t stride = transposed ? 1 : ldb;
      for (int64_t j = 0; j < width; ++j) packed[j] = from[j * stride];
      std::fill(packed + width, packed + panel_width, 0.0f);
    }
  }
}

}  // namespace adm_rt
