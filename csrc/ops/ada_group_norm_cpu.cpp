// ada_group_norm on the CPU: argument checks, threads, choice of the instruction set, and the small
// joins between the passes of the kernels (in double, in a fixed order).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/check.h"
#include "common/cpu_isa.h"
#include "common/thread_pool.h"
#include "ops/ada_group_norm.h"
#include "ops/ada_group_norm_kernels.h"

namespace adm_rt {
namespace {

// Work below this many values is not worth waking another thread.
constexpr int64_t kGrainValues = 8192;
// Values per block of rows: 64 KiB of floats, read twice from the second-level cache.
constexpr int64_t kRowBlockValues = 16384;

int64_t grain_of(int64_t values_per_task) {
  return std::max<int64_t>(1, kGrainValues / std::max<int64_t>(1, values_per_task));
}

template <typename Params>
void check_shape(const Params& p) {
  ADM_RT_CHECK(p.batch >= 0, "batch is ", p.batch, "; it must not be negative");
  ADM_RT_CHECK(p.channels > 0, "channels is ", p.channels, "; it must be positive");
  ADM_RT_CHECK(p.spatial > 0, "the number of pixels is ", p.spatial, "; it must be positive");
  ADM_RT_CHECK(p.groups > 0 && p.channels % p.groups == 0, "groups is ", p.groups,
               ", which does not divide the ", p.channels, " channels");
  ADM_RT_CHECK(p.dtype == DType::kFloat32 || p.dtype == DType::kBFloat16, "dtype is ",
               name_of(p.dtype), "; the CPU kernels take float32 and bfloat16");
  ADM_RT_CHECK(p.weight != nullptr && p.bias != nullptr, "weight and bias must be given");
  ADM_RT_CHECK(p.scale_shift == nullptr || p.scale_shift_stride >= 2 * p.channels,
               "scale_shift_stride is ", p.scale_shift_stride, "; rows hold ", 2 * p.channels,
               " values");
  ADM_RT_CHECK(p.x != nullptr || p.batch == 0, "x is null");
}

// One pixel per channel is the same memory in both layouts; the row kernels fill their vectors.
template <typename Params>
bool runs_as_planes(const Params& p) {
  return p.layout == AdaGroupNormLayout::kChannelsFirst && p.spatial > 1;
}

template <typename Params>
AdaGroupNormRows cut_rows(const Params& p) {
  AdaGroupNormRows rows;
  rows.rows_per_block = std::clamp<int64_t>(kRowBlockValues / p.channels, 1, p.spatial);
  rows.blocks = (p.spatial + rows.rows_per_block - 1) / rows.rows_per_block;
  return rows;
}

// weight and bias of one channel with the modulation folded in: v = xhat * weight + bias.
template <typename Params>
void fold_modulation(const Params& p, int64_t image, int64_t channel, double* weight,
                     double* bias) {
  *weight = p.weight[channel];
  *bias = p.bias[channel];
  if (p.scale_shift == nullptr) return;
  const float* row = p.scale_shift + image * p.scale_shift_stride;
  const double scale = 1.0 + row[channel];
  *weight *= scale;
  *bias = *bias * scale + row[p.channels + channel];
}

// Three float arrays of [count] in one allocation.
struct Triple {
  explicit Triple(int64_t count) : values(static_cast<size_t>(3 * count)), count_(count) {}
  float* operator[](int index) { return values.data() + index * count_; }
  std::vector<float> values;
  int64_t count_;
};

// Joins the blocks of one (image, group) and writes its channels' affine maps.
void finish_group(const AdaGroupNormParams& p, const AdaGroupNormRows& rows, Triple& blocks,
                  const AdaGroupNormAffine& affine, int64_t task) {
  const int64_t image = task / p.groups;
  const int64_t group_channels = p.channels / p.groups;
  const int64_t channel0 = task % p.groups * group_channels;
  const double count = static_cast<double>(group_channels * p.spatial);
  double total = 0.0;
  for (int64_t b = 0; b < rows.blocks; ++b) {
    const double height =
        static_cast<double>(std::min(rows.rows_per_block, p.spatial - b * rows.rows_per_block));
    const int64_t at = (image * rows.blocks + b) * p.channels + channel0;
    for (int64_t c = 0; c < group_channels; ++c) {
      total += static_cast<double>(blocks[0][at + c]) * height + blocks[1][at + c];
    }
  }
  const double mean = total / count;
  double square = 0.0;
  for (int64_t b = 0; b < rows.blocks; ++b) {
    const double height =
        static_cast<double>(std::min(rows.rows_per_block, p.spatial - b * rows.rows_per_block));
    const int64_t at = (image * rows.blocks + b) * p.channels + channel0;
    for (int64_t c = 0; c < group_channels; ++c) {
      // sum (x - mean)^2 = sum d^2 + 2 step sum d + height step^2 with d = x - pilot.
      const double step = static_cast<double>(blocks[0][at + c]) - mean;
      square += blocks[2][at + c] + step * (2.0 * blocks[1][at + c] + height * step);
    }
  }
  const double rstd = 1.0 / std::sqrt(std::max(square, 0.0) / count + static_cast<double>(p.eps));
  const float center = static_cast<float>(mean);
  const double rest = mean - static_cast<double>(center);
  if (p.mean != nullptr) p.mean[task] = center;
  if (p.rstd != nullptr) p.rstd[task] = static_cast<float>(rstd);
  for (int64_t c = 0; c < group_channels; ++c) {
    double weight, bias;
    fold_modulation(p, image, channel0 + c, &weight, &bias);
    const int64_t at = image * p.channels + channel0 + c;
    affine.center[at] = center;
    affine.slope[at] = static_cast<float>(rstd * weight);
    affine.offset[at] = static_cast<float>(bias - rest * rstd * weight);
  }
}

void forward_rows(const AdaGroupNormParams& p) {
  const AdaGroupNormRows rows = cut_rows(p);
  const int64_t tasks = p.batch * rows.blocks;
  const int64_t grain = grain_of(rows.rows_per_block * p.channels);
  Triple blocks(tasks * p.channels);
  parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
    ADM_RT_DISPATCH(
        ada_group_norm_rows_moments(p, rows, blocks[0], blocks[1], blocks[2], begin, end));
  });
  Triple maps(p.batch * p.channels);
  const AdaGroupNormAffine affine = {maps[0], maps[1], maps[2]};
  for (int64_t task = 0; task < p.batch * p.groups; ++task) {
    finish_group(p, rows, blocks, affine, task);
  }
  parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
    ADM_RT_DISPATCH(ada_group_norm_rows_apply(p, rows, affine, begin, end));
  });
}

