// The output `stats` that ops give beside their result: the mean (row 0) and the biased variance
// (row 1) of each channel over the pixels of an image, for the group_norm that follows.
#pragma once

#include <cstdint>

#include "engine/op.h"

namespace adm_rt::engine {

// Throws std::invalid_argument, naming the op, unless `stats` is 1x2x(channels of y).
void check_stats_shape(const OpArguments& arguments, const Shape& stats, const Shape& y);

// y [batch, pixels, channels] -> stats [batch, 2, channels]. Reads y once, on all threads.
void write_channel_stats(const float* y, int64_t batch, int64_t pixels, int64_t channels,
                         float* stats);

}  // namespace adm_rt::engine
