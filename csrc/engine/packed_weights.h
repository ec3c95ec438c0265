// Checksum of packed weights, for the cache on disk.
#pragma once

#include <cstddef>
#include <cstdint>

namespace adm_rt::engine {

// 64 bits of `bytes` bytes at `data` (8-byte aligned; bytes a multiple of 8), at the speed of
// memory and on all threads. Any change confined to one 8-byte word changes it. Against damage, not
// against malice.
uint64_t checksum(const void* data, size_t bytes);

}  // namespace adm_rt::engine
