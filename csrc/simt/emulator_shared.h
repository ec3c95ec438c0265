// Shared memory and asynchronous copies of the emulator: every array an allocation of its own
// between redzones, filled with NaN, and copies that arrive when they are waited for.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "simt/emulator_fiber.h"
#include "simt/types.h"

namespace adm_rt::simt::emulator {

inline void poison(void* memory, size_t bytes) {
#if defined(ADM_RT_ASAN)
  ASAN_POISON_MEMORY_REGION(memory, bytes);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}
inline void unpoison(void* memory, size_t bytes) {
#if defined(ADM_RT_ASAN)
  ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

// One array of a block's shared memory.
class SharedArray {
 public:
  explicit SharedArray(size_t bytes)
      : bytes_(bytes), memory_(new unsigned char[bytes + 2 * kRedzone + kAlign]) {
    const uintptr_t raw = reinterpret_cast<uintptr_t>(memory_.get()) + kRedzone;
    data_ = memory_.get() + (raw + kAlign - 1) / kAlign * kAlign - raw + kRedzone;
    std::memset(data_ - kRedzone, kCanary, bytes + 2 * kRedzone);
    std::memset(data_, 0xff, bytes);
    poison(data_ - kRedzone, kRedzone);
    poison(data_ + bytes, kRedzone);
  }
  ~SharedArray() {
    if (memory_ != nullptr) unpoison(data_ - kRedzone, bytes_ + 2 * kRedzone);
  }
  SharedArray(SharedArray&&) = default;
  SharedArray& operator=(SharedArray&&) = delete;

  unsigned char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool contains(const void* address, size_t bytes) const {
    const auto* at = static_cast<const unsigned char*>(address);
    return at >= data_ && at + bytes <= data_ + bytes_;
  }
  // AddressSanitizer stops at the very access; without it the redzones are looked at now and then.
  bool intact() const {
#if !defined(ADM_RT_ASAN)
    for (size_t i = 1; i <= kRedzone; ++i) {
      if (data_[-static_cast<ptrdiff_t>(i)] != kCanary) return false;
    }
    for (size_t i = 0; i < kRedzone; ++i) {
      if (data_[bytes_ + i] != kCanary) return false;
    }
#endif
    return true;
  }

 private:
  static constexpr size_t kRedzone = 128, kAlign = 128;
  static constexpr unsigned char kCanary = 0xc5;

  size_t bytes_;
  std::unique_ptr<unsigned char[]> memory_;
  unsigned char* data_;
};

// The cp.async of one thread. A GPU may deliver at any time between the copy and its wait: the
// target is NaN (and poisoned) at once, and right only after the wait.
class AsyncCopies {
 public:
  void copy(void* shared, const void* global, bool valid) {
    Copy copy = {shared, {}};
    if (valid) std::memcpy(&copy.value, global, 16);
    std::memset(shared, 0xff, 16);
    poison(shared, 16);
    open_.push_back(copy);
  }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  void wait(size_t allowed) {
    for (; groups_.size() > allowed; groups_.pop_front()) {
      for (const Copy& copy : groups_.front()) {
        unpoison(copy.target, 16);
        std::memcpy(copy.target, &copy.value, 16);
      }
    }
  }
  // Copies that nobody waited for.
  bool pending() const {
    for (const auto& group : groups_) {
      if (!group.empty()) return true;
    }
    return !open_.empty();
  }
  void clear() {
    open_.clear();
    groups_.clear();
  }

 private:
  struct Copy {
    void* target;
    Bytes16 value;
  };
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

}  // namespace adm_rt::simt::emulator
