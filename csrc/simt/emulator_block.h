// The scheduler of the emulator: runs a grid block by block, the threads of a block as fibers that
// give way at barriers and warp collectives.
#pragma once

#include <algorithm>
#include <exception>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "simt/emulator_types.h"

namespace adm_rt::simt {
namespace emulator {

class __attribute__((visibility("hidden"))) Emulator {  // one per library
 public:
  // Set by tests.
  Schedule schedule = Schedule::kForward;
  unsigned seed = 1;                    // of kShuffled
  size_t max_shared_bytes = 99 * 1024;  // of a block: the least of the architectures
  unsigned multiprocessors = 4;

  // Where the running thread is.
  unsigned thread = 0, block_x = 0, block_y = 0, block_z = 0;
  Grid grid;

  static Emulator& get() {
    static Emulator emulator;
    return emulator;
  }

  // Runs body() once per thread. Throws std::logic_error for what the kernel does wrong.
  template <class Body>
  void launch(const Grid& shape, const Body& body) {
    check_grid(shape, max_shared_bytes);
    grid = shape;
    random_.seed(seed);
    body_ = [](const void* argument) { (*static_cast<const Body*>(argument))(); };
    argument_ = &body;
    const size_t blocks = size_t{1} * grid.blocks_x * grid.blocks_y * grid.blocks_z;
    std::vector<size_t> order = identity(blocks);
    arrange(order);
    for (const size_t block : order) {
      block_x = static_cast<unsigned>(block % grid.blocks_x);
      block_y = static_cast<unsigned>(block / grid.blocks_x % grid.blocks_y);
      block_z = static_cast<unsigned>(block / grid.blocks_x / grid.blocks_y);
      run_block();
    }
  }

  // A barrier of `count` threads; id 0 is that of the whole block.
  void barrier(unsigned id, unsigned count, Site site) {
    Thread& self = *threads_[thread];
    check_shared(site);
    Barrier& barrier = barriers_[id];
    if (id == 0 && done_ > 0) fail(site, "waits for the block, which some threads have left");
    if (barrier.waiting.empty()) {
      barrier.site = site;
      barrier.count = count;
    } else if (id == 0 && !(barrier.site == site)) {
      fail(site, "waits for the block here, thread ", barrier.waiting[0], " at ", barrier.site,
           ": divergent barrier");
    } else if (barrier.count != count) {
      fail(site, "waits for ", count, " threads at barrier ", id, ", thread ", barrier.waiting[0],
           " at ", barrier.site, " for ", barrier.count);
    }
    barrier.waiting.push_back(thread);
    if (barrier.waiting.size() == count) {
      for (const unsigned other : barrier.waiting) threads_[other]->state = State::kReady;
      barrier.waiting.clear();
      if (schedule == Schedule::kShuffled) self.fiber.suspend();  // anyone may go first
      return;
    }
    wait(self, "the barrier", site);
  }

  // Brings `mine` to the lanes of this warp; the last one to arrive calls finish(lanes), and every
  // lane gets back its own, with what finish wrote there. The reference holds until the warp's
  // next collective.
  template <class Finish>
  const Exchange& collective(const char* name, const Exchange& mine, Site site,
                             const Finish& finish) {
    Warp& warp = warps_[thread / kWarpSize];
    Thread& self = *threads_[thread];
    if (grid.threads % kWarpSize != 0 && thread / kWarpSize == grid.threads / kWarpSize) {
      fail(site, "calls ", name, " in a warp of fewer than 32 threads");
    }
    if (warp.left > 0) fail(site, "calls ", name, ", but a lane of its warp has left the kernel");
    if (warp.arrived == 0) {
      warp.name = name;
      warp.site = site;
      warp.first = thread;
    } else if (!(warp.site == site) || std::strcmp(warp.name, name) != 0) {
      fail(site, "calls ", name, " while thread ", warp.first, " of its warp is in ", warp.name,
           " at ", warp.site, ": divergent warp");
    }
    // Two sets: a lane may be in the next collective before all have read this one's.
    Exchange(&lanes)[kWarpSize] = warp.lanes[warp.generation % 2];
    lanes[thread % kWarpSize] = mine;
    if (++warp.arrived < kWarpSize) {
      wait(self, name, site);
    } else {
      finish(lanes);
      warp.arrived = 0;
      ++warp.generation;
      const unsigned begin = thread - thread % kWarpSize;
      for (unsigned i = begin; i < begin + kWarpSize; ++i) threads_[i]->state = State::kReady;
      if (schedule == Schedule::kShuffled) self.fiber.suspend();
    }
    return lanes[thread % kWarpSize];
  }

  // The array number `index` of the block's shared memory, at `offset` of what the launch gave.
  void* shared_array(size_t index, size_t offset, size_t bytes, Site site) {
    if (offset + bytes > grid.shared_bytes) {
      fail(site, "takes bytes ", offset, " to ", offset + bytes,
           " of shared memory; the launch gave ", grid.shared_bytes);
    }
    if (index == shared_.size()) shared_.emplace_back(bytes);
    if (index > shared_.size() || shared_[index].bytes() != bytes) {
      fail(site, "takes ", bytes, " bytes as shared array ", index,
           "; another thread took something else");
    }
    return shared_[index].data();
  }

  void check_in_shared(const void* address, size_t bytes, Site site, const char* what) {
    for (const SharedArray& array : shared_) {
      if (array.contains(address, bytes)) return;
    }
    fail(site, what, " outside the arrays of shared memory");
  }
  void check_aligned(const void* address, uintptr_t size, Site site) {
    if (reinterpret_cast<uintptr_t>(address) % size != 0) {
      fail(site, "makes an access of ", size, " bytes that is not aligned");
    }
  }

