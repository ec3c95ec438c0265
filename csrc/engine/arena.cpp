#include "engine/arena.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/thread_pool.h"

namespace adm_rt::engine {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// Anonymous memory, aligned to huge pages when it is as large as one.
void* map_anonymous(size_t bytes) {
  const size_t slack = bytes >= kHugePage ? kHugePage : 0;
  void* const raw =
      mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  if (slack == 0) return raw;
  char* const begin = static_cast<char*>(raw);
  char* const aligned =
      reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(begin), kHugePage));
  if (aligned > begin) munmap(begin, static_cast<size_t>(aligned - begin));
  const size_t tail = static_cast<size_t>(begin + bytes + slack - (aligned + bytes));
  if (tail > 0) munmap(aligned + bytes, tail);
  madvise(aligned, bytes, MADV_HUGEPAGE);  // a wish: small pages work too
  return aligned;
}

constexpr size_t kReadBytes = size_t{8} << 20;

void read_file(int file, const std::string& path, size_t offset, char* to, size_t bytes) {
  while (bytes > 0) {
    const ssize_t count = pread(file, to, bytes, static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw std::runtime_error("cannot read " + path + ": " + std::strerror(errno));
    if (count == 0) throw std::runtime_error(path + " is truncated");
    offset += static_cast<size_t>(count);
    to += count;
    bytes -= static_cast<size_t>(count);
  }
}

// Leaked on purpose: threads may still be running when the program ends.
struct FreeList {
  std::mutex mutex;
  std::vector<MemoryBlock> blocks;
  size_t held = 0;
};

FreeList* make_free_list();

FreeList*& free_list_pointer() {
  static FreeList* list = make_free_list();
  return list;
}

FreeList& free_list() { return *free_list_pointer(); }

// fork() waits until no thread is inside the list, so the child finds it whole and unlocked.
FreeList* make_free_list() {
  pthread_atfork([] { free_list().mutex.lock(); }, [] { free_list().mutex.unlock(); },
                 [] { free_list().mutex.unlock(); });
  return new FreeList;
}

}  // namespace

MemoryBlock::MemoryBlock(size_t bytes) : bytes_(bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  mapped_ = round_up(std::max<size_t>(bytes, 1), bytes >= kHugePage ? kHugePage : page);
  data_ = map_anonymous(mapped_);
}

MemoryBlock::MemoryBlock(const std::string& path, size_t offset, size_t bytes)
    : MemoryBlock(bytes) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw std::runtime_error("cannot open " + path + ": " + std::strerror(errno));
  try {
    const int64_t chunks = static_cast<int64_t>((bytes + kReadBytes - 1) / kReadBytes);
    parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
      const size_t first = static_cast<size_t>(begin) * kReadBytes;
      const size_t last = std::min(bytes, static_cast<size_t>(end) * kReadBytes);
      read_file(file, path, offset + first, static_cast<char*>(data_) + first, last - first);
    });
  } catch (...) {
    close(file);
    throw;
  }
  close(file);
}

MemoryBlock::~MemoryBlock() {
  if (data_ != nullptr) munmap(data_, mapped_);
}

MemoryBlock::MemoryBlock(MemoryBlock&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      mapped_(std::exchange(other.mapped_, 0)) {}

MemoryBlock& MemoryBlock::operator=(MemoryBlock&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(mapped_, other.mapped_);
  return *this;
}

ArenaLease::ArenaLease(size_t bytes) {
  FreeList& list = free_list();
  MemoryBlock outgrown;  // unmapped after the lock is gone
  {
    std::lock_guard<std::mutex> lock(list.mutex);
    auto best = list.blocks.end();
    for (auto it = list.blocks.begin(); it != list.blocks.end(); ++it) {
      if (it->bytes() >= bytes && (best == list.blocks.end() || it->bytes() < best->bytes())) {
        best = it;
      }
    }
    // None is large enough: the largest of them makes room for the new one.
    const bool fits = best != list.blocks.end();
    if (!fits) {
      best = std::max_element(list.blocks.begin(), list.blocks.end(),
                              [](const auto& a, const auto& b) { return a.bytes() < b.bytes(); });
    }
    if (best != list.blocks.end()) {
      (fits ? block_ : outgrown) = std::move(*best);
      list.blocks.erase(best);
      if (fits) return;
      list.held -= outgrown.bytes();
    }
    list.held += bytes;
  }
  try {
    outgrown = MemoryBlock();
    block_ = MemoryBlock(bytes);
  } catch (...) {
    std::lock_guard<std::mutex> lock(list.mutex);
    list.held -= bytes;
    throw;
  }
}

ArenaLease::~ArenaLease() {
  if (block_.data() == nullptr) return;
  FreeList& list = free_list();
  std::lock_guard<std::mutex> lock(list.mutex);
  list.blocks.push_back(std::move(block_));
}

void free_unused_arenas() {
  std::vector<MemoryBlock> unused;
  FreeList& list = free_list();
  std::lock_guard<std::mutex> lock(list.mutex);
  unused.swap(list.blocks);
  for (const MemoryBlock& block : unused) list.held -= block.bytes();
}

size_t arena_bytes_held() {
  std::lock_guard<std::mutex> lock(free_list().mutex);
  return free_list().held;
}

}  // namespace adm_rt::engine
