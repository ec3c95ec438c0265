// The arguments of qkv_attention and its gradient, shared by the modules _C and _cuda.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/dtype.h"
#include "ops/qkv_attention.h"

inline adm_rt::QkvAttentionShape qkv_attention_shape(int64_t batch, int64_t heads, int64_t head_dim,
                                                     int64_t length, int64_t num_queries, int order,
                                                     int dtype) {
  ADM_RT_CHECK(order == 0 || order == 1, "order=", order, " is not 0 (legacy) or 1 (new)");
  adm_rt::QkvAttentionShape shape;
  shape.batch = batch;
  shape.heads = heads;
  shape.head_dim = head_dim;
  shape.length = length;
  shape.num_queries = num_queries;
  shape.order = static_cast<adm_rt::QkvOrder>(order);
  shape.dtype = adm_rt::dtype_from_int(dtype);
  return shape;
}

inline adm_rt::QkvAttentionParams qkv_attention_params(const adm_rt::QkvAttentionShape& shape,
                                                       uintptr_t qkv, uintptr_t out,
                                                       uintptr_t stats) {
  adm_rt::QkvAttentionParams p;
  p.shape = shape;
  p.qkv = reinterpret_cast<const void*>(qkv);
  p.out = reinterpret_cast<void*>(out);
  p.stats = reinterpret_cast<float*>(stats);
  return p;
}

inline adm_rt::QkvAttentionBackwardParams qkv_attention_backward_params(
    const adm_rt::QkvAttentionShape& shape, uintptr_t grad, uintptr_t qkv, uintptr_t out,
    uintptr_t stats, uintptr_t dqkv) {
  adm_rt::QkvAttentionBackwardParams p;
  p.shape = shape;
  p.grad = reinterpret_cast<const void*>(grad);
  p.qkv = reinterpret_cast<const void*>(qkv);
  p.out = reinterpret_cast<const void*>(out);
  p.stats = reinterpret_cast<const float*>(stats);
  p.dqkv = reinterpret_cast<void*>(dqkv);
  return p;
}
