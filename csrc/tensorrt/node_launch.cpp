#include "tensorrt/node_launch.h"

#include "common/check.h"
#include "ops/ada_group_norm_cuda.h"
#include "ops/qkv_attention_cuda.h"

namespace adm_rt::tensorrt {
namespace {

AdaGroupNormCudaShape norm_shape(const Node& node, const Attributes& attributes, const Sizes& sizes,
                                 DType dtype) {
  ADM_RT_CHECK(sizes.rank == 4, node.name, ": x has ", sizes.rank, " dimensions, not 4");
  AdaGroupNormCudaShape shape;
  shape.batch = sizes.values[0];
  shape.height = sizes.values[1];
  shape.width = sizes.values[2];
  shape.channels = sizes.values[3];
  shape.groups = attributes.groups;
  shape.eps = attributes.eps;
  shape.silu = node.silu;
  shape.dtype = dtype;
  shape.layout = AdaGroupNormLayout::kChannelsLast;
  shape.scale_shift_stride = 2 * shape.channels;
  return shape;
}

QkvAttentionShape attention_shape(const Node& node, const Attributes& attributes,
                                  const Sizes& sizes, DType dtype) {
  ADM_RT_CHECK(sizes.rank == 3, node.name, ": qkv has ", sizes.rank, " dimensions, not 3");
  QkvAttentionShape shape;
  shape.batch = sizes.values[0];
  shape.length = sizes.values[1];
  shape.heads = attributes.num_heads;
  shape.head_dim = attributes.head_dim;
  shape.num_queries = attributes.num_queries;
  shape.order = node.order;
  shape.dtype = dtype;
  return shape;
}

const float* floats(const void* pointer) { return static_cast<const float*>(pointer); }
float* floats(void* pointer) { return static_cast<float*>(pointer); }

void launch_norm(const Node& node, const AdaGroupNormCudaShape& shape, const void* const* inputs,
                 void* const* outputs, void* workspace, void* stream) {
  if (node.direction == Direction::kBackward) {
    AdaGroupNormCudaBackwardParams params;
    params.shape = shape;
    params.grad = inputs[0];
    params.x = inputs[1];
    params.mean = floats(inputs[2]);
    params.rstd = floats(inputs[3]);
    params.weight = floats(inputs[4]);
    params.bias = floats(inputs[5]);
    params.scale_shift = node.modulated ? inputs[6] : nullptr;
    params.dx = outputs[0];
    ada_group_norm_backward_cuda(params, workspace, stream);
    return;
  }
  const bool moments = node.direction == Direction::kForwardForBackward;
  AdaGroupNormCudaParams params;
  params.shape = shape;
  params.x = inputs[0];
  params.weight = floats(inputs[1]);
  params.bias = floats(inputs[2]);
  params.scale_shift = node.modulated ? inputs[3] : nullptr;
  params.y = outputs[0];
  params.mean = moments ? floats(outputs[1]) : nullptr;
  params.rstd = moments ? floats(outputs[2]) : nullptr;
  ada_group_norm_cuda(params, workspace, stream);
}

void launch_attention(const Node& node, const QkvAttentionShape& shape, const void* const* inputs,
                      void* const* outputs, void* workspace, void* stream) {
  if (node.direction == Direction::kBackward) {
    QkvAttentionBackwardParams params;
    params.shape = shape;
    params.grad = inputs[0];
    params.qkv = inputs[1];
    params.out = inputs[2];
    params.stats = floats(inputs[3]);
    params.dqkv = outputs[0];
    qkv_attention_backward_cuda(params, QkvLayout::kTokenMajor, workspace, stream);
    return;
  }
  QkvAttentionParams params;
  params.shape = shape;
  params.qkv = inputs[0];
  params.out = outputs[0];
  if (node.direction == Direction::kForwardForBackward) params.stats = floats(outputs[1]);
  qkv_attention_cuda(params, QkvLayout::kTokenMajor, stream);
}

}  // namespace

int main_input(const Node& node) { return node.direction == Direction::kBackward ? 1 : 0; }

int64_t workspace_bytes(const Node& node, const Attributes& attributes, const Sizes& sizes,
                        DType dtype) {
  const bool backward = node.direction == Direction::kBackward;
  if (node.op == Op::kAdaGroupNorm) {
    const AdaGroupNormCudaShape shape = norm_shape(node, attributes, sizes, dtype);
    return backward ? ada_group_norm_backward_cuda_workspace(shape)
                    : ada_group_norm_cuda_workspace(shape);
  }
  if (!backward) return 0;
  return qkv_attention_backward_workspace(attention_shape(node, attributes, sizes, dtype));
}

void launch(const Node& node, const Attributes& attributes, const Sizes& sizes, DType dtype,
            const void* const* inputs, void* const* outputs, void* workspace, void* stream) {
  if (node.op == Op::kAdaGroupNorm) {
    const AdaGroupNormCudaShape shape = norm_shape(node, attributes, sizes, dtype);
    launch_norm(node, shape, inputs, outputs, workspace, stream);
  } else {
    const QkvAttentionShape shape = attention_shape(node, attributes, sizes, dtype);
    launch_attention(node, shape, inputs, outputs, workspace, stream);
  }
}

}  // namespace adm_rt::tensorrt
