// SPDX-License-Identifier: BSD-3-Clause
// The one-dimensional transforms of F(2,3), F(4,3) and F(6,3), by the Toom-Cook construction. A two-dimensional transform is
// the one-dimensional one on the columns, then on the rows. T is `vec`, or double for the filters; on the GPU, `Channels`.
//
//   tile  points                       why these
//   2     0, ±1, inf                   the only small choice
//   4     0, ±5/8, ±3/2, inf           half the error of 0, ±1, ±2 (docs/winograd.md); all products exact in binary
//   6     0, ±1, ±2, ±1/2, inf         the best of the symmetric choices with exact products
#pragma once

#include "../common/inline.h"

namespace pywino::winograd {
namespace {

template <int M>
struct Transform;

template <>
struct Transform<2> {
  static constexpr int A = 4;

  template <typename T>
  PYWINO_INLINE static void input(const T* d, T* o) {  // B^T d
    o[0] = d[0] - d[2];
    o[1] = d[1] + d[2];
    o[2] = d[2] - d[1];
    o[3] = d[1] - d[3];
  }
  template <typename T>
  PYWINO_INLINE static void output(const T* m, T* o) {  // A^T m
    o[0] = m[0] + m[1] + m[2];
    o[1] = m[1] - m[2] - m[3];
  }
  template <typename T>
  PYWINO_INLINE static void output_transposed(const T* y, T* o) {  // A y
    o[0] = y[0];
    o[1] = y[0] + y[1];
    o[2] = y[0] - y[1];
    o[3] = -y[1];
  }
  template <typename T>
  PYWINO_INLINE static void input_transposed(const T* v, T* o) {  // B v
    o[0] = v[0];
    o[1] = v[1] - v[2] + v[3];
    o[2] = v[1] + v[2] - v[0];
    o[3] = -v[3];
  }
  template <typename T>
  PYWINO_INLINE static void filter_transposed(const T* u, T* o) {  // G^T u
    const T even = 0.5f * (u[1] + u[2]);
    o[0] = u[0] + even;
    o[1] = 0.5f * (u[1] - u[2]);
    o[2] = even + u[3];
  }
  template <typename T>
  PYWINO_INLINE static void filter(const T* g, T* o) {  // G g
    const T even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
    o[0] = g[0];
    o[1] = even + odd;
    o[2] = even - odd;
    o[3] = g[2];
  }
};

template <>
struct Transform<4> {
  static constexpr int A = 6;
  static constexpr float a = 0.625f, b = 1.5f, a2 = a * a, b2 = b * b;

  template <typename T>
  PYWINO_INLINE static void input(const T* d, T* o) {
    // Row 0: x^4 - (a^2 + b^2) x^2 + a^2 b^2, the polynomial of the other points; row inf: the same one step on.
    o[0] = d[4] - (a2 + b2) * d[2] + (a2 * b2) * d[0];
    o[5] = d[5] - (a2 + b2) * d[3] + (a2 * b2) * d[1];
    // Rows ±a: x (x ± a)(x^2 - b^2); rows ±b: x (x ± b)(x^2 - a^2).
    const T ae = d[4] - b2 * d[2], ao = d[3] - b2 * d[1];
    o[1] = ae + a * ao;
    o[2] = ae - a * ao;
    const T be = d[4] - a2 * d[2], bo = d[3] - a2 * d[1];
    o[3] = be + b * bo;
    o[4] = be - b * bo;
  }
  template <typename T>
  PYWINO_INLINE static void output(const T* m, T* o) {
    const T ae = m[1] + m[2], ao = m[1] - m[2], be = m[3] + m[4], bo = m[3] - m[4];
    o[0] = m[0] + ae + be;
    o[1] = a * ao + b * bo;
    o[2] = a2 * ae + b2 * be;
    o[3] = (a * a2) * ao + ((b * b2) * bo + m[5]);
  }
  template <typename T>
  PYWINO_INLINE static void output_transposed(const T* y, T* o) {
    // Row ±a: y0 + a^2 y2 ± a (y1 + a^2 y3).
    o[0] = y[0];
    const T ae = y[0] + a2 * y[2], ao = y[1] + a2 * y[3];
    o[1] = ae + a * ao;
    o[2] = ae - a * ao;
    const T be = y[0] + b2 * y[2], bo = y[1] + b2 * y[3];
    o[3] = be + b * bo;
    o[4] = be - b * bo;
    o[5] = y[3];
  }
  template <typename T>
  PYWINO_INLINE static void input_transposed(const T* v, T* o) {
    const T ae = v[1] + v[2], ao = a * (v[1] - v[2]), be = v[3] + v[4], bo = b * (v[3] - v[4]);
    o[0] = (a2 * b2) * v[0];
    o[1] = (a2 * b2) * v[5] - b2 * ao - a2 * bo;
    o[2] = -(a2 + b2) * v[0] - b2 * ae - a2 * be;
    o[3] = ao + bo - (a2 + b2) * v[5];
    o[4] = v[0] + ae + be;
    o[5] = v[5];
  }
  template <typename T>
  PYWINO_INLINE static void filter_transposed(const T* u, T* o) {
    constexpr float n0 = 1.0 / (double(a2) * b2), na = 1.0 / (2.0 * a2 * (a2 - b2)),
                    nb = 1.0 / (2.0 * b2 * (b2 - a2));
    const T ae = na * (u[1] + u[2]), be = nb * (u[3] + u[4]);
    o[0] = n0 * u[0] + ae + be;
    o[1] = (na * a) * (u[1] - u[2]) + (nb * b) * (u[3] - u[4]);
    o[2] = a2 * ae + b2 * be + u[5];
  }
  template <typename T>
  PYWINO_INLINE static void filter(const T* g, T* o) {
    // 1 / (the polynomial's derivative at the point), times (1, x, x^2).
    constexpr double na = 1.0 / (2.0 * a2 * (a2 - b2)), nb = 1.0 / (2.0 * b2 * (b2 - a2));
    o[0] = (1.0 / (double(a2) * b2)) * g[0];
    const T ae = na * (g[0] + a2 * g[2]), ao = (na * a) * g[1];
    o[1] = ae + ao;
    o[2] = ae - ao;
    const T be = nb * (g[0] + b2 * g[2]), bo = (nb * b) * g[1];
    o[3] = be + bo;
    o[4] = be - bo;
    o[5] = g[2];
  }
};

template <>
struct Transform<6> {
  static constexpr int A = 8;

