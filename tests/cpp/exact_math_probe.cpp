// Largest errors of common/exact_math.h against double precision over its whole domain. C
// interface.
#include <cmath>
#include <cstdint>

#include "common/exact_math.h"

using namespace adm_rt;

extern "C" {

// Every `stride`-th word, and the 1000 first and last. errors: relative of -2 ln u, absolute of cos
// and of sin, all in units of 2^-24.
void noise_errors(uint32_t stride, double* errors) {
  errors[0] = errors[1] = errors[2] = 0;
  const uint32_t end = 1u << 24;
  for (uint32_t v = 0; v < end; v += v < 1000 || v + 1000 + stride >= end ? 1 : stride) {
    const double u = (v + 0.5) * 0x1p-24, angle = 2 * 3.141592653589793 * u;
    const double log_u = -2 * std::log(u);
    Float1 cosine, sine;
    cos_sin_u24(Uint1{v}, &cosine, &sine);
    const double found[3] = {
        std::fabs(minus_two_log_u24<Float1>(Uint1{v}).v / log_u - 1),
        std::fabs(cosine.v - std::cos(angle)),
        std::fabs(sine.v - std::sin(angle)),
    };
    for (int i = 0; i < 3; ++i) errors[i] = std::fmax(errors[i], found[i] * 0x1p24);
  }
}

void exponential(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = exp(Float1{x[i]}).v;
}

}  // extern "C"
