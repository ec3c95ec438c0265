// to_nhwc, to_nchw: between the layout of images outside and inside of a plan; concat: channels of
// several buffers behind each other. All of them move memory and compute nothing.
#include <algorithm>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/thread_pool.h"
#include "engine/op.h"

namespace adm_rt::engine {
namespace {

// Work below this many values is not worth waking another thread.
constexpr int64_t kGrainValues = 32768;

// Output pixels [begin, end) of `rows` x `columns` -> `columns` x `rows`; the long side is the
// pixels, the short one a handful of channels.
void interleave(const float* planes, int64_t pixels, int64_t channels, int64_t begin, int64_t end,
                float* rows) {
  for (int64_t p = begin; p < end; ++p) {
    for (int64_t c = 0; c < channels; ++c) rows[p * channels + c] = planes[c * pixels + p];
  }
}

void deinterleave(const float* rows, int64_t pixels, int64_t channels, int64_t begin, int64_t end,
                  float* planes) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = begin; p < end; ++p) planes[c * pixels + p] = rows[p * channels + c];
  }
}

// to_nhwc: input x {1, 1, C * H * W} (planes of one image), output y {H, W, C}.
// to_nchw: input x {H, W, C}, output y {1, 1, C * H * W}.
class LayoutOp : public Op {
 public:
  LayoutOp(const OpArguments& arguments, bool to_nhwc)
      : x_(arguments.input("x")), y_(arguments.output("y")), to_nhwc_(to_nhwc) {
    const Shape& from = arguments.input_shape(x_);
    const Shape& to = arguments.output_shape(y_);
    image_ = to_nhwc ? to : from;
    const Shape planes = {1, 1, image_.floats()};
    ADM_RT_CHECK((to_nhwc ? from : to) == planes, arguments.op(), ": ", to_string(from), " -> ",
                 to_string(to), "; the planes of a ", to_string(image_), " image have the shape ",
                 to_string(planes));
  }

  void run(const RunContext& context) const override {
    const int64_t pixels = image_.pixels(), channels = image_.channels;
    const float* x = context.input(x_);
    float* y = context.output(y_);
    const int64_t grain = std::max<int64_t>(1, kGrainValues / channels);
    parallel_for(context.batch * pixels, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t image = begin / pixels, first = begin % pixels;
        const int64_t count = std::min(pixels - first, end - begin);
        const int64_t at = image * pixels * channels;
        if (to_nhwc_) {
          interleave(x + at, pixels, channels, first, first + count, y + at);
        } else {
          deinterleave(x + at, pixels, channels, first, first + count, y + at);
        }
        begin += count;
      }
    });
  }

 private:
  int x_, y_;
  bool to_nhwc_;
  Shape image_;
};

class ToNhwc : public LayoutOp {
 public:
  explicit ToNhwc(const OpArguments& arguments) : LayoutOp(arguments, true) {}
};
class ToNchw : public LayoutOp {
 public:
  explicit ToNchw(const OpArguments& arguments) : LayoutOp(arguments, false) {}
};

// Inputs x0, x1, ... {H, W, Ci}; output y {H, W, sum Ci}.
class Concat : public Op {
 public:
  explicit Concat(const OpArguments& arguments) : y_(arguments.output("y")) {
    const Shape& shape = arguments.output_shape(y_);
    pixels_ = shape.pixels();
    for (int i = 0;; ++i) {
      const std::string name = "x" + std::to_string(i);
      const int slot = arguments.optional_input(name);
      if (slot < 0) break;
      const Shape& part = arguments.input_shape(slot);
      ADM_RT_CHECK(part.height == shape.height && part.width == shape.width, "concat: ", name,
                   " is ", to_string(part), ", y ", to_string(shape));
      inputs_.push_back({slot, part.channels});
      channels_ += part.channels;
    }
    ADM_RT_CHECK(!inputs_.empty(), "concat: input x0 is missing");
    ADM_RT_CHECK(channels_ == shape.channels, "concat: y has ", shape.channels,
                 " channels, its parts ", channels_);
  }

  void run(const RunContext& context) const override {
    const int64_t grain = std::max<int64_t>(1, kGrainValues / channels_);
    parallel_for(context.batch * pixels_, grain, [&](int64_t begin, int64_t end) {
      float* y = context.output(y_) + begin * channels_;
      for (int64_t p = begin; p < end; ++p) {
        for (const Part& part : inputs_) {
          y = std::copy_n(context.input(part.slot) + p * part.channels, part.channels, y);
        }
      }
    });
  }

 private:
  struct Part {
    int slot;
    int64_t channels;
  };
  int y_;
  int64_t pixels_ = 0;
  int64_t channels_ = 0;
  std::vector<Part> inputs_;
};

ADM_RT_ENGINE_OP("to_nhwc", ToNhwc);
ADM_RT_ENGINE_OP("to_nchw", ToNchw);
ADM_RT_ENGINE_OP("concat", Concat);

}  // namespace
}  // namespace adm_rt::engine
