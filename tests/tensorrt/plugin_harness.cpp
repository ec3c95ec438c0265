// Drives the C++ plugins without TensorRT's libraries and without CUDA: the launchers are replaced
// by ones that print what they are asked for. A line of JSON per fact; the test compares them with
// the Python plugins.
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "ops/ada_group_norm_cuda.h"
#include "ops/qkv_attention_cuda.h"
#include "tensorrt/node_plugin.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

namespace {

long address(const void* pointer) { return reinterpret_cast<long>(pointer); }

struct Dimension final : nvinfer1::IDimensionExpr {
  struct Value final : nvinfer1::apiv::VDimensionExpr {
    int64_t value = 0;
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return value; }
    bool isSizeTensor() const override { return false; }
  };
  Value own;
  explicit Dimension(int64_t value) {
    own.value = value;
    mImpl = &own;
  }
};

struct Builder final : nvinfer1::IExprBuilder {
  struct Own final : nvinfer1::apiv::VExprBuilder {
    std::vector<std::unique_ptr<Dimension>> made;
    const nvinfer1::IDimensionExpr* constant(int64_t value) override {
      made.push_back(std::make_unique<Dimension>(value));
      return made.back().get();
    }
    const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation,
                                              const nvinfer1::IDimensionExpr&,
                                              const nvinfer1::IDimensionExpr&) override {
      std::abort();
    }
    const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                      const nvinfer1::IDimensionExpr&) override {
      std::abort();
    }
  };
  Own own;
  Builder() { mImpl = &own; }
};

struct Logger final : nvinfer1::ILogger {
  void log(Severity, const char* text) noexcept override {
    std::printf("{\"log\": \"%s\"}\n", text);
  }
};

struct Finder final : nvinfer1::ILoggerFinder {
  Logger logger;
  nvinfer1::ILogger* findLogger() override { return &logger; }
};

using adm_rt::tensorrt::Tensor;

std::vector<int64_t> dims_of(Tensor tensor) {
  switch (tensor) {  // the sizes of the Python test
    case Tensor::kImage:
      return {2, 8, 4, 64};
    case Tensor::kChannels:
      return {64};
    case Tensor::kModulation:
      return {2, 128};
    case Tensor::kMoments:
      return {2, 32};
    case Tensor::kQkv:
      return {2, 32, 144};
    case Tensor::kOut:
      return {2, 5, 48};
    case Tensor::kStats:
      return {2, 3, 2, 5};
  }
  std::abort();
}

nvinfer1::PluginTensorDesc desc_of(Tensor tensor, nvinfer1::DataType type) {
  nvinfer1::PluginTensorDesc desc{};
  const std::vector<int64_t> dims = dims_of(tensor);
  desc.dims.nbDims = static_cast<int32_t>(dims.size());
  for (size_t i = 0; i < dims.size(); ++i) desc.dims.d[i] = dims[i];
  desc.type = adm_rt::tensorrt::has_node_type(tensor) ? type : nvinfer1::DataType::kFLOAT;
  desc.format = nvinfer1::TensorFormat::kLINEAR;
  return desc;
}

void print_list(const char* name, const std::vector<std::string>& values) {
  std::printf("\"%s\": [", name);
  for (size_t i = 0; i < values.size(); ++i) std::printf("%s%s", i ? ", " : "", values[i].c_str());
  std::printf("]");
}

