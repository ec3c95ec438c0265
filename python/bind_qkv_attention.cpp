// adm_rt._C.qkv_attention and its gradient. Pointers come as ints; 0 is "not given".
#include "bind_qkv_attention.h"

#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

namespace {

void forward(uintptr_t qkv, uintptr_t out, uintptr_t stats, int64_t batch, int64_t heads,
             int64_t head_dim, int64_t length, int64_t num_queries, int order, int dtype) {
  const auto shape = qkv_attention_shape(batch, heads, head_dim, length, num_queries, order, dtype);
  const auto p = qkv_attention_params(shape, qkv, out, stats);
  py::gil_scoped_release release;
  adm_rt::qkv_attention_cpu(p);
}

void backward(uintptr_t grad, uintptr_t qkv, uintptr_t out, uintptr_t stats, uintptr_t dqkv,
              int64_t batch, int64_t heads, int64_t head_dim, int64_t length, int64_t num_queries,
              int order, int dtype) {
  const auto shape = qkv_attention_shape(batch, heads, head_dim, length, num_queries, order, dtype);
  const auto p = qkv_attention_backward_params(shape, grad, qkv, out, stats, dqkv);
  py::gil_scoped_release release;
  adm_rt::qkv_attention_backward_cpu(p);
}

}  // namespace

void bind_qkv_attention(py::module_& module) {
  using py::arg;
  module.def("qkv_attention", &forward, arg("qkv"), arg("out"), arg("stats"), arg("batch"),
             arg("heads"), arg("head_dim"), arg("length"), arg("num_queries"), arg("order"),
             arg("dtype"),
             "See csrc/ops/qkv_attention.h. order: 0 legacy, 1 new; dtype: 0 float32, 1 bfloat16.");
  module.def("qkv_attention_backward", &backward, arg("grad"), arg("qkv"), arg("out"), arg("stats"),
             arg("dqkv"), arg("batch"), arg("heads"), arg("head_dim"), arg("length"),
             arg("num_queries"), arg("order"), arg("dtype"), "Gradient of qkv_attention.");
}
