// Products of tiles of 16-bit floats on tensor cores, for qkv_attention: warps own rows, results
// stay in registers as the accumulators of mma.m16n8k16 lay them out (PTX ISA, "Matrix Fragments
// for mma.m16n8k16"): element 2 * i + j of a lane is row lane / 4 + 8 * i, column 2 * (lane % 4) +
// j.
#pragma once

#include <cstdint>

#include "ops/qkv_attention_shared.cuh"
#include "simt/simt.h"

namespace adm_rt {

// Operand a, rows [row, row + 16), columns [16 k, 16 k + 16).
template <class T, int kColumns>
ADM_RT_DEVICE void load_fragment_a(uint32_t (&a)[4], const QkvTile<T, kColumns>& tile, int row,
                                   int k) {
  const int lane = static_cast<int>(simt::lane());
  simt::ldmatrix_x4(a, tile.chunk(row + lane % 16, 2 * k + lane / 16));
}

template <class T>
ADM_RT_DEVICE void multiply_pair(float (&low)[4], float (&high)[4], const uint32_t (&a)[4],
                                 const uint32_t (&b)[4]) {
  const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  simt::mma_m16n8k16<T>(low, a, first);
  simt::mma_m16n8k16<T>(high, a, second);
}

// c[., n] += sum over columns k of a[., k] b[n, k], for rows n of tile b.
template <class T, int kColumns, int kRowTiles, int kTiles>
ADM_RT_DEVICE void multiply_step(float (&c)[kRowTiles][kTiles][4],
                                 const uint32_t (&a)[kRowTiles][4], const QkvTile<T, kColumns>& b,
                                 int k) {
  const int lane = static_cast<int>(simt::lane());
  ADM_RT_UNROLL for (int n = 0; n < kTiles; n += 2) {
    uint32_t fragment[4];  // columns [16 k, 16 k + 16) of 16 rows of b
    simt::ldmatrix_x4(fragment, b.chunk(8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
    ADM_RT_UNROLL for (int r = 0; r < kRowTiles; ++r) {
      multiply_pair<T>(c[r][n], c[r][n + 1], a[r], fragment);
    }
  }
}

template <class T, int kColumns, int kRowTiles, int kTiles>
ADM_RT_DEVICE void multiply_transposed(float (&c)[kRowTiles][kTiles][4],
                                       const uint32_t (&a)[kRowTiles][kColumns / 16][4],
                                       const QkvTile<T, kColumns>& b) {
  ADM_RT_UNROLL for (int k = 0; k < kColumns / 16; ++k) {
    uint32_t step[kRowTiles][4];
    ADM_RT_UNROLL for (int r = 0; r < kRowTiles; ++r) {
      ADM_RT_UNROLL for (int e = 0; e < 4; ++e) step[r][e] = a[r][k][e];
    }
    multiply_step(c, step, b, k);
  }
}

// The same with a from rows [row, row + 16 * kRowTiles) of a tile.
template <class T, int kColumns, int kRowTiles, int kTiles>
ADM_RT_DEVICE void multiply_transposed(float (&c)[kRowTiles][kTiles][4],
                                       const QkvTile<T, kColumns>& a, int row,
                                       const QkvTile<T, kColumns>& b) {
  ADM_RT_UNROLL_BY(4) for (int k = 0; k < kColumns / 16; ++k) {
    uint32_t step[kRowTiles][4];
    ADM_RT_UNROLL for (int r = 0; r < kRowTiles; ++r) {
      load_fragment_a(step[r], a, row + 16 * r, k);
    }
    multiply_step(c, step, b, k);
  }
}

// c[., n] += sum over k of p[., k] b[k, n], with p as accumulators, rounded to T, and k rows of b.
template <class T, int kColumns, int kRowTiles, int kTiles>
ADM_RT_DEVICE void multiply_accumulators(float (&c)[kRowTiles][kColumns / 8][4],
                                         const float (&p)[kRowTiles][kTiles][4],
                                         const QkvTile<T, kColumns>& b) {
  const int lane = static_cast<int>(simt::lane());
  ADM_RT_UNROLL for (int k = 0; k < kTiles / 2; ++k) {
    uint32_t a[kRowTiles][4];
    ADM_RT_UNROLL for (int r = 0; r < kRowTiles; ++r) {
      const float (&left)[4] = p[r][2 * k];
      const float (&right)[4] = p[r][2 * k + 1];
      a[r][0] = simt::pack2<T>(left[0], left[1]);
      a[r][1] = simt::pack2<T>(left[2], left[3]);
      a[r][2] = simt::pack2<T>(right[0], right[1]);
      a[r][3] = simt::pack2<T>(right[2], right[3]);
    }
    ADM_RT_UNROLL for (int n = 0; n < kColumns / 8; n += 2) {
      uint32_t fragment[4];  // columns [8 n, 8 n + 16) of 16 rows of b
      simt::ldmatrix_x4_trans(fragment, b.chunk(16 * k + lane % 16, n + lane / 16));
      ADM_RT_UNROLL for (int r = 0; r < kRowTiles; ++r) {
        multiply_pair<T>(c[r][n], c[r][n + 1], a[r], fragment);
      }
    }
  }
}

// Writes factor * c as rows first_row + row.. of the matrix, through the warp's own rows of a tile.
template <class T, int kColumns, int kRowTiles>
ADM_RT_DEVICE void store_accumulators(const float (&c)[kRowTiles][kColumns / 8][4], float factor,
                                      const QkvTile<T, kColumns>& tile, int row,
                                      const QkvMatrix<T>& m, int first_row, bool wide) {
  const int lane = static_cast<int>(simt::lane());
  simt::sync_warp();  // every lane is done with the tile
  ADM_RT_UNROLL for (int r = 0; r < kRowTiles; ++r) {
    ADM_RT_UNROLL for (int n = 0; n < kColumns / 8; ++n) {
      ADM_RT_UNROLL for (int i = 0; i < 2; ++i) {
        T* const to = tile.chunk(row + 16 * r + 8 * i + lane / 4, n) + 2 * (lane % 4);
        *reinterpret_cast<uint32_t*>(to) =
            simt::pack2<T>(c[r][n][2 * i] * factor, c[r][n][2 * i + 1] * factor);
      }
    }
  }
  simt::sync_warp();
  store_tile(tile, row, 16 * kRowTiles, m, first_row, wide, lane, 32);
}

}  // namespace adm_rt
