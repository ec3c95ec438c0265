// The CPU side of simt.h, for tests: runs the threads of a block as fibers on one CPU thread, so
// that device code can be checked, and run under sanitizers, where there is no GPU. One block at a
// time.
//
// What is checked: results; every thread of a block reaches every barrier or none does; several
// orders of the threads between barriers. What is not: memory ordering, launch limits, speed.
// Covers what the kernels of this package use.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#define ADM_RT_KERNEL inline void
#define ADM_RT_DEVICE inline
#define ADM_RT_SHARED static  // blocks run one after the other
#define ADM_RT_GRID_CONSTANT

namespace adm_rt::simt {

// The order in which threads run from one barrier to the next.
enum class Schedule : int { kForward = 0, kReverse = 1, kShuffled = 2 };

class Emulator {
 public:
  unsigned thread = 0, threads = 1, block_x = 0, block_y = 0, blocks_x = 1;

  static Emulator& get() {
    static Emulator emulator;
    return emulator;
  }

  // Runs body() once per thread of a grid [blocks_x, blocks_y].
  template <class Body>
  void launch(unsigned grid_x, unsigned grid_y, unsigned block_threads, Schedule schedule,
              const Body& body) {
    blocks_x = grid_x;
    threads = block_threads;
    schedule_ = schedule;
    static const Body* current;
    current = &body;
    entry_ = [] { (*current)(); };
    for (block_y = 0; block_y < grid_y; ++block_y) {
      for (block_x = 0; block_x < grid_x; ++block_x) run_block();
    }
  }

  void barrier() {
    Fiber& self = *fibers_[thread];
    self.state = State::kWaiting;
    swapcontext(&self.context, &scheduler_);
  }

 private:
  enum class State { kReady, kWaiting, kDone };
  struct Fiber {
    ucontext_t context;
    State state;
    std::unique_ptr<char[]> stack;
  };
  static constexpr size_t kStack = 64 * 1024;

  static void start() {
    Emulator& emulator = get();
    try {
      emulator.entry_();
    } catch (...) {
      emulator.error_ = std::current_exception();
    }
    emulator.fibers_[emulator.thread]->state = State::kDone;
  }  // uc_link leads back to the scheduler

  void run_block() {
    while (fibers_.size() < threads) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_.back()->stack = std::make_unique<char[]>(kStack);
    }
    std::vector<unsigned> order(threads);
    for (unsigned i = 0; i < threads; ++i) {
      order[i] = schedule_ == Schedule::kReverse ? threads - 1 - i : i;
      Fiber& fiber = *fibers_[i];
      fiber.state = State::kReady;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Emulator::start, 0);
    }
    for (bool alive = true; alive;) {  // one round: every thread up to its next barrier or its end
      if (schedule_ == Schedule::kShuffled) {
        for (unsigned i = threads - 1; i > 0; --i) std::swap(order[i], order[random_() % (i + 1)]);
      }
      unsigned done = 0;
      for (const unsigned i : order) {
        Fiber& fiber = *fibers_[i];
        thread = i;
        swapcontext(&scheduler_, &fiber.context);
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
        if (fiber.state == State::kDone) ++done;
      }
      if (done != 0 && done != threads) {
        throw std::logic_error("emulator: some threads of a block left while others wait");
      }
      alive = done == 0;
    }
  }

  Schedule schedule_ = Schedule::kForward;
  void (*entry_)() = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  ucontext_t scheduler_;
  std::exception_ptr error_;
  std::minstd_rand random_{1};
};

inline unsigned thread_x() { return Emulator::get().thread; }
inline unsigned block_x() { return Emulator::get().block_x; }
inline unsigned block_y() { return Emulator::get().block_y; }
inline unsigned threads_x() { return Emulator::get().threads; }
inline unsigned blocks_x() { return Emulator::get().blocks_x; }

inline void sync_block() { Emulator::get().barrier(); }
inline uint32_t atomic_add(uint32_t* address, uint32_t value) {
  const uint32_t before = *address;
  *address += value;
  return before;
}
inline uint32_t atomic_min(uint32_t* address, uint32_t value) {
  const uint32_t before = *address;
  if (value < before) *address = value;
  return before;
}

inline void check_aligned(const void* address, uintptr_t size) {
  if (reinterpret_cast<uintptr_t>(address) % size != 0) {
    throw std::logic_error("emulator: a vector access is not aligned");
  }
}
inline void load4(const float* address, float (&values)[4]) {
  check_aligned(address, 16);
  for (int i = 0; i < 4; ++i) values[i] = address[i];
}
inline void load4(const uint16_t* address, uint16_t (&values)[4]) {
  check_aligned(address, 8);
  for (int i = 0; i < 4; ++i) values[i] = address[i];
}
inline void store4(float* address, const float (&values)[4]) {
  check_aligned(address, 16);
  for (int i = 0; i < 4; ++i) address[i] = values[i];
}

}  // namespace adm_rt::simt
