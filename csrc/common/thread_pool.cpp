#include "common/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "common/check.h"

namespace adm_rt {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int64_t kPollRanges = 4;  // pieces of what one thread runs alone, for interrupts
// A range is a quarter of a thread's share of what is left, so that cores that are not equally free
// end together (guided self-scheduling, Polychronopoulos & Kuck 1987), but no less than a sixteenth
// of its share of all: a range has its costs.
constexpr int64_t kRangesPerShare = 4, kMostRangesPerShare = 16;
// How long a thread waits awake: a network's ops are closer together than a sleeping core takes to
// wake up. First it keeps its core, then it offers it to others.
constexpr auto kSpin = std::chrono::microseconds(30);
constexpr auto kAwake = std::chrono::microseconds(500);

thread_local bool inside_body = false;
thread_local const std::function<void()>* interrupt_poll = nullptr;  // of the calling thread

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waits for at most kAwake until done() holds.
template <typename Done>
bool spin_until(const Done& done) {
  const auto begin = std::chrono::steady_clock::now();
  auto waited = std::chrono::steady_clock::duration::zero();
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      pause_cpu();
    }
    if (waited >= kSpin) sched_yield();
    waited = std::chrono::steady_clock::now() - begin;
  } while (waited < kAwake);
  return done();
}

struct Job {
  const std::function<void(int64_t, int64_t)>* body;
  int64_t n;
  int64_t grain;
  int64_t threads;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};  // changed under the pool's mutex
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  // What a thread takes of `left` at a time: depends on nothing that is decided at run time.
  int64_t range(int64_t left) const {
    const int64_t parts = kRangesPerShare * threads;
    return std::max({grain, (left + parts - 1) / parts, n / (kMostRangesPerShare * threads)});
  }

  void run() {
    const bool was_inside = inside_body;
    inside_body = true;
    while (!failed.load(std::memory_order_relaxed)) {
      int64_t begin = next.load(std::memory_order_relaxed), end;
      do {
        if (begin >= n) break;
        end = std::min(n, begin + range(n - begin));
      } while (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed));
      if (begin >= n) break;
      try {
        if (interrupt_poll != nullptr && !was_inside) (*interrupt_poll)();
        (*body)(begin, end);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
    inside_body = was_inside;
  }
};

// In one piece, or in a few when somebody wants to interrupt.
void run_inline(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (interrupt_poll == nullptr || inside_body) {
    body(0, n);
    return;
  }
  const int64_t chunk = std::max(grain, (n + kPollRanges - 1) / kPollRanges);
  for (int64_t begin = 0; begin < n; begin += chunk) {
    (*interrupt_poll)();
    body(begin, std::min(n, begin + chunk));
  }
}

class Pool {
 public:
  explicit Pool(int threads) : pid_(getpid()) { start(threads); }

  pid_t pid() const { return pid_; }
  int threads() const { return threads_.load(std::memory_order_relaxed); }

  void resize(int threads) {
    std::lock_guard<std::mutex> owner(owner_);
    if (threads == this->threads()) return;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stop_ = false;
    start(threads);
  }

