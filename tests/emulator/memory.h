// SPDX-License-Identifier: BSD-3-Clause
// Shared memory as the hardware addresses it, with a number. The dynamic part lies below 256 KB, because the matrix
// descriptors of wgmma have 18 bits for an address, and the static one behind it: that is what all kernels of a file have
// together here, and may be more than beside the dynamic one there is room for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emu {

inline constexpr size_t kMaxDynamicShared = 227 << 10;  // what a block of sm_90 may ask for
inline constexpr uint32_t kDynamicBase = 1 << 10;       // not 0, which would hide a forgotten base
inline constexpr uint32_t kStaticBase = kDynamicBase + kMaxDynamicShared;
inline constexpr size_t kSharedAlignment = 1024;

// The bytes from `address` on. Fails where they are not all in shared memory.
char* shared_at(uint32_t address, int bytes, const void* pc);

// What uninitialised memory and copies in flight hold: NaN in every floating-point format.
inline constexpr int kPoison = 0xff;

}  // namespace emu
