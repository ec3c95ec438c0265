// Bindings of Philox. Addresses are ints; adm_rt.ops.philox checks shapes and types.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/philox.h"
#include "ops/philox_normal.h"

namespace py = pybind11;

void bind_philox(py::module_& module) {
  module.def(
      "philox_normal",
      [](uintptr_t seeds, int64_t images, int64_t size, uint32_t step, uint32_t purpose,
         uintptr_t out) {
        py::gil_scoped_release release;
        adm_rt::philox_normal_cpu(reinterpret_cast<const int64_t*>(seeds), images, size, step,
                                  purpose, reinterpret_cast<float*>(out));
      },
      py::arg("seeds"), py::arg("images"), py::arg("size"), py::arg("step"), py::arg("purpose"),
      py::arg("out"), "out float32 [images, size], seeds int64 [images].");
  module.def(
      "philox_words",
      [](uintptr_t seeds, int64_t images, int64_t counters, uint32_t step, uint32_t purpose,
         uintptr_t out) {
        py::gil_scoped_release release;
        adm_rt::philox_words_cpu(reinterpret_cast<const int64_t*>(seeds), images, counters, step,
                                 purpose, reinterpret_cast<uint32_t*>(out));
      },
      py::arg("seeds"), py::arg("images"), py::arg("counters"), py::arg("step"), py::arg("purpose"),
      py::arg("out"), "out uint32 [images, 4 * counters], seeds int64 [images].");
  module.def(
      "philox4x32",
      [](const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
        adm_rt::Uint1 words[4] = {{counter[0]}, {counter[1]}, {counter[2]}, {counter[3]}};
        adm_rt::philox4x32(words, adm_rt::Uint1{key[0]}, adm_rt::Uint1{key[1]});
        return std::array<uint32_t, 4>{words[0].v, words[1].v, words[2].v, words[3].v};
      },
      py::arg("counter"), py::arg("key"), "One call of Philox4x32-10: four words.");
}