  void run(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    const int64_t threads = this->threads();
    if (!owner.owns_lock() || threads == 1) {
      run_inline(n, grain, body);
      return;
    }
    Job job;
    job.body = &body;
    job.n = n;
    job.grain = grain;
    job.threads = threads;
    int sleepers = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      epoch_.fetch_add(1, std::memory_order_release);
      sleepers = sleepers_;
    }
    // No more threads than there are ranges for them.
    const int64_t wanted = std::min(threads, (n + grain - 1) / grain) - 1;
    for (int64_t i = 0; i < std::min<int64_t>(wanted, sleepers); ++i) wake_.notify_one();
    job.run();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;  // a worker that comes late finds nothing and does not hold us up
    }
    const auto idle = [&] { return job.workers.load(std::memory_order_acquire) == 0; };
    spin_until(idle);
    {
      // Also taken after a lucky spin: the last worker may still be inside its critical section.
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, idle);
    }
    if (job.error) std::rethrow_exception(job.error);
  }

 private:
  void start(int threads) {
    // Signals belong to the program's own threads: Python's handlers expect the main one.
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int started = 1;
    try {
      for (; started < threads; ++started) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
      // A limit on processes: go on with the threads that there are.
    }
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
    threads_.store(started, std::memory_order_relaxed);
  }

  void work() {
    uint64_t seen = 0;
    const auto changed = [&] { return epoch_.load(std::memory_order_acquire) != seen; };
    while (true) {
      spin_until(changed);
      Job* job = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        if (!changed()) {
          ++sleepers_;
          wake_.wait(lock, changed);
          --sleepers_;
        }
        seen = epoch_.load(std::memory_order_relaxed);
        if (stop_) return;
        job = job_;
        if (job != nullptr) job->workers.fetch_add(1, std::memory_order_relaxed);
      }
      if (job == nullptr) continue;
      job->run();
      std::lock_guard<std::mutex> lock(mutex_);
      // Notified under the lock: the caller's Job is gone as soon as it sees zero and gets the
      // lock.
      if (job->workers.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  const pid_t pid_;
  std::mutex owner_;  // held by the thread whose job runs
  std::mutex mutex_;  // guards the fields below
  std::condition_variable wake_;
  std::condition_variable done_;
  Job* job_ = nullptr;
  int sleepers_ = 0;
  bool stop_ = false;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int> threads_{1};
  std::vector<std::thread> workers_;
};

int positive_env(const char* name) {
  const char* text = std::getenv(name);
  if (text == nullptr) return 0;
  const int value = std::atoi(text);  // OMP_NUM_THREADS may be a list: its first number
  return value > 0 ? std::min(value, kMaxThreads) : 0;
}

// The CPU quota of the cgroup (v2) in whole cores, rounded up; 0 when there is none.
int cgroup_quota() {
  std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r");
  if (file == nullptr) return 0;
  long long quota = 0, period = 0;
  const int fields = std::fscanf(file, "%lld %lld", &quota, &period);
  std::fclose(file);
  if (fields != 2 || quota <= 0 || period <= 0) return 0;
  return static_cast<int>(std::min<long long>((quota + period - 1) / period, kMaxThreads));
}

int default_threads() {
  if (const int n = positive_env("ADM_RT_NUM_THREADS")) return n;
  if (const int n = positive_env("OMP_NUM_THREADS")) return n;
  int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) cores = CPU_COUNT(&allowed);
#endif
  if (const int quota = cgroup_quota()) cores = std::min(cores, quota);
  return std::max(1, std::min(cores, kMaxThreads));
}

std::atomic<int> wanted_threads{0};
std::atomic<Pool*> shared_pool{nullptr};

// Pools are never destroyed: at exit their threads may be waiting, and after fork() the parent's
// mutexes may be locked for ever. A child therefore leaves the parent's object alone.
Pool& pool() {
  Pool* current = shared_pool.load(std::memory_order_acquire);
  if (current != nullptr && current->pid() == getpid()) return *current;
  Pool* fresh = new Pool(num_threads());
  while (!shared_pool.compare_exchange_strong(current, fresh, std::memory_order_acq_rel)) {
    // Another thread of this process was first: use its pool, let ours sleep.
    if (current != nullptr && current->pid() == getpid()) return *current;
  }
  return *fresh;
}

}  // namespace

int num_threads() {
  int n = wanted_threads.load(std::memory_order_relaxed);
  if (n == 0) {
    n = default_threads();
    wanted_threads.store(n, std::memory_order_relaxed);
  }
  return n;
}

void set_num_threads(int n) {
  ADM_RT_CHECK(n >= 1 && n <= kMaxThreads, "num_threads=", n, " is not in [1, ", kMaxThreads, "]");
  ADM_RT_CHECK(!inside_body, "set_num_threads was called from inside parallel_for");
  wanted_threads.store(n, std::memory_order_relaxed);
  Pool* current = shared_pool.load(std::memory_order_acquire);
  if (current != nullptr && current->pid() == getpid()) current->resize(n);
}

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (n <= grain || inside_body || num_threads() == 1) {
    run_inline(n, grain, body);
    return;
  }
  pool().run(n, grain, body);
}

InterruptScope::InterruptScope(const std::function<void()>* poll) : outer_(interrupt_poll) {
  interrupt_poll = poll;
}

InterruptScope::~InterruptScope() { interrupt_poll = outer_; }

}  // namespace adm_rt
