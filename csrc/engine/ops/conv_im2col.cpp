// conv_stem and conv3x3_stride2: 3x3 convolutions with padding 1 for which Winograd does not pay,
// as products of gathered patches (im2col) with packed weights. Few networks have more than one.
#include <algorithm>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/cpu_isa.h"
#include "common/thread_pool.h"
#include "engine/gemm.h"
#include "engine/op.h"
#include "engine/ops/channel_stats.h"
#include "engine/ops/row_kernels.h"
#include "engine/ops/thread_scratch.h"

namespace adm_rt::engine {
namespace {

constexpr int64_t kTaps = 9;
// Floats of gathered patches that stay in the second-level cache: 320 KiB.
constexpr int64_t kBlockFloats = 80 * 1024;
// But at least so many patches, or the weights would be read too often.
constexpr int64_t kLeastRows = 48;

// Inputs: x, x2? {H, W, Ci}, concatenated by channels; with kStride 1 also as planes
// {1, 1, Ci * H * W}. Outputs: y {ceil(H / stride), ceil(W / stride), Co}, stats {1, 2, Co}?.
// Weights: weight [Co, sum Ci, 3, 3], bias [Co]?.
template <int kStride>
class Im2colConvolution : public Op {
 public:
  explicit Im2colConvolution(const OpArguments& arguments)
      : y_(arguments.output("y")),
        stats_(arguments.optional_output("stats")),
        has_bias_(arguments.has_weight("bias")),
        to_(arguments.output_shape(y_)),
        panel_(ADM_RT_DISPATCH(gemm_panel_width())),
        row_block_(ADM_RT_DISPATCH(gemm_row_block())) {
    const std::string& op = arguments.op();
    for (const char* name : {"x", "x2"}) {
      const bool first = sources_.empty();
      const int slot = first ? arguments.input(name) : arguments.optional_input(name);
      if (slot < 0) break;
      add_source(op, name, slot, arguments.input_shape(slot));
    }
    ADM_RT_CHECK(to_.height == (height_ + kStride - 1) / kStride &&
                     to_.width == (width_ + kStride - 1) / kStride,
                 op, ": y is ", to_string(to_), ", x ", height_, "x", width_);
    const std::vector<int64_t> wanted = {to_.channels, channels_, 3, 3};
    ADM_RT_CHECK(arguments.weight_shape("weight") == wanted, op, ": weight must have the shape [",
                 to_.channels, ", ", channels_, ", 3, 3]");
    ADM_RT_CHECK(!has_bias_ || arguments.weight_shape("bias") == std::vector<int64_t>{to_.channels},
                 op, ": bias must have the shape [", to_.channels, "]");
    if (stats_ >= 0) check_stats_shape(arguments, arguments.output_shape(stats_), to_);
    depth_ = kTaps * channels_;
  }

  int64_t packed_floats() const override {
    return gemm_packed_floats(to_.channels, depth_, panel_) + (has_bias_ ? to_.channels : 0);
  }

  // In the order of a patch: [Co, 3, 3, Ci].
  void pack(const Weights& weights, float* packed) const override {
    const float* weight = weights.at("weight");
    std::vector<float> ordered(static_cast<size_t>(to_.channels * depth_));
    for (int64_t co = 0; co < to_.channels; ++co) {
      for (int64_t ci = 0; ci < channels_; ++ci) {
        for (int64_t tap = 0; tap < kTaps; ++tap) {
          ordered[static_cast<size_t>(co * depth_ + tap * channels_ + ci)] =
              weight[(co * channels_ + ci) * kTaps + tap];
        }
      }
    }
    gemm_pack(ordered.data(), to_.channels, depth_, depth_, false, panel_, packed);
    if (!has_bias_) return;
    std::copy_n(weights.at("bias"), to_.channels,
                packed + gemm_packed_floats(to_.channels, depth_, panel_));
  }

  int64_t thread_floats() const override { return most_rows() * depth_; }

  double flops(int64_t batch) const override {
    return 2.0 * static_cast<double>(batch * to_.pixels()) *
           static_cast<double>(depth_ * to_.channels);
  }

