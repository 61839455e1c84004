// SPDX-License-Identifier: BSD-3-Clause
// Copies that run beside the threads. cp.async and TMA stores move their data when their thread waits for the group; a TMA
// load lands when nobody else can run, or at random, and completes its bytes on the mbarrier. Until then the destination
// holds NaN, and in check mode every access to it is a finding: a kernel that does not wait cannot be right by luck.
#pragma once

#include "fiber.h"

namespace emu {

void begin_block_async();
void end_block_async();
void check_pending_copies(const Thread& exiting);
// Lets one TMA load land; false when there is none.
bool land_one();

}  // namespace emu
