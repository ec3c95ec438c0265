// qkv_attention for float32, without tensor cores: correct, and not tuned. The blocks, roles and
// sums of the 16-bit kernels (qkv_attention.cuh, qkv_attention_backward.cuh) with tiles of kRows by
// kRows; groups of eight lanes own kRows / 16 rows each.
#pragma once

#include <cstdint>

#include "ops/qkv_attention_backward.cuh"
#include "ops/qkv_attention_shared.cuh"
#include "simt/simt.h"

namespace adm_rt {

template <int kColumns>
struct QkvFloat {
  static constexpr int kRows = kColumns == 256 ? 16 : 32;  // of a tile of either side
  static constexpr int kOwn = kRows / 16;                  // rows of a lane
  static constexpr int kKeys = kRows / 8;                  // columns of a lane: lane % 8 + 8 * i
  static constexpr int kPad = kRows + 1;                   // floats of a row of probabilities
  using Tile = QkvTile<float, kColumns>;

  static constexpr size_t shared_size(int tiles) {
    return static_cast<size_t>(tiles) * simt::shared_bytes<float>(kRows * Tile::kStride) +
           simt::shared_bytes<float>(kRows * kPad);
  }
};

// c[i][j] += a[row + i] . b[lane % 8 + 8 * j] over the first `columns` columns.
template <int kColumns, int kOwn, int kKeys>
ADM_RT_DEVICE void multiply_transposed(float (&c)[kOwn][kKeys], const QkvTile<float, kColumns>& a,
                                       int row, const QkvTile<float, kColumns>& b, int columns) {
  const int lane = static_cast<int>(simt::lane()) % 8;
  ADM_RT_UNROLL_BY(2) for (int chunk = 0; chunk < (columns + 3) / 4; ++chunk) {
    float left[kOwn][4], right[4];
    ADM_RT_UNROLL for (int i = 0; i < kOwn; ++i) simt::load4(a.chunk(row + i, chunk), left[i]);
    ADM_RT_UNROLL for (int j = 0; j < kKeys; ++j) {
      simt::load4(b.chunk(lane + 8 * j, chunk), right);
      ADM_RT_UNROLL for (int i = 0; i < kOwn; ++i) {
        float four = left[i][0] * right[0];  // shorter chains of sums, smaller errors
        ADM_RT_UNROLL for (int e = 1; e < 4; ++e) {
          four = simt::fma_rn(left[i][e], right[e], four);
        }
        c[i][j] += four;
      }
    }
  }
}

// c[i][j] += sum over rows k of p[row + i][k] b[k], columns 4 * (lane % 8) + 32 * j..+3. The eight
// lanes of a group have written their rows of p.
template <int kColumns, int kOwn>
ADM_RT_DEVICE void multiply_rows(float (&c)[kOwn][kColumns / 32][4], const float* p, int row,
                                 const QkvTile<float, kColumns>& b) {
  using Config = QkvFloat<kColumns>;
  const int lane = static_cast<int>(simt::lane()) % 8;
  simt::sync_warp();
  ADM_RT_UNROLL_BY(4) for (int k = 0; k < Config::kRows; ++k) {
    ADM_RT_UNROLL for (int j = 0; j < kColumns / 32; ++j) {
      float right[4];
      simt::load4(b.chunk(k, lane + 8 * j), right);
      ADM_RT_UNROLL for (int i = 0; i < kOwn; ++i) {
        const float left = p[(row + i) * Config::kPad + k];
        ADM_RT_UNROLL for (int e = 0; e < 4; ++e) {
          c[i][j][e] = simt::fma_rn(left, right[e], c[i][j][e]);
        }
      }
    }
  }
}

// Writes factor * c to the matrix, through a tile that every thread is done with.
template <int kColumns, int kOwn>
ADM_RT_DEVICE void store_rows(const float (&c)[kOwn][kColumns / 32][4], const float (&factor)[kOwn],
                              const QkvTile<float, kColumns>& tile, int row,
                              const QkvMatrix<float>& m, int first_row, bool wide) {
  const int lane = static_cast<int>(simt::lane()) % 8;
  ADM_RT_UNROLL for (int i = 0; i < kOwn; ++i) {
    ADM_RT_UNROLL for (int j = 0; j < kColumns / 32; ++j) {
      float values[4];
      ADM_RT_UNROLL for (int e = 0; e < 4; ++e) values[e] = c[i][j][e] * factor[i];
      simt::store4(tile.chunk(row + i, lane + 8 * j), values);
    }
  }
  simt::sync_block();
  store_tile(tile, 0, QkvFloat<kColumns>::kRows, m, first_row, wide,
             static_cast<int>(simt::thread_x()), kQkvThreads);
}

// Grid: blocks of queries, heads, images.
template <int kColumns>
ADM_RT_KERNEL_BOUNDS(kQkvThreads, 1)
qkv_attention_float_kernel(const ADM_RT_GRID_CONSTANT QkvForwardArgs args) {
  using Config = QkvFloat<kColumns>;
  using Tile = typename Config::Tile;
  constexpr int kRows = Config::kRows, kOwn = Config::kOwn, kKeys = Config::kKeys;
  const QkvGeometry& g = args.geometry;
  simt::SharedArena shared;
  const Tile query{shared.take<float>(kRows * Tile::kStride)};
  const Tile key{shared.take<float>(kRows * Tile::kStride)};
  const Tile value{shared.take<float>(kRows * Tile::kStride)};
  float* const p = shared.take<float>(kRows * Config::kPad);
  const int lane = static_cast<int>(simt::lane()) % 8;
  const int row = static_cast<int>(simt::thread_x()) / 8 * kOwn;
  const int first_row = static_cast<int>(simt::block_x()) * kRows;

  simt::wait_for_previous_kernel();
  load_tile<kRows>(query, qkv_part<const float>(g, args.qkv, QkvPart::kQuery), first_row, g.wide);
  const auto k = qkv_part<const float>(g, args.qkv, QkvPart::kKey);
  const auto v = qkv_part<const float>(g, args.qkv, QkvPart::kValue);
  float out[kOwn][kColumns / 32][4] = {}, highest[kOwn], sum[kOwn] = {};
  ADM_RT_UNROLL for (int i = 0; i < kOwn; ++i) highest[i] = -INFINITY;
  for (int first_key = 0; first_key < g.length; first_key += kRows) {
    load_tile<kRows>(key, k, first_key, g.wide);
    load_tile<kRows>(value, v, first_key, g.wide);
    simt::cp_async_commit();
    simt::cp_async_wait<0>();
    simt::sync_block();
    float logits[kOwn][kKeys] = {};
    multiply_transposed(logits, query, row, key, g.head_dim);
    ADM_RT_UNROLL for (int i = 0; i < kOwn; ++i) {
      float top = -INFINITY;
      ADM_RT_UNROLL for (int j = 0; j < kKeys; ++j) {
        if (first_key + lane + 8 * j >= g.length) logits[i][j] = -INFINITY;
        top = simt::maximum(top, logits[i][j]);
      }
      for (int mask = 1; mask < 8; mask *= 2) {
        top = simt::maximum(top, simt::shuffle_xor(top, mask));
      }
      const float now = simt::maximum(highest[i], top * g.logit_scale2);
      const float shrink = simt::exp2_approx(highest[i] - now);
      float total = 0;
      ADM_RT_UNROLL for (int j = 0; j < kKeys; ++j) {
        const float probability =
            simt::exp2_approx(simt::fma_rn(logits[i][j], g.logit_scale2, -now));
        p[(row + i) * Config::kPad + lane + 8 * j] = probability;
        total += probability;
      }
      highest[i] = now;
      sum[i] = sum[i] * shrink + total;
      ADM_RT_UNROLL for (int j = 0; j < kColumns / 32; ++j) {
        ADM_RT_UNROLL for (int e = 0; e < 4; ++e) out[i][j][e] *= shrink;
      }
    }
    multiply_rows(out, p, row, value);
    simt::sync_block();
  }
  simt::allow_next_kernel();
  float inverse[kOwn];
  ADM_RT_UNROLL for (int i = 0; i < kOwn; ++i) {
    for (int mask = 1; mask < 8; mask *= 2) sum[i] += simt::shuffle_xor(sum[i], mask);
    inverse[i] = simt::div_rn(1.0f, sum[i]);
    const int position = first_row + row + i;
    if (args.stats != nullptr && lane == 0 && position < g.num_queries) {
      float* const stats = args.stats + qkv_head_index(g) * 2 * g.num_queries;
      stats[position] = highest[i];
      stats[g.num_queries + position] = sum[i];
    }
  }
  store_rows(out, inverse, query, row, qkv_out<float>(g, args.out), first_row, g.wide);
}

// Grid: blocks of rows times three roles, heads, images.
template <int kColumns>
ADM_RT_KERNEL_BOUNDS(kQkvThreads, 1)
qkv_attention_float_backward_kernel(const ADM_RT_GRID_CONSTANT QkvBackwardArgs args) {
  using Config = QkvFloat<kColumns>;
  using Tile = typename Config::Tile;
  constexpr int kRows = Config::kRows, kOwn = Config::kOwn, kKeys = Config::kKeys;
  const QkvGeometry& g = args.geometry;
  simt::SharedArena shared;
  const Tile own_a{shared.take<float>(kRows * Tile::kStride)};
  const Tile own_b{shared.take<float>(kRows * Tile::kStride)};
  const Tile a{shared.take<float>(kRows * Tile::kStride)};
  const Tile b{shared.take<float>(kRows * Tile::kStride)};
  float* const shared_p = shared.take<float>(kRows * Config::kPad);
  const int blocks = static_cast<int>(simt::blocks_x()) / 3;
  const auto role = static_cast<QkvPart>(static_cast<int>(simt::block_x()) / blocks);
  const bool by_query = role == QkvPart::kQuery;
  const int first_row = static_cast<int>(simt::block_x()) % blocks * kRows;
  const int lane = static_cast<int>(simt::lane()) % 8;
  const int row = static_cast<int>(simt::thread_x()) / 8 * kOwn;

  const auto q = qkv_part<const float>(g, args.qkv, QkvPart::kQuery);
  const auto k = qkv_part<const float>(g, args.qkv, QkvPart::kKey);
  const auto v = qkv_part<const float>(g, args.qkv, QkvPart::kValue);
  const auto grad = qkv_out<const float>(g, args.grad);
  const auto from_a = choose(by_query, k, q);
  const auto from_b = choose(by_query, v, grad);
  const int others = first_row < (by_query ? g.num_queries : g.length) ? from_a.rows : 0;

  simt::wait_for_previous_kernel();
  load_tile<kRows>(own_a, choose(by_query, q, k), first_row, g.wide);
  load_tile<kRows>(own_b, choose(by_query, grad, v), first_row, g.wide);
  simt::cp_async_commit();
  float sum[kOwn][kColumns / 32][4] = {};
  for (int first = 0; first < others; first += kRows) {
    load_tile<kRows>(a, from_a, first, g.wide);
    load_tile<kRows>(b, from_b, first, g.wide);
    simt::cp_async_commit();
    simt::cp_async_wait<0>();
    simt::sync_block();
    float p[kOwn][kKeys] = {}, ds[kOwn][kKeys] = {};
    multiply_transposed(p, own_a, row, a, g.head_dim);
    if (role != QkvPart::kValue) multiply_transposed(ds, own_b, row, b, g.head_dim);
    ADM_RT_UNROLL for (int i = 0; i < kOwn; ++i) {
      ADM_RT_UNROLL for (int j = 0; j < kKeys; ++j) {
        const int own = first_row + row + i, other = first + lane + 8 * j;
        const QkvQueryStats query = qkv_query_stats(args, by_query ? own : other);
        float probability = 0;
        if (!by_query || other < g.length) {
          probability = simt::exp2_approx(simt::fma_rn(p[i][j], g.logit_scale2, -query.highest)) *
                        query.inverse_sum;
        }
        shared_p[(row + i) * Config::kPad + lane + 8 * j] =
            role == QkvPart::kValue ? probability : probability * (ds[i][j] - query.delta);
      }
    }
    multiply_rows(sum, shared_p, row, role == QkvPart::kValue ? b : a);
    simt::sync_block();
  }
  simt::allow_next_kernel();
  simt::cp_async_wait<0>();
  simt::sync_block();  // the tile that takes the result is not being loaded any more
  auto target = qkv_part<float>(g, args.dqkv, role);
  target.rows = g.length;  // positions that did not ask get zeros
  float factor[kOwn];
  ADM_RT_UNROLL for (int i = 0; i < kOwn; ++i) {
    factor[i] = role == QkvPart::kValue ? 1.0f : g.logit_scale;
  }
  store_rows(sum, factor, own_a, row, target, first_row, g.wide);
}

}  // namespace adm_rt
