// The nodes of domain "adm_rt" in exported graphs: adm_rt/export/nodes.py in C++. A test holds the
// names, the version, the fields, the tensors and the types of both to each other.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "ops/qkv_attention.h"

namespace adm_rt::tensorrt {

constexpr const char* kNamespace = "adm_rt";
constexpr const char* kVersion = "1";

enum class Op { kAdaGroupNorm, kQkvAttention };

// kForwardForBackward: with the second results that the backward node reads.
enum class Direction { kForward, kForwardForBackward, kBackward };

struct Node {
  const char* name;
  Op op;
  Direction direction;
  bool modulated;  // AdaGN: has an input scale_shift
  bool silu;
  QkvOrder order;
};

constexpr std::array<Node, 15> kNodes = {{
    // clang-format off
    {"ada_group_norm", Op::kAdaGroupNorm, Direction::kForward, false, false, {}},
    {"ada_group_norm_with_moments", Op::kAdaGroupNorm, Direction::kForwardForBackward, false, false, {}},
    {"ada_group_norm_backward", Op::kAdaGroupNorm, Direction::kBackward, false, false, {}},
    {"ada_group_norm_silu", Op::kAdaGroupNorm, Direction::kForward, false, true, {}},
    {"ada_group_norm_with_moments_silu", Op::kAdaGroupNorm, Direction::kForwardForBackward, false, true, {}},
    {"ada_group_norm_backward_silu", Op::kAdaGroupNorm, Direction::kBackward, false, true, {}},
    {"ada_group_norm_modulated_silu", Op::kAdaGroupNorm, Direction::kForward, true, true, {}},
    {"ada_group_norm_with_moments_modulated_silu", Op::kAdaGroupNorm, Direction::kForwardForBackward, true, true, {}},
    {"ada_group_norm_backward_modulated_silu", Op::kAdaGroupNorm, Direction::kBackward, true, true, {}},
    {"qkv_attention_legacy", Op::kQkvAttention, Direction::kForward, false, false, QkvOrder::kLegacy},
    {"qkv_attention_with_stats_legacy", Op::kQkvAttention, Direction::kForwardForBackward, false, false, QkvOrder::kLegacy},
    {"qkv_attention_backward_legacy", Op::kQkvAttention, Direction::kBackward, false, false, QkvOrder::kLegacy},
    {"qkv_attention_new", Op::kQkvAttention, Direction::kForward, false, false, QkvOrder::kNew},
    {"qkv_attention_with_stats_new", Op::kQkvAttention, Direction::kForwardForBackward, false, false, QkvOrder::kNew},
    {"qkv_attention_backward_new", Op::kQkvAttention, Direction::kBackward, false, false, QkvOrder::kNew},
    // clang-format on
}};

// Own attributes of a node; those that it has not stay zero.
struct Attributes {
  int32_t groups = 0;
  float eps = 0;
  int32_t num_heads = 0;
  int32_t head_dim = 0;
  int32_t num_queries = 0;
};

// One serialised field: exactly one of the pointers is set.
struct Field {
  const char* name;
  int32_t Attributes::* integer;
  float Attributes::* real;
};

inline std::vector<Field> fields_of(const Node& node) {
  const Field groups = {"groups", &Attributes::groups, nullptr};
  if (node.op == Op::kQkvAttention) {
    return {{"num_heads", &Attributes::num_heads, nullptr},
            {"head_dim", &Attributes::head_dim, nullptr},
            {"num_queries", &Attributes::num_queries, nullptr}};
  }
  if (node.direction == Direction::kBackward) return {groups};
  return {groups, {"eps", nullptr, &Attributes::eps}};
}

// The tensors by what they are. kImage, kQkv and kOut are of the node's type, the rest is float32.
enum class Tensor {
  kImage,       // [N, H, W, C]
  kChannels,    // [C]
  kModulation,  // [N, 2C]
  kMoments,     // [N, groups]
  kQkv,         // [N, T, 3 * num_heads * head_dim]
  kOut,         // [N, num_queries, num_heads * head_dim]
  kStats,       // [N, num_heads, 2, num_queries]
};

inline bool has_node_type(Tensor tensor) {
  return tensor == Tensor::kImage || tensor == Tensor::kQkv || tensor == Tensor::kOut;
}

inline std::vector<Tensor> inputs_of(const Node& node) {
  std::vector<Tensor> inputs;
  const bool backward = node.direction == Direction::kBackward;
  if (node.op == Op::kQkvAttention) {
    if (!backward) return {Tensor::kQkv};
    return {Tensor::kOut, Tensor::kQkv, Tensor::kOut, Tensor::kStats};  // grad, qkv, out, stats
  }
  if (backward) inputs.push_back(Tensor::kImage);  // grad
  inputs.push_back(Tensor::kImage);
  if (backward) inputs.insert(inputs.end(), 2, Tensor::kMoments);  // mean, rstd
  inputs.insert(inputs.end(), 2, Tensor::kChannels);               // weight, bias
  if (node.modulated) inputs.push_back(Tensor::kModulation);
  return inputs;
}

inline std::vector<Tensor> outputs_of(const Node& node) {
  const bool extra = node.direction == Direction::kForwardForBackward;
  if (node.op == Op::kQkvAttention) {
    if (node.direction == Direction::kBackward) return {Tensor::kQkv};
    return extra ? std::vector<Tensor>{Tensor::kOut, Tensor::kStats}
                 : std::vector<Tensor>{Tensor::kOut};
  }
  return extra ? std::vector<Tensor>{Tensor::kImage, Tensor::kMoments, Tensor::kMoments}
               : std::vector<Tensor>{Tensor::kImage};
}

}  // namespace adm_rt::tensorrt
