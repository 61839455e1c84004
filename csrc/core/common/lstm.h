// SPDX-License-Identifier: BSD-3-Clause
// The LSTM cell of a vector of numbers.
#pragma once

#include "simd.h"

namespace pywino {
namespace {

typedef int32_t ivec __attribute__((vector_size(kLanes * 4)));

// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2: a polynomial of degree 7 (coefficients of the Cephes library),
// to about one unit in the last place. Beyond the clamps the result is as good as 0 or infinity for what is made of it;
// NaN stays NaN.
PYWINO_INLINE vec exponential(vec x) {
  const vec low = zero() - 87.33654f, high = zero() + 88.02f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vec t = x * 1.44269504f;
  const ivec n = __builtin_convertvector(t + (t < zero() ? zero() - 0.5f : zero() + 0.5f), ivec);
  const vec whole = __builtin_convertvector(n, vec);
  // ln 2 in two parts, the first of few bits: whole * 0.693359375 is exact.
  const vec r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
  vec p = zero() + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * (r * r) + r + 1.f) * (vec)((n + 127) << 23);
}

PYWINO_INLINE vec sigmoid(vec x) { return 1.f / (1.f + exponential(-x)); }

// tanh x = 1 - 2 / (e^2x + 1), which cancels near 0: there an odd polynomial (Cephes).
PYWINO_INLINE vec hyperbolic_tangent(vec x) {
  const vec z = x * x;
  vec p = zero() - 5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vec near = p * z * x + x, far = 1.f - 2.f / (exponential(x + x) + 1.f);
  return z < 0.390625f ? near : far;
}

// From the convolution's a_i, a_f, a_g, a_o.
struct LstmGates {
  vec i, f, g, o;

  PYWINO_INLINE LstmGates(vec ai, vec af, vec ag, vec ao)
      : i(sigmoid(ai)), f(sigmoid(af)), g(hyperbolic_tangent(ag)), o(sigmoid(ao)) {}

  PYWINO_INLINE vec next_cell(vec c) const { return f * c + i * g; }
  PYWINO_INLINE vec hidden(vec next) const { return o * hyperbolic_tangent(next); }
};

}  // namespace
}  // namespace pywino
