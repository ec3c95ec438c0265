// How ada_group_norm on CUDA cuts its work: host arithmetic, shared by the launchers and by the
// tests that run the kernels without a GPU. Nothing here depends on the batch or on the device: an
// image is reduced in the same order, so to the same bits, in every batch and on every GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "common/check.h"
#include "ops/ada_group_norm_cuda.h"
#include "simt/simt.h"

namespace adm_rt {

constexpr int kNormThreads = 256;
constexpr int kNormColumns = 64;              // accesses across a slab of channels, at most
constexpr int kNormMergeChannels = 32;        // of a block that merges partial results
constexpr int64_t kNormBlockElements = 8192;  // what a block should have to do at least
constexpr int64_t kNormBlocksPerImage = 512;  // fill a large GPU with one image
constexpr int64_t kNormChannelFirstPixels = 4096;
constexpr int64_t kNormOnChipBytes = 96 * 1024;  // of shared memory; all architectures have 99

// Whether a block reads 16 bytes along the channels, and how many channels these are.
inline int norm_lanes(DType dtype, bool wide) {
  return !wide ? 1 : dtype == DType::kFloat32 ? 4 : 8;
}
inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// How the threads of a block lie over a slab of channels and over pixels: `columns` accesses side
// by side, `rows` pixels at once, consecutive threads on consecutive memory.
struct NormTiling {
  int slabs = 1;
  int columns = 1;
  int rows = 1;
};

inline NormTiling norm_tiling(int64_t channels, int lanes, AdaGroupNormLayout layout) {
  NormTiling tiling;
  const int64_t accesses = channels / lanes;
  if (layout == AdaGroupNormLayout::kChannelsFirst) {  // neighbours are pixels: one channel a block
    tiling.slabs = static_cast<int>(accesses);
  } else {
    tiling.slabs = static_cast<int>((accesses + kNormColumns - 1) / kNormColumns);
    tiling.columns = static_cast<int>((accesses + tiling.slabs - 1) / tiling.slabs);
  }
  tiling.rows = kNormThreads / tiling.columns;
  return tiling;
}

// The pixels of an image in chunks, one block each.
struct NormChunks {
  int count = 1;
  int pixels = 1;  // of a chunk; the last may have fewer
};

inline NormChunks norm_chunks(const AdaGroupNormCudaShape& s) {
  const int64_t pixels = s.height * s.width;
  const int64_t slabs = (s.channels + 8 * kNormColumns - 1) / (8 * kNormColumns);
  const int64_t wanted = pixels * s.channels / (kNormBlockElements * slabs);
  const int64_t count = std::clamp<int64_t>(wanted, 1, kNormBlocksPerImage / slabs);
  int64_t size = (pixels + count - 1) / count;
  if (count > 1) size = (size + 31) / 32 * 32;
  if (s.layout == AdaGroupNormLayout::kChannelsFirst) {
    size = std::max(size, std::min(pixels, kNormChannelFirstPixels));
  }
  return {static_cast<int>((pixels + size - 1) / size), static_cast<int>(size)};
}

// Blocks along the pixels of a kernel that keeps nothing between them, so that their number does
// not show in the result. `resident`: the blocks that run at the same time on the device. Few
// images: as many blocks as run at once, of equal size. Many: several rounds of them, for the last
// is short.
inline unsigned norm_apply_blocks(const NormTiling& tiling, int64_t pixels, int unroll,
                                  int64_t batch, int64_t resident) {
  const int64_t turns = (pixels + tiling.rows * unroll - 1) / (tiling.rows * unroll);
  const int64_t columns = tiling.slabs * batch, share = resident / columns;
  const int64_t length = share >= 8 ? (turns + share - 1) / share
                                    : std::clamp<int64_t>(turns * columns / (4 * resident), 1, 16);
  return static_cast<unsigned>((turns + length - 1) / length);
}

// Threads that hand over their sums at a time while the rows of a block are added up.
inline int norm_reduce_slots(const NormTiling& tiling) {
  return (tiling.rows + 1) / 2 * tiling.columns;
}
// Groups that may have channels in a slab, at most.
inline int64_t norm_slab_groups(int64_t slab_channels, int64_t group_channels) {
  return (slab_channels + group_channels - 1) / group_channels + 1;  // may begin inside one
}

// Whole groups of one image, small enough for one block: the statistics and what uses them need no
// second kernel.
struct NormSlab {
  int channels = 0;  // 0: does not fit
  NormTiling tiling;
  int64_t shared_bytes = 0;  // of the forward kernel
};

inline NormSlab norm_slab(const AdaGroupNormCudaShape& s, bool wide) {
  NormSlab slab;
  if (!wide) return slab;
  const int lanes = norm_lanes(s.dtype, true);
  const int64_t group_channels = s.channels / s.groups, pixels = s.height * s.width;
  const int64_t unit = std::lcm<int64_t>(lanes, group_channels);
  const auto bytes_with = [&](int64_t channels) {
    const NormTiling tiling = norm_tiling(channels, lanes, s.layout);
    const int64_t groups = norm_slab_groups(channels, group_channels);
    return static_cast<int64_t>(
        simt::shared_bytes<simt::Bytes16>(pixels * tiling.columns) +
        simt::shared_bytes<float>((2 * lanes + 1) * norm_reduce_slots(tiling)) +
        2 * simt::shared_bytes<float>(channels) + 2 * simt::shared_bytes<float>(groups));
  };
  int64_t best = 0;  // pieces of 64 bytes are read well, less than 32 badly
  for (int64_t channels = unit; channels <= std::min<int64_t>(s.channels, kNormColumns * lanes);
       channels += unit) {
    if (bytes_with(channels) > kNormOnChipBytes) break;
    best = channels;
    if (channels * size_of(s.dtype) >= 64) break;
  }
  if (best == 0 || (best * size_of(s.dtype) < 32 && best < s.channels)) return slab;
  slab.channels = static_cast<int>(best);
  slab.tiling = norm_tiling(best, lanes, s.layout);
  slab.tiling.slabs = static_cast<int>((s.channels + best - 1) / best);
  slab.shared_bytes = bytes_with(best);
  return slab;
}

// Scratch in floats: moments or sums of every channel, and those of every chunk.
inline int64_t norm_channel_floats(const AdaGroupNormCudaShape& s) {
  return 2 * s.batch * s.channels;
}
inline int64_t norm_workspace_bytes(const AdaGroupNormCudaShape& s) {
  return 4 * norm_channel_floats(s) * (1 + norm_chunks(s).count);
}

inline bool norm_aligned(const void* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0;
}
inline bool norm_wide_shape(const AdaGroupNormCudaShape& s) {
  const int lanes = norm_lanes(s.dtype, true);
  return s.layout == AdaGroupNormLayout::kChannelsLast && s.channels % lanes == 0 &&
         s.skip_channels % lanes == 0;
}

inline void check_norm_shape(const AdaGroupNormCudaShape& s) {
  ADM_RT_CHECK(s.batch >= 0 && s.batch <= 65535, "ada_group_norm: a batch of ", s.batch,
               " images; CUDA takes 0 to 65535");
  ADM_RT_CHECK(s.height > 0 && s.width > 0, "ada_group_norm: the number of pixels is ", s.height,
               " x ", s.width, "; it must be positive");
  ADM_RT_CHECK(s.channels > 0 && s.channels <= 65535, "ada_group_norm: ", s.channels,
               " channels; CUDA takes 1 to 65535");
  ADM_RT_CHECK(s.groups > 0 && s.channels % s.groups == 0, "ada_group_norm: groups=", s.groups,
               " does not divide the ", s.channels, " channels");
  ADM_RT_CHECK(s.skip_channels >= 0 && s.skip_channels < s.channels,
               "ada_group_norm: skip_channels=", s.skip_channels, " of ", s.channels,
               " channels in all; x needs at least one");
  ADM_RT_CHECK(s.eps >= 0, "ada_group_norm: eps=", s.eps, " must not be negative");
  ADM_RT_CHECK(s.resample != Resample::kAveragePool || (s.height % 2 == 0 && s.width % 2 == 0),
               "ada_group_norm: averages of 2x2 pixels need an even height and width, not ",
               s.height, " x ", s.width);
  const int64_t largest = s.resample == Resample::kNearestUp ? 4 : 1;
  ADM_RT_CHECK(largest * s.channels * s.height * s.width < (int64_t{1} << 31),
               "ada_group_norm: an image of ", s.channels, " x ", s.height, " x ", s.width,
               " elements; CUDA takes fewer than 2^31 before and after resampling");
}

}  // namespace adm_rt
