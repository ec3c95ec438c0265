// timestep_embedding: the sinusoidal embedding of a timestep (Ho et al. 2020; cosines first, as in
// ADM).
#include <cmath>
#include <vector>

#include "common/check.h"
#include "engine/op.h"

namespace adm_rt::engine {
namespace {

constexpr double kMaxPeriod = 10000.0;

// Input t {1, 1, 1}, fractions allowed. Output out {1, 1, dim}: cos(t f_i) for i < dim / 2, then
// sin(t f_i), then 0 when dim is odd; f_i = 10000^(-i / (dim / 2)).
//
// Frequencies and angles are rounded to float32 like those of the networks in training (f_i from a
// float32 exponent, rounded once: models.blocks.timestep_frequencies): an angle reaches 1000, where
// that rounding weighs 3e-5, and the weights have learned it.
class TimestepEmbedding : public Op {
 public:
  explicit TimestepEmbedding(const OpArguments& arguments)
      : t_(arguments.input("t")), out_(arguments.output("out")) {
    ADM_RT_CHECK(arguments.input_shape(t_).floats() == 1, "timestep_embedding: t is ",
                 to_string(arguments.input_shape(t_)), ", not 1x1x1");
    const Shape& shape = arguments.output_shape(out_);
    ADM_RT_CHECK(shape.pixels() == 1 && shape.channels >= 2, "timestep_embedding: out is ",
                 to_string(shape), ", not 1x1xdim with dim >= 2");
    dim_ = shape.channels;
    const int64_t half = dim_ / 2;
    const float log_period = static_cast<float>(-std::log(kMaxPeriod));
    for (int64_t i = 0; i < half; ++i) {
      const float exponent = log_period * static_cast<float>(i) / static_cast<float>(half);
      frequencies_.push_back(static_cast<float>(std::exp(static_cast<double>(exponent))));
    }
  }

  void run(const RunContext& context) const override {
    const int64_t half = dim_ / 2;
    for (int64_t image = 0; image < context.batch; ++image) {
      const float t = context.input(t_)[image];
      float* out = context.output(out_) + image * dim_;
      for (int64_t i = 0; i < half; ++i) {
        const float angle = t * frequencies_[static_cast<size_t>(i)];
        out[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
        out[half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
      }
      if (dim_ % 2 != 0) out[dim_ - 1] = 0.0f;
    }
  }

 private:
  int t_, out_;
  int64_t dim_ = 0;
  std::vector<float> frequencies_;
};

ADM_RT_ENGINE_OP("timestep_embedding", TimestepEmbedding);

}  // namespace
}  // namespace adm_rt::engine
