// attention_backward: the gradient of attention with respect to qkv, from qkv, the gradient of its
// result and its probabilities P = softmax(q k^T / sqrt(d)). Per head:
//   dv = P^T grad,  dP = grad v^T,  dS = P (dP - rowsum(P dP)) / sqrt(d),  dq = dS k,  dk = dS^T q
#include <algorithm>

#include "common/check.h"
#include "common/cpu_isa.h"
#include "common/thread_pool.h"
#include "engine/op.h"
#include "engine/ops/attention_backward_kernels.h"
#include "engine/ops/attention_probabilities.h"
#include "engine/ops/thread_scratch.h"

namespace adm_rt::engine {
namespace {

// Queries of one task. dk and dv are sums over all queries: where there are more tasks than one per
// head, each makes a part of them, and the parts are added in order.
constexpr int64_t kTaskQueries = 384;
constexpr int64_t kGrainRows = 64;

// Inputs: qkv {.., .., 3 * heads * d} with T pixels; grad {.., .., heads * d} with Tq <= T pixels,
// the gradient of the result of the first Tq queries; p, as attention keeps it. Output: dqkv like
// qkv; queries that did not ask get zeros. Attributes: heads; order 0 (legacy) or 1 (new), as in
// attention.
class AttentionBackward : public Op {
 public:
  explicit AttentionBackward(const OpArguments& arguments)
      : qkv_(arguments.input("qkv")),
        grad_(arguments.input("grad")),
        p_(arguments.input("p")),
        dqkv_(arguments.output("dqkv")),
        heads_(arguments.integer("heads")),
        order_(arguments.integer("order", 0)) {
    const Shape& qkv = arguments.input_shape(qkv_);
    const Shape& grad = arguments.input_shape(grad_);
    ADM_RT_CHECK(order_ == 0 || order_ == 1, "attention_backward: order=", order_,
                 " is not 0 (legacy) or 1 (new)");
    ADM_RT_CHECK(heads_ >= 1 && grad.channels >= heads_ && grad.channels % heads_ == 0,
                 "attention_backward: ", heads_, " heads do not divide the ", grad.channels,
                 " channels of grad");
    ADM_RT_CHECK(qkv.channels == 3 * grad.channels, "attention_backward: qkv has ", qkv.channels,
                 " channels, not 3 * ", grad.channels);
    ADM_RT_CHECK(arguments.output_shape(dqkv_) == qkv, "attention_backward: dqkv is ",
                 to_string(arguments.output_shape(dqkv_)), ", qkv is ", to_string(qkv));
    keys_ = qkv.pixels();
    queries_ = grad.pixels();
    channels_ = grad.channels;
    ADM_RT_CHECK(queries_ >= 1 && queries_ <= keys_, "attention_backward: grad has ", queries_,
                 " positions, which is not in [1, ", keys_, "]");
    p_row_ =
        probability_row("attention_backward", arguments.input_shape(p_), heads_, keys_, queries_);
    tasks_ = (queries_ + kTaskQueries - 1) / kTaskQueries;
  }

  int64_t scratch_floats(int64_t batch) const override {
    return tasks_ == 1 ? 0 : batch * heads_ * tasks_ * part_floats();
  }

  int64_t thread_floats() const override {
    return ADM_RT_DISPATCH(attention_backward_scratch(channels_ / heads_, keys_));
  }

  double flops(int64_t batch) const override {
    return 8.0 * static_cast<double>(batch * channels_) * static_cast<double>(keys_ * queries_);
  }

  void run(const RunContext& context) const override {
    const int64_t pairs = context.batch * heads_;
    const int64_t floats = thread_floats();
    parallel_for(pairs * tasks_, 1, [&](int64_t begin, int64_t end) {
      float* scratch = thread_scratch(floats);
      for (int64_t index = begin; index < end; ++index) {
        const int64_t task = index % tasks_;
        AttentionBackwardHead one = head(context, index / tasks_);
        if (tasks_ > 1) {
          one.dk = context.scratch + index * part_floats();
          one.dv = one.dk + part_floats() / 2;
          one.partial_row = channels_ / heads_;
        }
        ADM_RT_DISPATCH(attention_backward_queries(
            one, task * kTaskQueries, std::min(queries_, (task + 1) * kTaskQueries), scratch));
      }
    });
    if (tasks_ > 1) add_up(context, pairs);
    if (queries_ < keys_) clear_silent_queries(context, pairs);
  }

 private:
  // dk and dv of one head, dense.
  int64_t part_floats() const { return 2 * keys_ * (channels_ / heads_); }

  AttentionBackwardHead head(const RunContext& context, int64_t pair) const {
    const int64_t image = pair / heads_, head = pair % heads_, d = channels_ / heads_;
    const int64_t start = image * keys_ * 3 * channels_ + (order_ == 0 ? head * 3 * d : head * d);
    const int64_t step = order_ == 0 ? d : channels_;
    AttentionBackwardHead one;
    one.q = context.input(qkv_) + start;
    one.k = one.q + step;
    one.v = one.k + step;
    one.grad = context.input(grad_) + image * queries_ * channels_ + head * d;
    one.p = context.input(p_) + pair * keys_ * p_row_;
    one.p_row = p_row_;
    one.dq = context.output(dqkv_) + start;
    one.dk = one.dq + step;
    one.dv = one.dk + step;
    one.row = one.partial_row = 3 * channels_;
    one.grad_row = channels_;
    one.head_dim = d;
    one.keys = keys_;
    return one;
  }

  void add_up(const RunContext& context, int64_t pairs) const {
    const int64_t d = channels_ / heads_;
    parallel_for(pairs * keys_, kGrainRows, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t pair = begin / keys_, key = begin % keys_;
        const int64_t rows = std::min(end - begin, keys_ - key);
        const AttentionBackwardHead one = head(context, pair);
        const float* parts = context.scratch + pair * tasks_ * part_floats() + key * d;
        ADM_RT_DISPATCH(
            add_parts(rows, d, parts, tasks_, part_floats(), d, one.dk + key * one.row, one.row));
        ADM_RT_DISPATCH(add_parts(rows, d, parts + part_floats() / 2, tasks_, part_floats(), d,
                                  one.dv + key * one.row, one.row));
        begin += rows;
      }
    });
  }

  void clear_silent_queries(const RunContext& context, int64_t pairs) const {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const AttentionBackwardHead one = head(context, pair);
      for (int64_t query = queries_; query < keys_; ++query) {
        std::fill_n(one.dq + query * one.row, one.head_dim, 0.0f);
      }
    }
  }

  int qkv_, grad_, p_, dqkv_;
  int64_t heads_, order_;
  int64_t keys_ = 0;
  int64_t queries_ = 0;
  int64_t channels_ = 0;
  int64_t p_row_ = 0;
  int64_t tasks_ = 1;
};

ADM_RT_ENGINE_OP("attention_backward", AttentionBackward);

}  // namespace
}  // namespace adm_rt::engine
