// SPDX-License-Identifier: BSD-3-Clause
// The matrix product that the convolutions are made of, in registers.
#pragma once

#include "simd.h"

namespace pywino {
namespace {

// What a call may keep beside its filter, input and output.
constexpr int64_t kScratchPerThread = int64_t(4) << 20;
constexpr int kPanel = 2 * kLanes;  // output channels of a panel
// Register blocks: MR x 2 (or, where K fits in one vector, MR x 1) accumulators, the filter's vectors and a broadcast.
constexpr int kRows2 = kRegisters == 32 ? 14 : 6;
constexpr int kRows1 = kRegisters == 32 ? 28 : 12;
// Whether the product fetches its operands' next lines into the first-level cache. With 16 registers 8 loads stand against 12
// multiplications, and more loads would slow it down: the processor's own prefetcher does it there.
constexpr bool kFetchesNear = kRegisters == 32;
// Whether its loop over the channels of a vector is unrolled: 12 multiplications of a step stand against 11 other instructions,
// 3 of them for the loop.
constexpr bool kUnrolled = kRegisters == 16;
// Channels that are summed in registers before they are added to M: a float sum of n terms has an error of about sqrt(n) eps,
// in blocks of 128 that of 128 terms (docs/winograd.md, error).
constexpr int64_t kSumBlock = 128;
// Memory that will be read later and is fetched into the second-level cache meanwhile: every four channels, a quarter, `rate`
// slots of `lines` cache lines. Few at a time: a burst would fill the core's miss buffers, and the product would wait behind it.
struct Ahead {
  const char* next;
  int64_t pitch;  // bytes from slot to slot
  int lines, rate;
};
constexpr Ahead kNothing = {nullptr, 0, 0, 0};

// The slots of the next `quarters`, from `next` on.
PYWINO_INLINE void fetch(const Ahead& ahead, const char*& next, int quarters) {
  for (int i = 0; i < ahead.rate * quarters; ++i, next += ahead.pitch)
    for (int l = 0; l < ahead.lines; ++l) __builtin_prefetch(next + 64 * l, 0, 2);
}

// sum[r][n] += v[r][k] u[k][n], a rank-1 update; v and u as floats, or as pairs of bfloat16.
template <typename E, int MR, int NR>
PYWINO_INLINE void rank_one(vec (&sum)[MR][NR], const float* v, const float* u) {
  vec un[NR];
  PYWINO_UNROLL for (int n = 0; n < NR; ++n) {
    un[n] = load(u + n * kLanes);
    if (kFetchesNear) prefetch(u + n * kLanes + 16 * NR * kLanes);
  }
  PYWINO_UNROLL for (int r = 0; r < MR; ++r) {
    const vec x = v[r * kLanes] - vec{};
    PYWINO_UNROLL for (int n = 0; n < NR; ++n) sum[r][n] = multiply_add(sum[r][n], x, un[n], E{});
  }
}

// Between two unrolled steps: all sums are in registers here. GCC would mix the steps, and keep sums in memory.
template <int MR, int NR>
PYWINO_INLINE void in_registers(vec (&sum)[MR][NR]) {
#if defined(__x86_64__)
  PYWINO_UNROLL for (int r = 0; r < MR; ++r)
      PYWINO_UNROLL for (int n = 0; n < NR; ++n) asm volatile("" : "+x"(sum[r][n]));
#endif
}

// M[r][n] = sum_c V[r][c] U[c][n] for MR tiles and NR vectors of output channels; `depth` counts floats of V. While it computes,
// it fetches V's next block of channels, or of tiles, where loads leave room for that. add: to M, else in its place.
template <typename E, int MR, int NR>
void multiply(int64_t depth, const float* __restrict v, const float* __restrict u,
              float* __restrict m, const Ahead& ahead, bool add) {
  const char* next = ahead.next;
  for (int64_t done = 0; done < depth; done += kSumBlock) {
    vec sum[MR][NR];
    PYWINO_UNROLL for (int r = 0; r < MR; ++r) PYWINO_UNROLL for (int n = 0; n < NR; ++n)
        sum[r][n] = zero();
    const int64_t block = min(depth - done, kSumBlock);
    for (int64_t c = 0; c < block; c += kLanes, v += MR * kLanes) {
      const int most = int(min<int64_t>(kLanes, block - c));
      int k = 0;
      if constexpr (kUnrolled) {
        fetch(ahead, next, kLanes / 4);
        for (; k + kLanes <= most; k += kLanes, u += kLanes * NR * kLanes)
          PYWINO_UNROLL for (int i = 0; i < kLanes; ++i) {
            rank_one<E>(sum, v + k + i, u + i * NR * kLanes);
            in_registers(sum);
          }
      } else {
        for (; k + 4 <= most; k += 4) {
          fetch(ahead, next, 1);
          // Unrolled, GCC mixes the four and keeps some of the sums in memory.
          PYWINO_ROLLED for (int i = 0; i < 4; ++i, u += NR * kLanes) {
            if (kFetchesNear && NR > 1) prefetch(v + (MR + k + i) * kLanes);
            rank_one<E>(sum, v + k + i, u);
          }
        }
      }
      for (; k < most; ++k, u += NR * kLanes) rank_one<E>(sum, v + k, u);
    }
    PYWINO_UNROLL for (int r = 0; r < MR; ++r) PYWINO_UNROLL for (int n = 0; n < NR; ++n) {
      float* p = m + (r * NR + n) * kLanes;
      store(p, add ? load(p) + sum[r][n] : sum[r][n]);
    }
    add = true;
  }
}

using Multiply = void (*)(int64_t, const float*, const float*, float*, const Ahead&, bool add);

// Tables of register blocks by MR - 1.
template <typename E, int NR, int... MR>
struct Multiplies {
  static constexpr Multiply table[] = {multiply<E, MR, NR>...};
};

// For V of elements E and panels of 1 or 2 vectors.
template <typename E>
const Multiply* multiplies(int vectors) {
#if defined(__AVX512F__)
  return vectors == 2 ? Multiplies<E, 2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>::table
                      : Multiplies<E, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17,
                                   18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28>::table;
#else
  return vectors == 2 ? Multiplies<E, 2, 1, 2, 3, 4, 5, 6>::table
                      : Multiplies<E, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>::table;
#endif
}

// How V's channels are laid out: in lines of 64 bytes, and so many floats of V and U (pairs of channels, for bfloat16) deep.
template <typename E>
struct Depth {
  static constexpr int kPerFloat = int(4 / sizeof(E));  // channels in a float
  static constexpr int kLine = kLanes * kPerFloat;      // channels in a line
  static constexpr bool kFilled = false;                // is the last line filled up with zeros?
  static int64_t lines(int64_t channels) { return ceil_div<int64_t>(channels, kLine); }
  static int64_t floats(int64_t channels) { return ceil_div<int64_t>(channels, kPerFloat); }
};

// The products of a thread. kEven: the groups of a chunk must have one size.
template <typename E>
struct Products {
  static constexpr bool kEven = false;
  static int rows(int64_t out_channels) { return out_channels > kLanes ? kRows2 : kRows1; }
  // For a group of so many tiles and a panel of 1 or 2 vectors.
  PYWINO_INLINE Multiply get(int tiles, int vectors) { return multiplies<E>(vectors)[tiles - 1]; }
  // When there are no more.
  PYWINO_INLINE void end() {}
};

}  // namespace
}  // namespace pywino
