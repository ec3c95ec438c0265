// Plans written down by test_engine_sanitizers.py, on random numbers: every op alone in buffers of
// the exact size, and every plan whole, from one thread, from several, and by two callers at once,
// which must not change a bit. For the sanitizers; the results' values are tested elsewhere.
// plan_probe FILE ISA...: prints what is wrong; exit status 1 then.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/cpu_isa.h"
#include "common/thread_pool.h"
#include "engine/arena.h"
#include "engine/plan.h"

using namespace adm_rt;
using namespace adm_rt::engine;

namespace {

constexpr int64_t kBatch = 2;
constexpr int kThreads[] = {1, 3};

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

std::mt19937 generator(6);

// Aligned as the plan's buffers are; the sanitizer watches what follows the last float. Positive:
// some are variances. Classes, which are whole numbers, are all 1.
Buffer buffer(int64_t floats, const std::string& name = "") {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<size_t>(floats) * sizeof(float)) != 0) std::abort();
  float* values = static_cast<float*>(memory);
  std::uniform_real_distribution<float> uniform(0.05f, 1.0f);
  const bool classes = name == "index" || name == "y";
  for (int64_t i = 0; i < floats; ++i) values[i] = classes ? 1.0f : uniform(generator);
  return Buffer(values);
}

struct Call {
  std::string op;
  Plan::Ids inputs, outputs;
  OpArguments::Attributes attributes;
  OpArguments::WeightShapes weights;
};

struct Recipe {
  std::string name;
  std::vector<std::pair<std::string, Shape>> buffers;  // the name is "" where no input is meant
  std::vector<Call> calls;
  Plan::Ids outputs;
};

template <typename Value>
void read_table(std::istream& in, std::map<std::string, Value>* table) {
  size_t count = 0;
  in >> count;
  for (size_t i = 0; i < count; ++i) {
    std::string key;
    in >> key;
    in >> (*table)[key];
  }
}

std::vector<Recipe> read_recipes(const char* path) {
  std::ifstream file(path);
  std::vector<Recipe> recipes;
  std::string line, word, name;
  while (std::getline(file, line)) {
    std::istringstream in(line);
    in >> word;
    if (word == "plan") {
      recipes.emplace_back();
      in >> recipes.back().name;
    } else if (word == "buffer" || word == "input") {
      name.clear();
      Shape shape;
      if (word == "input") in >> name;
      in >> shape.height >> shape.width >> shape.channels;
      recipes.back().buffers.emplace_back(name, shape);
    } else if (word == "output") {
      in >> name;
      in >> recipes.back().outputs[name];
    } else if (word == "op") {
      Call call;
      in >> call.op;
      read_table(in, &call.inputs);
      read_table(in, &call.outputs);
      read_table(in, &call.attributes);
      size_t count = 0, dims = 0;
      in >> count;
      for (size_t i = 0; i < count; ++i) {
        in >> name >> dims;
        std::vector<int64_t>& shape = call.weights[name];
        shape.resize(dims);
        for (int64_t& side : shape) in >> side;
      }
      recipes.back().calls.push_back(call);
    }
    if (in.fail()) std::abort();
  }
  return recipes;
}

// Buffers of the raw weights, and the map that ops take.
struct RawWeights {
  std::vector<Buffer> memory;
  Weights weights;

  explicit RawWeights(const OpArguments::WeightShapes& shapes) {
    for (const auto& [name, shape] : shapes) {
      int64_t floats = 1;
      for (const int64_t side : shape) floats *= side;
      memory.push_back(buffer(floats));
      // The sums stay small: results must be finite through a whole network.
      for (int64_t i = 0; i < floats; ++i) memory.back().get()[i] -= 0.5f;
      weights[name] = memory.back().get();
    }
  }
};

bool finite(const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(values[i])) return false;
  }
  return true;
}

