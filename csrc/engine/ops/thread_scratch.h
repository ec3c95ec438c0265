// Scratch memory of the threads that run an op: for blocks that live in a core's own cache.
#pragma once

#include <cstddef>
#include <cstdint>

namespace adm_rt::engine {

// At least `floats` floats, 64-byte aligned, that belong to the calling thread until it asks again.
// They are kept from call to call, so that a plan allocates in its first run only. Throws
// std::bad_alloc. An op that asks says how much it may be in Op::thread_floats.
float* thread_scratch(int64_t floats);

// Bytes of all threads together.
size_t thread_scratch_bytes_held();

}  // namespace adm_rt::engine
