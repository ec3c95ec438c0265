// attention: softmax(q k^T / sqrt(d)) v for every head, on pixels as rows.
#include <algorithm>

#include "common/check.h"
#include "common/cpu_isa.h"
#include "common/thread_pool.h"
#include "engine/op.h"
#include "engine/ops/attention_kernels.h"
#include "engine/ops/attention_probabilities.h"
#include "engine/ops/thread_scratch.h"

namespace adm_rt::engine {
namespace {

// At least this many query blocks of one head go to a thread at once: it packs k and v for them.
constexpr int64_t kBlocksPerTask = 4;

// Input qkv {.., .., 3 * heads * d}, T pixels. Output y {.., .., heads * d} with the first Tq <= T
// pixels. Optional output p: attention_probabilities.h. Attributes: heads; order 0 (legacy: channel
// head * 3d + {q, k, v} * d + i) or 1 (new: channel {q, k, v} * heads * d + head * d + i), as in
// the released checkpoints.
class Attention : public Op {
 public:
  explicit Attention(const OpArguments& arguments)
      : qkv_(arguments.input("qkv")),
        y_(arguments.output("y")),
        p_(arguments.optional_output("p")),
        heads_(arguments.integer("heads")),
        order_(arguments.integer("order", 0)) {
    const Shape& qkv = arguments.input_shape(qkv_);
    const Shape& y = arguments.output_shape(y_);
    ADM_RT_CHECK(order_ == 0 || order_ == 1, "attention: order=", order_,
                 " is not 0 (legacy) or 1 (new)");
    ADM_RT_CHECK(heads_ >= 1 && y.channels >= heads_ && y.channels % heads_ == 0,
                 "attention: ", heads_, " heads do not divide the ", y.channels, " channels of y");
    ADM_RT_CHECK(qkv.channels == 3 * y.channels, "attention: qkv has ", qkv.channels,
                 " channels, not 3 * ", y.channels);
    keys_ = qkv.pixels();
    queries_ = y.pixels();
    channels_ = y.channels;
    ADM_RT_CHECK(queries_ >= 1 && queries_ <= keys_, "attention: y has ", queries_,
                 " positions, which is not in [1, ", keys_, "]");
    if (p_ >= 0) {
      p_row_ = probability_row("attention", arguments.output_shape(p_), heads_, keys_, queries_);
    }
  }

  int64_t thread_floats() const override {
    return ADM_RT_DISPATCH(attention_scratch(channels_ / heads_, keys_, p_ >= 0));
  }

  double flops(int64_t batch) const override {
    return 4.0 * static_cast<double>(batch * channels_) * static_cast<double>(keys_ * queries_);
  }

  void run(const RunContext& context) const override {
    const int64_t pairs = context.batch * heads_;
    const int64_t floats = thread_floats();
    if (queries_ == 1) {
      parallel_for(pairs, 8, [&](int64_t begin, int64_t end) {
        float* scratch = thread_scratch(floats);
        for (int64_t pair = begin; pair < end; ++pair) {
          ADM_RT_DISPATCH(attention_single(head(context, pair), scratch));
        }
      });
      return;
    }
    const int64_t block = ADM_RT_DISPATCH(attention_query_block());
    const int64_t blocks = (queries_ + block - 1) / block;
    parallel_for(pairs * blocks, std::min(blocks, kBlocksPerTask), [&](int64_t begin, int64_t end) {
      float* scratch = thread_scratch(floats);
      int64_t packed = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t pair = task / blocks, first = task % blocks * block;
        const AttentionHead one = head(context, pair);
        if (pair != packed) ADM_RT_DISPATCH(attention_pack(one, scratch));
        packed = pair;
        ADM_RT_DISPATCH(attention_queries(one, first, std::min(queries_, first + block), scratch));
      }
    });
  }

 private:
  AttentionHead head(const RunContext& context, int64_t pair) const {
    const int64_t image = pair / heads_, head = pair % heads_, d = channels_ / heads_;
    const float* qkv = context.input(qkv_) + image * keys_ * 3 * channels_;
    const int64_t step = order_ == 0 ? d : channels_;
    AttentionHead one;
    one.q = qkv + (order_ == 0 ? head * 3 * d : head * d);
    one.k = one.q + step;
    one.v = one.k + step;
    one.out = context.output(y_) + image * queries_ * channels_ + head * d;
    if (p_ >= 0) one.p = context.output(p_) + pair * keys_ * p_row_;
    one.p_row = p_row_;
    one.row = 3 * channels_;
    one.out_row = channels_;
    one.head_dim = d;
    one.keys = keys_;
    one.queries = queries_;
    return one;
  }

  int qkv_, y_, p_;
  int64_t heads_, order_;
  int64_t keys_ = 0;
  int64_t queries_ = 0;
  int64_t channels_ = 0;
  int64_t p_row_ = 0;
};

ADM_RT_ENGINE_OP("attention", Attention);

}  // namespace

int64_t probability_row(const char* op, const Shape& p, int64_t heads, int64_t keys,
                        int64_t queries) {
  ADM_RT_CHECK(
      p.height == heads && p.width == keys && p.channels % 16 == 0 && p.channels >= queries, op,
      ": p is ", to_string(p), ", not ", heads, "x", keys, "xR, R a multiple of 16 and at least ",
      queries);
  return p.channels;
}

}  // namespace adm_rt::engine
