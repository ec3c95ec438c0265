// Checks, dynamic threshold and dispatch of guided_mean_update on the CPU.
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/cpu_isa.h"
#include "common/thread_pool.h"
#include "ops/guided_mean_update.h"
#include "ops/guided_mean_update_check.h"
#include "ops/guided_mean_update_element.h"
#include "ops/guided_mean_update_kernels.h"

namespace adm_rt {

namespace {

constexpr int64_t kChunk = 2048;  // elements per unit of parallel work, a few microseconds
static_assert(kChunk % kUpdateAlignment == 0);
constexpr int64_t kGrain = 4;  // chunks: waking a thread must pay

void run_pass(const GuidedMeanUpdateParams& params, UpdatePass pass, const float* limits) {
  const int64_t size = params.channels * params.pixels;
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  parallel_for(params.images * chunks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {  // neighbouring chunks of an image go in one call
      const int64_t image = i / chunks, first = i % chunks;
      const int64_t last = std::min(chunks, first + end - i);
      const float limit = limits == nullptr ? 1.0f : limits[image];
      ADM_RT_DISPATCH(guided_mean_update_range(params, pass, image, limit, first * kChunk,
                                               std::min(size, last * kChunk)));
      i += last - first;
    }
  });
}

// max(1, quantile of |values|), by selection.
float limit_of(const float* values, int64_t n, double quantile) {
  const QuantileRank rank = quantile_rank(quantile, n);
  const uint32_t one = simt::bits_of(1.0f);
  const auto magnitude = [&](int64_t i) { return simt::bits_of(values[i]) & 0x7fffffffu; };
  int64_t above = 0;
  for (int64_t i = 0; i < n; ++i) above += magnitude(i) > one;
  if (rank.high < n - above) return 1.0f;  // the usual case: nothing to select
  // Only values above 1 matter, unless the quantile lies between the last one below and the first
  // one above.
  const bool all = rank.low < n - above;
  std::vector<uint32_t> keys;
  keys.reserve(static_cast<size_t>(all ? n : above));
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = magnitude(i);
    if (all || key > one) keys.push_back(key);
  }
  const int64_t skipped = n - static_cast<int64_t>(keys.size());
  const auto low = keys.begin() + (rank.low - skipped);
  std::nth_element(keys.begin(), low, keys.end());
  const uint32_t low_key = *low;
  const uint32_t high_key =
      rank.high == rank.low ? low_key : *std::min_element(low + 1, keys.end());
  return dynamic_limit(low_key, high_key, rank.fraction);
}

}  // namespace

void guided_mean_update_cpu(const GuidedMeanUpdateParams& params) {
  check_guided_mean_update(params);
  if (params.images == 0) return;
  if (params.clip != Clip::kDynamic) return run_pass(params, UpdatePass::kWhole, nullptr);
  run_pass(params, UpdatePass::kPredict, nullptr);
  const int64_t size = params.channels * params.pixels;
  std::vector<float> limits(static_cast<size_t>(params.images));
  parallel_for(params.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      limits[image] = limit_of(params.x0 + image * size, size, params.quantile);
    }
  });
  run_pass(params, UpdatePass::kFinish, limits.data());
}

void count_nonfinite_cpu(const float* values, int64_t images, int64_t size, int64_t* counts) {
  ADM_RT_CHECK(images >= 0 && size >= 0, "count_nonfinite: negative shape");
  parallel_for(images, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, size)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   counts[i] = size - ADM_RT_DISPATCH(count_finite(values + i * size, size));
                 }
               });
}

}  // namespace adm_rt
