#include "tensorrt/node_plugin.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "tensorrt/node_launch.h"

namespace adm_rt::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kFailed = -1;

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

void log_error(const Node& node, const char* what) noexcept {
  char text[512];
  std::snprintf(text, sizeof(text), "adm_rt plugin %s: %s", node.name, what);
  nvinfer1::ILoggerFinder* finder = logger_finder;
  nvinfer1::ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
  if (logger != nullptr) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, text);
  } else {
    std::fprintf(stderr, "%s\n", text);
  }
}

// TensorRT takes no exceptions: `failure` instead, and what went wrong into its log.
template <typename Result, typename Function>
Result guarded(const Node& node, Result failure, Function function) noexcept {
  try {
    return function();
  } catch (const std::exception& error) {
    log_error(node, error.what());
  } catch (...) {
    log_error(node, "unknown error");
  }
  return failure;
}

bool is_node_type(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

DType dtype_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return DType::kFloat32;
    case DataType::kBF16:
      return DType::kBFloat16;
    case DataType::kHALF:
      return DType::kFloat16;
    default:
      throw std::invalid_argument("type " + std::to_string(static_cast<int>(type)) +
                                  " is not float32, float16 or bfloat16");
  }
}

Sizes sizes_of(const nvinfer1::Dims& dims) {
  Sizes sizes;
  sizes.rank = dims.nbDims;
  for (int i = 0; i < dims.nbDims && i < 4; ++i) sizes.values[i] = dims.d[i];
  return sizes;
}

PluginField plugin_field(const Field& field, const Attributes* attributes) {
  const bool integer = field.integer != nullptr;
  const void* data = nullptr;
  if (attributes != nullptr && integer) data = &(attributes->*field.integer);
  if (attributes != nullptr && !integer) data = &(attributes->*field.real);
  return {field.name, data, integer ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32, 1};
}

std::vector<PluginField> plugin_fields(const Node& node, const Attributes* attributes) {
  std::vector<PluginField> made;
  for (const Field& field : fields_of(node)) made.push_back(plugin_field(field, attributes));
  return made;
}

// The attributes of a node out of TensorRT's fields; those of others are passed over.
Attributes read_attributes(const Node& node, const nvinfer1::PluginFieldCollection& given) {
  Attributes attributes;
  for (const Field& field : fields_of(node)) {
    const PluginField* found = nullptr;
    for (int i = 0; i < given.nbFields; ++i) {
      if (std::strcmp(given.fields[i].name, field.name) == 0) found = &given.fields[i];
    }
    const bool integer = field.integer != nullptr;
    const PluginFieldType type = integer ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32;
    if (found == nullptr || found->data == nullptr || found->type != type) {
      throw std::invalid_argument(std::string("the attribute ") + field.name +
                                  " is missing or is not " + (integer ? "an int" : "a float"));
    }
    if (integer) {
      std::memcpy(&(attributes.*field.integer), found->data, sizeof(int32_t));
    } else {
      std::memcpy(&(attributes.*field.real), found->data, sizeof(float));
    }
  }
  return attributes;
}

void set_shape(Tensor tensor, const Attributes& a, const DimsExprs* inputs,
               const std::vector<Tensor>& kinds, nvinfer1::IExprBuilder& builder, DimsExprs& out) {
  for (size_t i = 0; i < kinds.size(); ++i) {
    if (kinds[i] == tensor) {
      out = inputs[i];
      return;
    }
  }
  const nvinfer1::IDimensionExpr* batch = inputs[0].d[0];
  std::vector<const nvinfer1::IDimensionExpr*> dims = {batch};
  switch (tensor) {
    case Tensor::kMoments:
      dims.push_back(builder.constant(a.groups));
      break;
    case Tensor::kOut:
      dims.push_back(builder.constant(a.num_queries));
      dims.push_back(builder.constant(int64_t{a.num_heads} * a.head_dim));
      break;
    case Tensor::kStats:
      dims.push_back(builder.constant(a.num_heads));
      dims.push_back(builder.constant(2));
      dims.push_back(builder.constant(a.num_queries));
      break;
    default:
      throw std::logic_error("an output without a shape");
  }
  out.nbDims = static_cast<int32_t>(dims.size());
  for (size_t i = 0; i < dims.size(); ++i) out.d[i] = dims[i];
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) { logger_finder = finder; }

