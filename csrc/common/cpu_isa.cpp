#include "common/cpu_isa.h"

#include <atomic>
#include <cstdlib>

#include "common/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace adm_rt {
namespace {

constexpr int kUnset = -1;
std::atomic<int> current_isa{kUnset};

CpuIsa detect() {
#if defined(__x86_64__)
  // The builtins also ask XGETBV whether the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return CpuIsa::kAvx512;
  if (avx2) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kPortable;
}

void check_available(CpuIsa isa, const char* source) {
  ADM_RT_CHECK(static_cast<int>(isa) <= static_cast<int>(best_cpu_isa()), source, "=", name_of(isa),
               " is not available: this machine's best is ", name_of(best_cpu_isa()));
}

}  // namespace

const char* name_of(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kPortable:
      return "portable";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

CpuIsa cpu_isa_from_name(const std::string& name) {
  for (CpuIsa isa : {CpuIsa::kPortable, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (name == name_of(isa)) return isa;
  }
  throw_invalid_argument("cpu_isa='", name, "' is not one of portable, avx2, avx512");
}

CpuIsa best_cpu_isa() {
  static const CpuIsa best = detect();
  return best;
}

CpuIsa cpu_isa() {
  int isa = current_isa.load(std::memory_order_relaxed);
  if (isa == kUnset) {
    CpuIsa chosen = best_cpu_isa();
    const char* text = std::getenv("ADM_RT_CPU_ISA");
    if (text != nullptr && *text != '\0') {
      chosen = cpu_isa_from_name(text);
      check_available(chosen, "ADM_RT_CPU_ISA");
    }
    isa = static_cast<int>(chosen);
    current_isa.store(isa, std::memory_order_relaxed);
  }
  return static_cast<CpuIsa>(isa);
}

void set_cpu_isa(CpuIsa isa) {
  check_available(isa, "cpu_isa");
  current_isa.store(static_cast<int>(isa), std::memory_order_relaxed);
}

bool cpu_has_bf16() {
#if defined(__x86_64__)
  if (best_cpu_isa() != CpuIsa::kAvx512) return false;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) == 0) return false;
  return (eax & (1u << 5)) != 0;
#else
  return false;
#endif
}

}  // namespace adm_rt