  void run(const RunContext& context) const override {
    const int64_t rows = context.batch * to_.pixels();
    const int64_t share = (rows + 4 * num_threads() - 1) / (4 * num_threads());
    const int64_t size = std::min(most_rows(), std::max(2 * row_block_, share));
    parallel_for((rows + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
      float* patches = thread_scratch(size * depth_);
      for (int64_t task = begin; task < end; ++task) {
        run_block(context, task * size, std::min(rows, (task + 1) * size), patches);
      }
    });
    if (stats_ >= 0) {
      write_channel_stats(context.output(y_), context.batch, to_.pixels(), to_.channels,
                          context.output(stats_));
    }
  }

 private:
  int64_t most_rows() const { return std::max(kLeastRows, kBlockFloats / depth_); }

  struct Source {
    int slot;
    int64_t channels;
    bool planes;  // channels first
  };

  void add_source(const std::string& op, const char* name, int slot, const Shape& shape) {
    const bool planes = kStride == 1 && shape.pixels() == 1 && to_.pixels() > 1;
    const int64_t height = planes ? to_.height : shape.height;
    const int64_t width = planes ? to_.width : shape.width;
    const int64_t channels = shape.floats() / (height * width);
    ADM_RT_CHECK(channels >= 1 && channels * height * width == shape.floats(), op, ": ", name,
                 " is ", to_string(shape), ", which is no whole number of ", height, "x", width,
                 " planes");
    ADM_RT_CHECK(sources_.empty() || (height == height_ && width == width_), op, ": ", name, " is ",
                 to_string(shape), ", x ", height_, "x", width_);
    height_ = height;
    width_ = width;
    channels_ += channels;
    sources_.push_back({slot, channels, planes});
  }

  // Output pixels [begin, end), counted over the batch.
  void run_block(const RunContext& context, int64_t begin, int64_t end, float* patches) const {
    for (int64_t row = begin; row < end; ++row) {
      gather(context, row, patches + (row - begin) * depth_);
    }
    float* y = context.output(y_) + begin * to_.channels;
    const float* bias =
        has_bias_ ? context.packed + gemm_packed_floats(to_.channels, depth_, panel_) : nullptr;
    ADM_RT_DISPATCH(gemm(end - begin, to_.channels, depth_, {patches, depth_}, context.packed,
                         {y, to_.channels}, false));
    ADM_RT_DISPATCH(
        finish_rows(end - begin, to_.channels, y, to_.channels, bias, nullptr, 0, 1.0f));
  }

  void gather(const RunContext& context, int64_t row, float* patch) const {
    const int64_t image = row / to_.pixels(), pixel = row % to_.pixels();
    const int64_t top = pixel / to_.width * kStride - 1, left = pixel % to_.width * kStride - 1;
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      const int64_t y = top + tap / 3, x = left + tap % 3;
      if (y < 0 || y >= height_ || x < 0 || x >= width_) {
        patch = std::fill_n(patch, channels_, 0.0f);
        continue;
      }
      const int64_t at = y * width_ + x, pixels = height_ * width_;
      for (const Source& source : sources_) {
        const float* from = context.input(source.slot) + image * pixels * source.channels;
        if (source.planes) {
          for (int64_t c = 0; c < source.channels; ++c) *patch++ = from[c * pixels + at];
        } else {
          patch = std::copy_n(from + at * source.channels, source.channels, patch);
        }
      }
    }
  }

  int y_, stats_;
  bool has_bias_;
  Shape to_;
  int64_t panel_, row_block_;
  std::vector<Source> sources_;
  int64_t height_ = 0;
  int64_t width_ = 0;
  int64_t channels_ = 0;
  int64_t depth_ = 0;
};

using ConvStem = Im2colConvolution<1>;
using Conv3x3Stride2 = Im2colConvolution<2>;

ADM_RT_ENGINE_OP("conv_stem", ConvStem);
ADM_RT_ENGINE_OP("conv3x3_stride2", Conv3x3Stride2);

}  // namespace
}  // namespace adm_rt::engine
