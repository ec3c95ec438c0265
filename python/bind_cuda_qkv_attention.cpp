// adm_rt._cuda.qkv_attention and its gradient. Pointers and streams come as ints; 0 is "not given".
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bind_qkv_attention.h"
#include "ops/qkv_attention_cuda.h"

namespace py = pybind11;

namespace {

void forward(uintptr_t qkv, uintptr_t out, uintptr_t stats, int64_t batch, int64_t heads,
             int64_t head_dim, int64_t length, int64_t num_queries, int order, int dtype,
             int layout, uintptr_t stream) {
  const auto shape = qkv_attention_shape(batch, heads, head_dim, length, num_queries, order, dtype);
  const auto p = qkv_attention_params(shape, qkv, out, stats);
  py::gil_scoped_release release;
  adm_rt::qkv_attention_cuda(p, static_cast<adm_rt::QkvLayout>(layout),
                             reinterpret_cast<void*>(stream));
}

void backward(uintptr_t grad, uintptr_t qkv, uintptr_t out, uintptr_t stats, uintptr_t dqkv,
              uintptr_t workspace, int64_t batch, int64_t heads, int64_t head_dim, int64_t length,
              int64_t num_queries, int order, int dtype, int layout, uintptr_t stream) {
  const auto shape = qkv_attention_shape(batch, heads, head_dim, length, num_queries, order, dtype);
  const auto p = qkv_attention_backward_params(shape, grad, qkv, out, stats, dqkv);
  py::gil_scoped_release release;
  adm_rt::qkv_attention_backward_cuda(p, static_cast<adm_rt::QkvLayout>(layout),
                                      reinterpret_cast<void*>(workspace),
                                      reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_cuda_qkv_attention(py::module_& module) {
  using py::arg;
  module.def("qkv_attention", &forward, arg("qkv"), arg("out"), arg("stats"), arg("batch"),
             arg("heads"), arg("head_dim"), arg("length"), arg("num_queries"), arg("order"),
             arg("dtype"), arg("layout"), arg("stream"),
             "See csrc/ops/qkv_attention_cuda.h. order: 0 legacy, 1 new; dtype: 0 float32, "
             "1 bfloat16, 2 float16; layout: 0 channel-major, 1 token-major.");
  module.def("qkv_attention_backward", &backward, arg("grad"), arg("qkv"), arg("out"), arg("stats"),
             arg("dqkv"), arg("workspace"), arg("batch"), arg("heads"), arg("head_dim"),
             arg("length"), arg("num_queries"), arg("order"), arg("dtype"), arg("layout"),
             arg("stream"), "Gradient of qkv_attention.");
  module.def(
      "qkv_attention_backward_workspace",
      [](int64_t batch, int64_t heads, int64_t num_queries) {
        adm_rt::QkvAttentionShape shape;
        shape.batch = batch, shape.heads = heads, shape.num_queries = num_queries;
        return adm_rt::qkv_attention_backward_workspace(shape);
      },
      arg("batch"), arg("heads"), arg("num_queries"),
      "Bytes on the device that qkv_attention_backward needs.");
}
