// Hides AVX-512 from libraries that have no setting for it, so that a benchmark can keep everybody
// to AVX2.
#pragma once

namespace adm_rt {

// From now on the calling thread, and every thread that it starts, reads from CPUID that there is
// no AVX-512, AVX10 or AMX; libraries loaded earlier may have asked already. Takes the process's
// SIGSEGV handler. False, and nothing has changed, where the processor or the system cannot do it:
// it needs Linux on x86-64 with CPUID faulting (arch_prctl(2), ARCH_SET_CPUID).
bool limit_cpuid_to_avx2();

}  // namespace adm_rt
