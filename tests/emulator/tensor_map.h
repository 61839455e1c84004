// SPDX-License-Identifier: BSD-3-Clause
// What the emulator keeps in the 128 opaque bytes of a CUtensorMap, and the walk over a box of the tensor.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstdint>

namespace emu {

inline constexpr int kMaxRank = 5;
inline constexpr uint32_t kTensorMapMagic = 0x544d4150;

// Rows of 32, 64 or 128 bytes: the 16-byte chunks of a row are permuted by the row's number, which stands in address bits
// 7 and up, so that a column of chunks falls on different banks.
enum class Swizzle : uint8_t { none, bytes32, bytes64, bytes128 };

inline uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  const uint32_t mask = (1u << static_cast<int>(swizzle)) - 1;  // 0, 1, 3, 7
  return address ^ (address >> 7 & mask) << 4;
}

struct TensorMap {
  uint32_t magic;
  uint8_t rank, item_bytes;
  Swizzle swizzle;
  uint16_t box[kMaxRank];
  char* base;
  uint64_t extent[kMaxRank];
  uint64_t stride[kMaxRank - 1];  // in bytes, of dimension 1 and up

  int box_bytes() const {
    int bytes = item_bytes;
    for (int d = 0; d < rank; ++d) bytes *= box[d];
    return bytes;
  }

  // The box at `coordinates`, 16 bytes at a time: visit(shared address, its place in the tensor, first, end), of which bytes
  // first ... end - 1 are in the tensor. The tile begins at `address`.
  template <class Visit>
  void for_each_chunk(const int* coordinates, uint32_t address, Visit visit) const {
    constexpr int kChunk = 16;
    const int items = kChunk / item_bytes;
    int index[kMaxRank] = {};
    for (int done = 0; done < box_bytes(); done += kChunk) {
      bool inside = true;
      char* place = base;
      for (int d = 1; d < rank; ++d) {
        const int64_t at = int64_t{coordinates[d]} + index[d];
        inside &= at >= 0 && at < static_cast<int64_t>(extent[d]);
        place += at * static_cast<int64_t>(stride[d - 1]);
      }
      const int64_t at = int64_t{coordinates[0]} + index[0];
      const int64_t first = std::clamp<int64_t>(-at, 0, items);
      const int64_t end = std::clamp<int64_t>(static_cast<int64_t>(extent[0]) - at, first, items);
      visit(swizzled(address + done, swizzle), place + at * item_bytes,
            static_cast<int>(first) * item_bytes, inside ? static_cast<int>(end) * item_bytes : 0);
      index[0] += items;
      for (int d = 0; d + 1 < rank && index[d] == box[d]; ++d) {
        index[d] = 0;
        ++index[d + 1];
      }
    }
  }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

}  // namespace emu
