#include "engine/ops/channel_stats.h"

#include <algorithm>

#include "common/check.h"
#include "common/cpu_isa.h"
#include "common/thread_pool.h"
#include "engine/ops/row_kernels.h"

namespace adm_rt::engine {
namespace {

// Work below this many values is not worth waking another thread.
constexpr int64_t kGrainValues = 32768;

}  // namespace

void check_stats_shape(const OpArguments& arguments, const Shape& stats, const Shape& y) {
  const Shape wanted = {1, 2, y.channels};
  ADM_RT_CHECK(stats == wanted, arguments.op(), ": stats is ", to_string(stats), ", not ",
               to_string(wanted));
}

void write_channel_stats(const float* y, int64_t batch, int64_t pixels, int64_t channels,
                         float* stats) {
  const int64_t blocks = (channels + kMomentChannels - 1) / kMomentChannels;
  const int64_t grain = std::max<int64_t>(1, kGrainValues / (pixels * kMomentChannels));
  parallel_for(batch * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks, first = task % blocks * kMomentChannels;
      const int64_t count = std::min(kMomentChannels, channels - first);
      float* mean = stats + image * 2 * channels + first;
      ADM_RT_DISPATCH(channel_moments(pixels, count, y + image * pixels * channels + first,
                                      channels, mean, mean + channels));
    }
  });
}

}  // namespace adm_rt::engine