void check(const adm_rt::tensorrt::Node& node, nvinfer1::IPluginCreatorV3One* creator) {
  using namespace nvinfer1;
  static const int32_t groups = 32, heads = 3, head_dim = 16, queries = 5;
  static const float eps = 1e-5f;
  const PluginField given[] = {
      {"plugin_namespace", "adm_rt", PluginFieldType::kCHAR, 6},
      {"groups", &groups, PluginFieldType::kINT32, 1},
      {"eps", &eps, PluginFieldType::kFLOAT32, 1},
      {"num_heads", &heads, PluginFieldType::kINT32, 1},
      {"head_dim", &head_dim, PluginFieldType::kINT32, 1},
      {"num_queries", &queries, PluginFieldType::kINT32, 1},
  };
  const PluginFieldCollection all{6, given}, none{1, given};
  std::printf("{\"node\": \"%s\", \"version\": \"%s\", \"namespace\": \"%s\", ",
              creator->getPluginName(), creator->getPluginVersion(), creator->getPluginNamespace());
  std::vector<std::string> names;
  const PluginFieldCollection* known = creator->getFieldNames();
  for (int i = 0; i < known->nbFields; ++i) {
    names.push_back("[\"" + std::string(known->fields[i].name) + "\", " +
                    std::to_string(static_cast<int>(known->fields[i].type)) + "]");
  }
  print_list("fields", names);
  std::printf("}\n");
  if (creator->createPlugin("layer", &none, TensorRTPhase::kBUILD) != nullptr) std::abort();

  // Through serialised fields, as an engine file does it, then cloned into a context.
  std::unique_ptr<IPluginV3> first(creator->createPlugin("layer", &all, TensorRTPhase::kBUILD));
  auto* runtime_of_first = static_cast<IPluginV3OneRuntime*>(
      first->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  std::unique_ptr<IPluginV3> second(creator->createPlugin(
      "layer", runtime_of_first->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
  first.reset();
  std::unique_ptr<IPluginV3> plugin(
      static_cast<IPluginV3OneRuntime*>(
          second->getCapabilityInterface(PluginCapabilityType::kRUNTIME))
          ->attachToContext(nullptr));
  second.reset();
  auto* core =
      static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
  auto* build =
      static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
  auto* runtime = static_cast<IPluginV3OneRuntime*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));

  std::vector<std::string> values;
  const PluginFieldCollection* kept = runtime->getFieldsToSerialize();
  for (int i = 0; i < kept->nbFields; ++i) {
    const PluginField& field = kept->fields[i];
    values.push_back(field.type == PluginFieldType::kINT32
                         ? std::to_string(*static_cast<const int32_t*>(field.data))
                         : std::to_string(*static_cast<const float*>(field.data)));
  }
  std::printf("{\"name\": \"%s\", ", core->getPluginName());
  print_list("serialized", values);

  const auto inputs = adm_rt::tensorrt::inputs_of(node);
  const auto outputs = adm_rt::tensorrt::outputs_of(node);
  std::vector<Tensor> tensors = inputs;
  tensors.insert(tensors.end(), outputs.begin(), outputs.end());
  if (build->getNbOutputs() != static_cast<int32_t>(outputs.size())) std::abort();
  std::vector<std::string> kinds;
  for (Tensor tensor : tensors)
    kinds.push_back(adm_rt::tensorrt::has_node_type(tensor) ? "1" : "0");
  std::printf(", ");
  print_list("of_node_type", kinds);

  std::vector<DimsExprs> shapes(inputs.size()), made(outputs.size());
  Builder builder;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::vector<int64_t> dims = dims_of(inputs[i]);
    shapes[i].nbDims = static_cast<int32_t>(dims.size());
    for (size_t j = 0; j < dims.size(); ++j) shapes[i].d[j] = builder.constant(dims[j]);
  }
  const int32_t num_inputs = static_cast<int32_t>(inputs.size());
  const int32_t num_outputs = static_cast<int32_t>(outputs.size());
  if (build->getOutputShapes(shapes.data(), num_inputs, nullptr, 0, made.data(), num_outputs,
                             builder) != 0) {
    std::abort();
  }
  std::vector<std::string> out_shapes;
  for (const DimsExprs& shape : made) {
    std::string text = "[";
    for (int j = 0; j < shape.nbDims; ++j) {
      text += (j ? ", " : "") + std::to_string(shape.d[j]->getConstantValue());
    }
    out_shapes.push_back(text + "]");
  }
  std::printf(", ");
  print_list("shapes", out_shapes);
  std::printf("}\n");

  for (const DataType type : {DataType::kFLOAT, DataType::kBF16, DataType::kHALF}) {
    std::vector<DynamicPluginTensorDesc> dynamic(tensors.size());
    std::vector<PluginTensorDesc> descs;
    for (size_t i = 0; i < tensors.size(); ++i) {
      descs.push_back(desc_of(tensors[i], type));
      dynamic[i].desc = descs[i];
      dynamic[i].min = dynamic[i].max = descs[i].dims;
    }
    for (int32_t i = 0; i < static_cast<int32_t>(tensors.size()); ++i) {
      const auto supported = [&] {
        return build->supportsFormatCombination(i, dynamic.data(), num_inputs, num_outputs);
      };
      if (!supported()) std::abort();
      dynamic[i].desc.format = TensorFormat::kHWC8;
      if (supported()) std::abort();
      dynamic[i].desc = descs[i];
      dynamic[i].desc.type = DataType::kINT32;
      if (supported()) std::abort();
      dynamic[i].desc = descs[i];
    }
    std::vector<DataType> in_types, out_types(outputs.size());
    for (int32_t i = 0; i < num_inputs; ++i) in_types.push_back(descs[i].type);
    build->getOutputDataTypes(out_types.data(), num_outputs, in_types.data(), num_inputs);
    for (int32_t i = 0; i < num_outputs; ++i) {
      if (out_types[i] != descs[num_inputs + i].type) std::abort();
    }
    const size_t bytes = build->getWorkspaceSize(dynamic.data(), num_inputs,
                                                 dynamic.data() + num_inputs, num_outputs);
    std::printf("{\"workspace\": %zu}\n", bytes);
    std::vector<const void*> in_pointers;
    std::vector<void*> out_pointers;
    for (size_t i = 0; i < inputs.size(); ++i) {
      in_pointers.push_back(reinterpret_cast<const void*>(1000 + i));
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      out_pointers.push_back(reinterpret_cast<void*>(1000 + inputs.size() + i));
    }
    if (runtime->enqueue(descs.data(), descs.data() + num_inputs, in_pointers.data(),
                         out_pointers.data(), reinterpret_cast<void*>(77),
                         reinterpret_cast<cudaStream_t>(88)) != 0) {
      std::abort();
    }
    descs[node.direction == adm_rt::tensorrt::Direction::kBackward ? 1 : 0].dims.nbDims = 2;
    if (runtime->enqueue(descs.data(), descs.data() + num_inputs, in_pointers.data(),
                         out_pointers.data(), nullptr, nullptr) == 0) {
      std::abort();  // a wrong rank must be refused
    }
  }
}

