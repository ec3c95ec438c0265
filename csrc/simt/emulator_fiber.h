// Fibers for the emulator: a stack of its own with a guard page, switched by hand on x86-64 and by
// ucontext elsewhere (or with ADM_RT_EMULATOR_UCONTEXT), annotated for AddressSanitizer.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ADM_RT_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define ADM_RT_ASAN 1
#endif
#if defined(ADM_RT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) && !defined(ADM_RT_EMULATOR_UCONTEXT)
#define ADM_RT_EMULATOR_UCONTEXT
#endif
#if defined(ADM_RT_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace adm_rt::simt::emulator {

#if !defined(ADM_RT_EMULATOR_UCONTEXT)
// Saves the registers that a callee keeps, stores the stack pointer and goes on with another one.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*to*/) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
#endif

class __attribute__((visibility("hidden"))) Fiber {
 public:
  Fiber() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = kStack + page;
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mapping_ = static_cast<char*>(memory);
    mprotect(mapping_, page, PROT_NONE);
    bottom_ = mapping_ + page;
  }
  ~Fiber() { munmap(mapping_, mapped_); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls entry(argument) on this stack; what ran there before is forgotten.
  void start(void (*entry)(void*), void* argument) {
    entry_ = entry;
    argument_ = argument;
    done_ = false;
#if defined(ADM_RT_ASAN)
    ASAN_UNPOISON_MEMORY_REGION(bottom_, kStack);
    fake_stack_ = nullptr;
#endif
#if defined(ADM_RT_EMULATOR_UCONTEXT)
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom_;
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    starting() = this;
    makecontext(&context_, &Fiber::run_starting, 0);
#else
    void** top = reinterpret_cast<void**>(bottom_ + kStack);
    top[-1] = nullptr;  // where run_starting would return to
    top[-2] = reinterpret_cast<void*>(&Fiber::run_starting);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;  // six registers
    stack_pointer_ = top - 8;
#endif
    fresh_ = true;
  }

  // Runs the fiber until it suspends itself or its entry returns.
  void resume() {
    if (fresh_) starting() = this;
    fresh_ = false;
#if defined(ADM_RT_ASAN)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, bottom_, kStack);
#endif
#if defined(ADM_RT_EMULATOR_UCONTEXT)
    swapcontext(&outside_context_, &context_);
#else
    switch_stack(&outside_, stack_pointer_);
#endif
#if defined(ADM_RT_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // From inside: back to resume(), until the next one.
  void suspend() {
#if defined(ADM_RT_ASAN)
    // A null place for the fake stack lets it go: this stack is not coming back.
    __sanitizer_start_switch_fiber(done_ ? nullptr : &fake_stack_, outside_bottom_, outside_size_);
#endif
#if defined(ADM_RT_EMULATOR_UCONTEXT)
    swapcontext(&context_, &outside_context_);
#else
    switch_stack(&stack_pointer_, outside_);
#endif
#if defined(ADM_RT_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack_, &outside_bottom_, &outside_size_);
#endif
  }

 private:
  static constexpr size_t kStack = 256 * 1024;  // AddressSanitizer makes frames large

  static Fiber*& starting() {
    static Fiber* fiber = nullptr;
    return fiber;
  }
  static void run_starting() {
    Fiber& self = *starting();
#if defined(ADM_RT_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &self.outside_bottom_, &self.outside_size_);
#endif
    self.entry_(self.argument_);
    self.done_ = true;
    self.suspend();
    __builtin_trap();
  }

  char* mapping_ = nullptr;
  char* bottom_ = nullptr;
  size_t mapped_ = 0;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool fresh_ = false, done_ = false;
#if defined(ADM_RT_EMULATOR_UCONTEXT)
  ucontext_t context_, outside_context_;
#else
  void* stack_pointer_ = nullptr;
  void* outside_ = nullptr;
#endif
#if defined(ADM_RT_ASAN)
  void* fake_stack_ = nullptr;
  const void* outside_bottom_ = nullptr;
  size_t outside_size_ = 0;
#endif
};

}  // namespace adm_rt::simt::emulator
