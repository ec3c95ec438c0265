// What the kernels of qkv_attention share: where a head's rows lie, and tiles of them in shared
// memory. A row is a token, a column one of the head's channels.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "ops/qkv_attention_cuda.h"
#include "simt/simt.h"

namespace adm_rt {

constexpr int kQkvThreads = 128;
constexpr int kQkvWarps = kQkvThreads / 32;

// Distances in elements; token or channel is 1.
struct QkvStrides {
  int64_t batch = 0;
  int token = 0, channel = 0;
};

struct QkvGeometry {
  int heads = 0, head_dim = 0, length = 0, num_queries = 0;
  int head_step = 0;       // channels from one head's q to the next head's
  int part_step = 0;       // channels from q to k, and from k to v
  QkvStrides qkv, out;     // out: of the gradient of out, too
  float logit_scale = 0;   // 1 / sqrt(head_dim)
  float logit_scale2 = 0;  // log2(e) / sqrt(head_dim): probabilities are powers of two
  bool wide = false;       // 16-byte accesses are possible everywhere
};

struct QkvForwardArgs {
  QkvGeometry geometry;
  const void* qkv = nullptr;
  void* out = nullptr;
  float* stats = nullptr;  // or null
};

struct QkvBackwardArgs {
  QkvGeometry geometry;
  const void* grad = nullptr;
  const void* qkv = nullptr;
  const void* out = nullptr;
  const float* stats = nullptr;
  float* delta = nullptr;  // [batch, heads, num_queries]: sum over channels of grad * out
  void* dqkv = nullptr;
};

inline QkvGeometry qkv_geometry(const QkvAttentionShape& s, QkvLayout layout) {
  const int64_t width = s.heads * s.head_dim;
  const auto strides = [&](int64_t channels, int64_t tokens) {
    const bool token_major = layout == QkvLayout::kTokenMajor;
    return QkvStrides{channels * tokens, static_cast<int>(token_major ? channels : 1),
                      static_cast<int>(token_major ? 1 : tokens)};
  };
  QkvGeometry g;
  g.heads = static_cast<int>(s.heads), g.head_dim = static_cast<int>(s.head_dim);
  g.length = static_cast<int>(s.length), g.num_queries = static_cast<int>(s.num_queries);
  const bool legacy = s.order == QkvOrder::kLegacy;
  g.head_step = static_cast<int>(legacy ? 3 * s.head_dim : s.head_dim);
  g.part_step = static_cast<int>(legacy ? s.head_dim : width);
  g.qkv = strides(3 * width, s.length);
  g.out = strides(width, s.num_queries);
  g.logit_scale = static_cast<float>(1 / std::sqrt(static_cast<double>(s.head_dim)));
  g.logit_scale2 =
      static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(s.head_dim)));
  return g;
}

// One head's q, k, v, out or a gradient of them, for this block's head (y) and image (z).
template <class T>
struct QkvMatrix {
  T* data;
  int token, channel;  // strides
  int rows, columns;   // there are no others
};

template <class T>
ADM_RT_DEVICE QkvMatrix<T> choose(bool first, const QkvMatrix<T>& a, const QkvMatrix<T>& b) {
  return {first ? a.data : b.data, first ? a.token : b.token, first ? a.channel : b.channel,
          first ? a.rows : b.rows, a.columns};  // a choice between structs would be made in memory
}

enum class QkvPart : int { kQuery = 0, kKey = 1, kValue = 2 };

template <class T, class Pointer>
ADM_RT_DEVICE QkvMatrix<T> qkv_part(const QkvGeometry& g, Pointer qkv, QkvPart part) {
  const int channel =
      static_cast<int>(simt::block_y()) * g.head_step + static_cast<int>(part) * g.part_step;
  const int64_t offset =
      simt::block_z() * g.qkv.batch + static_cast<int64_t>(channel) * g.qkv.channel;
  const int rows = part == QkvPart::kQuery ? g.num_queries : g.length;
  return {static_cast<T*>(qkv) + offset, g.qkv.token, g.qkv.channel, rows, g.head_dim};
}

template <class T, class Pointer>
ADM_RT_DEVICE QkvMatrix<T> qkv_out(const QkvGeometry& g, Pointer out) {
  const int channel = static_cast<int>(simt::block_y()) * g.head_dim;
  const int64_t offset =
      simt::block_z() * g.out.batch + static_cast<int64_t>(channel) * g.out.channel;
  return {static_cast<T*>(out) + offset, g.out.token, g.out.channel, g.num_queries, g.head_dim};
}

// Of this block's head and image: which of [batch, heads].
ADM_RT_DEVICE int64_t qkv_head_index(const QkvGeometry& g) {
  return static_cast<int64_t>(simt::block_z()) * g.heads + simt::block_y();
}

