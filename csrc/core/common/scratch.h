// SPDX-License-Identifier: BSD-3-Clause
// Scratch memory that a thread keeps between calls: a fresh allocation of some MB would cost a page fault every 4 KB,
// which is more than the transforms of a small layer.
#pragma once

#include <cstddef>

#include "isa.h"

namespace pywino {

enum class ScratchSlot : int { own = 0, shared = 1 };
inline constexpr int kScratchSlots = 2;

// At least `bytes` bytes, 4 KB aligned, contents undefined, valid until this thread's next call with the same slot;
// nullptr when memory has run out.
void* scratch(std::size_t bytes, ScratchSlot slot);

// What this thread keeps.
PYWINO_API std::size_t scratch_bytes();

}  // namespace pywino
