// conv3x3 against a direct sum, in buffers of the exact size: for the sanitizers.
// conv3x3_probe ISA...: prints what is wrong; exit status 1 then.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/cpu_isa.h"
#include "common/thread_pool.h"
#include "engine/op.h"

using namespace adm_rt;
using namespace adm_rt::engine;

namespace {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

std::mt19937 generator(6303);

// Aligned as the plan's buffers are; the sanitizer watches what follows the last float.
Buffer buffer(int64_t floats) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<size_t>(floats) * sizeof(float)) != 0) std::abort();
  float* values = static_cast<float*>(memory);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  for (int64_t i = 0; i < floats; ++i) values[i] = uniform(generator);
  return Buffer(values);
}

struct Layer {
  int64_t batch, height, width, channels1, channels2, channels_out;
  int64_t resample;  // of x and of the residual
  bool fused, fast;
};

// act(a x + b) of input channel c, resampled, at a pixel of the output; 0 outside.
double input_at(const Layer& l, const Shape& in, const float* x, const float* x2,
                const float* affine, int64_t image, int64_t row, int64_t column, int64_t c) {
  if (row < 0 || column < 0 || row >= l.height || column >= l.width) return 0.0;
  const bool second = c >= l.channels1;
  const int64_t all = l.channels1 + l.channels2;
  const auto activated = [&](int64_t i, int64_t j) {
    const int64_t pixel = (image * in.height + i) * in.width + j;
    double v = second ? x2[pixel * l.channels2 + c - l.channels1] : x[pixel * l.channels1 + c];
    if (!l.fused) return v;
    v = affine[image * 2 * all + c] * v + affine[image * 2 * all + all + c];
    return v / (1.0 + std::exp(-v));
  };
  if (l.resample == 2) return activated(row / 2, column / 2);
  if (l.resample == 0) return activated(row, column);
  return 0.25 * (activated(2 * row, 2 * column) + activated(2 * row, 2 * column + 1) +
                 activated(2 * row + 1, 2 * column) + activated(2 * row + 1, 2 * column + 1));
}

bool check(const Layer& l) {
  const int64_t channels_in = l.channels1 + l.channels2;
  const int64_t up = l.resample == 1 ? 2 : 1, down = l.resample == 2 ? 2 : 1;
  const Shape in = {l.height * up / down, l.width * up / down, l.channels1};
  const Shape y_shape = {l.height, l.width, l.channels_out};
  OpArguments::Slots inputs = {{"x", in}}, outputs = {{"y", y_shape}};
  if (l.channels2 > 0) inputs.push_back({"x2", {in.height, in.width, l.channels2}});
  if (l.fused) {
    inputs.push_back({"affine", {1, 2, channels_in}});
    inputs.push_back({"residual", {in.height, in.width, l.channels_out}});
    outputs.push_back({"stats", {1, 2, l.channels_out}});
  }
  OpArguments::WeightShapes weight_shapes = {{"weight", {l.channels_out, channels_in, 3, 3}}};
  if (l.fused) weight_shapes["bias"] = {l.channels_out};
  const double resample = static_cast<double>(l.resample);
  const auto op = make_op(OpArguments("conv3x3", inputs, outputs,
                                      {{"activation", l.fused ? 1.0 : 0.0},
                                       {"resample", resample},
                                       {"residual_resample", l.fused ? resample : 0.0},
                                       {"fast", l.fast ? 1.0 : 0.0}},
                                      weight_shapes));

  std::vector<Buffer> memory;
  std::vector<const float*> input_pointers;
  std::vector<float*> output_pointers;
  for (const auto& input : inputs) {
    memory.push_back(buffer(l.batch * input.second.floats()));
    input_pointers.push_back(memory.back().get());
  }
  for (const auto& output : outputs) {
    memory.push_back(buffer(l.batch * output.second.floats()));
    output_pointers.push_back(memory.back().get());
  }
  const Buffer weight = buffer(l.channels_out * channels_in * 9), bias = buffer(l.channels_out);
  const Buffer packed = buffer(op->packed_floats());
  const Buffer scratch = buffer(op->scratch_floats(l.batch));
  op->pack({{"weight", weight.get()}, {"bias", bias.get()}}, packed.get());
  RunContext context;
  context.batch = l.batch;
  context.inputs = input_pointers.data();
  context.outputs = output_pointers.data();
  context.packed = packed.get();
  context.scratch = scratch.get();
  op->run(context);

  const float* x2 = l.channels2 > 0 ? input_pointers[1] : nullptr;
  const float* affine = l.fused ? input_pointers[input_pointers.size() - 2] : nullptr;
  Layer residual = l;  // read like an input of its own
  residual.fused = false;
  residual.channels1 = l.channels_out;
  residual.channels2 = 0;
  std::uniform_int_distribution<int64_t> any(0, l.batch * y_shape.floats() - 1);
  double worst = 0.0;
  for (int sample = 0; sample < 60; ++sample) {
    const int64_t index = any(generator);
    const int64_t channel = index % l.channels_out, pixel = index / l.channels_out;
    const int64_t column = pixel % l.width, row = pixel / l.width % l.height;
    const int64_t image = pixel / l.width / l.height;
    double sum = l.fused ? bias.get()[channel] : 0.0;
    for (int64_t c = 0; c < channels_in; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        sum += input_at(l, in, input_pointers[0], x2, affine, image, row + tap / 3 - 1,
                        column + tap % 3 - 1, c) *
               weight.get()[(channel * channels_in + c) * 9 + tap];
      }
    }
    if (l.fused) {
      sum += input_at(residual, in, input_pointers.back(), nullptr, nullptr, image, row, column,
                      channel);
    }
    worst = std::fmax(worst, std::fabs(sum - output_pointers[0][index]));
  }
  const double allowed = (l.fast ? 1e-4 : 2e-5) * std::sqrt(static_cast<double>(channels_in));
  if (worst < allowed) return true;
  std::printf("%s, %d threads, %ldx%ldx%ld+%ld -> %ld: %g\n", name_of(cpu_isa()), num_threads(),
              static_cast<long>(l.height), static_cast<long>(l.width),
              static_cast<long>(l.channels1), static_cast<long>(l.channels2),
              static_cast<long>(l.channels_out), worst);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const Layer layers[] = {
      {1, 1, 1, 1, 0, 1, 0, true, false},     {3, 5, 7, 3, 2, 6, 0, true, false},
      {1, 6, 10, 17, 0, 31, 1, true, false},  {2, 8, 8, 33, 5, 17, 2, true, false},
      {1, 13, 35, 36, 0, 33, 0, true, false}, {2, 14, 22, 40, 33, 20, 1, true, false},
      {2, 16, 38, 33, 0, 18, 2, true, false}, {1, 40, 40, 48, 0, 48, 0, false, false},
      {1, 66, 65, 33, 0, 17, 0, true, true},  {2, 8, 7, 90, 41, 17, 0, true, false},
  };
  bool right = true;
  for (int i = 1; i < argc; ++i) {
    for (int isa = 0; isa <= static_cast<int>(best_cpu_isa()); ++isa) {
      if (argv[i] != std::string(name_of(static_cast<CpuIsa>(isa)))) continue;
      set_cpu_isa(static_cast<CpuIsa>(isa));
      for (const int threads : {1, 3}) {
        set_num_threads(threads);
        for (const Layer& layer : layers) right = check(layer) && right;
      }
    }
  }
  return right ? 0 : 1;
}
