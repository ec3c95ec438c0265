// One op of the native plan: made once from what the lowering says, run many times.
//
// An op is a class derived from Op in csrc/engine/ops/<name>.cpp that registers itself with
// ADM_RT_ENGINE_OP; nothing else has to know of it. Images are NHWC float32.
//
// Every element of an output is computed by the same operations in the same order, whatever the
// batch, the number of threads or its neighbours: blockings and algorithms depend on the layer's
// shape alone.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace adm_rt::engine {

// Of one image: [height, width, channels], channels innermost.
struct Shape {
  int64_t height = 1;
  int64_t width = 1;
  int64_t channels = 0;

  int64_t pixels() const { return height * width; }
  int64_t floats() const { return height * width * channels; }
};
inline bool operator==(const Shape& a, const Shape& b) {
  return a.height == b.height && a.width == b.width && a.channels == b.channels;
}
inline bool operator!=(const Shape& a, const Shape& b) { return !(a == b); }
std::string to_string(const Shape& shape);  // "64x64x192"

// What the lowering says of one op. A lookup that fails throws std::invalid_argument with the names
// of the op and of the argument.
class OpArguments {
 public:
  using Slots = std::vector<std::pair<std::string, Shape>>;
  using Attributes = std::map<std::string, double>;
  using WeightShapes = std::map<std::string, std::vector<int64_t>>;

  OpArguments(std::string op, Slots inputs, Slots outputs, Attributes attributes,
              WeightShapes weight_shapes);

  const std::string& op() const { return op_; }

  // Slots for RunContext::input and output.
  int input(const std::string& name) const;
  int optional_input(const std::string& name) const;  // -1 when not given
  int output(const std::string& name) const;
  int optional_output(const std::string& name) const;
  const Shape& input_shape(int slot) const;
  const Shape& output_shape(int slot) const;

  const std::vector<int64_t>& weight_shape(const std::string& name) const;
  bool has_weight(const std::string& name) const;
  const WeightShapes& weight_shapes() const { return weight_shapes_; }

  double number(const std::string& name) const;
  double number(const std::string& name, double fallback) const;
  int64_t integer(const std::string& name) const;
  int64_t integer(const std::string& name, int64_t fallback) const;

  // The name of an input, output, attribute or weight that nothing has asked for, or "".
  std::string unused() const;

 private:
  int find(const Slots& slots, const std::string& name) const;
  void mark(const std::string& name) const { used_.insert_or_assign(name, true); }

  std::string op_;
  Slots inputs_, outputs_;
  Attributes attributes_;
  WeightShapes weight_shapes_;
  mutable std::map<std::string, bool> used_;
};

// Raw weights by name: dense, in the published layout (convolution [Co, Ci, 3, 3], linear
// [Co, Ci]).
using Weights = std::map<std::string, const float*>;

struct RunContext {
  int64_t batch = 0;
  const float* const* inputs = nullptr;
  float* const* outputs = nullptr;
  const float* packed = nullptr;  // this op's packed weights, 64-byte aligned
  // scratch_floats(batch) of them, shared by all ops one after the other, 64-byte aligned.
  float* scratch = nullptr;

  // Dense [batch, height, width, channels], 64-byte aligned; nullptr for slot -1.
  const float* input(int slot) const { return slot < 0 ? nullptr : inputs[slot]; }
  float* output(int slot) const { return slot < 0 ? nullptr : outputs[slot]; }
};

class Op {
 public:
  virtual ~Op() = default;

  // Floats of packed weights, for the instruction set in use when the op was made.
  virtual int64_t packed_floats() const { return 0; }
  // Called once; other ops may be packing on other threads.
  virtual void pack(const Weights& weights, float* packed) const {
    (void)weights;
    (void)packed;
  }
  virtual int64_t scratch_floats(int64_t batch) const {
    (void)batch;
    return 0;
  }
  // What each thread that runs the op takes beside that, at most (engine/ops/thread_scratch.h).
  virtual int64_t thread_floats() const { return 0; }
  // May be called from several threads at a time, on different buffers; uses parallel_for inside.
  // It may be left by an exception of parallel_for, when the user interrupts.
  virtual void run(const RunContext& context) const = 0;
  // Floating-point operations of the direct algorithm, for effective GFLOP/s.
  virtual double flops(int64_t batch) const {
    (void)batch;
    return 0;
  }
};

using OpFactory = std::function<std::unique_ptr<Op>(const OpArguments&)>;

// The op named arguments.op(); throws std::invalid_argument for an unknown name and for an argument
// that the op has not asked for.
std::unique_ptr<Op> make_op(const OpArguments& arguments);
std::vector<std::string> op_names();

struct OpRegistration {
  OpRegistration(const char* name, OpFactory factory);
};

}  // namespace adm_rt::engine

// In csrc/engine/ops/<name>.cpp, inside namespace adm_rt::engine:
//   ADM_RT_ENGINE_OP("conv3x3", Conv3x3);   // class Conv3x3 : public Op { explicit
//                                           // Conv3x3(const OpArguments& arguments); ... };
#define ADM_RT_ENGINE_OP(name, Class)                                       \
  static const ::adm_rt::engine::OpRegistration k##Class##Registered(       \
      name, [](const ::adm_rt::engine::OpArguments& arguments) {            \
        return std::unique_ptr<::adm_rt::engine::Op>(new Class(arguments)); \
      })
