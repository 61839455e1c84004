// SPDX-License-Identifier: BSD-3-Clause
// What the emulator keeps in the 128 opaque bytes of a CUtensorMap, and the walk over a box of the tensor.
#pragma once

#include <cuda.h>

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

  // visit(shared address, item in global memory, or null where the tensor has none) for each item of the box at
  // `coordinates`, whose tile begins at `address`.
  template <class Visit>
  void for_each(const int* coordinates, uint32_t address, Visit visit) const {
    int index[kMaxRank] = {};
    const int items = box_bytes() / item_bytes;
    for (int i = 0; i < items; ++i) {
      char* item = base;
      bool inside = true;
      for (int d = 0; d < rank; ++d) {
        const int64_t at = int64_t{coordinates[d]} + index[d];
        inside &= at >= 0 && at < static_cast<int64_t>(extent[d]);
        item += at * static_cast<int64_t>(d ? stride[d - 1] : item_bytes);
      }
      visit(swizzled(address + i * item_bytes, swizzle), inside ? item : nullptr);
      for (int d = 0; d < rank && ++index[d] == box[d]; ++d) index[d] = 0;
    }
  }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

}  // namespace emu
