// The small ops of a classifier's gradient: where it starts (log_softmax_gradient), and the
// backward passes of ReLU, of the tokens of an attention pool and of a strided convolution's
// samples.
#include <algorithm>
#include <cmath>

#include "common/check.h"
#include "common/thread_pool.h"
#include "engine/op.h"

namespace adm_rt::engine {
namespace {

// Work below this many values is not worth waking another thread.
constexpr int64_t kGrainValues = 32768;

void check_shape(const OpArguments& arguments, const char* name, const Shape& shape,
                 const Shape& wanted) {
  ADM_RT_CHECK(shape == wanted, arguments.op(), ": ", name, " is ", to_string(shape), ", not ",
               to_string(wanted));
}

// Input logits {1, 1, K}; index {1, 1, 1}, a float that holds a class in [0, K). Output: y {1, 1,
// K} = one_hot(index) - softmax(logits), the gradient of log softmax(logits)[index]. run() throws
// std::invalid_argument for an index that is no class.
class LogSoftmaxGradient : public Op {
 public:
  explicit LogSoftmaxGradient(const OpArguments& arguments)
      : logits_(arguments.input("logits")),
        index_(arguments.input("index")),
        y_(arguments.output("y")),
        classes_(arguments.input_shape(logits_).channels) {
    const Shape row = {1, 1, classes_};
    ADM_RT_CHECK(classes_ >= 1, "log_softmax_gradient: there are no logits");
    check_shape(arguments, "logits", arguments.input_shape(logits_), row);
    check_shape(arguments, "y", arguments.output_shape(y_), row);
    check_shape(arguments, "index", arguments.input_shape(index_), {1, 1, 1});
  }

  void run(const RunContext& context) const override {
    for (int64_t image = 0; image < context.batch; ++image) {
      const float index = context.input(index_)[image];
      // Written so that NaN fails too.
      ADM_RT_CHECK(
          index >= 0.0f && index < static_cast<float>(classes_) && index == std::floor(index),
          "log_softmax_gradient: index=", index, " of image ", image,
          " is not a whole number in [0, ", classes_, ")");
      const float* logits = context.input(logits_) + image * classes_;
      float* y = context.output(y_) + image * classes_;
      const double maximum = *std::max_element(logits, logits + classes_);
      double total = 0.0;
      for (int64_t k = 0; k < classes_; ++k) total += std::exp(logits[k] - maximum);
      const auto chosen = static_cast<int64_t>(index);
      double others = 0.0;  // 1 - softmax[chosen], without cancellation
      for (int64_t k = 0; k < classes_; ++k) {
        const double probability = std::exp(logits[k] - maximum) / total;
        y[k] = static_cast<float>(-probability);
        if (k != chosen) others += probability;
      }
      y[chosen] = static_cast<float>(others);
    }
  }

 private:
  int logits_, index_, y_;
  int64_t classes_;
};

// Inputs x, grad; output y, all of one shape: y = x > 0 ? grad : 0.
class ReluBackward : public Op {
 public:
  explicit ReluBackward(const OpArguments& arguments)
      : x_(arguments.input("x")), grad_(arguments.input("grad")), y_(arguments.output("y")) {
    const Shape& x = arguments.input_shape(x_);
    check_shape(arguments, "grad", arguments.input_shape(grad_), x);
    check_shape(arguments, "y", arguments.output_shape(y_), x);
    floats_ = x.floats();
  }

  void run(const RunContext& context) const override {
    const float* x = context.input(x_);
    const float* grad = context.input(grad_);
    float* y = context.output(y_);
    parallel_for(context.batch * floats_, kGrainValues, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) y[i] = x[i] > 0.0f ? grad[i] : 0.0f;
    });
  }

 private:
  int x_, grad_, y_;
  int64_t floats_ = 0;
};

// The backward pass of attention_pool_tokens: every pixel is a token, and a part of the first one,
// their mean. Input: grad {1, T + 1, C}. Output: y {H, W, C}, T = H * W.
class AttentionPoolTokensBackward : public Op {
 public:
  explicit AttentionPoolTokensBackward(const OpArguments& arguments)
      : grad_(arguments.input("grad")), y_(arguments.output("y")) {
    const Shape& y = arguments.output_shape(y_);
    pixels_ = y.pixels();
    channels_ = y.channels;
    ADM_RT_CHECK(y.floats() >= 1, "attention_pool_tokens_backward: y is empty, ", to_string(y));
    check_shape(arguments, "grad", arguments.input_shape(grad_), {1, pixels_ + 1, channels_});
  }

  void run(const RunContext& context) const override {
    const float share = 1.0f / static_cast<float>(pixels_);
    const int64_t grain = std::max<int64_t>(1, kGrainValues / channels_);
    parallel_for(context.batch * pixels_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const float* mean = context.input(grad_) + row / pixels_ * (pixels_ + 1) * channels_;
        const float* token = mean + (row % pixels_ + 1) * channels_;
        float* y = context.output(y_) + row * channels_;
        for (int64_t c = 0; c < channels_; ++c) y[c] = token[c] + mean[c] * share;
      }
    });
  }

 private:
  int grad_, y_;
  int64_t pixels_ = 0;
  int64_t channels_ = 0;
};

// zero_insert: x {h, w, C} at the even positions of y {2h, 2w, C}, zeros at the others. A 3x3
// convolution of it with the rotated weights is the data gradient of one of stride 2 (Dumoulin &
// Visin 2016, section 4.5).
class ZeroInsert : public Op {
 public:
  explicit ZeroInsert(const OpArguments& arguments)
      : x_(arguments.input("x")), y_(arguments.output("y")), shape_(arguments.input_shape(x_)) {
    ADM_RT_CHECK(shape_.floats() >= 1, "zero_insert: x is empty, ", to_string(shape_));
    check_shape(arguments, "y", arguments.output_shape(y_),
                {2 * shape_.height, 2 * shape_.width, shape_.channels});
  }

  void run(const RunContext& context) const override {
    const int64_t width = shape_.width, channels = shape_.channels, row = width * channels;
    const int64_t grain = std::max<int64_t>(1, kGrainValues / (4 * row));
    parallel_for(context.batch * shape_.height, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const float* x = context.input(x_) + task * row;
        float* y = context.output(y_) + task * 4 * row;
        for (int64_t i = 0; i < width; ++i) {
          std::copy_n(x + i * channels, channels, y + 2 * i * channels);
          std::fill_n(y + (2 * i + 1) * channels, channels, 0.0f);
        }
        std::fill_n(y + 2 * row, 2 * row, 0.0f);
      }
    });
  }

 private:
  int x_, y_;
  Shape shape_;
};

ADM_RT_ENGINE_OP("log_softmax_gradient", LogSoftmaxGradient);
ADM_RT_ENGINE_OP("relu_backward", ReluBackward);
ADM_RT_ENGINE_OP("attention_pool_tokens_backward", AttentionPoolTokensBackward);
ADM_RT_ENGINE_OP("zero_insert", ZeroInsert);

}  // namespace
}  // namespace adm_rt::engine
