// Which instruction set the CPU kernels use, chosen at run time.
//
// Every csrc/ops/*_simd.cpp is compiled once per instruction set into its own namespace
// (portable, avx2, avx512); ADM_RT_DISPATCH picks the namespace of the current one.
#pragma once

#include <string>

namespace adm_rt {

enum class CpuIsa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set that this CPU, the operating system and this build have, lowered by the
// environment variable ADM_RT_CPU_ISA=portable|avx2|avx512 (read once). A value that is unknown or
// that this machine lacks throws std::invalid_argument.
CpuIsa cpu_isa();

// For tests and benchmarks, while no kernel runs: each instruction set has scratch memory and work
// of its own size. Throws std::invalid_argument when this machine lacks `isa`.
void set_cpu_isa(CpuIsa isa);

// The best one available here, whatever was set.
CpuIsa best_cpu_isa();

// Whether the CPU has the AVX-512 bfloat16 dot products.
bool cpu_has_bf16();

const char* name_of(CpuIsa isa);
CpuIsa cpu_isa_from_name(const std::string& name);

}  // namespace adm_rt

// return ADM_RT_DISPATCH(kernel(arguments)) inside namespace adm_rt: an expression that calls
// portable::kernel, avx2::kernel or avx512::kernel.
#if defined(__x86_64__)
#define ADM_RT_DISPATCH(...)                                              \
  (::adm_rt::cpu_isa() == ::adm_rt::CpuIsa::kAvx512 ? avx512::__VA_ARGS__ \
   : ::adm_rt::cpu_isa() == ::adm_rt::CpuIsa::kAvx2 ? avx2::__VA_ARGS__   \
                                                    : portable::__VA_ARGS__)
#else
#define ADM_RT_DISPATCH(...) (portable::__VA_ARGS__)
#endif
