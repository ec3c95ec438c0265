// qkv_attention for 16-bit floats on tensor cores: the backward pass, in two launches.
//
// The first writes delta = sum over channels of grad * out. In the second every block owns 64 rows
// of one gradient and sums over tiles of the other side's rows, in one fixed order, so that nothing
// is added up across blocks and results are the same bits in every run. With P = softmax, made
// again from q, k and the saved maximum and sum, dP = grad v^T and dS = P * (dP - delta):
//   kQuery  owns q and grad, goes over k and v:    dq = dS k / sqrt(d)
//   kKey    owns k and v, goes over q and grad:    dk = dS^T q / sqrt(d), and dv for kColumns = 64
//   kValue  owns k, goes over q and grad:          dv = P^T grad
// kKey and kValue compute the transposed products, so that what they own is always in rows.
#pragma once

#include <cmath>
#include <cstdint>

#include "ops/qkv_attention_mma.cuh"
#include "ops/qkv_attention_shared.cuh"
#include "simt/simt.h"

namespace adm_rt {

// Rows of [batch, heads, num_queries] that a block of the first launch takes.
constexpr int kQkvDeltaRows = 32;

// Grid: blocks of queries, heads, images.
template <class T>
ADM_RT_KERNEL_BOUNDS(kQkvThreads, 1)
qkv_attention_delta_kernel(const ADM_RT_GRID_CONSTANT QkvBackwardArgs args) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  const QkvGeometry& g = args.geometry;
  const auto grad = qkv_out<const T>(g, args.grad);
  const auto out = qkv_out<const T>(g, args.out);
  float* const delta = args.delta + qkv_head_index(g) * g.num_queries;
  const int thread = static_cast<int>(simt::thread_x());
  const int first = static_cast<int>(simt::block_x()) * kQkvDeltaRows;
  simt::wait_for_previous_kernel();
  // Eight lanes to a row where the row lies together, else four.
  const int lanes = g.wide ? 8 : 4;
  for (int row = first + thread / lanes; row - thread / lanes < first + kQkvDeltaRows;
       row += kQkvThreads / lanes) {
    float sum = 0;
    if (row < g.num_queries && g.wide) {
      for (int i = thread % 8 * kChunk; i < g.head_dim; i += 8 * kChunk) {
        float a[kChunk], b[kChunk];
        simt::unpack<T>(simt::load16(grad.data + row * grad.token + i), a);
        simt::unpack<T>(simt::load16(out.data + row * out.token + i), b);
        ADM_RT_UNROLL for (int e = 0; e < kChunk; ++e) sum = simt::fma_rn(a[e], b[e], sum);
      }
    } else if (row < g.num_queries) {
      for (int i = thread % 4; i < g.head_dim; i += 4) {
        sum = simt::fma_rn(simt::to_float(grad.data[row * grad.token + i * grad.channel]),
                           simt::to_float(out.data[row * out.token + i * out.channel]), sum);
      }
    }
    for (int mask = 1; mask < lanes; mask *= 2) sum += simt::shuffle_xor(sum, mask);
    if (row < g.num_queries && thread % lanes == 0) delta[row] = sum;
  }
  simt::allow_next_kernel();
}

// What the backward pass knows of one query. A query that is none has probabilities of zero.
struct QkvQueryStats {
  float highest, inverse_sum, delta;
};

ADM_RT_DEVICE QkvQueryStats qkv_query_stats(const QkvBackwardArgs& args, int query) {
  const QkvGeometry& g = args.geometry;
  if (query >= g.num_queries) return {INFINITY, 0, 0};
  const int64_t head = qkv_head_index(g);
  const float* const stats = args.stats + head * 2 * g.num_queries;
  return {stats[query], simt::div_rn(1.0f, stats[g.num_queries + query]),
          args.delta[head * g.num_queries + query]};
}

template <class T, int kColumns>
struct QkvBackward {
  static constexpr int kRowsPerWarp = 16;
  static constexpr int kRows = kRowsPerWarp * kQkvWarps;  // that a block owns
  // Of the other side, in a stage: what fits into the 99 KiB that sm_86, 89 and 120 have.
  static constexpr int kOther = kColumns == 64 ? 64 : kColumns == 256 ? 16 : 32;
  static constexpr bool kKeyAndValue = kColumns == 64;  // the accumulators of both fit
  static constexpr int kRoles = kKeyAndValue ? 2 : 3;
  using Tile = QkvTile<T, kColumns>;

  static constexpr size_t shared_size() {
    return 2 * simt::shared_bytes<T>(kRows * Tile::kStride) +
           2 * QkvRing<T, kColumns, kOther>::shared_size() +
           simt::shared_bytes<QkvQueryStats>(2 * kOther);
  }
};

