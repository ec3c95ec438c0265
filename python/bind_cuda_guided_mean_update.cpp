// adm_rt._cuda.guided_mean_update: the step on CUDA, with coefficients by value or from a table.
#include <pybind11/pybind11.h>

#include "bind_guided_mean_update.h"
#include "ops/guided_mean_update_cuda.h"

namespace py = pybind11;

void bind_cuda_guided_mean_update(py::module_& module) {
  module.def(
      "guided_mean_update",
      guided_mean_update_binding<uintptr_t, uintptr_t>(
          [](const adm_rt::GuidedMeanUpdateParams& params, uintptr_t limits, uintptr_t stream) {
            adm_rt::guided_mean_update_cuda(params, nullptr, nullptr,
                                            reinterpret_cast<float*>(limits),
                                            reinterpret_cast<void*>(stream));
          }),
      "As _C.guided_mean_update, then limits: float32 [images] scratch, and the stream.");
  module.def(
      "guided_mean_update_from_table",
      guided_mean_update_binding<uintptr_t, uintptr_t, uintptr_t, uintptr_t>(
          [](const adm_rt::GuidedMeanUpdateParams& params, uintptr_t limits, uintptr_t stream,
             uintptr_t table, uintptr_t step_counter) {
            adm_rt::guided_mean_update_cuda(params, reinterpret_cast<const float*>(table),
                                            reinterpret_cast<const uint32_t*>(step_counter),
                                            reinterpret_cast<float*>(limits),
                                            reinterpret_cast<void*>(stream));
          }),
      "As guided_mean_update, then the addresses on the device of a float32 table [steps, 18] "
      "and of the uint32 that names its row and the noise's step: for captured graphs. The "
      "coefficients and step arguments are not used.");
}
