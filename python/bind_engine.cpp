// adm_rt._C.Plan, PackedWeights and run_engine_op: the native engine. NumPy float32 arrays.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/thread_pool.h"
#include "engine/arena.h"
#include "engine/op.h"
#include "engine/ops/thread_scratch.h"
#include "engine/packed_weights.h"
#include "engine/plan.h"

namespace py = pybind11;
using adm_rt::throw_invalid_argument;
using adm_rt::engine::kAlignment;
using adm_rt::engine::MemoryBlock;
using adm_rt::engine::Op;
using adm_rt::engine::OpArguments;
using adm_rt::engine::Plan;
using adm_rt::engine::RunContext;
using adm_rt::engine::Shape;
using adm_rt::engine::Weights;

namespace {

using Array = py::array_t<float, py::array::c_style>;
using Arrays = std::map<std::string, Array>;
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t>;

constexpr auto kPollInterval = std::chrono::milliseconds(10);

Shape to_shape(const ShapeTuple& sides) {
  return {std::get<0>(sides), std::get<1>(sides), std::get<2>(sides)};
}

// Packed weights of a plan: anonymous memory that is packed into, or a file that was. Python sees
// the bytes through the buffer protocol.
class PackedWeights {
 public:
  explicit PackedWeights(size_t bytes) : block_(bytes) {}
  PackedWeights(const std::string& path, size_t offset, size_t bytes)
      : block_(path, offset, bytes) {}

  float* floats() const { return block_.floats(); }
  const MemoryBlock& block() const { return block_; }

 private:
  MemoryBlock block_;
};

// Raises KeyboardInterrupt (or what a signal handler raises) from inside a run. Only now and then:
// taking the GIL may wait for another thread.
class SignalPoll {
 public:
  void operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now < next_) return;
    next_ = now + kPollInterval;
    py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

 private:
  std::chrono::steady_clock::time_point next_ = std::chrono::steady_clock::now() + kPollInterval;
};

void check_array(const std::string& name, const py::array& array, int64_t batch, int64_t floats) {
  if (array.size() != batch * floats) {
    throw_invalid_argument(name, " has ", array.size(), " elements; ", batch, " images need ",
                           batch, " x ", floats);
  }
}

std::vector<double> run_plan(const Plan& plan, int64_t batch, const Arrays& inputs, Arrays& outputs,
                             const PackedWeights& blob, bool profile) {
  if (blob.block().bytes() < plan.packed_bytes()) {
    throw_invalid_argument("weights have ", blob.block().bytes(), " bytes; the plan needs ",
                           plan.packed_bytes());
  }
  std::map<std::string, const float*> in;
  std::map<std::string, float*> out;
  for (const auto& [name, array] : inputs) {
    const auto id = plan.input_ids().find(name);
    if (id == plan.input_ids().end()) throw_invalid_argument("the plan has no input ", name);
    check_array(name, array, batch, plan.shape(id->second).floats());
    in[name] = array.data();
  }
  for (auto& [name, array] : outputs) {
    const auto id = plan.output_ids().find(name);
    if (id == plan.output_ids().end()) throw_invalid_argument("the plan has no output ", name);
    check_array(name, array, batch, plan.shape(id->second).floats());
    out[name] = array.mutable_data();
  }
  std::vector<double> seconds(profile ? static_cast<size_t>(plan.op_count()) : 0);
  py::gil_scoped_release release;
  SignalPoll poll;
  const std::function<void()> check = [&poll] { poll(); };
  const adm_rt::InterruptScope interrupts(&check);
  plan.run(batch, in, out, blob.floats(), check, profile ? seconds.data() : nullptr);
  return seconds;
}

void pack_op(const Plan& plan, int op, const Arrays& weights, const PackedWeights& blob) {
  if (blob.block().bytes() < plan.packed_bytes()) {
    throw_invalid_argument("weights have too few bytes: ", blob.block().bytes());
  }
  plan.check_weights(op, [&] {
    OpArguments::WeightShapes shapes;
    for (const auto& [name, array] : weights) {
      shapes[name] = {array.shape(), array.shape() + array.ndim()};
    }
    return shapes;
  }());
  Weights raw;
  for (const auto& [name, array] : weights) raw[name] = array.data();
  py::gil_scoped_release release;
  plan.pack(op, raw, blob.floats());
}

// ---- One op alone, for tests ----

