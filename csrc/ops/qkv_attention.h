// qkv_attention: multi-head self-attention on the output of one fused qkv projection.
//
//   out[:, t] = sum_s softmax_s(q[:, t] . k[:, s] / sqrt(head_dim)) v[:, s]       per (image, head)
//
// qkv is channel-major, [batch, 3 * heads * head_dim, length], as a 1-D convolution gives it; the
// published models order its channels in one of two ways (QkvOrder). Vaswani et al., "Attention Is
// All You Need", 2017, section 3.2; Dhariwal & Nichol, "Diffusion Models Beat GANs on Image
// Synthesis", 2021, section 3.
//
// All arithmetic is float32, whatever the type of qkv. The softmax is streamed over blocks of keys
// (running maximum and sum: Milakov & Gimelshein, "Online normalizer calculation for softmax",
// 2018), so the scratch memory grows with length, never with its square. Every output element is
// computed in one fixed order: results depend neither on the threads nor on the batch.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace adm_rt {

enum class QkvOrder : int {
  kLegacy = 0,  // channel = head * 3 * head_dim + {q, k, v} * head_dim + i
  kNew = 1,     // channel = {q, k, v} * heads * head_dim + head * head_dim + i
};

struct QkvAttentionShape {
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;
  int64_t length = 0;       // keys
  int64_t num_queries = 0;  // the first num_queries positions ask, 1 <= num_queries <= length
  QkvOrder order = QkvOrder::kLegacy;
  DType dtype = DType::kFloat32;  // of qkv, out and their gradients: float32 or bfloat16
};

struct QkvAttentionParams {
  QkvAttentionShape shape;
  const void* qkv = nullptr;  // [batch, 3 * heads * head_dim, length]
  void* out = nullptr;  // [batch, heads * head_dim, num_queries], channel = head * head_dim + i
  // For the backward pass, or null: [batch, heads, 2, num_queries]. Row 0 is the maximum of the
  // logits in units of ln 2, row 1 the sum of exp(logit - maximum). Kept apart, and not as one
  // log-sum-exp, so that probabilities come out the same when logits are large.
  float* stats = nullptr;
};

// With P = softmax (recomputed from q, k and stats) and delta[t] = sum_c grad[c, t] * out[c, t]:
//   dv = grad P,  dP = grad^T v,  dS = P * (dP - delta),  dq = k dS^T / sqrt(d),  dk = q dS /
//   sqrt(d)
struct QkvAttentionBackwardParams {
  QkvAttentionShape shape;
  const void* grad = nullptr;  // like out
  const void* qkv = nullptr;   // as in the forward pass, and so for the next two
  const void* out = nullptr;
  const float* stats = nullptr;
  void* dqkv = nullptr;  // like qkv; every element is written
};

void qkv_attention_cpu(const QkvAttentionParams& params);
void qkv_attention_backward_cpu(const QkvAttentionBackwardParams& params);

}  // namespace adm_rt
