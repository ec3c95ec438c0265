// The per-ISA kernels of guided_mean_update: guided_mean_update_cpu.cpp calls them and
// guided_mean_update_simd.cpp defines them once per instruction set.
#pragma once

#include <cstdint>

#include "ops/guided_mean_update.h"

namespace adm_rt {

enum class UpdatePass {
  kWhole,    // everything
  kPredict,  // x0 before clipping, into params.x0
  kFinish,   // the rest, from there
};

// A chunk starts at a multiple of this many elements: whole blocks of noise in every build.
constexpr int64_t kUpdateAlignment = 64;

// Each works on elements [begin, end) of one image; begin is a multiple of kUpdateAlignment.
// `limit` is the image's dynamic threshold in kFinish.
#define ADM_RT_DECLARE_GUIDED_MEAN_UPDATE(ISA)                                           \
  namespace ISA {                                                                        \
  void guided_mean_update_range(const GuidedMeanUpdateParams& params, UpdatePass pass,   \
                                int64_t image, float limit, int64_t begin, int64_t end); \
  /* How many of n values are finite. */                                                 \
  int64_t count_finite(const float* values, int64_t n);                                  \
  }

ADM_RT_DECLARE_GUIDED_MEAN_UPDATE(portable)
ADM_RT_DECLARE_GUIDED_MEAN_UPDATE(avx2)
ADM_RT_DECLARE_GUIDED_MEAN_UPDATE(avx512)
#undef ADM_RT_DECLARE_GUIDED_MEAN_UPDATE

}  // namespace adm_rt
