// What the forward and the backward launcher of ada_group_norm on CUDA share.
#pragma once

#include "ops/ada_group_norm_access.cuh"
#include "simt/launch.h"

namespace adm_rt {

inline NormArgs norm_args(const AdaGroupNormCudaShape& s, const NormTiling& tiling, int lanes) {
  NormArgs a;
  const auto as_int = [](int64_t value) { return static_cast<int>(value); };
  a.channels = as_int(s.channels);
  a.x_channels = as_int(s.channels - s.skip_channels);
  a.groups = as_int(s.groups);
  a.group_channels = as_int(s.channels / s.groups);
  a.pixels = as_int(s.height * s.width);
  a.width = as_int(s.width);
  const bool up = s.resample == Resample::kNearestUp;
  const bool down = s.resample == Resample::kAveragePool;
  a.out_pixels = up ? 4 * a.pixels : down ? a.pixels / 4 : a.pixels;
  a.out_width = up ? 2 * a.width : down ? a.width / 2 : a.width;
  a.columns = tiling.columns;
  a.rows = tiling.rows;
  a.slab_channels = tiling.columns * lanes;
  a.reduce_slots = norm_reduce_slots(tiling);
  a.slab_groups = as_int(norm_slab_groups(a.slab_channels, a.group_channels));
  a.eps = s.eps;
  a.silu = s.silu;
  a.channels_last = s.layout == AdaGroupNormLayout::kChannelsLast;
  a.resample = s.resample;
  a.scale_shift_dtype = s.scale_shift_dtype;
  a.scale_shift_stride = s.scale_shift_stride;
  return a;
}

inline simt::Launch norm_launch(const NormTiling& tiling, unsigned blocks_x, int64_t batch) {
  simt::Launch launch;
  launch.name = "ada_group_norm";
  launch.blocks_x = blocks_x;
  launch.blocks_y = static_cast<unsigned>(tiling.slabs);
  launch.blocks_z = static_cast<unsigned>(batch);
  launch.threads = kNormThreads;
  launch.programmatic = true;
  return launch;
}

inline void check_norm_workspace(const void* workspace, bool needed) {
  ADM_RT_CHECK(workspace != nullptr || !needed,
               "ada_group_norm: workspace is null; it needs as many bytes as "
               "ada_group_norm_cuda_workspace says");
  ADM_RT_CHECK(norm_aligned(workspace), "ada_group_norm: workspace is not aligned to 16 bytes");
}

// Calls run(access) with the access that fits.
template <class Run>
void with_norm_access(DType dtype, bool wide, const Run& run) {
  if (!wide) {
    run(NarrowAccess{dtype});
  } else if (dtype == DType::kFloat32) {
    run(WideAccess<float>());
  } else if (dtype == DType::kFloat16) {
    run(WideAccess<simt::Half>());
  } else {
    run(WideAccess<simt::BFloat16>());
  }
}

}  // namespace adm_rt