constexpr size_t kGuardFloats = 64;  // on each side of every buffer; keeps 64-byte alignment
constexpr uint32_t kGuardBits = 0x7fc0dead;

// A buffer between canaries, filled with a signalling pattern: NaN.
class GuardedBuffer {
 public:
  GuardedBuffer(std::string name, size_t floats)
      : name_(std::move(name)),
        floats_(floats),
        block_((floats + 2 * kGuardFloats) * sizeof(float)) {
    uint32_t* const words = static_cast<uint32_t*>(block_.data());
    for (size_t i = 0; i < floats + 2 * kGuardFloats; ++i) words[i] = kGuardBits;
  }
  float* data() const { return block_.floats() + kGuardFloats; }
  void check(const std::string& op) const {
    const uint32_t* const words = static_cast<const uint32_t*>(block_.data());
    for (size_t i = 0; i < kGuardFloats; ++i) {
      if (words[i] != kGuardBits || words[kGuardFloats + floats_ + i] != kGuardBits) {
        throw std::runtime_error(op + " wrote outside " + name_);
      }
    }
  }

 private:
  std::string name_;
  size_t floats_;
  MemoryBlock block_;
};

std::map<std::string, Array> run_op(const std::string& name, const Arrays& inputs,
                                    const std::map<std::string, ShapeTuple>& outputs,
                                    const std::map<std::string, double>& attributes,
                                    const Arrays& weights) {
  if (inputs.empty()) throw_invalid_argument(name, ": give at least one input");
  const int64_t batch = inputs.begin()->second.ndim() > 0 ? inputs.begin()->second.shape(0) : 0;
  OpArguments::Slots input_slots, output_slots;
  std::vector<GuardedBuffer> buffers;
  std::vector<const float*> input_pointers;
  std::vector<float*> output_pointers;
  buffers.reserve(inputs.size() + outputs.size() + 2);
  for (const auto& [key, array] : inputs) {
    if (array.ndim() != 4 || array.shape(0) != batch || batch < 1) {
      throw_invalid_argument(name, ": input ", key, " must be [N, H, W, C], N alike and positive");
    }
    input_slots.emplace_back(key, Shape{array.shape(1), array.shape(2), array.shape(3)});
    buffers.emplace_back("input " + key, static_cast<size_t>(array.size()));
    std::memcpy(buffers.back().data(), array.data(),
                static_cast<size_t>(array.size()) * sizeof(float));
    input_pointers.push_back(buffers.back().data());
  }
  std::map<std::string, Array> results;
  for (const auto& [key, sides] : outputs) {
    const Shape shape = to_shape(sides);
    output_slots.emplace_back(key, shape);
    buffers.emplace_back("output " + key, static_cast<size_t>(shape.floats() * batch));
    output_pointers.push_back(buffers.back().data());
  }
  OpArguments::WeightShapes weight_shapes;
  Weights raw;
  for (const auto& [key, array] : weights) {
    weight_shapes[key] = {array.shape(), array.shape() + array.ndim()};
    raw[key] = array.data();
  }
  const std::unique_ptr<Op> op =
      make_op(OpArguments(name, input_slots, output_slots, attributes, std::move(weight_shapes)));
  buffers.emplace_back("its packed weights", static_cast<size_t>(op->packed_floats()));
  const GuardedBuffer& packed = buffers.back();
  {
    py::gil_scoped_release release;
    op->pack(raw, packed.data());
    buffers.emplace_back("its scratch", static_cast<size_t>(op->scratch_floats(batch)));
    RunContext context;
    context.batch = batch;
    context.inputs = input_pointers.data();
    context.outputs = output_pointers.data();
    context.packed = packed.data();
    context.scratch = buffers.back().data();
    op->run(context);
  }
  for (const GuardedBuffer& buffer : buffers) buffer.check(name);
  size_t slot = 0;
  for (const auto& [key, array] : inputs) {
    if (std::memcmp(input_pointers[slot++], array.data(),
                    static_cast<size_t>(array.size()) * sizeof(float)) != 0) {
      throw std::runtime_error(name + " changed its input " + key);
    }
  }
  slot = 0;
  for (const auto& [key, sides] : outputs) {
    const Shape shape = to_shape(sides);
    Array result({batch, shape.height, shape.width, shape.channels});
    std::memcpy(result.mutable_data(), output_pointers[slot++],
                static_cast<size_t>(shape.floats() * batch) * sizeof(float));
    results[key] = std::move(result);
  }
  return results;
}