bool check_op(const Recipe& recipe, const Call& call) {
  const auto slots = [&](const Plan::Ids& ids) {
    OpArguments::Slots made;
    for (const auto& [name, id] : ids) {
      made.emplace_back(name, recipe.buffers[static_cast<size_t>(id)].second);
    }
    return made;
  };
  const OpArguments::Slots inputs = slots(call.inputs), outputs = slots(call.outputs);
  const auto op = make_op(OpArguments(call.op, inputs, outputs, call.attributes, call.weights));
  const RawWeights raw(call.weights);
  const Buffer packed = buffer(op->packed_floats());
  op->pack(raw.weights, packed.get());
  std::vector<Buffer> memory;
  std::vector<const float*> input_pointers;
  for (const auto& [name, shape] : inputs) {
    memory.push_back(buffer(kBatch * shape.floats(), name));
    input_pointers.push_back(memory.back().get());
  }
  std::vector<Buffer> first;
  bool right = true;
  for (const int threads : kThreads) {
    set_num_threads(threads);
    const Buffer scratch = buffer(op->scratch_floats(kBatch));
    std::vector<Buffer> made;
    std::vector<float*> output_pointers;
    for (const auto& output : outputs) {
      made.push_back(buffer(kBatch * output.second.floats()));
      output_pointers.push_back(made.back().get());
    }
    RunContext context;
    context.batch = kBatch;
    context.inputs = input_pointers.data();
    context.outputs = output_pointers.data();
    context.packed = packed.get();
    context.scratch = scratch.get();
    op->run(context);
    for (size_t i = 0; i < made.size(); ++i) {
      const int64_t floats = kBatch * outputs[i].second.floats();
      right = right && finite(made[i].get(), floats);
      if (!first.empty()) {
        right = right && std::memcmp(made[i].get(), first[i].get(),
                                     static_cast<size_t>(floats) * sizeof(float)) == 0;
      }
    }
    if (first.empty()) first = std::move(made);
  }
  if (!right) std::printf("%s: %s alone\n", recipe.name.c_str(), call.op.c_str());
  return right;
}

bool check_plan(const Recipe& recipe) {
  Plan plan;
  for (const auto& [name, shape] : recipe.buffers) {
    name.empty() ? plan.buffer(shape) : plan.input(name, shape);
  }
  for (const Call& c : recipe.calls) {
    plan.add(c.op, c.inputs, c.outputs, c.attributes, c.weights);
  }
  for (const auto& [name, id] : recipe.outputs) plan.output(name, id);
  plan.finish();
  const MemoryBlock blob(plan.packed_bytes());
  for (int i = 0; i < plan.op_count(); ++i) {
    plan.pack(i, RawWeights(recipe.calls[static_cast<size_t>(i)].weights).weights, blob.floats());
  }
  std::vector<Buffer> memory;
  std::map<std::string, const float*> inputs;
  for (const auto& [name, id] : plan.input_ids()) {
    memory.push_back(buffer(kBatch * plan.shape(id).floats(), name));
    inputs[name] = memory.back().get();
  }
  const auto& [output_name, output_id] = *plan.output_ids().begin();
  const std::string& name = output_name;
  const int64_t floats = kBatch * plan.shape(output_id).floats();
  const auto run = [&] {
    Buffer result = buffer(floats);
    plan.run(kBatch, inputs, {{name, result.get()}}, blob.floats(), [] {});
    return result;
  };
  set_num_threads(1);
  const Buffer expected = run();
  bool right = finite(expected.get(), floats);
  const auto same = [&](const Buffer& other) {
    return std::memcmp(other.get(), expected.get(), static_cast<size_t>(floats) * sizeof(float)) ==
           0;
  };
  set_num_threads(3);
  right = right && same(run());
  Buffer beside = buffer(floats);  // and by two callers, one of whom has the pool
  std::thread caller(
      [&] { plan.run(kBatch, inputs, {{name, beside.get()}}, blob.floats(), [] {}); });
  Buffer here(static_cast<float*>(std::malloc(static_cast<size_t>(floats) * sizeof(float))));
  plan.run(kBatch, inputs, {{name, here.get()}}, blob.floats(), [] {});
  caller.join();
  right = right && same(here) && same(beside);
  if (!right) std::printf("%s: the plan\n", recipe.name.c_str());
  return right;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<Recipe> recipes = read_recipes(argv[1]);
  bool right = !recipes.empty();
  for (int i = 2; i < argc; ++i) {
    for (int isa = 0; isa <= static_cast<int>(best_cpu_isa()); ++isa) {
      if (argv[i] != std::string(name_of(static_cast<CpuIsa>(isa)))) continue;
      set_cpu_isa(static_cast<CpuIsa>(isa));
      for (const Recipe& recipe : recipes) {
        for (const Call& call : recipe.calls) right = check_op(recipe, call) && right;
        right = check_plan(recipe) && right;
      }
    }
  }
  return right ? 0 : 1;
}
