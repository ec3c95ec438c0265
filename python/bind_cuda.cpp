// The extension module adm_rt._cuda: the ops on CUDA. Kept out of _C so that _C loads anywhere.
// Each python/bind_cuda_<name>.cpp defines bind_cuda_<name>(module); the list comes from CMake.
#include <pybind11/pybind11.h>

#define ADM_RT_BIND_CUDA(name) void bind_cuda_##name(pybind11::module_& module);
#include "bind_cuda_list.inc"
#undef ADM_RT_BIND_CUDA

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of adm_rt. Pointers and streams are ints; work is only enqueued.";
#define ADM_RT_BIND_CUDA(name) bind_cuda_##name(module);
#include "bind_cuda_list.inc"
#undef ADM_RT_BIND_CUDA
}
