#include "engine/ops/thread_scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace adm_rt::engine {
namespace {

struct Free {
  void operator()(float* p) const { std::free(p); }
};

}  // namespace

float* thread_scratch(int64_t floats) {
  static thread_local std::unique_ptr<float, Free> data;
  static thread_local int64_t size = 0;
  if (floats > size || data == nullptr) {
    data.reset();
    size = 0;
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) / 4096 + 1) * 4096;
    data.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (data == nullptr) throw std::bad_alloc();
    size = static_cast<int64_t>(bytes / sizeof(float));
  }
  return data.get();
}

}  // namespace adm_rt::engine
