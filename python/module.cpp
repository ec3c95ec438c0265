// The extension module adm_rt._C. Each python/bind_<name>.cpp defines bind_<name>(module); the list
// comes from CMake, so an op is added by adding its file.
#include <pybind11/pybind11.h>

#define ADM_RT_BIND(name) void bind_##name(pybind11::module_& module);
#include "bind_list.inc"
#undef ADM_RT_BIND

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of adm_rt. Pointers are ints; adm_rt.ops checks what they point to.";
#define ADM_RT_BIND(name) bind_##name(module);
#include "bind_list.inc"
#undef ADM_RT_BIND
}
