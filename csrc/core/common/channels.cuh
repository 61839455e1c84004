// SPDX-License-Identifier: BSD-3-Clause
// A few neighbouring channels of a pixel in one thread's registers, as the fp32 numbers that are computed with.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "inline.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace pywino {

template <int V>
struct Channels {
  float x[V];

  PYWINO_INLINE friend Channels operator+(Channels a, Channels b) {
#pragma unroll
    for (int i = 0; i < V; ++i) a.x[i] += b.x[i];
    return a;
  }
  PYWINO_INLINE friend Channels operator-(Channels a, Channels b) {
#pragma unroll
    for (int i = 0; i < V; ++i) a.x[i] -= b.x[i];
    return a;
  }
  PYWINO_INLINE friend Channels operator-(Channels a) {
#pragma unroll
    for (int i = 0; i < V; ++i) a.x[i] = -a.x[i];
    return a;
  }
  PYWINO_INLINE friend Channels operator*(float s, Channels a) {
#pragma unroll
    for (int i = 0; i < V; ++i) a.x[i] *= s;
    return a;
  }
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class E>
__device__ inline E from_float(float x) {
  if constexpr (std::is_same_v<E, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<E, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

// V elements that lie side by side, moved as one word.
template <class E, int V>
struct alignas(sizeof(E) * V) Pack {
  E x[V];
};

// Two 16-bit elements as that word.
template <class E>
__device__ inline uint32_t bits_of(float first, float second) {
  const Pack<E, 2> pack = {{from_float<E>(first), from_float<E>(second)}};
  uint32_t bits;
  memcpy(&bits, &pack, sizeof(bits));
  return bits;
}

template <class E, int V>
__device__ inline Channels<V> load_channels(const E* p) {
  const auto pack = ptx::load<Pack<E, V>>(p);
  Channels<V> channels;
#pragma unroll
  for (int i = 0; i < V; ++i) channels.x[i] = to_float(pack.x[i]);
  return channels;
}

// In words of at most 16 bytes.
template <class E, int V>
__device__ inline void store_channels(E* p, Channels<V> channels) {
  constexpr int kWord = V * int(sizeof(E)) > 16 ? 16 / int(sizeof(E)) : V;
#pragma unroll
  for (int first = 0; first < V; first += kWord) {
    Pack<E, kWord> pack;
#pragma unroll
    for (int i = 0; i < kWord; ++i) pack.x[i] = from_float<E>(channels.x[first + i]);
    ptx::store(p + first, pack);
  }
}

// A convolution's eight channels of a pixel from channel k on, those of them that K has, `step` elements apart; with the bias,
// where there is one.
template <class E>
__device__ inline void write_channels(E* to, Channels<8> sums, const float* bias, int64_t k,
                                      int64_t K, int64_t step = 1) {
  const bool whole = step == 1 && K % 8 == 0;  // all eight are there, and aligned
#pragma unroll
  for (int e = 0; e < 8; ++e)
    if (k + e < K) {
      if (bias) sums.x[e] += bias[k + e];
      if (!whole) to[e * step] = from_float<E>(sums.x[e]);
    }
  if (whole) store_channels(to, sums);
}

}  // namespace pywino
