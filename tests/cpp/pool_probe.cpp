// csrc/common/thread_pool.h as a plain C library, for test_thread_pool.py.
#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/thread_pool.h"

using adm_rt::parallel_for;

extern "C" {

int threads() { return adm_rt::num_threads(); }
void set_threads(int n) { adm_rt::set_num_threads(n); }

// counts[i] += 1 for every index; returns the number of ranges.
int cover(int64_t n, int64_t grain, int32_t* counts) {
  std::atomic<int> ranges{0};
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    ++ranges;
    for (int64_t i = begin; i < end; ++i) ++counts[i];
  });
  return ranges;
}

// The number of indices seen by parallel_for inside parallel_for: n * n.
int64_t nested(int64_t n) {
  std::atomic<int64_t> total{0};
  parallel_for(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      parallel_for(n, 1, [&](int64_t b, int64_t e) { total += e - b; });
    }
  });
  return total;
}

// 1 when the exception of the body arrives here with its message, and the pool works after it.
int throws(int64_t n, int64_t bad) {
  bool caught = false;
  try {
    parallel_for(n, 1, [&](int64_t begin, int64_t end) {
      if (begin <= bad && bad < end) throw std::runtime_error("index " + std::to_string(bad));
    });
  } catch (const std::runtime_error& error) {
    caught = error.what() == "index " + std::to_string(bad);
  }
  std::vector<int32_t> counts(n);
  cover(n, 1, counts.data());
  for (int32_t count : counts) caught = caught && count == 1;
  return caught;
}

// How many threads take part in n slow bodies; -1 when parallel_for returned before all had ended.
int slow(int64_t n) {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  std::atomic<int64_t> ended{0};
  parallel_for(n, 1, [&](int64_t begin, int64_t end) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      threads.insert(std::this_thread::get_id());
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(begin == 0 ? 1 : 20));
    ended += end - begin;
  });
  return ended == n ? static_cast<int>(threads.size()) : -1;
}

// Many callers at once; the number of indices that were not visited exactly once.
int64_t callers(int count, int repeats, int64_t n) {
  std::atomic<int64_t> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < count; ++t) {
    threads.emplace_back([&] {
      std::vector<int32_t> counts(n);
      for (int r = 0; r < repeats; ++r) cover(n, 1, counts.data());
      for (int32_t c : counts) wrong += c != repeats;
    });
  }
  for (std::thread& thread : threads) thread.join();
  return wrong;
}

}  // extern "C"

#ifdef POOL_PROBE_MAIN
int main() {
  set_threads(4);
  if (callers(3, 200, 50) != 0 || nested(8) != 64 || slow(12) < 1 || throws(64, 40) != 1) return 1;
  for (int n : {1, 3, 2, 5}) {
    set_threads(n);
    if (callers(2, 50, 20) != 0) return 2;
  }
  return 0;
}
#endif
