// SPDX-License-Identifier: BSD-3-Clause
// The matrix instructions: mma.sync and mma.sp of a warp, wgmma of a warpgroup. Products of 16-bit and TF32 numbers are
// exact in fp32; they are added in fp32, k ascending. A tensor core adds in another order and drops bits of its own, so
// results agree to about 1e-7 of the largest sum, not to the bit.
#pragma once

namespace emu {

void begin_block_matrix();
void end_block_matrix();

}  // namespace emu