NodePlugin::NodePlugin(const Node& node, const Attributes& attributes)
    : node_(node),
      attributes_(attributes),
      inputs_(inputs_of(node)),
      outputs_(outputs_of(node)),
      fields_(plugin_fields(node, &attributes_)),
      collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

nvinfer1::IPluginCapability* NodePlugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* NodePlugin::clone() noexcept {
  return guarded<nvinfer1::IPluginV3*>(node_, nullptr, [&] { return new NodePlugin(*this); });
}

int32_t NodePlugin::configurePlugin(const DynamicPluginTensorDesc*, int32_t,
                                    const DynamicPluginTensorDesc*, int32_t) noexcept {
  return 0;
}

int32_t NodePlugin::getOutputDataTypes(DataType* outputs, int32_t num_outputs,
                                       const DataType* inputs, int32_t) const noexcept {
  for (int32_t i = 0; i < num_outputs; ++i) {
    outputs[i] = has_node_type(outputs_[i]) ? inputs[0] : DataType::kFLOAT;
  }
  return 0;
}

int32_t NodePlugin::getOutputShapes(const DimsExprs* inputs, int32_t, const DimsExprs*, int32_t,
                                    DimsExprs* outputs, int32_t num_outputs,
                                    nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(node_, kFailed, [&] {
    for (int32_t i = 0; i < num_outputs; ++i) {
      set_shape(outputs_[i], attributes_, inputs, inputs_, builder, outputs[i]);
    }
    return int32_t{0};
  });
}

bool NodePlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                           int32_t num_inputs, int32_t) noexcept {
  const PluginTensorDesc& desc = tensors[position].desc;
  if (desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
  const Tensor kind = position < num_inputs ? inputs_[position] : outputs_[position - num_inputs];
  if (!has_node_type(kind)) return desc.type == DataType::kFLOAT;
  return is_node_type(desc.type) && (position == 0 || desc.type == tensors[0].desc.type);
}

int32_t NodePlugin::getNbOutputs() const noexcept { return static_cast<int32_t>(outputs_.size()); }

size_t NodePlugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t,
                                    const DynamicPluginTensorDesc*, int32_t) const noexcept {
  return guarded(node_, size_t{0}, [&] {
    const int main = main_input(node_);
    const DType dtype = dtype_of(in[0].desc.type);
    return static_cast<size_t>(workspace_bytes(node_, attributes_, sizes_of(in[main].max), dtype));
  });
}

int32_t NodePlugin::onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*,
                                  int32_t) noexcept {
  return 0;
}

int32_t NodePlugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*,
                            const void* const* inputs, void* const* outputs, void* workspace,
                            cudaStream_t stream) noexcept {
  return guarded(node_, kFailed, [&] {
    const Sizes sizes = sizes_of(in[main_input(node_)].dims);
    launch(node_, attributes_, sizes, dtype_of(in[0].type), inputs, outputs, workspace, stream);
    return int32_t{0};
  });
}

nvinfer1::IPluginV3* NodePlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return clone();
}

const nvinfer1::PluginFieldCollection* NodePlugin::getFieldsToSerialize() noexcept {
  return &collection_;
}

NodeCreator::NodeCreator(const Node& node)
    : node_(node),
      fields_(plugin_fields(node, nullptr)),
      collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

nvinfer1::IPluginV3* NodeCreator::createPlugin(const char*,
                                               const nvinfer1::PluginFieldCollection* fields,
                                               nvinfer1::TensorRTPhase) noexcept {
  return guarded<nvinfer1::IPluginV3*>(
      node_, nullptr, [&] { return new NodePlugin(node_, read_attributes(node_, *fields)); });
}

}  // namespace adm_rt::tensorrt
