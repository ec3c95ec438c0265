// norm_backward: the input gradient of GroupNorm, its modulation and SiLU, as the forward plan runs
// them (statistics, group_norm's affine map a x + b, activation in the next op). With
// dv = grad silu'(a x + b), u = a dv and xhat = (x - mean) rstd:
//   dx = u - mean_g(u) - xhat mean_g(u xhat),  the means over the pixels and channels of a group.
// See csrc/ops/ada_group_norm.h. One pass over x and grad makes dv and the sums of fixed chunks of
// rows, joined in double; a second one makes dx out of dv.
#include <algorithm>
#include <utility>

#include "common/check.h"
#include "common/cpu_isa.h"
#include "common/thread_pool.h"
#include "engine/op.h"
#include "engine/ops/norm_backward_kernels.h"

namespace adm_rt::engine {
namespace {

// Values of a chunk, whose sums are float: three such blocks stay in the second-level cache.
constexpr int64_t kChunkValues = 16384;

// How a gradient of fewer pixels is shared among those of x, as the backward pass of an average.
struct Sharing {
  int64_t rows = 1;     // of x per row of the gradient
  int64_t columns = 1;  // of x per column

  float scale() const { return 1.0f / static_cast<float>(rows * columns); }
};

Sharing sharing(const OpArguments& arguments, const char* name, const Shape& small,
                const Shape& whole) {
  ADM_RT_CHECK(
      small.floats() >= 1 && whole.height % small.height == 0 && whole.width % small.width == 0,
      arguments.op(), ": ", name, " is ", to_string(small), ", which does not tile ",
      to_string(whole));
  return {whole.height / small.height, whole.width / small.width};
}

// Rows of `width` pixels whose gradient begins at `data`, [height / rows, width / columns, ld].
SharedGradient at_row(const float* data, const Sharing& s, int64_t row, int64_t width, int64_t ld) {
  if (data == nullptr) return {};
  return {data + row / s.rows * (width / s.columns) * ld, s.columns, s.scale()};
}

// Inputs: x {H, W, C}, what was normalised; stats {1, 2, C} and affine {1, 2, C}, of its forward
// pass; grad {h, w, C}, the gradient of the activation, or of its average over blocks of (H / h) x
// (W / w) pixels; residual {h', w', C}?, added to the result in the same way; modulation {1, 1, M}?
// (in mode 2 alone, where it was added to x before the norm). Output: dx {H, W, C}. Attributes:
// groups, eps, mode, offset, as group_norm had them; activation (0 none, 1 silu); residual_scale.
class NormBackward : public Op {
 public:
  explicit NormBackward(const OpArguments& arguments)
      : x_(arguments.input("x")),
        stats_(arguments.input("stats")),
        affine_(arguments.input("affine")),
        grad_(arguments.input("grad")),
        residual_(arguments.optional_input("residual")),
        modulation_(arguments.optional_input("modulation")),
        dx_(arguments.output("dx")),
        shape_(arguments.input_shape(x_)),
        groups_(arguments.integer("groups")),
        mode_(arguments.integer("mode", 0)),
        offset_(arguments.integer("offset", 0)),
        eps_(arguments.number("eps", 1e-5)),
        residual_scale_(static_cast<float>(arguments.number("residual_scale", 1.0))) {
    ADM_RT_CHECK(shape_.floats() >= 1, "norm_backward: x is empty, ", to_string(shape_));
    ADM_RT_CHECK(arguments.output_shape(dx_) == shape_, "norm_backward: dx is ",
                 to_string(arguments.output_shape(dx_)), ", x is ", to_string(shape_));
    const Shape two_rows = {1, 2, shape_.channels};
    for (const auto& [name, slot] : {std::pair("stats", stats_), std::pair("affine", affine_)}) {
      ADM_RT_CHECK(arguments.input_shape(slot) == two_rows, "norm_backward: ", name, " is ",
                   to_string(arguments.input_shape(slot)), ", not ", to_string(two_rows));
    }
    ADM_RT_CHECK(groups_ >= 1 && shape_.channels % groups_ == 0, "norm_backward: groups=", groups_,
                 " does not divide the ", shape_.channels, " channels");
    ADM_RT_CHECK(eps_ > 0, "norm_backward: eps=", eps_, " is not positive");
    const int64_t activation = arguments.integer("activation", 0);
    ADM_RT_CHECK(activation == 0 || activation == 1, "norm_backward: activation=", activation,
                 " is not 0 (none) or 1 (silu)");
    silu_ = activation == 1;
    ADM_RT_CHECK(mode_ >= 0 && mode_ <= 2, "norm_backward: mode=", mode_,
                 " is not 0 (none), 1 (scale-shift) or 2 (additive)");
    ADM_RT_CHECK((mode_ == 2) == (modulation_ >= 0), "norm_backward: mode=", mode_,
                 modulation_ >= 0 ? " takes no" : " needs the", " input modulation");
    if (mode_ == 2) {
      const Shape& modulation = arguments.input_shape(modulation_);
      modulation_floats_ = modulation.floats();
      ADM_RT_CHECK(offset_ >= 0 && offset_ + shape_.channels <= modulation_floats_,
                   "norm_backward: modulation is ", to_string(modulation), ", offset=", offset_);
    }
    const Shape& grad = arguments.input_shape(grad_);
    grad_sharing_ = shared(arguments, "grad", grad);
    grad_floats_ = grad.floats();
    if (residual_ >= 0) {
      const Shape& residual = arguments.input_shape(residual_);
      residual_sharing_ = shared(arguments, "residual", residual);
      residual_floats_ = residual.floats();
    }
    const int64_t row_values = shape_.width * shape_.channels;
    chunk_rows_ = std::clamp<int64_t>(kChunkValues / row_values, 1, shape_.height);
    chunks_ = (shape_.height + chunk_rows_ - 1) / chunk_rows_;
  }

