// A network as a list of ops over buffers of one arena, run without Python, torch or allocation.
//
// Built by adm_rt/engines/lowering.py: buffers and ops are added in the order of execution, then
// finish() gives every buffer its place in the arena (buffers whose lifetimes do not meet share
// memory) and every op its place in the packed weights. After that a plan is constant: any number
// of threads may run it, each with an arena of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/cpu_isa.h"
#include "engine/op.h"

namespace adm_rt::engine {

class Plan {
 public:
  using Ids = std::map<std::string, int>;

  Plan();
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Build. All throw std::invalid_argument; ids come from buffer() and input().
  int buffer(const Shape& shape);
  int input(const std::string& name, const Shape& shape);
  void output(const std::string& name, int id);
  int add(const std::string& op, const Ids& inputs, const Ids& outputs,
          const OpArguments::Attributes& attributes,
          const OpArguments::WeightShapes& weight_shapes);  // -> index of the op
  void finish();

  // After finish().
  size_t packed_bytes() const;
  size_t arena_bytes(int64_t batch) const;  // buffers and scratch of a run
  size_t thread_bytes() const;              // scratch of each thread of a run, at most
  // Throws unless `shapes` are the ones that the op was added with.
  void check_weights(int op, const OpArguments::WeightShapes& shapes) const;
  // Packs one op's raw weights into its place in `blob`; several threads may pack different ops.
  void pack(int op, const Weights& weights, float* blob) const;
  // Runs the plan. inputs, outputs: by name, dense [batch, floats]. blob: packed weights. poll: is
  // called between ops (and may throw, which ends the run); op_seconds: when given, the time of
  // each op is added to its element.
  void run(int64_t batch, const std::map<std::string, const float*>& inputs,
           const std::map<std::string, float*>& outputs, const float* blob,
           const std::function<void()>& poll, double* op_seconds = nullptr) const;

  struct OpInfo {
    std::string op;
    std::string shapes;  // "64x64x192 -> 64x64x192"
    double flops;        // of one image
    size_t packed_bytes;
  };
  std::vector<OpInfo> ops() const;
  const std::map<std::string, int>& input_ids() const { return inputs_; }
  const std::map<std::string, int>& output_ids() const { return outputs_; }
  const Shape& shape(int id) const;
  int op_count() const { return static_cast<int>(nodes_.size()); }
  CpuIsa isa() const { return isa_; }

 private:
  struct Buffer {
    Shape shape;
    int first = -1;  // index of the op that writes it; -1 for inputs
    int last = -1;   // last op that reads it
    bool written = false;
    size_t offset = 0;  // floats per image
    size_t floats = 0;  // per image, rounded up to kAlignment
  };
  struct Node {
    OpArguments arguments;
    std::unique_ptr<Op> op;
    std::vector<int> inputs, outputs;  // buffer ids by slot
    size_t packed_offset = 0;          // floats
    size_t packed_floats = 0;
  };

  Buffer& checked(int id, const char* what);
  void place_buffers();
  size_t scratch_floats(int64_t batch) const;

  const CpuIsa isa_;
  bool finished_ = false;
  std::vector<Buffer> buffers_;
  std::vector<Node> nodes_;
  std::map<std::string, int> inputs_, outputs_;
  size_t packed_floats_ = 0;
  size_t arena_floats_ = 0;  // per image
};

}  // namespace adm_rt::engine
