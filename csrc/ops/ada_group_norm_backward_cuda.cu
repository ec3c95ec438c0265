// Launch of the gradients of ada_group_norm on CUDA.
#include "ops/ada_group_norm_backward.cuh"
#include "ops/ada_group_norm_launch.h"
#include "simt/launch.h"

namespace adm_rt {

namespace {

// dx (and dskip), and the sums of every channel when `sums` is wanted. Whether it filled sums
// itself.
template <class Access>
bool launch_slab(const AdaGroupNormCudaBackwardParams& p, const Access& access,
                 const NormBackwardInputs& in, const NormModulation& modulation, float* sums,
                 void* stream) {
  const AdaGroupNormCudaShape& s = p.shape;
  const NormSlab slab = norm_slab(s, Access::kLanes > 1);
  if (slab.channels == 0 || p.dx == nullptr) return false;
  NormArgs args = norm_args(s, slab.tiling, Access::kLanes);
  simt::Launch launch = norm_launch(slab.tiling, 1, s.batch);
  launch.shared_bytes = simt::shared_bytes<float>(2 * Access::kLanes * args.reduce_slots) +
                        2 * simt::shared_bytes<float>(args.slab_channels) +
                        2 * simt::shared_bytes<float>(args.slab_groups);
  simt::launch<norm_backward_slab_kernel<Access>>(launch, stream, args, access, in, modulation,
                                                  sums, NormPair<void>{p.dx, p.dskip});
  return true;
}

template <class Access>
void run_backward(const AdaGroupNormCudaBackwardParams& p, const Access& access, float* workspace,
                  void* stream) {
  const AdaGroupNormCudaShape& s = p.shape;
  const NormBackwardInputs in = {p.grad, p.grad_x_out, {p.x, p.skip}, p.mean, p.rstd};
  const NormModulation modulation = {p.weight, p.bias, p.scale_shift};
  const bool parameters = p.dweight != nullptr || p.dbias != nullptr || p.dscale_shift != nullptr;
  float* const sums = workspace;
  const NormTiling tiling = norm_tiling(s.channels, Access::kLanes, s.layout);
  const NormArgs args = norm_args(s, tiling, Access::kLanes);

  bool done = false;
  if constexpr (Access::kLanes > 1) {
    done = launch_slab(p, access, in, modulation, parameters ? sums : nullptr, stream);
  }
  if (!done) {
    const NormChunks chunks = norm_chunks(s);
    float* const partial = chunks.count == 1 ? sums : workspace + norm_channel_floats(s);
    simt::Launch launch = norm_launch(tiling, chunks.count, s.batch);
    launch.shared_bytes = simt::shared_bytes<float>(2 * Access::kLanes * args.reduce_slots);
    simt::launch<norm_backward_sums_kernel<Access>>(launch, stream, args, access, in, modulation,
                                                    chunks.pixels, partial);
    if (chunks.count > 1) {
      launch.blocks_x = (2 * args.channels + kNormMergeChannels - 1) / kNormMergeChannels;
      launch.blocks_y = 1;
      launch.shared_bytes = simt::shared_bytes<float>(kNormThreads);
      simt::launch<norm_merge_sums_kernel>(launch, stream, static_cast<const float*>(partial),
                                           chunks.count, args.channels, sums);
    }
  }
  if (!done && p.dx != nullptr) {
    const int64_t resident = kNormBackwardBlocks * simt::multiprocessors("ada_group_norm_backward");
    const int unroll = s.resample == Resample::kNearestUp ? 1 : 2;
    simt::Launch launch = norm_launch(
        tiling, norm_apply_blocks(tiling, args.pixels, unroll, s.batch, resident), s.batch);
    launch.shared_bytes = 2 * simt::shared_bytes<float>(args.slab_groups);
    simt::launch<norm_backward_apply_kernel<Access>>(launch, stream, args, access, in, modulation,
                                                     static_cast<const float*>(sums),
                                                     NormPair<void>{p.dx, p.dskip});
  }
  if (parameters) {
    simt::Launch launch =
        norm_launch({}, (args.channels + kNormParameterThreads - 1) / kNormParameterThreads, 1);
    launch.threads = kNormParameterThreads;
    simt::launch<norm_parameter_gradients_kernel>(launch, stream, args, static_cast<int>(s.batch),
                                                  modulation, static_cast<const float*>(sums),
                                                  p.dweight, p.dbias, p.dscale_shift);
  }
}

}  // namespace

void ada_group_norm_backward_cuda(const AdaGroupNormCudaBackwardParams& p, void* workspace,
                                  void* stream) {
  const AdaGroupNormCudaShape& s = p.shape;
  check_norm_shape(s);
  ADM_RT_CHECK(s.batch == 0 || (p.grad != nullptr && p.x != nullptr && p.mean != nullptr &&
                                p.rstd != nullptr && p.weight != nullptr && p.bias != nullptr),
               "ada_group_norm_backward: grad, x, mean, rstd, weight and bias are required");
  ADM_RT_CHECK(s.batch == 0 || (p.skip != nullptr) == (s.skip_channels > 0),
               "ada_group_norm_backward: skip comes with skip_channels and not without");
  ADM_RT_CHECK(s.skip_channels == 0 || (p.dx != nullptr) == (p.dskip != nullptr),
               "ada_group_norm_backward: dx and dskip are wanted together or not at all");
  if (s.batch == 0) {
    for (float* out : {p.dweight, p.dbias}) {
      if (out != nullptr) {
        simt::fill_zero("ada_group_norm_backward", out, 4 * s.channels, stream);
      }
    }
    return;
  }
  check_norm_workspace(workspace, true);
  const bool wide = norm_wide_shape(s) && norm_aligned(p.grad) && norm_aligned(p.grad_x_out) &&
                    norm_aligned(p.x) && norm_aligned(p.skip) && norm_aligned(p.dx) &&
                    norm_aligned(p.dskip);
  with_norm_access(s.dtype, wide, [&](const auto& access) {
    run_backward(p, access, static_cast<float*>(workspace), stream);
  });
}

int64_t ada_group_norm_backward_cuda_workspace(const AdaGroupNormCudaShape& shape) {
  check_norm_shape(shape);
  return norm_workspace_bytes(shape);
}

}  // namespace adm_rt
