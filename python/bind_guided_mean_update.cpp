// Binding of guided_mean_update and count_nonfinite. Addresses are ints, 0 for none; adm_rt.ops
// checks shapes and types.
#include "bind_guided_mean_update.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_guided_mean_update(py::module_& module) {
  module.def("guided_mean_update", guided_mean_update_binding(&adm_rt::guided_mean_update_cpu),
             kGuidedMeanUpdateDoc);
  module.def(
      "count_nonfinite",
      [](uintptr_t values, int64_t images, int64_t size, uintptr_t counts) {
        py::gil_scoped_release release;
        adm_rt::count_nonfinite_cpu(reinterpret_cast<const float*>(values), images, size,
                                    reinterpret_cast<int64_t*>(counts));
      },
      py::arg("values"), py::arg("images"), py::arg("size"), py::arg("counts"),
      "counts int64 [images]: how many of values float32 [images, size] are NaN or infinite.");
}
