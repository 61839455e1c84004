// SPDX-License-Identifier: BSD-3-Clause
// The last stage of an input gradient: patches overlap, so each is added to what is there.
#pragma once

#include "../common/simd.h"
#include "patches.h"
#include "tiles.h"
#include "transforms.h"
#include "winograd.h"

namespace pywino::winograd {
namespace {

// B [ dV . (V > 0) ] B^T of one tile and one vector of channels, or without the mask: load_at(i, j) gives d[i][j] of V = B^T d B,
// position xi of dV is at dv + xi * stride, add(i, j, y) gets the result.
template <int M, bool Masked, typename Load, typename Add>
PYWINO_INLINE void transform_gradient(const float* dv, int64_t stride, const Load& load_at,
                                      const Add& add) {
  constexpr int A = Transform<M>::A;
  vec v[A][A], t[A][A];
  if (Masked) PYWINO_ROLLED for (int j = 0; j < A; ++j) {
      vec d[A], o[A];
      PYWINO_UNROLL for (int i = 0; i < A; ++i) d[i] = load_at(i, j);
      Transform<M>::input(d, o);
      PYWINO_UNROLL for (int i = 0; i < A; ++i) v[i][j] = o[i];
    }
  PYWINO_ROLLED for (int i = 0; i < A; ++i) {
    vec q[A], o[A];
    if (Masked) Transform<M>::input(v[i], o);
    PYWINO_UNROLL for (int j = 0; j < A; ++j) {
      q[j] = load(dv + (i * A + j) * stride);
      if (Masked) q[j] = o[j] > zero() ? q[j] : zero();
    }
    Transform<M>::input_transposed(q, o);
    PYWINO_UNROLL for (int j = 0; j < A; ++j) t[i][j] = o[j];
  }
  PYWINO_ROLLED for (int j = 0; j < A; ++j) {
    vec q[A], o[A];
    PYWINO_UNROLL for (int i = 0; i < A; ++i) q[i] = t[i][j];
    Transform<M>::input_transposed(q, o);
    PYWINO_UNROLL for (int i = 0; i < A; ++i) add(i, j, o[i]);
  }
}

template <int M, bool Masked, typename T>
void add_pixels(const DomainInputGradientParams& params, const Source<T>& input, const Piece& piece,
                int64_t channel, const float* dv, int64_t stride, int64_t pitch) {
  constexpr int A = Transform<M>::A;
  const int64_t C = input.channels, H = input.height, W = input.width;
  const int lanes = int(min<int64_t>(kLanes, C - channel));
  const Lines<A> rows(piece.y - input.pad_h, input.dil_h, H, W * C);
  const bool rows_inside = rows.inside[0] & rows.inside[A - 1];
  const T* image = input.data + piece.image * H * W * C + channel;
  float* sums = params.input_gradient + piece.image * H * W * C + channel;
  for (int s = 0; s < piece.count; ++s, dv += pitch) {
    const int64_t x0 = piece.x + piece.offset(s) - input.pad_w;
    if (rows_inside && x0 >= 0 && x0 + (A - 1) * input.dil_w < W && lanes == kLanes) {
      const int64_t first = rows.at[0] + x0 * C, row = input.dil_h * W * C,
                    column = input.dil_w * C;
      transform_gradient<M, Masked>(
          dv, stride,
          [&](int i, int j)
              __attribute__((always_inline)) { return load(image + first + i * row + j * column); },
          [&](int i, int j, vec y) __attribute__((always_inline)) {
            float* to = sums + first + i * row + j * column;
            store(to, load(to) + y);
          });
      continue;
    }
    const Lines<A> columns(x0, input.dil_w, W, C);
    transform_gradient<M, Masked>(
        dv, stride,
        [&](int i, int j) __attribute__((always_inline)) {
          return rows.inside[i] & columns.inside[j]
                     ? load_part(image + rows.at[i] + columns.at[j], 0, lanes)
                     : zero();
        },
        [&](int i, int j, vec y) __attribute__((always_inline)) {
          if (!(rows.inside[i] & columns.inside[j])) return;
          float* to = sums + rows.at[i] + columns.at[j];
          store_part(to, load_part(to, 0, lanes) + y, 0, lanes);
        });
  }
}

template <int M, bool Masked, typename T>
void add_planes(const DomainInputGradientParams& params, const Source<T>& input, const Piece& piece,
                int64_t channel, const float* dv, int64_t stride, int64_t pitch) {
  constexpr int A = Transform<M>::A;
  const int64_t H = input.height, W = input.width, plane = H * W;
  const int64_t y0 = piece.y - input.pad_h, x0 = piece.x - input.pad_w;
  const int lanes = int(min<int64_t>(kLanes, input.channels - channel));
  const Strip map = read_strip(piece, A);
  alignas(64) float strip[A * kStrip * kLanes], sums[A * kStrip * kLanes];
  if (Masked)
    stage<A>(input, input.data + (piece.image * input.channels + channel) * plane, lanes, y0, x0,
             map, strip);
  for (int i = 0; i < A; ++i)
    for (int j = 0; j < map.segments * map.length; ++j)
      store(sums + (i * kStrip + j) * kLanes, zero());
  for (int s = 0; s < piece.count; ++s, dv += pitch) {
    const auto pixel = [&](int i, int j) __attribute__((always_inline)) {
      return (i * kStrip + map.at(s) + j * map.step) * kLanes;
    };
    transform_gradient<M, Masked>(
        dv, stride,
        [&](int i, int j) __attribute__((always_inline)) { return load(strip + pixel(i, j)); },
        [&](int i, int j, vec y) __attribute__((always_inline)) {
          float* to = sums + pixel(i, j);
          store(to, load(to) + y);
        });
  }
  float* planes = params.input_gradient + (piece.image * input.channels + channel) * plane;
  for (int i = 0; i < A; ++i) {
    const int64_t y = y0 + i * input.dil_h;
    if (y < 0 || y >= H) continue;
    for (int segment = 0; segment < map.segments; ++segment)
      for (int j = 0; j < map.length; j += kLanes) {
        const float* from = sums + (i * kStrip + segment * map.length + j) * kLanes;
        const int64_t x = x0 + map.pixel(segment) + j;
        const int lo = int(max<int64_t>(0, min<int64_t>(kLanes, -x))),
                  hi = int(min<int64_t>(min(kLanes, map.length - j), W - x));
        if (lo >= hi) continue;
        vec r[kLanes];
        PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) r[c] = load(from + c * kLanes);
        transpose(r);
        for (int c = 0; c < lanes; ++c) {
          float* to = planes + c * plane + y * W + x;
          store_part(to, load_part(to, lo, hi) + r[c], lo, hi);
        }
      }
  }
}

// dX += B [ dV . (V > 0) ] B^T for the tiles of a piece (strip_piece in NCHW) and a vector of channels; dV of the next position is
// `stride` floats on, that of the next tile `pitch`.
template <int M, typename T>
void add_patches(const DomainInputGradientParams& params, const Source<T>& input,
                 const Piece& piece, int64_t channel, const float* dv, int64_t stride,
                 int64_t pitch) {
  const auto add = params.geometry.channels_last
                       ? (params.winograd_relu ? add_pixels<M, true, T> : add_pixels<M, false, T>)
                       : (params.winograd_relu ? add_planes<M, true, T> : add_planes<M, false, T>);
  add(params, input, piece, channel, dv, stride, pitch);
}

}  // namespace
}  // namespace pywino::winograd