void backward_rows(const AdaGroupNormBackwardParams& p, const AdaGroupNormSums& sums) {
  const AdaGroupNormRows rows = cut_rows(p);
  const int64_t tasks = p.batch * rows.blocks;
  const int64_t grain = grain_of(rows.rows_per_block * p.channels);
  const int64_t group_channels = p.channels / p.groups;
  Triple maps(p.batch * p.channels), factors(p.batch * p.channels);
  const AdaGroupNormAffine affine = {maps[0], maps[1], maps[2]};
  const AdaGroupNormGradient gradient = {factors[0], factors[1], factors[2]};
  for (int64_t at = 0; at < p.batch * p.channels; ++at) {
    const int64_t image = at / p.channels, channel = at % p.channels;
    const int64_t task = image * p.groups + channel / group_channels;
    double weight, bias;
    fold_modulation(p, image, channel, &weight, &bias);
    affine.center[at] = p.mean[task];
    affine.slope[at] = static_cast<float>(p.rstd[task] * weight);
    affine.offset[at] = static_cast<float>(bias);
    gradient.on_grad[at] = affine.slope[at];
  }
  std::vector<float> block_sums(static_cast<size_t>(2 * tasks * p.channels));
  float* s1 = block_sums.data();
  float* s2 = s1 + tasks * p.channels;
  parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
    ADM_RT_DISPATCH(ada_group_norm_rows_sums(p, rows, affine, s1, s2, begin, end));
  });
  for (int64_t task = 0; task < p.batch * p.groups; ++task) {
    const int64_t image = task / p.groups;
    const int64_t channel0 = task % p.groups * group_channels;
    const double rstd = p.rstd[task];
    const double count = static_cast<double>(group_channels * p.spatial);
    double mean1 = 0.0, mean2 = 0.0;
    for (int64_t channel = channel0; channel < channel0 + group_channels; ++channel) {
      double sum1 = 0.0, sum2 = 0.0;
      for (int64_t b = 0; b < rows.blocks; ++b) {
        const int64_t at = (image * rows.blocks + b) * p.channels + channel;
        sum1 += s1[at];
        sum2 += s2[at];
      }
      const int64_t at = image * p.channels + channel;
      sums.s1[at] = sum1;
      sums.s2[at] = sum2 * rstd;
      double weight, bias;
      fold_modulation(p, image, channel, &weight, &bias);
      mean1 += weight * sum1;
      mean2 += weight * sums.s2[at];
    }
    for (int64_t channel = channel0; channel < channel0 + group_channels; ++channel) {
      const int64_t at = image * p.channels + channel;
      gradient.on_x[at] = static_cast<float>(-rstd * rstd * mean2 / count);
      gradient.constant[at] = static_cast<float>(-rstd * mean1 / count);
    }
  }
  if (p.dx == nullptr) return;
  parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
    ADM_RT_DISPATCH(ada_group_norm_rows_backward(p, rows, affine, gradient, begin, end));
  });
}

