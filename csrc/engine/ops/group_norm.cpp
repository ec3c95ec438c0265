// group_norm: what GroupNorm (with AdaGN's modulation, Dhariwal & Nichol 2021, section 3) does to
// each channel, as one affine map a * x + b that the next op applies while it reads x. It sees the
// statistics of the channels and not the pixels, so there is nothing to vectorise.
#include <cmath>
#include <vector>

#include "common/check.h"
#include "engine/op.h"

namespace adm_rt::engine {
namespace {

// Inputs: stats {1, 2, C1} (row 0 the means, row 1 the variances over the pixels), stats2 {1, 2,
// C2}? (of the second half of a concatenation), modulation {1, 1, M}?. Output: affine {1, 2, C1 +
// C2} (row 0 a, row 1 b). Weights: weight, bias [C1 + C2]. Attributes: groups, eps, mode (0: no
// modulation; 1: scale-shift, y = norm * (1 + scale) + shift with scale = modulation[offset :
// offset + C] and shift the next C; 2: modulation[offset : offset + C] is added to x before the
// norm), offset.
class GroupNorm : public Op {
 public:
  explicit GroupNorm(const OpArguments& arguments)
      : stats_(arguments.input("stats")),
        stats2_(arguments.optional_input("stats2")),
        modulation_(arguments.optional_input("modulation")),
        affine_(arguments.output("affine")),
        groups_(arguments.integer("groups")),
        mode_(arguments.integer("mode", 0)),
        offset_(arguments.integer("offset", 0)),
        eps_(arguments.number("eps", 1e-5)) {
    const Shape& first = arguments.input_shape(stats_);
    channels1_ = first.channels;
    channels_ = channels1_;
    check_two_rows("stats", first);
    if (stats2_ >= 0) {
      const Shape& second = arguments.input_shape(stats2_);
      check_two_rows("stats2", second);
      channels_ += second.channels;
    }
    const Shape& affine = arguments.output_shape(affine_);
    check_two_rows("affine", affine);
    ADM_RT_CHECK(affine.channels == channels_, "group_norm: affine has ", affine.channels,
                 " channels, the statistics ", channels_);
    ADM_RT_CHECK(groups_ >= 1 && channels_ % groups_ == 0, "group_norm: groups=", groups_,
                 " does not divide the ", channels_, " channels");
    ADM_RT_CHECK(eps_ > 0, "group_norm: eps=", eps_, " is not positive");
    ADM_RT_CHECK(mode_ >= 0 && mode_ <= 2, "group_norm: mode=", mode_,
                 " is not 0 (none), 1 (scale-shift) or 2 (additive)");
    ADM_RT_CHECK((mode_ != 0) == (modulation_ >= 0), "group_norm: mode=", mode_,
                 modulation_ >= 0 ? " takes no" : " needs the", " input modulation");
    if (mode_ != 0) {
      const Shape& modulation = arguments.input_shape(modulation_);
      modulation_floats_ = modulation.floats();
      const int64_t needed = offset_ + (mode_ == 1 ? 2 : 1) * channels_;
      ADM_RT_CHECK(modulation.pixels() == 1 && offset_ >= 0 && needed <= modulation_floats_,
                   "group_norm: modulation is ", to_string(modulation), ", offset=", offset_,
                   " and ", channels_, " channels in mode ", mode_, " need 1x1x", needed);
    }
    for (const char* name : {"weight", "bias"}) {
      ADM_RT_CHECK(arguments.weight_shape(name) == std::vector<int64_t>{channels_},
                   "group_norm: ", name, " must have the shape [", channels_, "]");
    }
  }

  int64_t packed_floats() const override { return 2 * channels_; }

  void pack(const Weights& weights, float* packed) const override {
    const float* weight = weights.at("weight");
    const float* bias = weights.at("bias");
    for (int64_t c = 0; c < channels_; ++c) {
      packed[c] = weight[c];
      packed[channels_ + c] = bias[c];
    }
  }

  void run(const RunContext& context) const override {
    for (int64_t image = 0; image < context.batch; ++image) run_image(context, image);
  }

 private:
  static void check_two_rows(const char* name, const Shape& shape) {
    ADM_RT_CHECK(shape.height == 1 && shape.width == 2 && shape.channels >= 1, "group_norm: ", name,
                 " is ", to_string(shape), ", not 1x2xC");
  }

  void run_image(const RunContext& context, int64_t image) const {
    const int64_t channels2 = channels_ - channels1_;
    const float* stats1 = context.input(stats_) + image * 2 * channels1_;
    const float* stats2 = stats2_ < 0 ? nullptr : context.input(stats2_) + image * 2 * channels2;
    const float* modulation =
        mode_ == 0 ? nullptr : context.input(modulation_) + image * modulation_floats_ + offset_;
    float* a = context.output(affine_) + image * 2 * channels_;
    float* b = a + channels_;
    // Mean and variance of one channel of what is normalised.
    const auto mean_of = [&](int64_t c) {
      const double mean = c < channels1_ ? stats1[c] : stats2[c - channels1_];
      return mode_ == 2 ? mean + modulation[c] : mean;
    };
    const auto variance_of = [&](int64_t c) -> double {
      return c < channels1_ ? stats1[channels1_ + c] : stats2[channels2 + c - channels1_];
    };
    const int64_t size = channels_ / groups_;
    for (int64_t first = 0; first < channels_; first += size) {
      double mean = 0.0;
      for (int64_t c = first; c < first + size; ++c) mean += mean_of(c);
      mean /= static_cast<double>(size);
      double variance = 0.0;
      for (int64_t c = first; c < first + size; ++c) {
        const double step = mean_of(c) - mean;
        variance += variance_of(c) + step * step;
      }
      const double rstd = 1.0 / std::sqrt(variance / static_cast<double>(size) + eps_);
      for (int64_t c = first; c < first + size; ++c) {
        double slope = rstd * context.packed[c];
        double constant = context.packed[channels_ + c];
        double center = mean;
        if (mode_ == 1) {
          const double scale = 1.0 + modulation[c];
          slope *= scale;
          constant = constant * scale + modulation[channels_ + c];
        }
        if (mode_ == 2) center -= modulation[c];
        a[c] = static_cast<float>(slope);
        b[c] = static_cast<float>(constant - center * slope);
      }
    }
  }

  int stats_, stats2_, modulation_, affine_;
  int64_t groups_, mode_, offset_;
  double eps_;
  int64_t channels1_ = 0;
  int64_t channels_ = 0;
  int64_t modulation_floats_ = 0;
};

ADM_RT_ENGINE_OP("group_norm", GroupNorm);

}  // namespace
}  // namespace adm_rt::engine
