// linear: a dense layer on every pixel, which is a 1x1 convolution, as one packed product (gemm.h).
//
// Affine map, activation and concatenation happen once, while a block of rows is copied into the
// second-level cache; bias, residual and scale where a block of columns leaves it.
#include <algorithm>
#include <cstring>
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

// Floats of a block of rows that stays in the second-level cache: 320 KiB.
constexpr int64_t kBlockFloats = 80 * 1024;
// Products whose rows all fit this (1 MiB) are split among the threads by columns, so that each
// thread reads its own part of the weights; larger ones by rows.
constexpr int64_t kSharedFloats = 256 * 1024;
// Panels of columns between product and epilogue: what was written is still in the cache.
constexpr int64_t kGroupPanels = 4;
// Work below this many operations is not worth waking another thread.
constexpr int64_t kGrainFlops = 200000;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// y = (W act(a x + b) + bias + residual) * output_scale for every pixel, x = [x, x2] by channels.
//
// Inputs: x {H, W, C1}, x2 {H, W, C2}?, affine {1, 2, C1 + C2}? (row 0 a, row 1 b), residual like
// y?. Outputs: y {.., .., Co} with as many pixels as x, stats {1, 2, Co}?. Weights: weight [Co, C1
// + C2] (trailing dimensions of 1 are allowed), bias [Co]?. Attributes: activation (0 none, 1 silu,
// 2 relu), output_scale (1).
class Linear : public Op {
 public:
  explicit Linear(const OpArguments& arguments)
      : x_(arguments.input("x")),
        x2_(arguments.optional_input("x2")),
        affine_(arguments.optional_input("affine")),
        residual_(arguments.optional_input("residual")),
        y_(arguments.output("y")),
        stats_(arguments.optional_output("stats")),
        has_bias_(arguments.has_weight("bias")),
        output_scale_(static_cast<float>(arguments.number("output_scale", 1.0))),
        panel_(ADM_RT_DISPATCH(gemm_panel_width())),
        row_block_(ADM_RT_DISPATCH(gemm_row_block())) {
    const Shape& x = arguments.input_shape(x_);
    const Shape& y = arguments.output_shape(y_);
    pixels_ = x.pixels();
    channels1_ = x.channels;
    depth_ = channels1_;
    columns_ = y.channels;
    ADM_RT_CHECK(y.pixels() == pixels_ && pixels_ >= 1, "linear: x is ", to_string(x), " and y ",
                 to_string(y), "; they must have as many pixels");
    if (x2_ >= 0) {
      const Shape& x2 = arguments.input_shape(x2_);
      ADM_RT_CHECK(x2.pixels() == pixels_, "linear: x is ", to_string(x), " and x2 ", to_string(x2),
                   "; they must have as many pixels");
      depth_ += x2.channels;
    }
    ADM_RT_CHECK(affine_ < 0 || arguments.input_shape(affine_) == (Shape{1, 2, depth_}),
                 "linear: affine is not 1x2x", depth_);
    if (residual_ >= 0) {
      const Shape& residual = arguments.input_shape(residual_);
      ADM_RT_CHECK(residual.pixels() == pixels_ && residual.channels == columns_,
                   "linear: residual is ", to_string(residual), " and y ", to_string(y));
    }
    if (stats_ >= 0) check_stats_shape(arguments, arguments.output_shape(stats_), y);
    const int64_t activation = arguments.integer("activation", 0);
    ADM_RT_CHECK(activation >= 0 && activation <= 2, "linear: activation=", activation,
                 " is not 0 (none), 1 (silu) or 2 (relu)");
    activation_ = static_cast<RowActivation>(activation);
    const std::vector<int64_t>& weight = arguments.weight_shape("weight");
    ADM_RT_CHECK(
        weight.size() >= 2 && weight[0] == columns_ && weight[1] == depth_ &&
            std::all_of(weight.begin() + 2, weight.end(), [](int64_t n) { return n == 1; }),
        "linear: weight must have the shape [", columns_, ", ", depth_, "]");
    ADM_RT_CHECK(!has_bias_ || arguments.weight_shape("bias") == std::vector<int64_t>{columns_},
                 "linear: bias must have the shape [", columns_, "]");
    prepared_ = x2_ >= 0 || affine_ >= 0 || activation_ != RowActivation::kNone;
  }

  int64_t packed_floats() const override {
    return gemm_packed_floats(columns_, depth_, panel_) + (has_bias_ ? columns_ : 0);
  }

  void pack(const Weights& weights, float* packed) const override {
    gemm_pack(weights.at("weight"), columns_, depth_, depth_, false, panel_, packed);
    if (!has_bias_) return;
    std::copy_n(weights.at("bias"), columns_,
                packed + gemm_packed_floats(columns_, depth_, panel_));
  }

  int64_t scratch_floats(int64_t batch) const override {
    return prepared_ && by_columns(batch) ? batch * pixels_ * depth_ : 0;
  }

  int64_t thread_floats() const override { return prepared_ ? most_rows() * depth_ : 0; }

