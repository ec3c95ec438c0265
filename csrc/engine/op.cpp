#include "engine/op.h"

#include <cmath>

#include "common/check.h"

namespace adm_rt::engine {
namespace {

// A function's static: registrations run before main in any order.
std::map<std::string, OpFactory>& registry() {
  static std::map<std::string, OpFactory> factories;
  return factories;
}

}  // namespace

std::string to_string(const Shape& shape) {
  return std::to_string(shape.height) + "x" + std::to_string(shape.width) + "x" +
         std::to_string(shape.channels);
}

OpArguments::OpArguments(std::string op, Slots inputs, Slots outputs, Attributes attributes,
                         WeightShapes weight_shapes)
    : op_(std::move(op)),
      inputs_(std::move(inputs)),
      outputs_(std::move(outputs)),
      attributes_(std::move(attributes)),
      weight_shapes_(std::move(weight_shapes)) {}

int OpArguments::find(const Slots& slots, const std::string& name) const {
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i].first == name) {
      mark(name);
      return static_cast<int>(i);
    }
  }
  return -1;
}

int OpArguments::input(const std::string& name) const {
  const int slot = find(inputs_, name);
  ADM_RT_CHECK(slot >= 0, op_, ": input ", name, " is missing");
  return slot;
}

int OpArguments::optional_input(const std::string& name) const { return find(inputs_, name); }

int OpArguments::output(const std::string& name) const {
  const int slot = find(outputs_, name);
  ADM_RT_CHECK(slot >= 0, op_, ": output ", name, " is missing");
  return slot;
}

int OpArguments::optional_output(const std::string& name) const { return find(outputs_, name); }

const Shape& OpArguments::input_shape(int slot) const {
  ADM_RT_CHECK(slot >= 0 && slot < static_cast<int>(inputs_.size()), op_, ": no input ", slot);
  return inputs_[static_cast<size_t>(slot)].second;
}

const Shape& OpArguments::output_shape(int slot) const {
  ADM_RT_CHECK(slot >= 0 && slot < static_cast<int>(outputs_.size()), op_, ": no output ", slot);
  return outputs_[static_cast<size_t>(slot)].second;
}

const std::vector<int64_t>& OpArguments::weight_shape(const std::string& name) const {
  const auto found = weight_shapes_.find(name);
  ADM_RT_CHECK(found != weight_shapes_.end(), op_, ": weight ", name, " is missing");
  mark(name);
  return found->second;
}

bool OpArguments::has_weight(const std::string& name) const {
  if (weight_shapes_.count(name) == 0) return false;
  mark(name);
  return true;
}

double OpArguments::number(const std::string& name) const {
  const auto found = attributes_.find(name);
  ADM_RT_CHECK(found != attributes_.end(), op_, ": attribute ", name, " is missing");
  mark(name);
  return found->second;
}

double OpArguments::number(const std::string& name, double fallback) const {
  return attributes_.count(name) ? number(name) : fallback;
}

int64_t OpArguments::integer(const std::string& name) const {
  const double value = number(name);
  ADM_RT_CHECK(std::abs(value) < 9007199254740992.0 && value == std::floor(value), op_,
               ": attribute ", name, "=", value, " is not a whole number");
  return static_cast<int64_t>(value);
}

int64_t OpArguments::integer(const std::string& name, int64_t fallback) const {
  return attributes_.count(name) ? integer(name) : fallback;
}

std::string OpArguments::unused() const {
  for (const auto& [name, shape] : inputs_) {
    if (!used_.count(name)) return "input " + name;
  }
  for (const auto& [name, shape] : outputs_) {
    if (!used_.count(name)) return "output " + name;
  }
  for (const auto& [name, value] : attributes_) {
    if (!used_.count(name)) return "attribute " + name;
  }
  for (const auto& [name, shape] : weight_shapes_) {
    if (!used_.count(name)) return "weight " + name;
  }
  return "";
}

OpRegistration::OpRegistration(const char* name, OpFactory factory) {
  registry()[name] = std::move(factory);
}

std::unique_ptr<Op> make_op(const OpArguments& arguments) {
  const auto found = registry().find(arguments.op());
  if (found == registry().end()) {
    std::string known;
    for (const std::string& name : op_names()) known += (known.empty() ? "" : ", ") + name;
    throw_invalid_argument("op ", arguments.op(), " is unknown; known: ", known);
  }
  std::unique_ptr<Op> op = found->second(arguments);
  const std::string unused = arguments.unused();
  ADM_RT_CHECK(unused.empty(), arguments.op(), " takes no ", unused);
  return op;
}

std::vector<std::string> op_names() {
  std::vector<std::string> names;
  for (const auto& [name, factory] : registry()) names.push_back(name);
  return names;
}

}  // namespace adm_rt::engine
