// SPDX-License-Identifier: BSD-3-Clause
// Barriers, and what a warp does together. Each lane that comes to a warp collective leaves its operands and waits; the
// last lane of the mask computes the result for all of them, and all go on.
#pragma once

#include <cstdint>

#include "fiber.h"
#include "report.h"

namespace emu {

// What lanes that meet must agree in.
enum Collective {
  kSyncWarp = 1,
  kShuffle,
  kBallot,
  kReduce,
  kLdmatrix,
  kMma,
  kMmaSparse,
  kWgmmaFence,
  kWgmma,
  kWgmmaCommit,
  kWgmmaWait,
};

// Joins the lanes of `mask` at the collective `kind`; true for the last to arrive, which must then compute and call
// collective_done(). operands[lane]: what each brought.
bool arrive_at_collective(int kind, uint32_t mask, void* operands, const void* pc, void** all);
void collective_done(uint32_t mask);

template <class Compute>
void collective(int kind, uint32_t mask, void* operands, const void* pc, Compute compute) {
  void* all[kLanes];
  if (!arrive_at_collective(kind, mask, operands, pc, all)) return;
  compute(all);
  collective_done(mask);
}

// While it lives, `current` is a lane for which the last one works: findings name the right thread.
class ActAs {
 public:
  explicit ActAs(int lane) : me_(current) { current = &threads[me_->warp * kLanes + lane]; }
  ~ActAs() { current = me_; }

 private:
  Thread* me_;
};

void begin_block_collectives();
// A thread has exited: others may have waited for it alone.
void complete_without(const Thread& exited);

}  // namespace emu
