// adm_rt._cuda.ada_group_norm, its gradients and the moments of channels. Pointers come as ints; 0
// is "not given".
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "ops/ada_group_norm_cuda.h"

namespace py = pybind11;

namespace {

// (batch, channels, skip_channels, height, width, groups)
using Sizes = std::array<int64_t, 6>;
// (eps, silu, dtype, channels_last, resample, scale_shift_dtype, scale_shift_stride)
using Options = std::tuple<double, bool, int, bool, int, int, int64_t>;

constexpr char kShapeDoc[] =
    "shape: (batch, channels, skip_channels, height, width, groups); options: (eps, silu, dtype,\n"
    "channels_last, resample, scale_shift_dtype, scale_shift_stride); dtypes: 0 float32, 1 "
    "bfloat16,\n"
    "2 float16; resample: 0 none, 1 average pool, 2 nearest up. See "
    "csrc/ops/ada_group_norm_cuda.h.";

adm_rt::AdaGroupNormCudaShape shape_of(const Sizes& sizes, const Options& options) {
  adm_rt::AdaGroupNormCudaShape s;
  s.batch = sizes[0];
  s.channels = sizes[1];
  s.skip_channels = sizes[2];
  s.height = sizes[3];
  s.width = sizes[4];
  s.groups = sizes[5];
  s.eps = static_cast<float>(std::get<0>(options));
  s.silu = std::get<1>(options);
  s.dtype = adm_rt::dtype_from_int(std::get<2>(options));
  s.layout = std::get<3>(options) ? adm_rt::AdaGroupNormLayout::kChannelsLast
                                  : adm_rt::AdaGroupNormLayout::kChannelsFirst;
  const int resample = std::get<4>(options);
  ADM_RT_CHECK(resample >= 0 && resample <= 2, "resample code ", resample, " is not 0, 1 or 2");
  s.resample = static_cast<adm_rt::Resample>(resample);
  s.scale_shift_dtype = adm_rt::dtype_from_int(std::get<5>(options));
  s.scale_shift_stride = std::get<6>(options);
  return s;
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void forward(const Sizes& sizes, const Options& options, const std::array<uintptr_t, 7>& inputs,
             const std::array<uintptr_t, 4>& outputs, uintptr_t workspace, uintptr_t stream) {
  adm_rt::AdaGroupNormCudaParams p;
  p.shape = shape_of(sizes, options);
  p.x = pointer<const void>(inputs[0]);
  p.skip = pointer<const void>(inputs[1]);
  p.weight = pointer<const float>(inputs[2]);
  p.bias = pointer<const float>(inputs[3]);
  p.scale_shift = pointer<const void>(inputs[4]);
  p.x_moments = pointer<const float>(inputs[5]);
  p.skip_moments = pointer<const float>(inputs[6]);
  p.y = pointer<void>(outputs[0]);
  p.x_out = pointer<void>(outputs[1]);
  p.mean = pointer<float>(outputs[2]);
  p.rstd = pointer<float>(outputs[3]);
  py::gil_scoped_release release;
  adm_rt::ada_group_norm_cuda(p, pointer<void>(workspace), pointer<void>(stream));
}

void backward(const Sizes& sizes, const Options& options, const std::array<uintptr_t, 9>& inputs,
              const std::array<uintptr_t, 5>& outputs, uintptr_t workspace, uintptr_t stream) {
  adm_rt::AdaGroupNormCudaBackwardParams p;
  p.shape = shape_of(sizes, options);
  p.grad = pointer<const void>(inputs[0]);
  p.grad_x_out = pointer<const void>(inputs[1]);
  p.x = pointer<const void>(inputs[2]);
  p.skip = pointer<const void>(inputs[3]);
  p.mean = pointer<const float>(inputs[4]);
  p.rstd = pointer<const float>(inputs[5]);
  p.weight = pointer<const float>(inputs[6]);
  p.bias = pointer<const float>(inputs[7]);
  p.scale_shift = pointer<const void>(inputs[8]);
  p.dx = pointer<void>(outputs[0]);
  p.dskip = pointer<void>(outputs[1]);
  p.dweight = pointer<float>(outputs[2]);
  p.dbias = pointer<float>(outputs[3]);
  p.dscale_shift = pointer<float>(outputs[4]);
  py::gil_scoped_release release;
  adm_rt::ada_group_norm_backward_cuda(p, pointer<void>(workspace), pointer<void>(stream));
}

void moments(const Sizes& sizes, const Options& options, uintptr_t x, uintptr_t out,
             uintptr_t workspace, uintptr_t stream) {
  const adm_rt::AdaGroupNormCudaShape shape = shape_of(sizes, options);
  py::gil_scoped_release release;
  adm_rt::channel_moments_cuda(shape, pointer<const void>(x), pointer<float>(out),
                               pointer<void>(workspace), pointer<void>(stream));
}

}  // namespace

void bind_cuda_ada_group_norm(py::module_& module) {
  using py::arg;
  module.def(
      "ada_group_norm_workspace",
      [](const Sizes& sizes, const Options& options) {
        return adm_rt::ada_group_norm_cuda_workspace(shape_of(sizes, options));
      },
      arg("shape"), arg("options"), "Bytes of scratch on the device, aligned to 16.");
  module.def("ada_group_norm", &forward, arg("shape"), arg("options"), arg("inputs"),
             arg("outputs"), arg("workspace"), arg("stream"), kShapeDoc);
  module.def(
      "ada_group_norm_backward_workspace",
      [](const Sizes& sizes, const Options& options) {
        return adm_rt::ada_group_norm_backward_cuda_workspace(shape_of(sizes, options));
      },
      arg("shape"), arg("options"), "Bytes of scratch on the device, aligned to 16.");
  module.def("ada_group_norm_backward", &backward, arg("shape"), arg("options"), arg("inputs"),
             arg("outputs"), arg("workspace"), arg("stream"), kShapeDoc);
  module.def("channel_moments", &moments, arg("shape"), arg("options"), arg("x"), arg("moments"),
             arg("workspace"), arg("stream"), kShapeDoc);
}
