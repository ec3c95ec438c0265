// Threads, instruction set and build facts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/cpu_isa.h"
#include "common/cpuid_limit.h"
#include "common/thread_pool.h"

namespace py = pybind11;

void bind_common(py::module_& module) {
  module.def("num_threads", &adm_rt::num_threads,
             "Threads that the CPU kernels use. Default: ADM_RT_NUM_THREADS, else OMP_NUM_THREADS, "
             "else the cores that this process may run on.");
  module.def("set_num_threads", &adm_rt::set_num_threads, py::arg("n"),
             py::call_guard<py::gil_scoped_release>(), "n in [1, 1024].");
  module.def(
      "cpu_isa", [] { return std::string(adm_rt::name_of(adm_rt::cpu_isa())); },
      "The instruction set in use: 'portable', 'avx2' or 'avx512'.");
  module.def(
      "set_cpu_isa",
      [](const std::string& name) { adm_rt::set_cpu_isa(adm_rt::cpu_isa_from_name(name)); },
      py::arg("name"), "ValueError when the name is unknown or the CPU lacks it.");
  module.def(
      "available_cpu_isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i <= static_cast<int>(adm_rt::best_cpu_isa()); ++i) {
          names.emplace_back(adm_rt::name_of(static_cast<adm_rt::CpuIsa>(i)));
        }
        return names;
      },
      "The instruction sets that this CPU and this build have, the best one last.");
  module.def("cpu_has_bf16", &adm_rt::cpu_has_bf16,
             "Whether the CPU has AVX-512 bfloat16 dot products.");
  module.def("limit_cpuid_to_avx2", &adm_rt::limit_cpuid_to_avx2,
             "For benchmarks, before the libraries are loaded: from now on CPUID tells this thread "
             "and those it starts of no AVX-512 and no AMX. False where the machine cannot hide "
             "them (it takes Linux, x86-64 and CPUID faulting).");
  module.attr("compiler") = ADM_RT_COMPILER;
  module.attr("version") = ADM_RT_VERSION;
}
