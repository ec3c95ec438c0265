#include "engine/plan.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>

#include "common/check.h"
#include "engine/arena.h"

namespace adm_rt::engine {
namespace {

constexpr size_t kAlignFloats = kAlignment / sizeof(float);
constexpr int64_t kMaxBatch = int64_t{1} << 20;
constexpr int64_t kMaxFloats = int64_t{1} << 40;  // per image: far above anything real

size_t align(size_t floats) { return (floats + kAlignFloats - 1) / kAlignFloats * kAlignFloats; }

}  // namespace

Plan::Plan() : isa_(cpu_isa()) {}

Plan::~Plan() { free_unused_arenas(); }

int Plan::buffer(const Shape& shape) {
  ADM_RT_CHECK(!finished_, "the plan is finished: nothing can be added");
  ADM_RT_CHECK(shape.height > 0 && shape.width > 0 && shape.channels > 0 &&
                   shape.height < kMaxFloats && shape.width < kMaxFloats / shape.height &&
                   shape.channels < kMaxFloats / shape.pixels(),
               "buffer of shape ", to_string(shape), ": every side must be positive");
  Buffer buffer;
  buffer.shape = shape;
  buffer.floats = align(static_cast<size_t>(shape.floats()));
  buffers_.push_back(buffer);
  return static_cast<int>(buffers_.size()) - 1;
}

int Plan::input(const std::string& name, const Shape& shape) {
  ADM_RT_CHECK(inputs_.count(name) == 0, "input ", name, " is there already");
  const int id = buffer(shape);
  buffers_.back().written = true;
  inputs_[name] = id;
  return id;
}

void Plan::output(const std::string& name, int id) {
  ADM_RT_CHECK(!finished_, "the plan is finished: nothing can be added");
  ADM_RT_CHECK(outputs_.count(name) == 0, "output ", name, " is there already");
  ADM_RT_CHECK(checked(id, "output").written, "output ", name, ": no op writes buffer ", id);
  outputs_[name] = id;
}

Plan::Buffer& Plan::checked(int id, const char* what) {
  ADM_RT_CHECK(id >= 0 && id < static_cast<int>(buffers_.size()), what, ": there is no buffer ",
               id);
  return buffers_[static_cast<size_t>(id)];
}

const Shape& Plan::shape(int id) const {
  ADM_RT_CHECK(id >= 0 && id < static_cast<int>(buffers_.size()), "there is no buffer ", id);
  return buffers_[static_cast<size_t>(id)].shape;
}

int Plan::add(const std::string& op, const Ids& inputs, const Ids& outputs,
              const OpArguments::Attributes& attributes,
              const OpArguments::WeightShapes& weight_shapes) {
  ADM_RT_CHECK(!finished_, "the plan is finished: nothing can be added");
  const int index = op_count();
  OpArguments::Slots input_slots, output_slots;
  std::vector<int> input_ids, output_ids;
  for (const auto& [name, id] : inputs) {
    const Buffer& buffer = checked(id, op.c_str());
    ADM_RT_CHECK(buffer.written, op, ": input ", name, ": no op has written buffer ", id);
    input_slots.emplace_back(name, buffer.shape);
    input_ids.push_back(id);
  }
  for (const auto& [name, id] : outputs) {
    const Buffer& buffer = checked(id, op.c_str());
    ADM_RT_CHECK(!buffer.written, op, ": output ", name, ": buffer ", id, " is written already");
    ADM_RT_CHECK(std::count(output_ids.begin(), output_ids.end(), id) == 0, op, ": buffer ", id,
                 " is two of its outputs");
    output_slots.emplace_back(name, buffer.shape);
    output_ids.push_back(id);
  }
  OpArguments arguments(op, std::move(input_slots), std::move(output_slots), attributes,
                        weight_shapes);
  std::unique_ptr<Op> made = make_op(arguments);
  for (const int id : input_ids) buffers_[static_cast<size_t>(id)].last = index;
  for (const int id : output_ids) {
    Buffer& buffer = buffers_[static_cast<size_t>(id)];
    buffer.written = true;
    buffer.first = buffer.last = index;
  }
  nodes_.push_back(
      {std::move(arguments), std::move(made), std::move(input_ids), std::move(output_ids)});
  return index;
}

void Plan::finish() {
  ADM_RT_CHECK(!finished_, "the plan is finished already");
  for (const auto& [name, id] : outputs_) {
    buffers_[static_cast<size_t>(id)].last = op_count();  // read after the last op
  }
  for (Node& node : nodes_) {
    node.packed_offset = packed_floats_;
    node.packed_floats = static_cast<size_t>(node.op->packed_floats());
    packed_floats_ += align(node.packed_floats);
  }
  place_buffers();
  finished_ = true;
}

// Largest first, each at the lowest place that is free while it lives. Offsets count floats of one
// image: with a batch, offset and size of every buffer grow alike, so what is apart stays apart.
void Plan::place_buffers() {
  std::vector<size_t> order(buffers_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [this](size_t a, size_t b) { return buffers_[a].floats > buffers_[b].floats; });
  std::vector<const Buffer*> placed, meeting;
  for (const size_t id : order) {
    Buffer& buffer = buffers_[id];
    if (!buffer.written) continue;  // never used
    meeting.clear();
    for (const Buffer* other : placed) {
      if (buffer.first <= other->last && other->first <= buffer.last) meeting.push_back(other);
    }
    std::sort(meeting.begin(), meeting.end(),
              [](const Buffer* a, const Buffer* b) { return a->offset < b->offset; });
    size_t offset = 0;
    for (const Buffer* other : meeting) {
      if (offset + buffer.floats <= other->offset) break;
      offset = std::max(offset, other->offset + other->floats);
    }
    buffer.offset = offset;
    arena_floats_ = std::max(arena_floats_, offset + buffer.floats);
    placed.push_back(&buffer);
  }
}

size_t Plan::packed_bytes() const {
  ADM_RT_CHECK(finished_, "the plan is not finished");
  return packed_floats_ * sizeof(float);
}

size_t Plan::scratch_floats(int64_t batch) const {
  size_t most = 0;
  for (const Node& node : nodes_) {
    most = std::max(most, static_cast<size_t>(node.op->scratch_floats(batch)));
  }
  return align(most);
}

size_t Plan::arena_bytes(int64_t batch) const {
  ADM_RT_CHECK(finished_, "the plan is not finished");
  ADM_RT_CHECK(batch >= 1 && batch <= kMaxBatch, "batch=", batch, " is not in [1, ", kMaxBatch,
               "]");
  return (arena_floats_ * static_cast<size_t>(batch) + scratch_floats(batch)) * sizeof(float);
}

size_t Plan::thread_bytes() const {
  int64_t most = 0;
  for (const Node& node : nodes_) most = std::max(most, node.op->thread_floats());
  return static_cast<size_t>(most) * sizeof(float);
}

void Plan::check_weights(int op, const OpArguments::WeightShapes& shapes) const {
  ADM_RT_CHECK(op >= 0 && op < op_count(), "op ", op, " is not in [0, ", op_count(), ")");
  const OpArguments& arguments = nodes_[static_cast<size_t>(op)].arguments;
  for (const auto& [name, shape] : arguments.weight_shapes()) {
    const auto given = shapes.find(name);
    ADM_RT_CHECK(given != shapes.end(), arguments.op(), ": weight ", name, " is missing");
    ADM_RT_CHECK(given->second == shape, arguments.op(), ": weight ", name,
                 " has another shape than the plan was made with");
  }
}

void Plan::pack(int op, const Weights& weights, float* blob) const {
  ADM_RT_CHECK(finished_, "the plan is not finished");
  ADM_RT_CHECK(op >= 0 && op < op_count(), "op ", op, " is not in [0, ", op_count(), ")");
  ADM_RT_CHECK(cpu_isa() == isa_, "the plan was made for ", name_of(isa_));
  const Node& node = nodes_[static_cast<size_t>(op)];
  for (const auto& [name, shape] : node.arguments.weight_shapes()) {
    ADM_RT_CHECK(weights.count(name) == 1, node.arguments.op(), ": weight ", name, " is missing");
  }
  node.op->pack(weights, blob + node.packed_offset);
}

void Plan::run(int64_t batch, const std::map<std::string, const float*>& inputs,
               const std::map<std::string, float*>& outputs, const float* blob,
               const std::function<void()>& poll, double* op_seconds) const {
  const size_t bytes = arena_bytes(batch);
  ADM_RT_CHECK(cpu_isa() == isa_, "the plan was made for ", name_of(isa_), ", but ",
               name_of(cpu_isa()), " is in use now");
  const ArenaLease arena(bytes);
  const size_t images = static_cast<size_t>(batch);
  const auto address = [&](int id) {
    return arena.floats() + buffers_[static_cast<size_t>(id)].offset * images;
  };
  const auto dense_bytes = [&](int id) {
    return static_cast<size_t>(buffers_[static_cast<size_t>(id)].shape.floats()) * images *
           sizeof(float);
  };
  for (const auto& [name, id] : inputs_) {
    const auto given = inputs.find(name);
    ADM_RT_CHECK(given != inputs.end(), "input ", name, " is missing");
    std::memcpy(address(id), given->second, dense_bytes(id));
  }
  RunContext context;
  context.batch = batch;
  context.scratch = arena.floats() + arena_floats_ * images;
  const size_t scratch = bytes / sizeof(float) - arena_floats_ * images;
  std::vector<const float*> input_pointers;
  std::vector<float*> output_pointers;
  using Clock = std::chrono::steady_clock;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (poll) poll();
    const Node& node = nodes_[i];
    ADM_RT_CHECK(static_cast<size_t>(node.op->scratch_floats(batch)) <= scratch,
                 "the number of threads was changed during a run");
    input_pointers.clear();
    output_pointers.clear();
    for (const int id : node.inputs) input_pointers.push_back(address(id));
    for (const int id : node.outputs) output_pointers.push_back(address(id));
    context.inputs = input_pointers.data();
    context.outputs = output_pointers.data();
    context.packed = blob + node.packed_offset;
    const auto start = op_seconds ? Clock::now() : Clock::time_point();
    node.op->run(context);
    if (op_seconds) {
      op_seconds[i] += std::chrono::duration<double>(Clock::now() - start).count();
    }
  }
  for (const auto& [name, id] : outputs_) {
    const auto given = outputs.find(name);
    if (given != outputs.end()) std::memcpy(given->second, address(id), dense_bytes(id));
  }
}

std::vector<Plan::OpInfo> Plan::ops() const {
  std::vector<OpInfo> infos;
  for (const Node& node : nodes_) {
    std::string shapes;
    for (const int id : node.inputs) shapes += (shapes.empty() ? "" : " ") + to_string(shape(id));
    shapes += " ->";
    for (const int id : node.outputs) shapes += " " + to_string(shape(id));
    infos.push_back({node.arguments.op(), shapes, node.op->flops(1),
                     static_cast<size_t>(node.op->packed_floats()) * sizeof(float)});
  }
  return infos;
}

}  // namespace adm_rt::engine