  double flops(int64_t batch) const override {
    return 2.0 * static_cast<double>(batch * pixels_) * static_cast<double>(depth_ * columns_);
  }

  void run(const RunContext& context) const override {
    if (by_columns(context.batch)) {
      run_by_columns(context);
    } else {
      run_by_rows(context);
    }
    if (stats_ >= 0) {
      write_channel_stats(context.output(y_), context.batch, pixels_, columns_,
                          context.output(stats_));
    }
  }

 private:
  // What the cache holds, in whole tiles of the microkernel.
  int64_t most_rows() const {
    return ceil_div(std::max<int64_t>(row_block_, kBlockFloats / depth_), row_block_) * row_block_;
  }

  bool by_columns(int64_t batch) const { return batch * pixels_ * depth_ <= kSharedFloats; }

  // Rows [begin, end) of the concatenated, mapped and activated input into `block`.
  void prepare(const RunContext& context, int64_t begin, int64_t end, float* block) const {
    const int64_t channels2 = depth_ - channels1_;
    while (begin < end) {
      const int64_t image = begin / pixels_;
      const int64_t count = std::min((image + 1) * pixels_, end) - begin;
      const float* a = affine_ < 0 ? nullptr : context.input(affine_) + image * 2 * depth_;
      const float* b = affine_ < 0 ? nullptr : a + depth_;
      ADM_RT_DISPATCH(activate_rows(count, channels1_, context.input(x_) + begin * channels1_,
                                    channels1_, a, b, activation_, block, depth_));
      if (x2_ >= 0) {
        ADM_RT_DISPATCH(activate_rows(count, channels2, context.input(x2_) + begin * channels2,
                                      channels2, a == nullptr ? a : a + channels1_,
                                      b == nullptr ? b : b + channels1_, activation_,
                                      block + channels1_, depth_));
      }
      block += count * depth_;
      begin += count;
    }
  }

  // Rows [begin, end) of columns [panel * width, ...) of y; `a` is the prepared row `begin`.
  void multiply(const RunContext& context, const float* a, int64_t begin, int64_t end,
                int64_t panel_begin, int64_t panel_end) const {
    const float* bias =
        has_bias_ ? context.packed + gemm_packed_floats(columns_, depth_, panel_) : nullptr;
    const float* residual = context.input(residual_);
    for (int64_t panel = panel_begin; panel < panel_end; panel += kGroupPanels) {
      const int64_t column = panel * panel_;
      const int64_t stop = std::min(panel_end, panel + kGroupPanels) * panel_;
      const int64_t count = std::min(stop, columns_) - column;
      float* y = context.output(y_) + begin * columns_ + column;
      ADM_RT_DISPATCH(gemm(end - begin, count, depth_, {a, depth_},
                           context.packed + column * depth_, {y, columns_}, false));
      ADM_RT_DISPATCH(
          finish_rows(end - begin, count, y, columns_, bias == nullptr ? nullptr : bias + column,
                      residual == nullptr ? nullptr : residual + begin * columns_ + column,
                      columns_, output_scale_));
    }
  }

  void run_by_columns(const RunContext& context) const {
    const int64_t rows = context.batch * pixels_;
    const float* a = context.input(x_);
    if (prepared_) {
      const int64_t grain = std::max<int64_t>(1, 16384 / depth_);
      parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
        prepare(context, begin, end, context.scratch + begin * depth_);
      });
      a = context.scratch;
    }
    const int64_t panels = ceil_div(columns_, panel_);
    const int64_t grain = ceil_div(kGrainFlops, 2 * rows * depth_ * panel_);
    parallel_for(panels, grain,
                 [&](int64_t begin, int64_t end) { multiply(context, a, 0, rows, begin, end); });
  }

  void run_by_rows(const RunContext& context) const {
    const int64_t rows = context.batch * pixels_;
    // As many rows as the cache holds, fewer when threads would be left without work.
    const int64_t most = most_rows();
    const int64_t share = num_threads() == 1 ? most : ceil_div(rows, 4 * num_threads());
    const int64_t size =
        ceil_div(std::min(most, std::max(4 * row_block_, share)), row_block_) * row_block_;
    const int64_t panels = ceil_div(columns_, panel_);
    parallel_for(ceil_div(rows, size), 1, [&](int64_t begin, int64_t end) {
      float* block = prepared_ ? thread_scratch(size * depth_) : nullptr;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * size, last = std::min(rows, first + size);
        if (prepared_) prepare(context, first, last, block);
        const float* a = prepared_ ? block : context.input(x_) + first * depth_;
        multiply(context, a, first, last, 0, panels);
      }
    });
  }

  int x_, x2_, affine_, residual_, y_, stats_;
  bool has_bias_;
  float output_scale_;
  int64_t panel_, row_block_;
  RowActivation activation_ = RowActivation::kNone;
  bool prepared_ = false;
  int64_t pixels_ = 0;
  int64_t channels1_ = 0;
  int64_t depth_ = 0;
  int64_t columns_ = 0;
};

ADM_RT_ENGINE_OP("linear", Linear);

}  // namespace
}  // namespace adm_rt::engine