py::list describe_ops(const Plan& plan) {
  py::list rows;
  for (const Plan::OpInfo& info : plan.ops()) {
    py::dict row;
    row["op"] = info.op;
    row["shapes"] = info.shapes;
    row["flops"] = info.flops;
    row["packed_bytes"] = info.packed_bytes;
    rows.append(row);
  }
  return rows;
}

}  // namespace

void bind_engine(py::module_& module) {
  using py::arg;
  py::class_<PackedWeights, std::shared_ptr<PackedWeights>>(
      module, "PackedWeights", py::buffer_protocol(), "Packed weights of a plan, as bytes.")
      .def(py::init<size_t>(), arg("bytes"), "Zeroed memory; MemoryError when there is none.")
      .def(py::init<const std::string&, size_t, size_t>(), arg("path"), arg("offset"), arg("bytes"),
           py::call_guard<py::gil_scoped_release>(),
           "Read from a file; RuntimeError when it is too short or unreadable.")
      .def(
          "checksum",
          [](const PackedWeights& w) {
            py::gil_scoped_release release;
            return adm_rt::engine::checksum(w.block().data(), w.block().bytes() / 8 * 8);
          },
          "64 bits that any damage changes.")
      .def_property_readonly("nbytes", [](const PackedWeights& w) { return w.block().bytes(); })
      .def_buffer([](PackedWeights& w) {
        return py::buffer_info(static_cast<uint8_t*>(w.block().data()),
                               static_cast<py::ssize_t>(w.block().bytes()));
      });

  py::class_<Plan>(module, "Plan", "See csrc/engine/plan.h. Shapes are (height, width, channels).")
      .def(py::init<>())
      .def(
          "buffer", [](Plan& p, const ShapeTuple& shape) { return p.buffer(to_shape(shape)); },
          arg("shape"))
      .def(
          "input",
          [](Plan& p, const std::string& name, const ShapeTuple& shape) {
            return p.input(name, to_shape(shape));
          },
          arg("name"), arg("shape"))
      .def("output", &Plan::output, arg("name"), arg("id"))
      .def("add", &Plan::add, arg("op"), arg("inputs"), arg("outputs"),
           arg("attributes") = OpArguments::Attributes(),
           arg("weight_shapes") = OpArguments::WeightShapes(), "Returns the index of the op.")
      .def("finish", &Plan::finish)
      .def("shape",
           [](const Plan& p, int id) {
             const Shape& shape = p.shape(id);
             return ShapeTuple(shape.height, shape.width, shape.channels);
           })
      .def_property_readonly("inputs", &Plan::input_ids)
      .def_property_readonly("outputs", &Plan::output_ids)
      .def("__len__", &Plan::op_count)
      .def("ops", &describe_ops, "One dict per op: op, shapes, flops of an image, packed_bytes.")
      .def_property_readonly("packed_bytes", &Plan::packed_bytes)
      .def("arena_bytes", &Plan::arena_bytes, arg("batch"))
      .def_property_readonly("thread_bytes", &Plan::thread_bytes)
      .def("pack", &pack_op, arg("op"), arg("weights"), arg("blob"))
      .def("run", &run_plan, arg("batch"), arg("inputs"), arg("outputs").noconvert(), arg("blob"),
           arg("profile") = false,
           "inputs, outputs: name -> float32 [batch, ...], C-contiguous; outputs are written. "
           "Releases the GIL and polls signals. Returns the seconds of each op with profile.");

  module.def("run_engine_op", &run_op, arg("name"), arg("inputs"), arg("outputs"),
             arg("attributes") = std::map<std::string, double>(), arg("weights") = Arrays(),
             "Runs one op of the native plan: inputs name -> [N, H, W, C], outputs name -> (H, W, "
             "C), weights name -> array. Outputs, scratch and packed weights start as NaN; "
             "RuntimeError when the op writes outside of them.");
  module.def("engine_ops", &adm_rt::engine::op_names, "Names of the ops of the native plan.");
  module.def("engine_arena_bytes", &adm_rt::engine::arena_bytes_held,
             "Bytes of all arenas of this process, free and in use.");
  module.def("engine_scratch_bytes", &adm_rt::engine::thread_scratch_bytes_held,
             "Bytes that the threads of this process keep as scratch memory of the ops.");
}
