// Launch of ada_group_norm on CUDA: checks, the choice of kernels, their order.
#include "ops/ada_group_norm.cuh"
#include "ops/ada_group_norm_launch.h"
#include "simt/launch.h"

namespace adm_rt {

namespace {

// Finds the moments of the channels [begin, end) of the input, into [batch, 2, channels].
template <class Access>
void launch_moments(const AdaGroupNormCudaShape& s, const Access& access,
                    const NormPair<const void>& input, int begin, int end, float* moments,
                    float* partial, void* stream) {
  const NormTiling tiling = norm_tiling(end - begin, Access::kLanes, s.layout);
  const NormChunks chunks = norm_chunks(s);
  const NormArgs args = norm_args(s, tiling, Access::kLanes);
  simt::Launch launch = norm_launch(tiling, chunks.count, s.batch);
  launch.shared_bytes = simt::shared_bytes<float>((2 * Access::kLanes + 1) * args.reduce_slots);
  simt::launch<norm_moments_kernel<Access>>(launch, stream, args, access, input, begin, end,
                                            chunks.pixels, chunks.count == 1 ? moments : partial);
  if (chunks.count == 1) return;
  launch.blocks_x = (end - begin + kNormMergeChannels - 1) / kNormMergeChannels;
  launch.blocks_y = 1;
  launch.shared_bytes = simt::shared_bytes<float>(kNormThreads);
  simt::launch<norm_merge_moments_kernel>(launch, stream, static_cast<const float*>(partial),
                                          chunks.count, chunks.pixels, args.pixels, args.channels,
                                          begin, end, moments);
}

template <class Access>
void run_forward(const AdaGroupNormCudaParams& p, const Access& access, const NormSlab& slab,
                 float* workspace, void* stream) {
  const AdaGroupNormCudaShape& s = p.shape;
  const NormPair<const void> input = {p.x, p.skip};
  const NormModulation modulation = {p.weight, p.bias, p.scale_shift};
  const NormOutputs out = {p.y, p.x_out, p.mean, p.rstd};
  const bool x_missing = p.x_moments == nullptr;
  const bool skip_missing = s.skip_channels > 0 && p.skip_moments == nullptr;

  if constexpr (Access::kLanes > 1) {
    if (slab.channels > 0 && (x_missing || skip_missing)) {
      NormArgs args = norm_args(s, slab.tiling, Access::kLanes);
      simt::Launch launch = norm_launch(slab.tiling, 1, s.batch);
      launch.shared_bytes = static_cast<size_t>(slab.shared_bytes);
      args.slab_channels = slab.channels;
      simt::launch<norm_on_chip_kernel<Access>>(launch, stream, args, access, input, modulation,
                                                out);
      return;
    }
  }

  const int channels = static_cast<int>(s.channels);
  const int x_channels = static_cast<int>(s.channels - s.skip_channels);
  float* const moments = workspace;
  NormMomentsView view = {p.x_moments, p.skip_moments, x_channels, channels - x_channels};
  if (x_missing || skip_missing) {
    launch_moments(s, access, input, x_missing ? 0 : x_channels,
                   skip_missing ? channels : x_channels, moments,
                   workspace + norm_channel_floats(s), stream);
  }
  if (x_missing) view.x = moments, view.x_row = channels;
  if (skip_missing) view.skip = moments + x_channels, view.skip_row = channels;

  const NormTiling tiling = norm_tiling(s.channels, Access::kLanes, s.layout);
  const NormArgs args = norm_args(s, tiling, Access::kLanes);
  const int64_t resident = kNormApplyBlocks * simt::multiprocessors("ada_group_norm");
  const int unroll = s.resample == Resample::kNone ? kNormUnroll : 1;
  const int64_t pixels = std::min(args.pixels, args.out_pixels);
  simt::Launch launch =
      norm_launch(tiling, norm_apply_blocks(tiling, pixels, unroll, s.batch, resident), s.batch);
  launch.shared_bytes = 2 * simt::shared_bytes<float>(args.slab_groups);
  simt::launch<norm_apply_kernel<Access>>(launch, stream, args, access, input, view, modulation,
                                          out);
}

}  // namespace

void ada_group_norm_cuda(const AdaGroupNormCudaParams& p, void* workspace, void* stream) {
  const AdaGroupNormCudaShape& s = p.shape;
  check_norm_shape(s);
  if (s.batch == 0) return;
  ADM_RT_CHECK(p.x != nullptr && p.weight != nullptr && p.bias != nullptr && p.y != nullptr,
               "ada_group_norm: x, weight, bias and y are required");
  ADM_RT_CHECK((p.skip != nullptr) == (s.skip_channels > 0),
               "ada_group_norm: skip comes with skip_channels and not without; skip_channels is ",
               s.skip_channels);
  const bool wide = norm_wide_shape(s) && norm_aligned(p.x) && norm_aligned(p.skip) &&
                    norm_aligned(p.y) && norm_aligned(p.x_out);
  const NormSlab slab = norm_slab(s, wide);
  const bool moments_missing =
      p.x_moments == nullptr || (p.skip != nullptr && p.skip_moments == nullptr);
  check_norm_workspace(workspace, moments_missing && slab.channels == 0);
  with_norm_access(s.dtype, wide, [&](const auto& access) {
    run_forward(p, access, slab, static_cast<float*>(workspace), stream);
  });
}

int64_t ada_group_norm_cuda_workspace(const AdaGroupNormCudaShape& shape) {
  check_norm_shape(shape);
  return norm_workspace_bytes(shape);
}

void channel_moments_cuda(const AdaGroupNormCudaShape& shape, const void* x, float* moments,
                          void* workspace, void* stream) {
  AdaGroupNormCudaShape s = shape;
  s.groups = 1;
  s.skip_channels = 0;
  s.resample = Resample::kNone;
  check_norm_shape(s);
  if (s.batch == 0) return;
  ADM_RT_CHECK(x != nullptr && moments != nullptr, "channel_moments: x and moments are required");
  check_norm_workspace(workspace, norm_chunks(s).count > 1);
  with_norm_access(s.dtype, norm_wide_shape(s) && norm_aligned(x), [&](const auto& access) {
    launch_moments(s, access, {x, nullptr}, 0, static_cast<int>(s.channels), moments,
                   static_cast<float*>(workspace) + norm_channel_floats(s), stream);
  });
}

}  // namespace adm_rt