  template <typename T>
  PYWINO_INLINE static void input(const T* d, T* o) {
    o[0] = (d[0] - d[6]) + 5.25f * (d[4] - d[2]);
    o[7] = (d[7] - d[1]) + 5.25f * (d[3] - d[5]);
    const T e1 = (d[2] + d[6]) - 4.25f * d[4], o1 = (d[1] + d[5]) - 4.25f * d[3];
    o[1] = e1 + o1;
    o[2] = e1 - o1;
    const T e2 = d[6] + (0.25f * d[2] - 1.25f * d[4]),
            o2 = 2.f * d[5] + (0.5f * d[1] - 2.5f * d[3]);
    o[3] = e2 + o2;
    o[4] = e2 - o2;
    const T eh = d[6] + (4.f * d[2] - 5.f * d[4]), oh = 0.5f * d[5] + (2.f * d[1] - 2.5f * d[3]);
    o[5] = eh + oh;
    o[6] = eh - oh;
  }
  template <typename T>
  PYWINO_INLINE static void output(const T* m, T* o) {
    const T e1 = m[1] + m[2], o1 = m[1] - m[2], e2 = m[3] + m[4], o2 = m[3] - m[4],
            eh = m[5] + m[6], oh = m[5] - m[6];
    o[0] = m[0] + e1 + (e2 + eh);
    o[1] = o1 + (2.f * o2 + 0.5f * oh);
    o[2] = e1 + (4.f * e2 + 0.25f * eh);
    o[3] = o1 + (8.f * o2 + 0.125f * oh);
    o[4] = e1 + (16.f * e2 + 0.0625f * eh);
    o[5] = (o1 + m[7]) + (32.f * o2 + 0.03125f * oh);
  }
  template <typename T>
  PYWINO_INLINE static void output_transposed(const T* y, T* o) {
    o[0] = y[0];
    const T e1 = y[0] + (y[2] + y[4]), o1 = y[1] + (y[3] + y[5]);
    o[1] = e1 + o1;
    o[2] = e1 - o1;
    const T e2 = y[0] + (4.f * y[2] + 16.f * y[4]), o2 = 2.f * y[1] + (8.f * y[3] + 32.f * y[5]);
    o[3] = e2 + o2;
    o[4] = e2 - o2;
    const T eh = y[0] + (0.25f * y[2] + 0.0625f * y[4]),
            oh = 0.5f * y[1] + (0.125f * y[3] + 0.03125f * y[5]);
    o[5] = eh + oh;
    o[6] = eh - oh;
    o[7] = y[5];
  }
  template <typename T>
  PYWINO_INLINE static void input_transposed(const T* v, T* o) {
    const T e1 = v[1] + v[2], o1 = v[1] - v[2], e2 = v[3] + v[4], o2 = v[3] - v[4],
            eh = v[5] + v[6], oh = v[5] - v[6];
    o[0] = v[0];
    o[1] = o1 + (0.5f * o2 + 2.f * oh) - v[7];
    o[2] = e1 + (0.25f * e2 + 4.f * eh) - 5.25f * v[0];
    o[3] = 5.25f * v[7] - 4.25f * o1 - 2.5f * (o2 + oh);
    o[4] = 5.25f * v[0] - 4.25f * e1 - (1.25f * e2 + 5.f * eh);
    o[5] = o1 + (2.f * o2 + 0.5f * oh) - 5.25f * v[7];
    o[6] = e1 + e2 + eh - v[0];
    o[7] = v[7];
  }
  template <typename T>
  PYWINO_INLINE static void filter_transposed(const T* u, T* o) {
    const T e1 = (-2.f / 9) * (u[1] + u[2]), e2 = (1.f / 90) * (u[3] + u[4]),
            eh = (8.f / 45) * (u[5] + u[6]);
    o[0] = u[0] + e1 + e2 + 4.f * eh;
    o[1] = (-2.f / 9) * (u[1] - u[2]) + (2.f / 90) * (u[3] - u[4]) + (16.f / 45) * (u[5] - u[6]);
    o[2] = e1 + 4.f * e2 + eh + u[7];
  }
  template <typename T>
  PYWINO_INLINE static void filter(const T* g, T* o) {
    o[0] = g[0];
    const T e1 = (-2.0 / 9) * (g[0] + g[2]), o1 = (-2.0 / 9) * g[1];
    o[1] = e1 + o1;
    o[2] = e1 - o1;
    const T e2 = (1.0 / 90) * (g[0] + 4 * g[2]), o2 = (2.0 / 90) * g[1];
    o[3] = e2 + o2;
    o[4] = e2 - o2;
    const T eh = (32.0 / 45) * g[0] + (8.0 / 45) * g[2], oh = (16.0 / 45) * g[1];
    o[5] = eh + oh;
    o[6] = eh - oh;
    o[7] = g[2];
  }
};

}  // namespace
}  // namespace pywino::winograd
