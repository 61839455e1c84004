// SPDX-License-Identifier: BSD-3-Clause
// The product of bfloat16 operands (product.h) in the tile registers of AMX. Each holds 16 rows of 64 bytes, and one instruction
// multiplies 16 tiles of 32 channels by 32 x 16 of the filter. V and U lie as the registers want them, without a copy:
//
//   V  [xi][group of MR tiles][C / 32][MR][32]     rows of 64 bytes: MR of them are a register, or two
//   U  [panel][xi][C / 2][panel's width][2]        16 pairs of channels of 16 outputs are a register
//   M  [xi][panel][tile][panel's width]            fp32
//
// where channels are filled up to 32 with zeros. To set the registers' shapes takes as long as a product of 64 channels. So the groups
// of a chunk have one size, and the rows that the last one lacks are made of whatever lies there.
#pragma once

#include <utility>

#include "product.h"

#if defined(__AMX_BF16__)

namespace pywino {
namespace {

// M[r][n] = sum_c V[r][c] U[c][n] for MR tiles and NR vectors of output channels: registers 0 .. 3 are sums, 4 and 5 V, 6 and 7 U.
template <int MR, int NR>
void multiply_in_tiles(int64_t depth, const float* __restrict v, const float* __restrict u,
                       float* __restrict m, const Ahead& ahead, bool add) {
  constexpr bool kTwo = MR > 16, kWide = NR == 2;
  // Bytes of a row of U or M, floats of 16 of them.
  constexpr int kRow = NR * kLanes * 4, kHalf = 16 * NR * kLanes;
  // GCC does not know that the loads below read memory.
  asm volatile("" : : : "memory");
  _tile_zero(0);
  if constexpr (kWide) _tile_zero(1);
  if constexpr (kTwo) _tile_zero(2);
  if constexpr (kTwo && kWide) _tile_zero(3);
  const char* next = ahead.next;
  for (int64_t c = 0; c < depth; c += kLanes, v += MR * kLanes, u += kHalf) {
    fetch(ahead, next, kLanes / 4);
    _tile_loadd(4, v, 64);
    _tile_loadd(6, u, kRow);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kWide) {
      _tile_loadd(7, u + kLanes, kRow);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwo) {
      _tile_loadd(5, v + 16 * kLanes, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kWide) _tile_dpbf16ps(3, 5, 7);
    }
  }
  const auto write = [](float* to) __attribute__((always_inline)) {
    _tile_stored(0, to, kRow);
    if constexpr (kWide) _tile_stored(1, to + kLanes, kRow);
    if constexpr (kTwo) _tile_stored(2, to + kHalf, kRow);
    if constexpr (kTwo && kWide) _tile_stored(3, to + kHalf + kLanes, kRow);
  };
  if (!add) return write(m);
  alignas(64) float sums[MR * NR * kLanes];
  write(sums);
  for (int i = 0; i < MR * NR * kLanes; i += kLanes) store(m + i, load(m + i) + load(sums + i));
}

// By MR - 1.
template <int NR, typename Rows = std::make_integer_sequence<int, 2 * 16>>
struct MultipliesInTiles;
template <int NR, int... I>
struct MultipliesInTiles<NR, std::integer_sequence<int, I...>> {
  static constexpr Multiply table[] = {multiply_in_tiles<I + 1, NR>...};
};

template <>
struct Depth<bf16_operand> {
  static constexpr int kPerFloat = 2, kLine = 32;
  static constexpr bool kFilled = true;
  static int64_t lines(int64_t channels) { return ceil_div<int64_t>(channels, kLine); }
  static int64_t floats(int64_t channels) { return lines(channels) * kLine / kPerFloat; }
};

template <>
class Products<bf16_operand> {
 public:
  static constexpr bool kEven = true;
  static int rows(int64_t) { return 2 * 16; }

  // What another library set before is gone.
  PYWINO_INLINE Multiply get(int tiles, int vectors) {
    if (tiles != tiles_) set(tiles);
    return (vectors == 2 ? MultipliesInTiles<2>::table : MultipliesInTiles<1>::table)[tiles - 1];
  }
  PYWINO_INLINE void end() {
    if (tiles_) _tile_release();
    tiles_ = 0;
  }

 private:
  int tiles_ = 0;

  void set(int tiles) {
    tiles_ = tiles;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int half = 0; half < 2; ++half) {
      const int rows = max(0, min(16, tiles - 16 * half));
      for (const int i : {2 * half, 2 * half + 1, 4 + half, 6 + half}) {
        shapes.rows[i] = uint8_t(i < 6 ? rows : 16);
        shapes.bytes[i] = shapes.rows[i] ? 64 : 0;
      }
    }
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
};

}  // namespace
}  // namespace pywino

#endif
