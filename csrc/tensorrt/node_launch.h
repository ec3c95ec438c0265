// From a node's tensors to the params structs of the CUDA launchers; knows nothing of TensorRT.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "tensorrt/nodes.h"

namespace adm_rt::tensorrt {

// The sizes of the tensor that decides the others: see main_input.
struct Sizes {
  int rank = 0;
  int64_t values[4] = {};
};

// Which input: x [N, H, W, C] of a norm, qkv [N, T, 3 * num_heads * head_dim] of an attention.
int main_input(const Node& node);

// Scratch of one launch, in bytes.
int64_t workspace_bytes(const Node& node, const Attributes& attributes, const Sizes& sizes,
                        DType dtype);

// Enqueues the node on `stream`; pointers in the order of inputs_of and outputs_of. Throws
// std::invalid_argument, std::runtime_error.
void launch(const Node& node, const Attributes& attributes, const Sizes& sizes, DType dtype,
            const void* const* inputs, void* const* outputs, void* workspace, void* stream);

}  // namespace adm_rt::tensorrt
