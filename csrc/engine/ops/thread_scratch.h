// Scratch memory of the threads that run an op: for blocks that live in a core's own cache.
#pragma once

#include <cstdint>

namespace adm_rt::engine {

// At least `floats` floats, 64-byte aligned, that belong to the calling thread until it asks again.
// They are kept from call to call, so that a plan allocates in its first run only. Throws
// std::bad_alloc.
float* thread_scratch(int64_t floats);

}  // namespace adm_rt::engine