// Grid: blocks of rows times roles, heads, images.
template <class T, int kColumns>
ADM_RT_KERNEL_BOUNDS(kQkvThreads, 1)
qkv_attention_backward_kernel(const ADM_RT_GRID_CONSTANT QkvBackwardArgs args) {
  using Config = QkvBackward<T, kColumns>;
  using Tile = typename Config::Tile;
  constexpr int kOther = Config::kOther;
  const QkvGeometry& g = args.geometry;
  simt::SharedArena shared;
  const Tile own_a{shared.take<T>(Config::kRows * Tile::kStride)};
  const Tile own_b{shared.take<T>(Config::kRows * Tile::kStride)};
  const QkvRing<T, kColumns, kOther> a(shared), b(shared);
  QkvQueryStats* const stats = shared.take<QkvQueryStats>(2 * kOther);  // of the queries in a, b

  const int blocks = static_cast<int>(simt::blocks_x()) / Config::kRoles;
  const auto role = static_cast<QkvPart>(static_cast<int>(simt::block_x()) / blocks);
  const bool by_query = role == QkvPart::kQuery;
  const int first_row = static_cast<int>(simt::block_x()) % blocks * Config::kRows;
  const int thread = static_cast<int>(simt::thread_x()), lane = static_cast<int>(simt::lane());
  const int warp_row = static_cast<int>(simt::warp()) * Config::kRowsPerWarp;

  const auto q = qkv_part<const T>(g, args.qkv, QkvPart::kQuery);
  const auto k = qkv_part<const T>(g, args.qkv, QkvPart::kKey);
  const auto v = qkv_part<const T>(g, args.qkv, QkvPart::kValue);
  const auto grad = qkv_out<const T>(g, args.grad);
  const auto from_a = choose(by_query, k, q);
  const auto from_b = choose(by_query, v, grad);
  const int own_rows = by_query ? g.num_queries : g.length;
  const bool active = first_row + warp_row < own_rows;
  // Blocks of positions that did not ask have nothing to sum up: their dq is zero.
  const int tiles = first_row < own_rows ? (from_a.rows + kOther - 1) / kOther : 0;

  simt::wait_for_previous_kernel();
  QkvQueryStats next{};  // of query `thread` of the tile that is being loaded
  if (tiles > 0) {
    load_tile<Config::kRows>(own_a, choose(by_query, q, k), first_row, g.wide);
    load_tile<Config::kRows>(own_b, choose(by_query, grad, v), first_row, g.wide);
    load_tile<kOther>(a.stage(0), from_a, 0, g.wide);
    load_tile<kOther>(b.stage(0), from_b, 0, g.wide);
    if (!by_query && thread < kOther) stats[thread] = qkv_query_stats(args, thread);
  }
  simt::cp_async_commit();
  QkvQueryStats own[2] = {};  // of this lane's rows, if they are queries
  if (by_query) {
    ADM_RT_UNROLL for (int i = 0; i < 2; ++i) {
      own[i] = qkv_query_stats(args, first_row + warp_row + 8 * i + lane / 4);
    }
  }

  float sum[1][kColumns / 8][4] = {};
  [[maybe_unused]] float sum_v[1][kColumns / 8][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % 2;
    simt::cp_async_wait<0>();
    simt::sync_block();
    const bool more = tile + 1 < tiles;
    if (more) {
      load_tile<kOther>(a.stage(1 - stage), from_a, (tile + 1) * kOther, g.wide);
      load_tile<kOther>(b.stage(1 - stage), from_b, (tile + 1) * kOther, g.wide);
      if (!by_query && thread < kOther) {
        next = qkv_query_stats(args, (tile + 1) * kOther + thread);
      }
    }
    simt::cp_async_commit();
    if (active) {
      float p[1][kOther / 8][4] = {}, ds[1][kOther / 8][4] = {};
      multiply_transposed(p, own_a, warp_row, a.stage(stage));
      if (role != QkvPart::kValue) multiply_transposed(ds, own_b, warp_row, b.stage(stage));
      const auto finish = [&](int n, int e, const QkvQueryStats& query, bool valid) {
        const float power = simt::fma_rn(p[0][n][e], g.logit_scale2, -query.highest);
        p[0][n][e] = valid ? simt::exp2_approx(power) * query.inverse_sum : 0;
        ds[0][n][e] = p[0][n][e] * (role == QkvPart::kValue ? 1 : ds[0][n][e] - query.delta);
      };
      ADM_RT_UNROLL for (int n = 0; n < kOther / 8; ++n) {
        const int column = 8 * n + 2 * (lane % 4);
        if (by_query) {
          const int keys = g.length - tile * kOther - column;
          ADM_RT_UNROLL for (int e = 0; e < 4; ++e) finish(n, e, own[e / 2], e % 2 < keys);
        } else {
          const QkvQueryStats* const query = stats + stage * kOther + column;
          ADM_RT_UNROLL for (int e = 0; e < 4; ++e) finish(n, e, query[e % 2], true);
        }
      }
      multiply_accumulators(sum, ds, role == QkvPart::kValue ? b.stage(stage) : a.stage(stage));
      if constexpr (Config::kKeyAndValue) {
        if (!by_query) multiply_accumulators(sum_v, p, b.stage(stage));
      }
    }
    if (more && !by_query && thread < kOther) stats[(1 - stage) * kOther + thread] = next;
  }

  simt::allow_next_kernel();
  if (first_row + warp_row >= g.length) return;
  const auto target = [&](QkvPart part) {
    auto matrix = qkv_part<T>(g, args.dqkv, part);
    matrix.rows = g.length;  // positions that did not ask get zeros
    return matrix;
  };
  store_accumulators(sum, role == QkvPart::kValue ? 1.0f : g.logit_scale, own_a, warp_row,
                     target(role), first_row, g.wide);
  if constexpr (Config::kKeyAndValue) {
    if (!by_query) {
      store_accumulators(sum_v, 1.0f, own_b, warp_row, target(QkvPart::kValue), first_row, g.wide);
    }
  }
}

}  // namespace adm_rt
