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

// dX += B [ dV . (V > 0) ] B^T for the tiles of a piece and a vector of channels; dV of the next position is `stride` floats on,
// that of the next tile `pitch`.
template <int M, typename T>
void add_patches(const DomainInputGradientParams& params, const Source<T>& input,
                 const Piece& piece, int64_t channel, const float* dv, int64_t stride,
                 int64_t pitch) {
  constexpr int A = Transform<M>::A, A2 = A * A;
  const Geometry& g = params.geometry;
  alignas(64) float strip[A * kStrip * kLanes], sum[A * kStrip * kLanes], v[A2 * kLanes];
  const int64_t plane = g.input.h * g.input.w, y0 = piece.y - g.pad_h, x0 = piece.x - g.pad_w;
  const Strip map = read_strip(piece, A);
  const int columns = map.segments * map.length,
            lanes = int(min<int64_t>(kLanes, g.input.c - channel));
  const bool masked = params.winograd_relu;
  const T* image = input.data + piece.image * g.input.c * plane;
  if (masked && g.channels_last)
    stage_pixels<A>(input, image, channel, y0, x0, map, strip);
  else if (masked)
    stage<A>(input, image + channel * plane, lanes, y0, x0, map, strip);
  for (int i = 0; i < A; ++i)
    for (int j = 0; j < columns; ++j) store(sum + (i * kStrip + j) * kLanes, zero());
  for (int s = 0; s < piece.count; ++s, dv += pitch) {
    const float* patch = strip + map.at(s) * kLanes;
    if (masked)
      transform_patch<InputPatch<M>>(
          [&](int i, int j) __attribute__((always_inline)) {
            return load(patch + (i * kStrip + j * map.step) * kLanes);
          },
          false, v, kLanes);
    vec t[A][A];
    PYWINO_ROLLED for (int j = 0; j < A; ++j) {
      vec q[A], o[A];
      PYWINO_UNROLL for (int i = 0; i < A; ++i) {
        const int xi = i * A + j;
        q[i] = load(dv + xi * stride);
        if (masked) q[i] = load(v + xi * kLanes) > zero() ? q[i] : zero();
      }
      Transform<M>::input_transposed(q, o);
      PYWINO_UNROLL for (int i = 0; i < A; ++i) t[i][j] = o[i];
    }
    float* out = sum + map.at(s) * kLanes;
    PYWINO_ROLLED for (int i = 0; i < A; ++i) {
      vec o[A];
      Transform<M>::input_transposed(t[i], o);
      PYWINO_UNROLL for (int j = 0; j < A; ++j) {
        float* pixel = out + (i * kStrip + j * map.step) * kLanes;
        store(pixel, load(pixel) + o[j]);
      }
    }
  }
  float* gradient = params.input_gradient + piece.image * g.input.c * plane;
  for (int i = 0; i < A; ++i) {
    const int64_t y = y0 + i * g.dil_h;
    if (y < 0 || y >= g.input.h) continue;
    for (int j = 0; j < columns; ++j) {
      const int64_t x = x0 + map.pixel(j / map.length) + j % map.length;
      if (x < 0 || x >= g.input.w) continue;
      const float* pixel = sum + (i * kStrip + j) * kLanes;
      if (g.channels_last) {
        float* to = gradient + (y * g.input.w + x) * g.input.c + channel;
        store_part(to, load_part(to, 0, lanes) + load(pixel), 0, lanes);
      } else {
        for (int c = 0; c < lanes; ++c)
          gradient[(channel + c) * plane + y * g.input.w + x] += pixel[c];
      }
    }
  }
}

}  // namespace
}  // namespace pywino::winograd