  int64_t scratch_floats(int64_t batch) const override {
    return batch * (chunks_ + 1) * 2 * shape_.channels;
  }

  void run(const RunContext& context) const override {
    parallel_for(context.batch * chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) sum_chunk(context, task);
    });
    for (int64_t image = 0; image < context.batch; ++image) join_sums(context, image);
    parallel_for(context.batch * chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) apply_chunk(context, task);
    });
  }

 private:
  Sharing shared(const OpArguments& arguments, const char* name, const Shape& small) const {
    ADM_RT_CHECK(small.channels == shape_.channels, "norm_backward: ", name, " is ",
                 to_string(small), ", x is ", to_string(shape_));
    return sharing(arguments, name, small, shape_);
  }

  // One call of a kernel for each run of pixels that reads one row of the gradient in order.
  template <typename Body>
  void for_runs(const Sharing& sharing, int64_t chunk, const Body& body) const {
    const int64_t begin = chunk * chunk_rows_;
    const int64_t end = std::min(begin + chunk_rows_, shape_.height);
    if (sharing.rows == 1 && sharing.columns == 1) {
      body(begin, (end - begin) * shape_.width);
      return;
    }
    for (int64_t row = begin; row < end; ++row) body(row, shape_.width);
  }

  const float* stats(const RunContext& context, int64_t image) const {
    return context.input(stats_) + image * 2 * shape_.channels;
  }
  const float* affine(const RunContext& context, int64_t image) const {
    return context.input(affine_) + image * 2 * shape_.channels;
  }
  // Sums of every chunk [batch, chunks, 2, C], then slope and offset [batch, 2, C].
  float* sums(const RunContext& context, int64_t task) const {
    return context.scratch + task * 2 * shape_.channels;
  }
  float* coefficients(const RunContext& context, int64_t image) const {
    return sums(context, context.batch * chunks_ + image);
  }

  void sum_chunk(const RunContext& context, int64_t task) const {
    const int64_t image = task / chunks_, channels = shape_.channels;
    const float* x = context.input(x_) + image * shape_.floats();
    const float* grad = context.input(grad_) + image * grad_floats_;
    const float* a = affine(context, image);
    float* dv = context.output(dx_) + image * shape_.floats();
    float* total = sums(context, task);
    std::fill_n(total, 2 * channels, 0.0f);
    for_runs(grad_sharing_, task % chunks_, [&](int64_t row, int64_t pixels) {
      const int64_t at = row * shape_.width * channels;
      ADM_RT_DISPATCH(norm_backward_sums(
          pixels, channels, x + at, at_row(grad, grad_sharing_, row, shape_.width, channels), a,
          a + channels, stats(context, image), silu_, dv + at, total));
    });
  }

  // Slope and offset of every channel: dx = a dv - slope (x - mean of the channel) - offset.
  void join_sums(const RunContext& context, int64_t image) const {
    const int64_t channels = shape_.channels, size = channels / groups_;
    const float* mean = stats(context, image);
    const float* variance = mean + channels;
    const float* a = affine(context, image);
    const float* added =
        mode_ != 2 ? nullptr : context.input(modulation_) + image * modulation_floats_ + offset_;
    const auto mean_of = [&](int64_t c) {
      return added == nullptr ? double{mean[c]} : double{mean[c]} + added[c];
    };
    float* slope = coefficients(context, image);
    float* offset = slope + channels;
    for (int64_t first = 0; first < channels; first += size) {
      double group_mean = 0.0, group_variance = 0.0;
      for (int64_t c = first; c < first + size; ++c) group_mean += mean_of(c);
      group_mean /= static_cast<double>(size);
      for (int64_t c = first; c < first + size; ++c) {
        const double step = mean_of(c) - group_mean;
        group_variance += variance[c] + step * step;
      }
      const double rstd2 = 1.0 / (group_variance / static_cast<double>(size) + eps_);
      double total = 0.0, product = 0.0;  // sums of u and of u (x - group mean)
      for (int64_t c = first; c < first + size; ++c) {
        double sum = 0.0, centered = 0.0;
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
          const float* part = sums(context, image * chunks_ + chunk);
          sum += part[c];
          centered += part[channels + c];
        }
        total += a[c] * sum;
        product += a[c] * (centered + (mean_of(c) - group_mean) * sum);
      }
      const double values = static_cast<double>(size * shape_.pixels());
      const double group_slope = rstd2 * product / values;
      for (int64_t c = first; c < first + size; ++c) {
        slope[c] = static_cast<float>(group_slope);
        offset[c] = static_cast<float>(total / values + group_slope * (mean_of(c) - group_mean));
      }
    }
  }

  void apply_chunk(const RunContext& context, int64_t task) const {
    const int64_t image = task / chunks_, channels = shape_.channels;
    const float* x = context.input(x_) + image * shape_.floats();
    const float* residual =
        residual_ < 0 ? nullptr : context.input(residual_) + image * residual_floats_;
    const float* slope = coefficients(context, image);
    float* dx = context.output(dx_) + image * shape_.floats();
    for_runs(residual_sharing_, task % chunks_, [&](int64_t row, int64_t pixels) {
      const int64_t at = row * shape_.width * channels;
      SharedGradient added = at_row(residual, residual_sharing_, row, shape_.width, channels);
      added.scale *= residual_scale_;
      ADM_RT_DISPATCH(norm_backward_apply(pixels, channels, x + at, affine(context, image),
                                          stats(context, image), slope, slope + channels, added,
                                          dx + at));
    });
  }

  int x_, stats_, affine_, grad_, residual_, modulation_, dx_;
  Shape shape_;
  int64_t groups_, mode_, offset_;
  double eps_;
  float residual_scale_;
  bool silu_ = false;
  Sharing grad_sharing_, residual_sharing_;
  int64_t grad_floats_ = 0, residual_floats_ = 0, modulation_floats_ = 0;
  int64_t chunk_rows_ = 1, chunks_ = 1;
};

