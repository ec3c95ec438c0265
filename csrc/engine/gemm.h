// C = A B, float32, for one thread: the product inside every linear and convolution of the engine.
//
// B is packed once into panels [ceil(n / width)][k][width] with zeros behind column n; the width of
// a panel belongs to the instruction set. A and C are row-major, or lie in chunks of 16 columns
// (GemmMatrix).
//
// An element of C is the same sequence of operations whatever m, n and its own position are: k is
// cut into blocks of at most a chain's length, each block is one chain of fused multiply-adds in
// the order of k, and the blocks are added in order. So callers may cut m and n as they like.
#pragma once

#include <cstdint>

namespace adm_rt {

// Columns of a chunk: one cache line.
constexpr int64_t kGemmChunk = 16;

// Element (i, j) is data[i * row + j / 16 * chunk + j % 16]: row-major, unless `chunk` says
// otherwise. With row 16 and chunk >= 16 * rows, what a tile of C needs lies together. Rows on
// pages of their own disturb the hardware's fetching of B: products of few rows, which wait for B's
// memory, take a fifth longer.
template <typename T>
struct GemmMatrix {
  T* data;
  int64_t row;
  int64_t chunk = kGemmChunk;
};

// How long a chain may be. Shorter chains lose less to rounding, longer ones touch C less often;
// the lengths belong to the instruction set (gemm_simd.cpp).
enum class GemmChains {
  kPlain,
  kPrecise,  // for Winograd, whose transforms multiply the rounding errors of the products
};

// Floats that gemm_pack writes. Start every packed matrix on a 64-byte boundary. Static: *_simd.cpp
// use it too, and the linker must not take one instruction set's copy for all.
static inline int64_t gemm_packed_floats(int64_t n, int64_t k, int64_t panel_width) {
  return (n + panel_width - 1) / panel_width * panel_width * k;
}

// Packs B for panels of `panel_width` columns. B[kk][j] is weights[j * ldb + kk] (the published
// layout of a linear layer, [n, k]), or weights[kk * ldb + j] when `transposed`.
void gemm_pack(const float* weights, int64_t n, int64_t k, int64_t ldb, bool transposed,
               int64_t panel_width, float* packed);

#define ADM_RT_DECLARE_GEMM(ISA)                                                               \
  namespace ISA {                                                                              \
  /* Columns per panel of packed B, a multiple of 16. */                                       \
  int64_t gemm_panel_width();                                                                  \
  /* Rows of A that one microkernel takes: cut m into multiples of this. */                    \
  int64_t gemm_row_block();                                                                    \
  /* C = A B, m x n, k >= 1, added to c when `accumulate`. following: A of the product that    \
     comes next, laid out as this one, which is fetched from the last cache meanwhile; may be  \
     null. */                                                                                  \
  void gemm(int64_t m, int64_t n, int64_t k, GemmMatrix<const float> a, const float* packed_b, \
            GemmMatrix<float> c, bool accumulate, GemmChains chains = GemmChains::kPlain,      \
            const float* following = nullptr);                                                 \
  }
ADM_RT_DECLARE_GEMM(portable)
ADM_RT_DECLARE_GEMM(avx2)
ADM_RT_DECLARE_GEMM(avx512)
#undef ADM_RT_DECLARE_GEMM

}  // namespace adm_rt
