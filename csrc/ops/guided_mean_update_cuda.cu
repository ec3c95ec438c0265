// Instantiations and launch of guided_mean_update on CUDA.
#include <algorithm>

#include "ops/guided_mean_update.cuh"
#include "ops/guided_mean_update_check.h"
#include "ops/guided_mean_update_cuda.h"
#include "simt/launch.h"

namespace adm_rt {

namespace {

template <UpdatePass kPass>
void launch(const GuidedMeanUpdateParams& p, const StepTable& table, const float* limits,
            void* stream) {
  const int64_t groups = (p.channels * p.pixels + 3) / 4;
  const int64_t blocks = (groups + kUpdateThreads - 1) / kUpdateThreads;
  simt::Launch shape = {"guided_mean_update"};
  shape.blocks_x = static_cast<unsigned>(std::min<int64_t>(blocks, 65535));
  shape.blocks_y = static_cast<unsigned>(p.images);
  shape.threads = kUpdateThreads;
  if (vectorizable(p)) {
    simt::launch<guided_mean_update_kernel<kPass, true>>(shape, stream, p, table, limits);
  } else {
    simt::launch<guided_mean_update_kernel<kPass, false>>(shape, stream, p, table, limits);
  }
}

}  // namespace

void guided_mean_update_cuda(const GuidedMeanUpdateParams& params, const float* table,
                             const uint32_t* step_counter, float* limits, void* stream) {
  check_guided_mean_update(params);
  const int64_t size = params.channels * params.pixels;
  ADM_RT_CHECK(params.images <= 65535, "guided_mean_update: a batch of ", params.images,
               " images; CUDA takes at most 65535");
  ADM_RT_CHECK(size < (int64_t{1} << 31), "guided_mean_update: an image of ", size,
               " elements; CUDA takes fewer than 2^31");
  ADM_RT_CHECK((table == nullptr) == (step_counter == nullptr),
               "guided_mean_update: table and step_counter come together");
  if (params.images == 0) return;
  const StepTable steps = {reinterpret_cast<const StepCoefficients*>(table), step_counter};
  if (params.clip != Clip::kDynamic) {
    return launch<UpdatePass::kWhole>(params, steps, nullptr, stream);
  }
  ADM_RT_CHECK(limits != nullptr, "guided_mean_update: dynamic clipping needs limits [images]");
  const QuantileRank rank = quantile_rank(params.quantile, size);
  simt::Launch select = {"guided_mean_update"};
  select.blocks_x = static_cast<unsigned>(params.images);
  select.threads = kSelectThreads;
  select.shared_bytes = kSelectSharedBytes;
  launch<UpdatePass::kPredict>(params, steps, nullptr, stream);
  simt::launch<guided_mean_update_select_kernel>(select, stream, params.x0, size,
                                                 static_cast<uint32_t>(rank.low),
                                                 rank.high > rank.low, rank.fraction, limits);
  launch<UpdatePass::kFinish>(params, steps, limits, stream);
}

}  // namespace adm_rt
