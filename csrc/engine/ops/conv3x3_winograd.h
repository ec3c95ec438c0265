// Winograd's minimal filtering F(m x n, 3 x 3) for m, n = 2, 4, 6 (Lavin & Gray 2016, in the
// Cook-Toom form): Y = A' [(G g G') . (B' d B)] A. An m x n tile of outputs takes (m+2) (n+2)
// products per pair of channels instead of 9 m n.
//
// The points are 0, infinity and pairs +-p, so that every transform splits into even and odd
// halves. m = 2 has p = 1. m = 4 has p = 1/sqrt2, sqrt2: half the error of the usual 1, 2, as no
// power of a point is far from 1. m = 6 has p = 1/2, 1, 2.
//
// An image that is up-sampled by 2 first (nearest) has a scheme of its own. Along an edge, with x
// before the up-sampling,
//   y[2i]     = w0 x[i-1] + (w1 + w2) x[i]
//   y[2i + 1] =             (w0 + w1) x[i] + w2 x[i+1]:
// two filters, each F(2, 3) on the same four pixels of the small image. The even one is 0 at
// infinity, the odd one at 0, and at 1 they are equal: 5 products for 4 outputs, at the points
// 0, 1, -1 (even), -1 (odd), infinity. So 4x4 outputs take 25 products on the 16 planes of F(2x2)'s
// V, where F(4x4) takes 36, and with the rounding errors of F(2x2).
#pragma once

#include <cstdint>
#include <type_traits>

// Loops over the elements of a tile, which are registers; in plain C++ they would be hundreds of
// scalars and minutes of compile time.
#if ADM_RT_ISA_LEVEL > 0
#define ADM_RT_UNROLL _Pragma("GCC unroll 8")
#else
#define ADM_RT_UNROLL
#endif

namespace adm_rt {

// Products along an edge of a tile name its scheme: m + 2, or these of an up-sampled image.
constexpr int64_t kUpProducts = 5;

static constexpr int64_t outputs_of(int64_t products) {
  return products == kUpProducts ? 4 : products - 2;
}

// The plane of V, along an edge, that product i is of.
static constexpr int64_t input_of(int64_t products, int64_t i) {
  return products == kUpProducts && i > 2 ? i - 1 : i;
}

// Calls function(down, along) with the numbers of products as constants.
template <class Function>
void with_products(int64_t down, int64_t along, Function function) {
  constexpr std::integral_constant<int64_t, 4> k4;
  constexpr std::integral_constant<int64_t, kUpProducts> kUp;
  constexpr std::integral_constant<int64_t, 6> k6;
  constexpr std::integral_constant<int64_t, 8> k8;
  if (down == 4 && along == 4) function(k4, k4);
  if (down == 6 && along == 4) function(k6, k4);
  if (down == 6 && along == 6) function(k6, k6);
  if (down == 8 && along == 8) function(k8, k8);
  if (down == kUpProducts && along == kUpProducts) function(kUp, kUp);
}

template <int kTile>
struct WinogradPoints;
template <>
struct WinogradPoints<2> {
  static constexpr double kPoint[1] = {1.0};
};
template <>
struct WinogradPoints<4> {
  static constexpr double kPoint[2] = {0.70710678118654752440, 1.41421356237309504880};
};
template <>
struct WinogradPoints<6> {
  static constexpr double kPoint[3] = {0.5, 1.0, 2.0};
};

// Coefficients of the transforms. Rows of B', G and columns of A' go with the points
// 0, +p0, -p0, +p1, -p1, ..., infinity.
template <int kTile>
struct Winograd {
  static constexpr int kPairs = kTile / 2;

  double even[kPairs + 1] = {};      // of prod (y - p^2), lowest power first: x times this in x^2
                                     // vanishes on all finite points
  double odd[kPairs][kPairs] = {};   // of the same product without pair i
  double power[kPairs][kTile] = {};  // p^k
  double weight[kPairs][3] = {};     // p^k / (product of differences to the other points)
  double weight_zero = 1.0;

  constexpr Winograd() {
    even[0] = 1.0;
    for (int i = 0; i < kPairs; ++i) {
      const double p = WinogradPoints<kTile>::kPoint[i];
      multiply(even, i, p * p);
      odd[i][0] = 1.0;
      double product = 2.0 * p * p;  // p - 0 times p - (-p)
      int degree = 0;
      for (int j = 0; j < kPairs; ++j) {
        if (j == i) continue;
        const double other = WinogradPoints<kTile>::kPoint[j];
        multiply(odd[i], degree++, other * other);
        product *= p * p - other * other;
      }
      double value = 1.0;
      for (int k = 0; k < kTile || k < 3; ++k) {
        if (k < kTile) power[i][k] = value;
        if (k < 3) weight[i][k] = value / product;
        value *= p;
      }
    }
    weight_zero = 1.0 / even[0];
  }

 private:
  // polynomial *= (y - root), in place.
  static constexpr void multiply(double* polynomial, int degree, double root) {
    polynomial[degree + 1 <= kPairs ? degree + 1 : kPairs] = polynomial[degree];
    for (int j = degree; j > 0; --j) {
      polynomial[j] = polynomial[j - 1] - root * polynomial[j];
    }
    polynomial[0] *= -root;
  }
};

}  // namespace adm_rt
