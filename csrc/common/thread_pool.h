// A small pool of std::threads for the CPU kernels. No OpenMP: its pool hangs in a forked child.
#pragma once

#include <cstdint>
#include <functional>

namespace adm_rt {

// How many threads parallel_for uses, the caller included. The default is ADM_RT_NUM_THREADS, else
// OMP_NUM_THREADS, else the cores that this process may run on (affinity and cgroup quota).
int num_threads();

// n in [1, 1024]; throws std::invalid_argument otherwise.
void set_num_threads(int n);

// Calls body(begin, end) over disjoint ranges that cover [0, n), each of at least `grain` elements
// (but for the last one). Ranges depend on n, grain and the number of threads; which thread takes
// which is decided at run time, so results must not depend on it.
//
// Runs inline when there is one thread, when n <= grain, when called from inside a body, and when
// another thread is using the pool. The first exception that a body throws is rethrown here, after
// every running body has ended; ranges that have not begun are then left out.
//
// Safe after fork(): the child makes a pool of its own on first use.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

// While it lives, parallel_for calls `poll` on the calling thread now and then, also when it runs
// inline. What poll throws ends the loop as an exception of a body does. Scopes may nest.
class InterruptScope {
 public:
  explicit InterruptScope(const std::function<void()>* poll);
  ~InterruptScope();
  InterruptScope(const InterruptScope&) = delete;
  InterruptScope& operator=(const InterruptScope&) = delete;

 private:
  const std::function<void()>* outer_;
};

}  // namespace adm_rt
