// The launchers of qkv_attention on CUDA, for C++ that does not include CUDA's headers.
#pragma once

#include <cstdint>

#include "ops/qkv_attention.h"

namespace adm_rt {

// How qkv, out and their gradients lie in memory; both dense.
enum class QkvLayout : int {
  kChannelMajor = 0,  // [batch, channels, tokens]: NCHW
  kTokenMajor = 1,    // [batch, tokens, channels]: NHWC, the layout that the kernels are made for
};

constexpr int64_t kMaxCudaHeadDim = 256;

// Both enqueue their work on `stream` (a cudaStream_t) and return: no allocation, no
// synchronisation, so a graph can capture them. All pointers are device pointers on the current
// device; dtype may be float32, bfloat16 or float16; stats is always float32 [batch, heads, 2,
// num_queries], as on the CPU. head_dim is at most kMaxCudaHeadDim, heads and batch at most 65535.
// Accesses are of 16 bytes where layout is kTokenMajor, addresses are multiples of 16 and head_dim
// is a multiple of 16 bytes, else of one element. Results are the same bits in every run, and do
// not depend on the other images of the batch.
//
// They throw std::invalid_argument for bad params, std::runtime_error for what CUDA reports.
void qkv_attention_cuda(const QkvAttentionParams& params, QkvLayout layout, void* stream);

// workspace: qkv_attention_backward_workspace(shape) bytes on the device, a multiple of 4 aligned
// to 4; its contents need not be set and mean nothing afterwards.
void qkv_attention_backward_cuda(const QkvAttentionBackwardParams& params, QkvLayout layout,
                                 void* workspace, void* stream);
int64_t qkv_attention_backward_workspace(const QkvAttentionShape& shape);

}  // namespace adm_rt
