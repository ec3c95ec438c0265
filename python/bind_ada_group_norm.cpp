// adm_rt._C.ada_group_norm and its gradient. Pointers come as ints; 0 is "not given".
#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/dtype.h"
#include "ops/ada_group_norm.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void forward(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t scale_shift,
             int64_t scale_shift_stride, uintptr_t y, uintptr_t mean, uintptr_t rstd, int64_t batch,
             int64_t channels, int64_t spatial, int64_t groups, double eps, bool silu, int dtype,
             bool channels_last) {
  adm_rt::AdaGroupNormParams p;
  p.x = pointer<const void>(x);
  p.weight = pointer<const float>(weight);
  p.bias = pointer<const float>(bias);
  p.scale_shift = pointer<const float>(scale_shift);
  p.scale_shift_stride = scale_shift_stride;
  p.y = pointer<void>(y);
  p.mean = pointer<float>(mean);
  p.rstd = pointer<float>(rstd);
  p.batch = batch;
  p.channels = channels;
  p.spatial = spatial;
  p.groups = groups;
  p.eps = static_cast<float>(eps);
  p.silu = silu;
  p.dtype = adm_rt::dtype_from_int(dtype);
  p.layout = channels_last ? adm_rt::AdaGroupNormLayout::kChannelsLast
                           : adm_rt::AdaGroupNormLayout::kChannelsFirst;
  py::gil_scoped_release release;
  adm_rt::ada_group_norm_cpu(p);
}

void backward(uintptr_t grad, uintptr_t x, uintptr_t mean, uintptr_t rstd, uintptr_t weight,
              uintptr_t bias, uintptr_t scale_shift, int64_t scale_shift_stride, uintptr_t dx,
              uintptr_t dweight, uintptr_t dbias, uintptr_t dscale_shift, int64_t batch,
              int64_t channels, int64_t spatial, int64_t groups, bool silu, int dtype,
              bool channels_last) {
  adm_rt::AdaGroupNormBackwardParams p;
  p.grad = pointer<const void>(grad);
  p.x = pointer<const void>(x);
  p.mean = pointer<const float>(mean);
  p.rstd = pointer<const float>(rstd);
  p.weight = pointer<const float>(weight);
  p.bias = pointer<const float>(bias);
  p.scale_shift = pointer<const float>(scale_shift);
  p.scale_shift_stride = scale_shift_stride;
  p.dx = pointer<void>(dx);
  p.dweight = pointer<float>(dweight);
  p.dbias = pointer<float>(dbias);
  p.dscale_shift = pointer<float>(dscale_shift);
  p.batch = batch;
  p.channels = channels;
  p.spatial = spatial;
  p.groups = groups;
  p.silu = silu;
  p.dtype = adm_rt::dtype_from_int(dtype);
  p.layout = channels_last ? adm_rt::AdaGroupNormLayout::kChannelsLast
                           : adm_rt::AdaGroupNormLayout::kChannelsFirst;
  py::gil_scoped_release release;
  adm_rt::ada_group_norm_backward_cpu(p);
}

}  // namespace

void bind_ada_group_norm(py::module_& module) {
  using py::arg;
  module.def("ada_group_norm", &forward, arg("x"), arg("weight"), arg("bias"), arg("scale_shift"),
             arg("scale_shift_stride"), arg("y"), arg("mean"), arg("rstd"), arg("batch"),
             arg("channels"), arg("spatial"), arg("groups"), arg("eps"), arg("silu"), arg("dtype"),
             arg("channels_last"), "See csrc/ops/ada_group_norm.h. dtype: 0 float32, 1 bfloat16.");
  module.def("ada_group_norm_backward", &backward, arg("grad"), arg("x"), arg("mean"), arg("rstd"),
             arg("weight"), arg("bias"), arg("scale_shift"), arg("scale_shift_stride"), arg("dx"),
             arg("dweight"), arg("dbias"), arg("dscale_shift"), arg("batch"), arg("channels"),
             arg("spatial"), arg("groups"), arg("silu"), arg("dtype"), arg("channels_last"),
             "Gradients of ada_group_norm; each of the four outputs may be 0.");
}
