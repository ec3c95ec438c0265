// Memory of the native engine: huge-page blocks, and the arenas that runs borrow.
#pragma once

#include <cstddef>
#include <string>

namespace adm_rt::engine {

constexpr size_t kAlignment = 64;  // bytes; of every buffer and of every op's packed weights

// A block of anonymous memory, zeroed, page-aligned, with huge pages asked for when it is large.
// Throws std::bad_alloc.
class MemoryBlock {
 public:
  MemoryBlock() = default;
  explicit MemoryBlock(size_t bytes);
  // Filled with `bytes` bytes of a file from `offset`, on all threads. A mapping would not copy,
  // but its pages are where and as small as the file's cache has them: runs were 5 to 15% slower.
  // Throws std::runtime_error when the file cannot be read or is too short.
  MemoryBlock(const std::string& path, size_t offset, size_t bytes);
  ~MemoryBlock();
  MemoryBlock(MemoryBlock&& other) noexcept;
  MemoryBlock& operator=(MemoryBlock&& other) noexcept;

  float* floats() const { return static_cast<float*>(data_); }
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  size_t mapped_ = 0;
};

// A block borrowed from the process-wide free list for one run, given back at the end: arenas of
// equal need are used again and again, and runs on several threads each have their own.
class ArenaLease {
 public:
  explicit ArenaLease(size_t bytes);  // throws std::bad_alloc
  ~ArenaLease();
  ArenaLease(const ArenaLease&) = delete;
  ArenaLease& operator=(const ArenaLease&) = delete;
  float* floats() const { return block_.floats(); }

 private:
  MemoryBlock block_;
};

// Returns free arenas to the system; those in use are not touched.
void free_unused_arenas();

// Bytes of all arenas of this process, free and in use.
size_t arena_bytes_held();

}  // namespace adm_rt::engine
