// The microkernels of gemm.h. A tile of C of kMaxRows x 2 vectors stays in registers while k runs;
// per step two vectors of B are loaded and each is multiplied by one broadcast element of every
// row.
//
// The accumulators are named variables: gcc stores the elements of an array back in every step.
#include <cstdint>

#include "common/simd.h"
#include "engine/gemm.h"

namespace adm_rt::ADM_RT_ISA {
namespace {

// With 12 rows of wide vectors, which the registers would hold, the rows' addresses do not fit
// theirs: 5% slower.
#if ADM_RT_ISA_LEVEL == 2
constexpr int kMaxRows = 8;
#elif ADM_RT_ISA_LEVEL == 1
constexpr int kMaxRows = 6;
#else
constexpr int kMaxRows = 2;
#endif
constexpr int kVecs = 2;
constexpr int64_t kPanel = kVecs * Vec::kWidth;
constexpr int64_t kLine = kGemmChunk;  // floats per cache line

// How B is fetched ahead. With many tiles over a panel: now and then, for the next visit, to the
// first-level cache, which two panels of wide vectors do not fit. With few, products wait for B's
// memory: a line every step or two, evenly, to the second-level cache, for which more lines can be
// under way.
constexpr int64_t kFewTiles = ADM_RT_ISA_LEVEL > 0 ? 3 : 0;
constexpr int64_t kFewSteps = ADM_RT_ISA_LEVEL == 2 ? 1 : 2;
constexpr int kFetchTo = ADM_RT_ISA_LEVEL == 2 ? 2 : 3;  // __builtin_prefetch's locality
// From so many rows on there are two tiles: one alone is better left to the hardware's fetching,
// and that gives two thirds of the speed. Narrow vectors need all rows to hide an addition's
// latency.
constexpr int64_t kTwoTiles = ADM_RT_ISA_LEVEL == 2 ? 6 : INT64_MAX;

// Steps of k between two visits of a tile to C, at most. Wide vectors gain a tenth when chains are
// added up between visits, and a wide panel this deep fits the first-level cache together with the
// rows of A. With fewer registers that costs more than it saves: every chain ends in C.
constexpr bool kManyChains = ADM_RT_ISA_LEVEL == 2;
constexpr int64_t kVisitDepth = 192;

// Products per chain. Eager float32 PyTorch, of whose error a network may have twice, errs less
// with wide vectors: there, chains of 256 in the convolutions give whole UNets three times its
// error.
constexpr int64_t kPlainChain = ADM_RT_ISA_LEVEL == 1 ? 192 : 64;
constexpr int64_t kPreciseChain = ADM_RT_ISA_LEVEL == 1 ? 96 : 48;

struct Tile {
  GemmMatrix<const float> a;  // from the first of the rows on
  GemmMatrix<float> c;
  int64_t depth = 0;  // steps
  int64_t chain = 0;  // steps of them that are one chain, a multiple of kLine
  const float* b = nullptr;
  const float* next_a = nullptr;  // the rows of the following tile, prefetched on the way
  const float* next_b = nullptr;  // what follows in B and is this tile's to prefetch
  int64_t next_b_step = 0;        // floats of it per kLine steps, or per kFewSteps
  int64_t columns = 0;            // of C, <= kPanel
  bool accumulate = false;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void keep(Vec sum, float* sums) { sum.store(sums); }

inline Vec read(const float* c, int64_t columns) {
  if (columns >= Vec::kWidth) return Vec::loadu(c);
  return columns > 0 ? Vec::load_partial(c, static_cast<int>(columns)) : Vec::zero();
}

inline void write(Vec sum, float* c, int64_t columns) {
  if (columns >= Vec::kWidth) {
    sum.storeu(c);
  } else if (columns > 0) {
    sum.store_partial(c, static_cast<int>(columns));
  }
}

// All of this is inlined: a call per tile would cost 4%. Instructions beside those of the products
// are few: integer ones take their ports.
//
// One vector per row when the panel's second half is empty. Chains of one visit are added up on
// the stack, while the next one is under way. kNear: the rows of A are kLine apart and need one
// address.
template <int kRows, int kColumns, bool kFew, bool kNear>
[[gnu::always_inline]] inline void compute(const Tile& t) {
  const int64_t a_chunk = t.a.chunk;
  const int64_t second = kPanel > kLine ? t.c.chunk : Vec::kWidth;  // vector of a row of C
  const float* b = t.b;
  const float* next_b = t.next_b;
  const int64_t step = t.next_b_step;
  alignas(64) float sums[kRows * kPanel];
#define ADM_RT_FOR_ROWS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#define ADM_RT_ROW(i)                                                                              \
  [[maybe_unused]] const float* a##i = t.a.data + (i < kRows ? i : 0) * (kNear ? kLine : t.a.row); \
  [[maybe_unused]] Vec c##i##0, c##i##1;
#define ADM_RT_START(i)  \
  c##i##0 = Vec::zero(); \
  c##i##1 = Vec::zero();
#define ADM_RT_STEP(i)                                             \
  if constexpr (i < kRows) {                                       \
    const Vec x = Vec::set1(a##i[k]);                              \
    c##i##0 = mul_add(x, b0, c##i##0);                             \
    if constexpr (kColumns > 1) c##i##1 = mul_add(x, b1, c##i##1); \
  }
#define ADM_RT_STEPS(begin, count)                                                   \
  for (int64_t j = 0; j < count; ++j) {                                              \
    const int64_t k = begin + j;                                                     \
    const Vec b0 = Vec::load(b);                                                     \
    [[maybe_unused]] const Vec b1 = Vec::load(b + (kColumns > 1 ? Vec::kWidth : 0)); \
    b += kPanel;                                                                     \
    ADM_RT_FOR_ROWS(ADM_RT_STEP)                                                     \
  }
#define ADM_RT_PREFETCH(i) \
  if constexpr (i < kRows) __builtin_prefetch(a##i + (ka + to_next));
// A chain onto the sum of those before it.
#define ADM_RT_ADD(i)                                                             \
  if constexpr (i < kRows) {                                                      \
    float* sum = sums + i * kPanel;                                               \
    c##i##0 = Vec::load(sum) + c##i##0;                                           \
    if constexpr (kColumns > 1) c##i##1 = Vec::load(sum + Vec::kWidth) + c##i##1; \
  }
#define ADM_RT_KEEP(i)                                            \
  if constexpr (i < kRows) {                                      \
    float* sum = sums + i * kPanel;                               \
    keep(c##i##0, sum);                                           \
    if constexpr (kColumns > 1) keep(c##i##1, sum + Vec::kWidth); \
  }
// The chain onto what C holds.
#define ADM_RT_READ(i)                                               \
  if constexpr (i < kRows) {                                         \
    const float* c = t.c.data + i * t.c.row;                         \
    c##i##0 = read(c, t.columns) + c##i##0;                          \
    if constexpr (kColumns > 1) {                                    \
      c##i##1 = read(c + second, t.columns - Vec::kWidth) + c##i##1; \
    }                                                                \
  }
#define ADM_RT_WRITE(i)                                                              \
  if constexpr (i < kRows) {                                                         \
    float* c = t.c.data + i * t.c.row;                                               \
    write(c##i##0, c, t.columns);                                                    \
    if constexpr (kColumns > 1) write(c##i##1, c + second, t.columns - Vec::kWidth); \
  }

  ADM_RT_FOR_ROWS(ADM_RT_ROW)
  const int64_t to_next = t.next_a - t.a.data;
  bool first = true;       // chain of this visit
  int64_t k0 = 0, ka = 0;  // step, and where it is in a row of A
  while (true) {
    const int64_t chain_end = !kManyChains || t.depth - k0 < t.chain ? t.depth : k0 + t.chain;
    ADM_RT_FOR_ROWS(ADM_RT_START)
    for (; k0 < chain_end; k0 += kLine, ka += a_chunk) {
      ADM_RT_FOR_ROWS(ADM_RT_PREFETCH)
      if constexpr (!kFew) {
        __builtin_prefetch(next_b, 0, kFetchTo);
        __builtin_prefetch(next_b + kLine, 0, kFetchTo);
        for (int64_t i = 2 * kLine; i < step; i += kLine) {
          __builtin_prefetch(next_b + i, 0, kFetchTo);
        }
        next_b += step;
      }
      const int64_t rest = chain_end - k0;
      if (rest < kLine) {
#pragma GCC unroll 1
        ADM_RT_STEPS(ka, rest)
      } else if constexpr (kFew) {
        for (int64_t k1 = ka; k1 < ka + kLine; k1 += kFewSteps) {
          __builtin_prefetch(next_b, 0, 2);
          next_b += step;
#pragma GCC unroll 2
          ADM_RT_STEPS(k1, kFewSteps)
        }
      } else {
#pragma GCC unroll 8
        ADM_RT_STEPS(ka, kLine)
      }
    }
    k0 = chain_end;
    if (kManyChains && !first) {
      ADM_RT_FOR_ROWS(ADM_RT_ADD)
    } else if (t.accumulate) {
      ADM_RT_FOR_ROWS(ADM_RT_READ)
    }
    if (!kManyChains || k0 >= t.depth) break;
    ADM_RT_FOR_ROWS(ADM_RT_KEEP)
    first = false;
  }
  ADM_RT_FOR_ROWS(ADM_RT_WRITE)
#undef ADM_RT_FOR_ROWS
#undef ADM_RT_ROW
#undef ADM_RT_START
#undef ADM_RT_STEP
#undef ADM_RT_STEPS
#undef ADM_RT_PREFETCH
#undef ADM_RT_ADD
#undef ADM_RT_KEEP
#undef ADM_RT_READ
#undef ADM_RT_WRITE
}

template <int kColumns, bool kFew, bool kNear>
[[gnu::always_inline]] inline void compute_rows(int64_t rows, const Tile& t) {
  switch (rows) {
    case 1:
      return compute<1, kColumns, kFew, kNear>(t);
    case 2:
      return compute<2, kColumns, kFew, kNear>(t);
#if ADM_RT_ISA_LEVEL >= 1
    case 3:
      return compute<3, kColumns, kFew, kNear>(t);
    case 4:
      return compute<4, kColumns, kFew, kNear>(t);
    case 5:
      return compute<5, kColumns, kFew, kNear>(t);
    case 6:
      return compute<6, kColumns, kFew, kNear>(t);
#endif
#if ADM_RT_ISA_LEVEL >= 2
    case 7:
      return compute<7, kColumns, kFew, kNear>(t);
    case 8:
      return compute<8, kColumns, kFew, kNear>(t);
#endif
  }
}

template <int kColumns, bool kFew>
[[gnu::always_inline]] inline void compute_rows(int64_t rows, const Tile& t) {
  t.a.row == kLine ? compute_rows<kColumns, kFew, true>(rows, t)
                   : compute_rows<kColumns, kFew, false>(rows, t);
}

// Row tile of `rows` rows.
[[gnu::always_inline]] inline void compute_tile(int64_t rows, bool few, const Tile& t) {
  const bool whole = t.columns > Vec::kWidth;
  if (few && kFewTiles > 0) {
    whole ? compute_rows<2, true>(rows, t) : compute_rows<1, true>(rows, t);
  } else {
    whole ? compute_rows<2, false>(rows, t) : compute_rows<1, false>(rows, t);
  }
}

}  // namespace

int64_t gemm_panel_width() { return kPanel; }
int64_t gemm_row_block() { return kMaxRows; }

void gemm(int64_t m, int64_t n, int64_t k, GemmMatrix<const float> a, const float* packed_b,
          GemmMatrix<float> c, bool accumulate, GemmChains precision, const float* following) {
  if (m <= 0 || n <= 0) return;
  const int64_t most_chain = precision == GemmChains::kPrecise ? kPreciseChain : kPlainChain;
  // Tiles of nearly equal height: a last tile of one row would run at a fraction of the speed.
  const int64_t tiles = m >= kTwoTiles && m <= kMaxRows ? 2 : ceil_div(m, kMaxRows);
  const int64_t chains = ceil_div(k, most_chain);
  // From a and c: a constructor without them would be a symbol that instruction sets share.
  Tile t{a, c};
  t.chain = ceil_div(k, chains * kLine) * kLine;
  const int64_t together = kManyChains && t.chain < kVisitDepth ? kVisitDepth / t.chain : 1;
  const int64_t visits = ceil_div(chains, together);
  const int64_t depth = ceil_div(chains, visits) * t.chain;
  const bool few = tiles <= kFewTiles;
  const int64_t floats_a = (m - 1) * a.row + (ceil_div(k, kLine) - 1) * a.chunk + kLine;
  const float* following_end = following == nullptr ? nullptr : following + floats_a;
  const int64_t following_step =
      ceil_div(floats_a, ceil_div(n, kPanel) * tiles * visits * kLine) * kLine;
  for (int64_t column = 0; column < n; column += kPanel, packed_b += k * kPanel) {
    t.columns = n - column < kPanel ? n - column : kPanel;
    for (int64_t k0 = 0; k0 < k; k0 += depth) {
      t.depth = k - k0 < depth ? k - k0 : depth;
      t.b = packed_b + k0 * kPanel;
      t.accumulate = accumulate || k0 > 0;
      // As much of B as this visit reads, later than that: the first tiles fetch a share each.
      const int64_t floats = t.depth * kPanel;
      const float* next_b = t.b + floats;
      const int64_t turns = ceil_div(t.depth, few ? kFewSteps : kLine);  // of a tile
      const int64_t even = ceil_div(floats, tiles * turns);
      const int64_t step = few ? even : ceil_div(even, kLine) * kLine;
      const float* a_k0 = a.data + k0 / kLine * a.chunk;
      float* c_column = c.data + column / kLine * c.chunk;
      int64_t row = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t end = m * (tile + 1) / tiles;
        t.a.data = a_k0 + row * a.row;
        // Behind the last rows: the first ones again, for the next block of k or the next panel.
        t.next_a = tile + 1 < tiles ? a_k0 + end * a.row : a.data;
        const bool fetches = tiles > 1 && tile * step * turns < floats;
        t.next_b = fetches ? next_b + tile * step * turns : t.b;
        t.next_b_step = fetches ? step : 0;
        t.c.data = c_column + row * c.row;
        const float* stop =
            following_end - following < following_step ? following_end : following + following_step;
        for (; following < stop; following += kLine) __builtin_prefetch(following, 0, 2);
        compute_tile(end - row, few, t);
        row = end;
      }
    }
  }
}

}  // namespace adm_rt::ADM_RT_ISA
