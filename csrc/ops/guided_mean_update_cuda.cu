// Instantiations and launch of guided_mean_update on CUDA.
#include <algorithm>

#include "ops/guided_mean_update.cuh"
#include "ops/guided_mean_update_check.h"
#include "ops/guided_mean_update_cuda.h"
#include "ops/guided_mean_update_select.cuh"
#include "simt/launch.h"

namespace adm_rt {

namespace {

void check_cuda_arguments(const GuidedMeanUpdateParams& p, const GuidedMeanUpdateCuda& cuda) {
  check_guided_mean_update(p, true);
  ADM_RT_CHECK(p.images <= 65535, "guided_mean_update: a batch of ", p.images,
               " images; CUDA takes at most 65535");
  ADM_RT_CHECK(p.channels * p.pixels < (int64_t{1} << 31), "guided_mean_update: an image of ",
               p.channels * p.pixels, " elements; CUDA takes fewer than 2^31");
  ADM_RT_CHECK((cuda.table == nullptr) == (cuda.step_counter == nullptr),
               "guided_mean_update: table and step_counter come together");
  ADM_RT_CHECK(cuda.arrivals == nullptr || cuda.step_counter != nullptr,
               "guided_mean_update: arrivals without a step_counter to advance");
  ADM_RT_CHECK(p.clip != Clip::kDynamic || cuda.limits != nullptr,
               "guided_mean_update: dynamic clipping needs limits [images]");
  ADM_RT_CHECK(!cuda.pixel_major.any() || p.channels <= kPixelMajorChannels,
               "guided_mean_update: pixel-major tensors of ", p.channels, " channels; at most ",
               kPixelMajorChannels, " are supported");
  for (const PixelMajor::Copy& copy : cuda.pixel_major.copies) {
    if (copy.data == nullptr) continue;
    ADM_RT_CHECK(copy.channels >= p.channels, "guided_mean_update: a copy of ", copy.channels,
                 " channels; x has ", p.channels);
    ADM_RT_CHECK(copy.dtype != DType::kFloat32,
                 "guided_mean_update: a copy is float16 or bfloat16; x_next itself is float32");
  }
}

template <UpdatePass kPass>
void launch(const GuidedMeanUpdateParams& p, const PixelMajor& pixel_major, const StepTable& table,
            const float* limits, void* stream) {
  const bool by_pixels = pixel_major.any();
  const int64_t groups = ((by_pixels ? 1 : p.channels) * p.pixels + 3) / 4;
  const int64_t blocks = (groups + kUpdateThreads - 1) / kUpdateThreads;
  simt::Launch shape = {"guided_mean_update"};
  shape.blocks_x = static_cast<unsigned>(std::min<int64_t>(blocks, 65535));
  shape.blocks_y = static_cast<unsigned>(p.images);
  shape.threads = kUpdateThreads;
  const auto run = [&](auto vector, auto pixels) {
    simt::launch<guided_mean_update_kernel<kPass, vector(), pixels()>>(shape, stream, p,
                                                                       pixel_major, table, limits);
  };
  if (vectorizable(p, by_pixels)) {
    by_pixels ? run(std::true_type{}, std::true_type{}) : run(std::true_type{}, std::false_type{});
  } else {
    by_pixels ? run(std::false_type{}, std::true_type{})
              : run(std::false_type{}, std::false_type{});
  }
}

}  // namespace

void guided_mean_update_cuda(const GuidedMeanUpdateParams& params, const GuidedMeanUpdateCuda& cuda,
                             void* stream) {
  check_cuda_arguments(params, cuda);
  if (params.images == 0) return;
  const StepTable steps = {reinterpret_cast<const StepCoefficients*>(cuda.table), cuda.step_counter,
                           cuda.arrivals};
  PixelMajor pixel_major = cuda.pixel_major;
  for (PixelMajor::Copy& copy : pixel_major.copies) {
    copy.dense3 = params.channels == 3 && copy.channels == 3 && aligned(copy.data, copy.dtype);
  }
  if (params.clip != Clip::kDynamic) {
    return launch<UpdatePass::kWhole>(params, pixel_major, steps, nullptr, stream);
  }
  const int64_t size = params.channels * params.pixels;
  const QuantileRank rank = quantile_rank(params.quantile, size);
  simt::Launch select = {"guided_mean_update"};
  select.blocks_x = static_cast<unsigned>(params.images);
  select.threads = kSelectThreads;
  select.shared_bytes = kSelectSharedBytes;
  launch<UpdatePass::kPredict>(params, pixel_major, steps, nullptr, stream);
  simt::launch<guided_mean_update_select_kernel>(select, stream, params.x0, size,
                                                 static_cast<uint32_t>(rank.low),
                                                 rank.high > rank.low, rank.fraction, cuda.limits);
  launch<UpdatePass::kFinish>(params, pixel_major, steps, cuda.limits, stream);
}

}  // namespace adm_rt
