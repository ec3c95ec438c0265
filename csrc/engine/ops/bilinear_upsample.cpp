// bilinear_upsample: an image at another size, as the super-resolution UNet sees the low-resolution
// one (Dhariwal & Nichol 2021, section 4.3; pixel centres at (i + 1/2) / size).
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/check.h"
#include "common/thread_pool.h"
#include "engine/op.h"

namespace adm_rt::engine {
namespace {

constexpr int64_t kGrainValues = 8192;

// Output position i is (1 - weight) * input[low] + weight * input[high].
struct Tap {
  int64_t low, high;
  float weight;
};

std::vector<Tap> make_taps(int64_t from, int64_t to) {
  std::vector<Tap> taps;
  const double scale = static_cast<double>(from) / static_cast<double>(to);
  for (int64_t i = 0; i < to; ++i) {
    const double at = std::max(0.0, (static_cast<double>(i) + 0.5) * scale - 0.5);
    const int64_t low = std::min(static_cast<int64_t>(at), from - 1);
    const int64_t high = std::min(low + 1, from - 1);
    taps.push_back({low, high, static_cast<float>(at - static_cast<double>(low))});
  }
  return taps;
}

// Input x {h, w, C}; output y {H, W, C}.
class BilinearUpsample : public Op {
 public:
  explicit BilinearUpsample(const OpArguments& arguments)
      : x_(arguments.input("x")), y_(arguments.output("y")) {
    from_ = arguments.input_shape(x_);
    to_ = arguments.output_shape(y_);
    ADM_RT_CHECK(from_.floats() >= 1 && to_.floats() >= 1 && from_.channels == to_.channels,
                 "bilinear_upsample: ", to_string(from_), " -> ", to_string(to_),
                 " changes the channels or is empty");
    rows_ = make_taps(from_.height, to_.height);
    columns_ = make_taps(from_.width, to_.width);
  }

  void run(const RunContext& context) const override {
    const int64_t row_floats = to_.width * to_.channels;
    const int64_t grain = std::max<int64_t>(1, kGrainValues / row_floats);
    parallel_for(context.batch * to_.height, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        run_row(context.input(x_) + row / to_.height * from_.floats(),
                rows_[static_cast<size_t>(row % to_.height)],
                context.output(y_) + row * row_floats);
      }
    });
  }

 private:
  void run_row(const float* image, const Tap& row, float* y) const {
    const int64_t channels = to_.channels, stride = from_.width * channels;
    const float* top = image + row.low * stride;
    const float* bottom = image + row.high * stride;
    for (const Tap& column : columns_) {
      const int64_t left = column.low * channels, right = column.high * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const float above = top[left + c] * (1.0f - column.weight) + top[right + c] * column.weight;
        const float below =
            bottom[left + c] * (1.0f - column.weight) + bottom[right + c] * column.weight;
        *y++ = above * (1.0f - row.weight) + below * row.weight;
      }
    }
  }

  int x_, y_;
  Shape from_, to_;
  std::vector<Tap> rows_, columns_;
};

ADM_RT_ENGINE_OP("bilinear_upsample", BilinearUpsample);

}  // namespace
}  // namespace adm_rt::engine
