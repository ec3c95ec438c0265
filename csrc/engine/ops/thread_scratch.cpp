#include "engine/ops/thread_scratch.h"

#include <atomic>

#include "engine/arena.h"

namespace adm_rt::engine {
namespace {

std::atomic<size_t> held{0};

struct Scratch {
  MemoryBlock block;

  ~Scratch() { release(); }
  void release() {
    held.fetch_sub(block.bytes(), std::memory_order_relaxed);
    block = MemoryBlock();
  }
};

}  // namespace

float* thread_scratch(int64_t floats) {
  static thread_local Scratch scratch;
  const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
  if (bytes > scratch.block.bytes() || scratch.block.data() == nullptr) {
    scratch.release();  // first, or both would be there at a time
    scratch.block = MemoryBlock(bytes);
    held.fetch_add(bytes, std::memory_order_relaxed);
  }
  return scratch.block.floats();
}

size_t thread_scratch_bytes_held() { return held.load(std::memory_order_relaxed); }

}  // namespace adm_rt::engine