  AsyncCopies& copies() { return threads_[thread]->copies; }

  // Throws, naming block, thread and line.
  template <class... Pieces>
  [[noreturn]] void fail(Site site, const Pieces&... pieces) const {
    std::ostringstream text;
    text << "emulator: block (" << block_x << ", " << block_y << ", " << block_z << ") thread "
         << thread << " at " << site << " ";
    (text << ... << pieces);
    throw std::logic_error(text.str());
  }

 private:
  static std::vector<size_t> identity(size_t n) {
    std::vector<size_t> order(n);
    for (size_t i = 0; i < n; ++i) order[i] = i;
    return order;
  }
  void arrange(std::vector<size_t>& order) {
    if (schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
    if (schedule == Schedule::kShuffled) std::shuffle(order.begin(), order.end(), random_);
  }

  // ---- A thread ----

  static void run_thread(void*) {
    Emulator& self = get();
    Thread& thread = *self.threads_[self.thread];
    try {
      self.body_(self.argument_);
      self.leave(thread);
    } catch (...) {
      self.error_ = std::current_exception();
    }
    thread.state = State::kDone;
  }

  void leave(Thread& self) {
    const Site end = {"the end of the kernel", 0};
    check_shared(end);
    if (self.copies.pending()) fail(end, "leaves with a cp.async that it never waited for");
    if (!barriers_[0].waiting.empty()) {
      fail(end, "leaves while thread ", barriers_[0].waiting[0], " waits for the block at ",
           barriers_[0].site);
    }
    Warp& warp = warps_[thread / kWarpSize];
    if (warp.arrived > 0) {
      fail(end, "leaves while thread ", warp.first, " of its warp is in ", warp.name, " at ",
           warp.site);
    }
    ++warp.left;
    ++done_;
  }

  void wait(Thread& self, const char* what, Site site) {
    self.state = State::kWaiting;
    self.waits_for = what;
    self.site = site;
    self.fiber.suspend();
  }

  void check_shared(Site site) const {
    for (size_t i = 0; i < shared_.size(); ++i) {
      if (!shared_[i].intact()) {
        fail(site, "finds that it or a thread before it wrote beyond shared array ", i, " of ",
             shared_[i].bytes(), " bytes");
      }
    }
  }

  // ---- A block ----

  void run_block() {
    shared_.clear();
    shared_.reserve(64);
    warps_.assign((grid.threads + kWarpSize - 1) / kWarpSize, Warp{});
    for (Barrier& barrier : barriers_) barrier.waiting.clear();
    done_ = 0;
    while (threads_.size() < grid.threads) threads_.push_back(std::make_unique<Thread>());
    for (unsigned i = 0; i < grid.threads; ++i) {
      threads_[i]->state = State::kReady;
      threads_[i]->copies.clear();
      threads_[i]->fiber.start(&Emulator::run_thread, nullptr);
    }
    std::vector<size_t> order = identity(warps_.size());
    arrange(order);
    while (done_ < grid.threads) {
      if (schedule == Schedule::kShuffled) arrange(order);
      bool progress = false;
      for (const size_t warp : order) progress |= run_warp(static_cast<unsigned>(warp));
      if (!progress) report_deadlock();
    }
    shared_.clear();
  }

  // Runs the lanes of a warp until all of them wait for another warp (shuffled: once each).
  bool run_warp(unsigned warp) {
    const unsigned begin = warp * kWarpSize;
    const unsigned lanes = std::min(kWarpSize, grid.threads - begin);
    const unsigned turn = schedule == Schedule::kShuffled ? random_() % lanes : 0;
    const bool backwards = schedule == Schedule::kReverse || random_() % 2 != 0;
    bool progress = false;
    for (bool again = true; again;) {
      again = false;
      for (unsigned i = 0; i < lanes; ++i) {
        unsigned lane = backwards && schedule != Schedule::kForward ? lanes - 1 - i : i;
        lane = (lane + turn) % lanes;
        if (threads_[begin + lane]->state != State::kReady) continue;
        thread = begin + lane;
        threads_[thread]->fiber.resume();
        if (error_) abandon();
        again = progress = true;
      }
      if (schedule == Schedule::kShuffled) break;
    }
    return progress;
  }

  [[noreturn]] void abandon() {
    shared_.clear();
    std::rethrow_exception(std::exchange(error_, nullptr));
  }

  [[noreturn]] void report_deadlock() {
    std::ostringstream text;
    text << "emulator: block (" << block_x << ", " << block_y << ", " << block_z << ") deadlock:";
    int shown = 0;
    const Thread* before = nullptr;
    for (unsigned i = 0; i < grid.threads; ++i) {
      const Thread& one = *threads_[i];
      if (one.state != State::kWaiting) continue;
      if (before != nullptr && before->site == one.site) continue;
      before = &one;
      if (++shown > 8) break;
      text << " thread " << i << " and on wait for " << one.waits_for << " at " << one.site << ";";
    }
    shared_.clear();
    throw std::logic_error(text.str());
  }

  void (*body_)(const void*) = nullptr;
  const void* argument_ = nullptr;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  Barrier barriers_[16];
  std::vector<SharedArray> shared_;
  unsigned done_ = 0;
  std::exception_ptr error_;
  std::minstd_rand random_{1};
};

}  // namespace emulator

using emulator::Emulator;

}  // namespace adm_rt::simt