void print_norm(const char* name, const adm_rt::AdaGroupNormCudaShape& s) {
  std::printf("{\"call\": \"%s\", \"shape\": [%ld, %ld, %ld, %ld, %ld, %ld], ", name, long(s.batch),
              long(s.channels), long(s.skip_channels), long(s.height), long(s.width),
              long(s.groups));
  std::printf("\"options\": [%g, %d, %d, %d, %d, %d, %ld], ", s.eps, int(s.silu), int(s.dtype),
              int(s.layout == adm_rt::AdaGroupNormLayout::kChannelsLast), int(s.resample),
              int(s.scale_shift_dtype), long(s.scale_shift_stride));
}

void print_attention(const char* name, const adm_rt::QkvAttentionShape& s,
                     adm_rt::QkvLayout layout) {
  std::printf("{\"call\": \"%s\", \"sizes\": [%ld, %ld, %ld, %ld, %ld, %d, %d, %d], ", name,
              long(s.batch), long(s.heads), long(s.head_dim), long(s.length), long(s.num_queries),
              int(s.order), int(s.dtype), int(layout));
}

}  // namespace

namespace adm_rt {

void ada_group_norm_cuda(const AdaGroupNormCudaParams& p, void* workspace, void* stream) {
  print_norm("ada_group_norm", p.shape);
  std::printf("\"inputs\": [%ld, %ld, %ld, %ld, %ld, %ld, %ld], ", address(p.x), address(p.skip),
              address(p.weight), address(p.bias), address(p.scale_shift), address(p.x_moments),
              address(p.skip_moments));
  std::printf("\"outputs\": [%ld, %ld, %ld, %ld], \"rest\": [%ld, %ld]}\n", address(p.y),
              address(p.x_out), address(p.mean), address(p.rstd), address(workspace),
              address(stream));
}

void ada_group_norm_backward_cuda(const AdaGroupNormCudaBackwardParams& p, void* workspace,
                                  void* stream) {
  print_norm("ada_group_norm_backward", p.shape);
  std::printf("\"inputs\": [%ld, %ld, %ld, %ld, %ld, %ld, %ld, %ld, %ld], ", address(p.grad),
              address(p.grad_x_out), address(p.x), address(p.skip), address(p.mean),
              address(p.rstd), address(p.weight), address(p.bias), address(p.scale_shift));
  std::printf("\"outputs\": [%ld, %ld, %ld, %ld, %ld], \"rest\": [%ld, %ld]}\n", address(p.dx),
              address(p.dskip), address(p.dweight), address(p.dbias), address(p.dscale_shift),
              address(workspace), address(stream));
}

void qkv_attention_cuda(const QkvAttentionParams& p, QkvLayout layout, void* stream) {
  print_attention("qkv_attention", p.shape, layout);
  std::printf("\"inputs\": [%ld, %ld, %ld], \"outputs\": [], \"rest\": [%ld]}\n", address(p.qkv),
              address(p.out), address(p.stats), address(stream));
}

void qkv_attention_backward_cuda(const QkvAttentionBackwardParams& p, QkvLayout layout,
                                 void* workspace, void* stream) {
  print_attention("qkv_attention_backward", p.shape, layout);
  std::printf("\"inputs\": [%ld, %ld, %ld, %ld, %ld, %ld], \"outputs\": [], \"rest\": [%ld]}\n",
              address(p.grad), address(p.qkv), address(p.out), address(p.stats), address(p.dqkv),
              address(workspace), address(stream));
}

int64_t ada_group_norm_cuda_workspace(const AdaGroupNormCudaShape&) { return 100; }
int64_t ada_group_norm_backward_cuda_workspace(const AdaGroupNormCudaShape&) { return 200; }
int64_t qkv_attention_backward_workspace(const QkvAttentionShape&) { return 300; }

}  // namespace adm_rt

int main() {
  static Finder finder;
  setLoggerFinder(&finder);
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* creators = getCreators(count);
  if (count != static_cast<int32_t>(adm_rt::tensorrt::kNodes.size())) return 1;
  for (int32_t i = 0; i < count; ++i) {
    check(adm_rt::tensorrt::kNodes[i], static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]));
  }
  setLoggerFinder(nullptr);
  return 0;
}
