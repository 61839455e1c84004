// SPDX-License-Identifier: BSD-3-Clause
// Shared memory as the hardware addresses it, with a number: first the static part, then the dynamic one. Everything stays
// below 256 KB, because the matrix descriptors of wgmma have 18 bits for an address.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emu {

inline constexpr size_t kMaxDynamicShared = 227 << 10;  // what a block of sm_90 may ask for
inline constexpr uint32_t kSharedBase = 1 << 10;        // not 0, which would hide a forgotten base
inline constexpr uint32_t kSharedEnd = 1 << 18;
inline constexpr size_t kSharedAlignment = 1024;

// The bytes from `address` on. Fails where they are not all in shared memory.
char* shared_at(uint32_t address, int bytes, const void* pc);

// What uninitialised memory and copies in flight hold: NaN in every floating-point format.
inline constexpr int kPoison = 0xff;

}  // namespace emu