// average_backward: y = add + the gradient of an average over blocks of pixels. Inputs: grad {h, w,
// M}, of which C channels from `offset` on are taken; add {H, W, C}?. Output: y {H, W, C}. With {1,
// 1, M} it is the backward pass of a mean over all pixels.
class AverageBackward : public Op {
 public:
  explicit AverageBackward(const OpArguments& arguments)
      : grad_(arguments.input("grad")),
        add_(arguments.optional_input("add")),
        y_(arguments.output("y")),
        shape_(arguments.output_shape(y_)),
        small_(arguments.input_shape(grad_)),
        offset_(arguments.integer("offset", 0)),
        sharing_(sharing(arguments, "grad", small_, shape_)) {
    ADM_RT_CHECK(offset_ >= 0 && offset_ + shape_.channels <= small_.channels,
                 "average_backward: offset=", offset_, ", grad is ", to_string(small_), ", y is ",
                 to_string(shape_));
    ADM_RT_CHECK(add_ < 0 || arguments.input_shape(add_) == shape_, "average_backward: add is not ",
                 to_string(shape_));
  }

  void run(const RunContext& context) const override {
    const int64_t row_values = shape_.width * shape_.channels;
    const int64_t grain = std::max<int64_t>(1, kChunkValues / row_values);
    parallel_for(context.batch * shape_.height, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / shape_.height, row = task % shape_.height;
        const float* grad = context.input(grad_) + image * small_.floats() + offset_;
        const float* add = add_ < 0 ? nullptr : context.input(add_) + task * row_values;
        ADM_RT_DISPATCH(
            add_shared_gradient(shape_.width, shape_.channels, add, small_.channels,
                                at_row(grad, sharing_, row, shape_.width, small_.channels),
                                context.output(y_) + task * row_values));
      }
    });
  }

 private:
  int grad_, add_, y_;
  Shape shape_, small_;
  int64_t offset_;
  Sharing sharing_;
};

ADM_RT_ENGINE_OP("norm_backward", NormBackward);
ADM_RT_ENGINE_OP("average_backward", AverageBackward);

}  // namespace
}  // namespace adm_rt::engine
