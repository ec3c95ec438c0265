// qkv_attention for 16-bit floats on tensor cores (sm_80 and up): the forward pass.
//
// A block computes kRows queries of one head: each of its four warps owns kRowTiles times 16 of
// them, keeps their output in registers and goes over the keys with the running maximum and sum of
// Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018, as Dao,
// "FlashAttention-2", 2023, arranges it. Keys and values go through a ring of two stages that
// cp.async fills one step ahead. Products add up in float32; probabilities are rounded to 16 bits
// for the product with v alone. A query's arithmetic is the same whichever variant or block it
// falls to.
#pragma once

#include <cstdint>

#include "ops/qkv_attention_mma.cuh"
#include "ops/qkv_attention_shared.cuh"
#include "simt/simt.h"

namespace adm_rt {

template <class T, int kColumns, int kRowTiles>
struct QkvForward {
  static constexpr int kRows = 16 * kRowTiles * kQkvWarps;  // queries of a block
  static constexpr int kKeys = kColumns == 64 ? 64 : 32;    // of a stage
  static constexpr bool kKeepQuery = kColumns == 64;        // its fragments stay in registers
  using Tile = QkvTile<T, kColumns>;

  static constexpr size_t shared_size() {
    return simt::shared_bytes<T>(kRows * Tile::kStride) +
           2 * QkvRing<T, kColumns, kKeys>::shared_size();
  }
};

// Grid: blocks of queries, heads, images. kColumns: head_dim rounded up to 64, 128, 192 or 256.
template <class T, int kColumns, int kRowTiles>
ADM_RT_KERNEL_BOUNDS(kQkvThreads, 1)
qkv_attention_kernel(const ADM_RT_GRID_CONSTANT QkvForwardArgs args) {
  using Config = QkvForward<T, kColumns, kRowTiles>;
  using Tile = typename Config::Tile;
  constexpr int kKeys = Config::kKeys;
  const QkvGeometry& g = args.geometry;
  simt::SharedArena shared;
  const Tile query{shared.take<T>(Config::kRows * Tile::kStride)};
  const QkvRing<T, kColumns, kKeys> key(shared), value(shared);
  const auto q = qkv_part<const T>(g, args.qkv, QkvPart::kQuery);
  const auto k = qkv_part<const T>(g, args.qkv, QkvPart::kKey);
  const auto v = qkv_part<const T>(g, args.qkv, QkvPart::kValue);
  const int lane = static_cast<int>(simt::lane());
  const int first_row = static_cast<int>(simt::block_x()) * Config::kRows;
  const int warp_row = static_cast<int>(simt::warp()) * 16 * kRowTiles;
  const bool active = first_row + warp_row < g.num_queries;  // else it only helps to load

  simt::wait_for_previous_kernel();
  load_tile<Config::kRows>(query, q, first_row, g.wide);
  load_tile<kKeys>(key.stage(0), k, 0, g.wide);
  simt::cp_async_commit();
  load_tile<kKeys>(value.stage(0), v, 0, g.wide);
  simt::cp_async_commit();

  // Accumulator element 2 * i + j of a lane is row lane / 4 + 8 * i, column 2 * (lane % 4) + j.
  float out[kRowTiles][kColumns / 8][4] = {};
  float highest[kRowTiles][2], sum[kRowTiles][2] = {};
  ADM_RT_UNROLL for (int r = 0; r < kRowTiles; ++r) highest[r][0] = highest[r][1] = -INFINITY;
  [[maybe_unused]] uint32_t kept[kRowTiles][kColumns / 16][4];

  const int tiles = (g.length + kKeys - 1) / kKeys;
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % 2;
    if (tile == 0) {
      simt::cp_async_wait<1>();  // the first values may come while q k^T is computed
    } else {
      simt::cp_async_wait<0>();
    }
    simt::sync_block();  // the tiles are there, and nobody reads the other stage any more
    if (tile + 1 < tiles) {
      load_tile<kKeys>(key.stage(1 - stage), k, (tile + 1) * kKeys, g.wide);
      load_tile<kKeys>(value.stage(1 - stage), v, (tile + 1) * kKeys, g.wide);
    }
    simt::cp_async_commit();
    if (Config::kKeepQuery && tile == 0) {
      ADM_RT_UNROLL for (int r = 0; r < kRowTiles; ++r) {
        ADM_RT_UNROLL for (int i = 0; i < kColumns / 16; ++i) {
          load_fragment_a(kept[r][i], query, warp_row + 16 * r, i);
        }
      }
    }
    float logits[kRowTiles][kKeys / 8][4] = {};
    if (active) {
      if constexpr (Config::kKeepQuery) {
        multiply_transposed(logits, kept, key.stage(stage));
      } else {
        multiply_transposed(logits, query, warp_row, key.stage(stage));
      }
      if ((tile + 1) * kKeys > g.length) {
        ADM_RT_UNROLL for (int r = 0; r < kRowTiles; ++r) {
          ADM_RT_UNROLL for (int n = 0; n < kKeys / 8; ++n) {
            ADM_RT_UNROLL for (int e = 0; e < 4; ++e) {
              const int column = tile * kKeys + n * 8 + 2 * (lane % 4) + e % 2;
              if (column >= g.length) logits[r][n][e] = -INFINITY;
            }
          }
        }
      }
      ADM_RT_UNROLL for (int r = 0; r < kRowTiles; ++r) {
        ADM_RT_UNROLL for (int i = 0; i < 2; ++i) {
          float top = logits[r][0][2 * i];
          ADM_RT_UNROLL for (int n = 0; n < kKeys / 8; ++n) {
            top = simt::maximum(top, simt::maximum(logits[r][n][2 * i], logits[r][n][2 * i + 1]));
          }
          top = simt::maximum(top, simt::shuffle_xor(top, 1));
          top = simt::maximum(top, simt::shuffle_xor(top, 2));
          const float before = highest[r][i];
          const float now = simt::maximum(before, top * g.logit_scale2);
          const float shrink = simt::exp2_approx(before - now);
          float total = 0;
          ADM_RT_UNROLL for (int n = 0; n < kKeys / 8; ++n) {
            ADM_RT_UNROLL for (int e = 2 * i; e < 2 * i + 2; ++e) {
              const float p =
                  simt::exp2_approx(simt::fma_rn(logits[r][n][e], g.logit_scale2, -now));
              logits[r][n][e] = p;
              total += p;
            }
          }
          highest[r][i] = now;
          sum[r][i] = sum[r][i] * shrink + total;
          ADM_RT_UNROLL for (int n = 0; n < kColumns / 8; ++n) {
            out[r][n][2 * i] *= shrink, out[r][n][2 * i + 1] *= shrink;
          }
        }
      }
    }
    if (tile == 0) {
      simt::cp_async_wait<1>();
      simt::sync_block();
    }
    if (active) multiply_accumulators(out, logits, value.stage(stage));
  }
  simt::allow_next_kernel();
  if (!active) return;

  ADM_RT_UNROLL for (int r = 0; r < kRowTiles; ++r) {
    ADM_RT_UNROLL for (int i = 0; i < 2; ++i) {
      float total = sum[r][i];
      total += simt::shuffle_xor(total, 1);
      total += simt::shuffle_xor(total, 2);
      const float inverse = simt::div_rn(1.0f, total);
      ADM_RT_UNROLL for (int n = 0; n < kColumns / 8; ++n) {
        out[r][n][2 * i] *= inverse, out[r][n][2 * i + 1] *= inverse;
      }
      const int row = first_row + warp_row + 16 * r + 8 * i + lane / 4;
      if (args.stats != nullptr && lane % 4 == 0 && row < g.num_queries) {
        float* const stats = args.stats + qkv_head_index(g) * 2 * g.num_queries;
        stats[row] = highest[r][i];
        stats[g.num_queries + row] = total;
      }
    }
  }
  // The warp's own rows of the query tile, which nobody else reads, take its output.
  store_accumulators(out, 1.0f, query, warp_row, qkv_out<T>(g, args.out), first_row, g.wide);
}

}  // namespace adm_rt
