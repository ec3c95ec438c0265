// The launcher of guided_mean_update on CUDA, for C++ that does not include CUDA's headers.
#pragma once

#include <cstdint>

#include "ops/guided_mean_update.h"

namespace adm_rt {

// Enqueues the step on `stream` (a cudaStream_t) and returns: no allocation, no synchronisation, so
// a graph can capture it. All pointers in params are device pointers on the current device.
//
// table: device float32 [steps, 18], rows of StepCoefficients, with step_counter: device uint32,
// the row to use; both null: params.coefficients and params.step. Nothing here advances the
// counter: the networks of the step read it too. limits: device float32 [images], for
// Clip::kDynamic alone.
//
// Throws std::invalid_argument for bad params, std::runtime_error for what CUDA reports.
void guided_mean_update_cuda(const GuidedMeanUpdateParams& params, const float* table,
                             const uint32_t* step_counter, float* limits, void* stream);

}  // namespace adm_rt