void parameter_gradients(const AdaGroupNormBackwardParams& p, const AdaGroupNormSums& sums) {
  for (int64_t channel = 0; channel < p.channels; ++channel) {
    double weight_sum = 0.0, bias_sum = 0.0;
    for (int64_t image = 0; image < p.batch; ++image) {
      const int64_t at = image * p.channels + channel;
      const double scale =
          p.scale_shift == nullptr
              ? 1.0
              : 1.0 + static_cast<double>(p.scale_shift[image * p.scale_shift_stride + channel]);
      weight_sum += scale * sums.s2[at];
      bias_sum += scale * sums.s1[at];
      if (p.dscale_shift != nullptr) {
        float* row = p.dscale_shift + image * 2 * p.channels;
        row[channel] =
            static_cast<float>(p.weight[channel] * sums.s2[at] + p.bias[channel] * sums.s1[at]);
        row[p.channels + channel] = static_cast<float>(sums.s1[at]);
      }
    }
    if (p.dweight != nullptr) p.dweight[channel] = static_cast<float>(weight_sum);
    if (p.dbias != nullptr) p.dbias[channel] = static_cast<float>(bias_sum);
  }
}

}  // namespace

void ada_group_norm_cpu(const AdaGroupNormParams& p) {
  check_shape(p);
  ADM_RT_CHECK(p.eps >= 0, "eps is ", p.eps, "; it must not be negative");
  if (p.batch == 0) return;
  ADM_RT_CHECK(p.y != nullptr, "y is null");
  if (!runs_as_planes(p)) return forward_rows(p);
  const int64_t values = p.channels / p.groups * p.spatial;
  parallel_for(p.batch * p.groups, grain_of(values), [&](int64_t begin, int64_t end) {
    ADM_RT_DISPATCH(ada_group_norm_planes(p, begin, end));
  });
}

void ada_group_norm_backward_cpu(const AdaGroupNormBackwardParams& p) {
  check_shape(p);
  ADM_RT_CHECK(p.dscale_shift == nullptr || p.scale_shift != nullptr,
               "dscale_shift is wanted but scale_shift is not given");
  if (p.batch > 0) {
    ADM_RT_CHECK(p.grad != nullptr && p.mean != nullptr && p.rstd != nullptr,
                 "grad, mean and rstd must be given");
  }
  std::vector<double> held(static_cast<size_t>(2 * p.batch * p.channels));
  const AdaGroupNormSums sums = {held.data(), held.data() + p.batch * p.channels};
  if (p.batch > 0 && runs_as_planes(p)) {
    const int64_t values = p.channels / p.groups * p.spatial;
    parallel_for(p.batch * p.groups, grain_of(values), [&](int64_t begin, int64_t end) {
      ADM_RT_DISPATCH(ada_group_norm_planes_backward(p, sums, begin, end));
    });
  } else if (p.batch > 0) {
    backward_rows(p, sums);
  }
  if (p.dweight != nullptr || p.dbias != nullptr || p.dscale_shift != nullptr) {
    parameter_gradients(p, sums);
  }
}

}  // namespace adm_rt
