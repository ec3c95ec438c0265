// embedding_lookup: one row of a table, and what is to be added to it.
#include <algorithm>
#include <cmath>

#include "common/check.h"
#include "engine/op.h"

namespace adm_rt::engine {
namespace {

// Inputs: index {1, 1, 1} (a float that holds a whole number in [0, rows)), add {1, 1, E}?. Output:
// y {1, 1, E} = table[index] (+ add). Weight: table [rows, E]. run() throws std::invalid_argument
// for an index that the table does not have.
class EmbeddingLookup : public Op {
 public:
  explicit EmbeddingLookup(const OpArguments& arguments)
      : index_(arguments.input("index")),
        add_(arguments.optional_input("add")),
        y_(arguments.output("y")) {
    ADM_RT_CHECK(arguments.input_shape(index_).floats() == 1, "embedding_lookup: index is ",
                 to_string(arguments.input_shape(index_)), ", not 1x1x1");
    const std::vector<int64_t>& table = arguments.weight_shape("table");
    ADM_RT_CHECK(table.size() == 2 && table[0] >= 1, "embedding_lookup: table has ", table.size(),
                 " dimensions; [rows, E] is wanted, with at least one row");
    rows_ = table[0];
    channels_ = table[1];
    const Shape wanted = {1, 1, channels_};
    ADM_RT_CHECK(arguments.output_shape(y_) == wanted, "embedding_lookup: y is ",
                 to_string(arguments.output_shape(y_)), ", the table has rows of ", channels_);
    ADM_RT_CHECK(add_ < 0 || arguments.input_shape(add_) == wanted, "embedding_lookup: add is not ",
                 to_string(wanted));
  }

  int64_t packed_floats() const override { return rows_ * channels_; }

  void pack(const Weights& weights, float* packed) const override {
    std::copy_n(weights.at("table"), rows_ * channels_, packed);
  }

  void run(const RunContext& context) const override {
    for (int64_t image = 0; image < context.batch; ++image) {
      const float index = context.input(index_)[image];
      // Written so that NaN fails too.
      ADM_RT_CHECK(index >= 0.0f && index < static_cast<float>(rows_) && index == std::floor(index),
                   "embedding_lookup: index=", index, " of image ", image,
                   " is not a whole number in [0, ", rows_, ")");
      const float* row = context.packed + static_cast<int64_t>(index) * channels_;
      float* y = context.output(y_) + image * channels_;
      std::copy_n(row, channels_, y);
      if (add_ < 0) continue;
      const float* add = context.input(add_) + image * channels_;
      for (int64_t c = 0; c < channels_; ++c) y[c] += add[c];
    }
  }

 private:
  int index_, add_, y_;
  int64_t rows_ = 0;
  int64_t channels_ = 0;
};

ADM_RT_ENGINE_OP("embedding_lookup", EmbeddingLookup);

}  // namespace
}  // namespace adm_rt::engine
