// Kernels of norm_backward_kernels.h for one instruction set (compiled once per ISA; see
// common/simd.h). Channels along the vectors; sums stay in registers while the pixels go by.
#include <cstdint>

#include "common/simd.h"
#include "engine/ops/norm_backward_kernels.h"

namespace adm_rt::ADM_RT_ISA {
namespace {

constexpr int64_t kWidth = Vec::kWidth;

inline Vec load_up_to(const float* p, int64_t n) {
  return n >= kWidth ? Vec::loadu(p) : Vec::load_partial(p, static_cast<int>(n));
}
inline void store_up_to(Vec v, float* p, int64_t n) {
  n >= kWidth ? v.storeu(p) : v.store_partial(p, static_cast<int>(n));
}

// s (1 + v (1 - s)), s the sigmoid of v.
inline Vec silu_slope(Vec v) {
  const Vec one = Vec::set1(1.0f);
  const Vec s = sigmoid(v);
  return s * fma(v, one - s, one);
}

template <bool kSilu>
void sums_of(int64_t pixels, int64_t channels, const float* x, SharedGradient grad, const float* a,
             const float* b, const float* mean, float* dv, float* sums) {
  const Vec scale = Vec::set1(grad.scale);
  for (int64_t c = 0; c < channels; c += kWidth) {
    const int64_t n = channels - c;
    const Vec slope = load_up_to(a + c, n), constant = load_up_to(b + c, n);
    const Vec center = load_up_to(mean + c, n);
    Vec sum = load_up_to(sums + c, n), product = load_up_to(sums + channels + c, n);
    const float* xp = x + c;
    const float* gp = grad.data + c;
    float* out = dv + c;
    for (int64_t pixel = 0; pixel < pixels; gp += channels) {
      const Vec g = load_up_to(gp, n) * scale;
      const int64_t stop = pixel + grad.repeat < pixels ? pixel + grad.repeat : pixels;
      for (; pixel < stop; ++pixel, xp += channels, out += channels) {
        const Vec value = load_up_to(xp, n);
        Vec d = g;
        if constexpr (kSilu) d = g * silu_slope(fma(slope, value, constant));
        store_up_to(d, out, n);
        sum = sum + d;
        product = fma(d, value - center, product);
      }
    }
    store_up_to(sum, sums + c, n);
    store_up_to(product, sums + channels + c, n);
  }
}

}  // namespace

void norm_backward_sums(int64_t pixels, int64_t channels, const float* x, SharedGradient grad,
                        const float* a, const float* b, const float* mean, bool silu, float* dv,
                        float* sums) {
  const auto kernel = silu ? sums_of<true> : sums_of<false>;
  kernel(pixels, channels, x, grad, a, b, mean, dv, sums);
}

void norm_backward_apply(int64_t pixels, int64_t channels, const float* x, const float* a,
                         const float* mean, const float* slope, const float* offset,
                         SharedGradient residual, float* dx) {
  const Vec scale = Vec::set1(residual.scale);
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, dx += channels) {
    const float* r =
        residual.data == nullptr ? nullptr : residual.data + pixel / residual.repeat * channels;
    for (int64_t c = 0; c < channels; c += kWidth) {
      const int64_t n = channels - c;
      const Vec centered = load_up_to(x + c, n) - load_up_to(mean + c, n);
      const Vec common = fma(load_up_to(slope + c, n), centered, load_up_to(offset + c, n));
      Vec y = fma(load_up_to(a + c, n), load_up_to(dx + c, n), -common);
      if (r != nullptr) y = fma(load_up_to(r + c, n), scale, y);
      store_up_to(y, dx + c, n);
    }
  }
}

void add_shared_gradient(int64_t pixels, int64_t channels, const float* add, int64_t ld_shared,
                         SharedGradient shared, float* y) {
  const Vec scale = Vec::set1(shared.scale);
  for (int64_t pixel = 0; pixel < pixels; ++pixel, y += channels) {
    const float* from = shared.data + pixel / shared.repeat * ld_shared;
    const float* old = add == nullptr ? nullptr : add + pixel * channels;
    for (int64_t c = 0; c < channels; c += kWidth) {
      const int64_t n = channels - c;
      const Vec base = old == nullptr ? Vec::zero() : load_up_to(old + c, n);
      store_up_to(fma(load_up_to(from + c, n), scale, base), y + c, n);
    }
  }
}

}  // namespace adm_rt::ADM_RT_ISA
