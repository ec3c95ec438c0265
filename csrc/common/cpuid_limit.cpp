#include "common/cpuid_limit.h"

#if defined(__x86_64__) && defined(__linux__)

#include <asm/prctl.h>
#include <cpuid.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

#ifndef ARCH_SET_CPUID
#define ARCH_SET_CPUID 0x1012
#endif

namespace adm_rt {
namespace {

struct Registers {
  unsigned eax, ebx, ecx, edx;
};

// Intel's manual, volume 2, CPUID: leaf 7 has the features, leaf 0x24 the version of AVX10.
void hide_wide_vectors(unsigned leaf, unsigned subleaf, Registers& r) {
  const auto clear = [](unsigned& word, auto... bits) { word &= ~((1u << bits) | ...); };
  if (leaf == 7 && subleaf == 0) {
    clear(r.ebx, 16, 17, 21, 26, 27, 28, 30, 31);  // F, DQ, IFMA, PF, ER, CD, BW, VL
    clear(r.ecx, 1, 6, 11, 12, 14);                // VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
    // 4VNNIW, 4FMAPS, VP2INTERSECT, AMX-BF16, FP16, AMX-TILE, AMX-INT8
    clear(r.edx, 2, 3, 8, 22, 23, 24, 25);
  } else if (leaf == 7 && subleaf == 1) {
    clear(r.eax, 5, 21);  // BF16, AMX-FP16
    clear(r.edx, 8, 19);  // AMX-COMPLEX, AVX10
  } else if (leaf == 0x24) {
    r = {};
  }
}

// Of the calling thread.
long set_cpuid(bool allowed) {
  return syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed ? 1UL : 0UL);
}

// CPUID faults: answers in its place. Anything else that faults does so again without us.
void on_fault(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (code[0] != 0x0f || code[1] != 0xa2) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  const int error = errno;
  const auto leaf = static_cast<unsigned>(registers[REG_RAX]);
  const auto subleaf = static_cast<unsigned>(registers[REG_RCX]);
  Registers r;
  set_cpuid(true);
  __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
  set_cpuid(false);
  hide_wide_vectors(leaf, subleaf, r);
  registers[REG_RAX] = r.eax;
  registers[REG_RBX] = r.ebx;
  registers[REG_RCX] = r.ecx;
  registers[REG_RDX] = r.edx;
  registers[REG_RIP] += 2;
  errno = error;
}

}  // namespace

bool limit_cpuid_to_avx2() {
  struct sigaction action = {}, before = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGSEGV, &action, &before) != 0) return false;
  if (set_cpuid(false) == 0) return true;
  sigaction(SIGSEGV, &before, nullptr);
  return false;
}

}  // namespace adm_rt

#else

namespace adm_rt {

bool limit_cpuid_to_avx2() { return false; }

}  // namespace adm_rt

#endif