// A tile of kRows rows of kColumns columns in shared memory. 16-bit tiles are what ldmatrix reads:
// the number of each chunk of 8 columns is XORed with its row's, so that eight rows of one column
// of chunks lie in different banks. Tiles of float have 4 floats after each row, to the same end.
template <class T, int kColumns>
struct QkvTile {
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements of 16 bytes
  static constexpr int kChunks = kColumns / kChunk;                // of a row
  static constexpr int kStride = sizeof(T) == 4 ? kColumns + 4 : kColumns;
  static_assert(sizeof(T) == 4 || kChunks % 8 == 0);

  T* data;

  ADM_RT_DEVICE T* chunk(int row, int chunk) const {
    if constexpr (sizeof(T) == 4) {
      return data + row * kStride + chunk * kChunk;
    } else {
      return data + row * kStride + (chunk ^ (row & 7)) * kChunk;
    }
  }
  ADM_RT_DEVICE T* at(int row, int column) const {
    return chunk(row, column / kChunk) + column % kChunk;
  }
};

// Two tiles that are loaded and used in turn.
template <class T, int kColumns, int kRows>
struct QkvRing {
  using Tile = QkvTile<T, kColumns>;

  static constexpr size_t shared_size() { return simt::shared_bytes<T>(2 * kRows * Tile::kStride); }

  ADM_RT_DEVICE explicit QkvRing(simt::SharedArena& shared)
      : data(shared.take<T>(2 * kRows * Tile::kStride)) {}
  ADM_RT_DEVICE Tile stage(int index) const { return {data + index * kRows * Tile::kStride}; }

  T* data;
};

// Loads rows first_row.. of the matrix, zeros where it has none, with all threads of the block. It
// has arrived after cp_async_wait and a barrier.
template <int kRows, class T, int kColumns>
ADM_RT_DEVICE void load_tile(const QkvTile<T, kColumns>& tile, const QkvMatrix<const T>& m,
                             int first_row, bool wide) {
  using Tile = QkvTile<T, kColumns>;
  const int thread = static_cast<int>(simt::thread_x());
  if (wide) {
    static_assert(kRows * Tile::kChunks % kQkvThreads == 0);
    ADM_RT_UNROLL_BY(4) for (int i = 0; i < kRows * Tile::kChunks / kQkvThreads; ++i) {
      const int index = i * kQkvThreads + thread;
      const int row = index / Tile::kChunks, chunk = index % Tile::kChunks;
      const bool valid = first_row + row < m.rows && chunk * Tile::kChunk < m.columns;
      const T* from = m.data;  // an address that may be read, whatever becomes of it
      if (valid) from += (first_row + row) * m.token + chunk * Tile::kChunk;
      simt::cp_async16(tile.chunk(row, chunk), from, valid);
    }
    return;
  }
  const bool token_major = m.channel == 1;
  ADM_RT_UNROLL_BY(1) for (int index = thread; index < kRows * kColumns; index += kQkvThreads) {
    const int row = token_major ? index / kColumns : index % kRows;
    const int column = token_major ? index % kColumns : index / kRows;
    T value{};
    if (first_row + row < m.rows && column < m.columns) {
      value = m.data[(first_row + row) * m.token + column * m.channel];
    }
    *tile.at(row, column) = value;
  }
}

// Stores rows [row, row + count) of the tile as rows first_row + row.. of the matrix, as far as it
// has them, with the threads first_thread, first_thread + threads...
template <class T, int kColumns>
ADM_RT_DEVICE void store_tile(const QkvTile<T, kColumns>& tile, int row, int count,
                              const QkvMatrix<T>& m, int first_row, bool wide, int thread,
                              int threads) {
  using Tile = QkvTile<T, kColumns>;
  if (wide) {
    ADM_RT_UNROLL_BY(4) for (int index = thread; index < count * Tile::kChunks; index += threads) {
      const int r = row + index / Tile::kChunks, chunk = index % Tile::kChunks;
      if (first_row + r < m.rows && chunk * Tile::kChunk < m.columns) {
        simt::store16(m.data + (first_row + r) * m.token + chunk * Tile::kChunk,
                      simt::load16(tile.chunk(r, chunk)));
      }
    }
    return;
  }
  const bool token_major = m.channel == 1;
  ADM_RT_UNROLL_BY(1) for (int index = thread; index < count * kColumns; index += threads) {
    const int r = row + (token_major ? index / kColumns : index % count);
    const int column = token_major ? index % kColumns : index / count;
    if (first_row + r < m.rows && column < m.columns) {
      m.data[(first_row + r) * m.token + column * m.channel] = *tile.at(r, column);
    }
  }
}

}  // namespace adm_rt
