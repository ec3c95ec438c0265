// The probabilities that attention hands to attention_backward: {heads, keys, R}, by key and query,
// R a multiple of 16 and at least the number of queries, zero behind the last of them.
#pragma once

#include <cstdint>

#include "engine/op.h"

namespace adm_rt::engine {

// R of `p`; throws std::invalid_argument, with the name of the op, where p has another shape.
int64_t probability_row(const char* op, const Shape& p, int64_t heads, int64_t keys,
                        int64_t queries);

}  // namespace adm_rt::engine
