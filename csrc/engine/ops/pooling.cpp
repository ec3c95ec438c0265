// mean_pool and attention_pool_tokens: what the heads of the classifiers do with the pixels. The
// affine map and activation of the norm before them are applied on the way.
#include <algorithm>
#include <vector>

#include "common/check.h"
#include "common/cpu_isa.h"
#include "common/thread_pool.h"
#include "engine/op.h"
#include "engine/ops/row_kernels.h"
#include "engine/ops/thread_scratch.h"

namespace adm_rt::engine {
namespace {

// Work below this many values is not worth waking another thread.
constexpr int64_t kGrainValues = 16384;

// Channels [first, first + count) of one image, as a task of its own: kMomentChannels of them.
struct Slice {
  int64_t image, first, count;
};

// Both ops take x {H, W, C}, affine {1, 2, C}? (row 0 a, row 1 b) and the attribute activation (0
// none, 1 silu, 2 relu), and work on z = act(a x + b).
class PoolingOp : public Op {
 public:
  explicit PoolingOp(const OpArguments& arguments)
      : x_(arguments.input("x")),
        affine_(arguments.optional_input("affine")),
        y_(arguments.output("y")) {
    const Shape& x = arguments.input_shape(x_);
    pixels_ = x.pixels();
    channels_ = x.channels;
    ADM_RT_CHECK(x.floats() >= 1, arguments.op(), ": x is empty, ", to_string(x));
    ADM_RT_CHECK(affine_ < 0 || arguments.input_shape(affine_) == (Shape{1, 2, channels_}),
                 arguments.op(), ": affine is not 1x2x", channels_);
    const int64_t activation = arguments.integer("activation", 0);
    ADM_RT_CHECK(activation >= 0 && activation <= 2, arguments.op(), ": activation=", activation,
                 " is not 0 (none), 1 (silu) or 2 (relu)");
    activation_ = static_cast<RowActivation>(activation);
  }

  void run(const RunContext& context) const override {
    const int64_t blocks = (channels_ + kMomentChannels - 1) / kMomentChannels;
    const int64_t grain = std::max<int64_t>(1, kGrainValues / (pixels_ * kMomentChannels));
    parallel_for(context.batch * blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % blocks * kMomentChannels;
        run_slice(context, {task / blocks, first, std::min(kMomentChannels, channels_ - first)});
      }
    });
  }

 protected:
  virtual void run_slice(const RunContext& context, const Slice& slice) const = 0;

  void check_output(const OpArguments& arguments, const Shape& wanted) const {
    ADM_RT_CHECK(arguments.output_shape(y_) == wanted, arguments.op(), ": y is ",
                 to_string(arguments.output_shape(y_)), ", not ", to_string(wanted));
  }

  const float* input(const RunContext& context, const Slice& slice) const {
    return context.input(x_) + slice.image * pixels_ * channels_ + slice.first;
  }

  // z of the slice; rows of y are ldy floats apart.
  void activate(const RunContext& context, const Slice& slice, float* y, int64_t ldy) const {
    const float* a =
        affine_ < 0 ? nullptr : context.input(affine_) + slice.image * 2 * channels_ + slice.first;
    ADM_RT_DISPATCH(activate_rows(pixels_, slice.count, input(context, slice), channels_, a,
                                  a == nullptr ? nullptr : a + channels_, activation_, y, ldy));
  }

  int x_, affine_, y_;
  RowActivation activation_ = RowActivation::kNone;
  int64_t pixels_ = 0;
  int64_t channels_ = 0;
};

// Output y {1, 1, C}: the mean of z over the pixels.
class MeanPool : public PoolingOp {
 public:
  explicit MeanPool(const OpArguments& arguments) : PoolingOp(arguments) {
    check_output(arguments, {1, 1, channels_});
  }

  int64_t thread_floats() const override {
    return affine_ < 0 && activation_ == RowActivation::kNone ? 0 : pixels_ * kMomentChannels;
  }

 private:
  void run_slice(const RunContext& context, const Slice& slice) const override {
    const float* z = input(context, slice);
    int64_t ld = channels_;
    if (thread_floats() > 0) {
      float* buffer = thread_scratch(thread_floats());
      activate(context, slice, buffer, kMomentChannels);
      z = buffer;
      ld = kMomentChannels;
    }
    float* y = context.output(y_) + slice.image * channels_ + slice.first;
    ADM_RT_DISPATCH(channel_moments(pixels_, slice.count, z, ld, y, nullptr));
  }
};

// Output y {1, T + 1, C}, T = H * W: the mean of z over the pixels, then z, each plus its column of
// the weight positional [C, T + 1]. The first token is the one whose attention is the result (CLIP,
// Radford et al. 2021).
class AttentionPoolTokens : public PoolingOp {
 public:
  explicit AttentionPoolTokens(const OpArguments& arguments) : PoolingOp(arguments) {
    check_output(arguments, {1, pixels_ + 1, channels_});
    const std::vector<int64_t> wanted = {channels_, pixels_ + 1};
    ADM_RT_CHECK(arguments.weight_shape("positional") == wanted,
                 "attention_pool_tokens: positional must have the shape [", channels_, ", ",
                 pixels_ + 1, "]");
  }

  int64_t packed_floats() const override { return (pixels_ + 1) * channels_; }

  void pack(const Weights& weights, float* packed) const override {
    const float* positional = weights.at("positional");
    for (int64_t t = 0; t <= pixels_; ++t) {
      for (int64_t c = 0; c < channels_; ++c) *packed++ = positional[c * (pixels_ + 1) + t];
    }
  }

 private:
  void run_slice(const RunContext& context, const Slice& slice) const override {
    const int64_t tokens = pixels_ + 1;
    float* y = context.output(y_) + slice.image * tokens * channels_ + slice.first;
    activate(context, slice, y + channels_, channels_);
    ADM_RT_DISPATCH(channel_moments(pixels_, slice.count, y + channels_, channels_, y, nullptr));
    ADM_RT_DISPATCH(finish_rows(tokens, slice.count, y, channels_, nullptr,
                                context.packed + slice.first, channels_, 1.0f));
  }
};

ADM_RT_ENGINE_OP("mean_pool", MeanPool);
ADM_RT_ENGINE_OP("attention_pool_tokens", AttentionPoolTokens);

}  // namespace
}  // namespace adm_rt::engine
