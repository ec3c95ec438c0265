// What the TensorRT plugins launch (csrc/tensorrt/node_launch.cpp), with the CUDA kernels under the
// emulator. C interface for ctypes; returns 0, or 1 with a message in error_text().
#define ADM_RT_EMULATOR
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "ops/ada_group_norm_backward_cuda.cu"
#include "ops/ada_group_norm_cuda.cu"
#include "ops/qkv_attention_backward_cuda.cu"
#include "ops/qkv_attention_cuda.cu"
#include "tensorrt/node_launch.cpp"

namespace {
std::string error;
}

extern "C" const char* error_text() { return error.c_str(); }

extern "C" const char* node_name(int index) {
  return adm_rt::tensorrt::kNodes[static_cast<size_t>(index)].name;
}

// attributes: groups, num_heads, head_dim, num_queries; sizes: of the main input, `rank` of them;
// pointers: as the node's inputs and outputs.
extern "C" int launch_node(int index, const int32_t* attributes, float eps, int rank,
                           const int64_t* sizes, int dtype, const void* const* inputs,
                           void* const* outputs) {
  using namespace adm_rt::tensorrt;
  try {
    const Node& node = kNodes.at(static_cast<size_t>(index));
    Attributes own;
    own.groups = attributes[0];
    own.eps = eps;
    own.num_heads = attributes[1];
    own.head_dim = attributes[2];
    own.num_queries = attributes[3];
    Sizes given;
    given.rank = rank;
    for (int i = 0; i < rank; ++i) given.values[i] = sizes[i];
    const adm_rt::DType type = adm_rt::dtype_from_int(dtype);
    const int64_t bytes = workspace_bytes(node, own, given, type);
    std::vector<float> workspace(static_cast<size_t>(bytes / 4 + 4));
    launch(node, own, given, type, inputs, outputs, workspace.data(), nullptr);
    return 0;
  } catch (const std::exception& exception) {
    error = exception.what();
    return 1;
  }
}
