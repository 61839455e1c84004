// SPDX-License-Identifier: BSD-3-Clause
#include "collectives.h"

#include <algorithm>
#include <vector>

#include "interface.h"
#include "memory.h"
#include "shadow.h"

namespace emu {

namespace {

// --- Warp collectives: who has come

uint32_t waiting[kMaxWarps];  // lanes at a collective

Thread* warp_of(const Thread& t) { return &threads[t.warp * kLanes]; }

template <class Body>
void for_each_lane(uint32_t mask, Body body) {
  for (; mask; mask &= mask - 1) body(__builtin_ctz(mask));
}

void meet_lanes(int warp, uint32_t mask) {
  int who[kLanes];
  int count = 0;
  for_each_lane(mask & live_lanes(warp), [&](int lane) { who[count++] = warp * kLanes + lane; });
  meet(who, count);
}

// --- Barriers: 0 is __syncthreads', which all threads that have not exited wait for

struct Barrier {
  std::vector<int> arrived;
  int expected = 0;
};
Barrier barriers[16];

struct Reduction {
  int any = 0, all = 1, count = 0;
};
Reduction reduction, reduced;  // of the __syncthreads_or that goes on, of the last

void release(int id) {
  Barrier& b = barriers[id];
  if (id == 0) {
    reduced = reduction;
    reduction = Reduction{};
    begin_epoch();
  } else {
    meet(b.arrived.data(), static_cast<int>(b.arrived.size()));
  }
  for (int t : b.arrived) {
    if (threads[t].state == State::at_barrier && threads[t].barrier == id) make_ready(t);
  }
  b.arrived.clear();
}

void release_if_all_have_come() {
  const int arrived = static_cast<int>(barriers[0].arrived.size());
  if (arrived && arrived >= block.alive) release(0);
}

void wait_for_block(const void* pc) {
  current->state = State::at_barrier;
  current->barrier = 0;
  current->pc = pc;
  barriers[0].arrived.push_back(current->number);
  release_if_all_have_come();
  wait();
}

}  // namespace

void begin_block_collectives() {
  for (uint32_t& lanes : waiting) lanes = 0;
  for (Barrier& b : barriers) b.arrived.clear();
  reduction = Reduction{};
}

void complete_without(const Thread& exited) {
  release_if_all_have_come();
  // A __syncwarp does not wait for lanes that have exited; any other collective needs all of its mask.
  const int warp = exited.warp;
  for_each_lane(waiting[warp], [&](int lane) {
    const Thread& t = warp_of(exited)[lane];
    if (t.collective != kSyncWarp && (t.mask >> exited.lane & 1)) {
      fail("WARP MASK", t.pc, nullptr, "lane %d of mask %#x has exited", exited.lane, t.mask);
    }
    const uint32_t needed = t.mask & live_lanes(warp);
    if (t.collective != kSyncWarp || (needed & ~waiting[warp])) return;
    meet_lanes(warp, needed);
    waiting[warp] &= ~needed;
    for_each_lane(needed, [&](int l) { make_ready(warp * kLanes + l); });
  });
}

bool arrive_at_collective(int kind, uint32_t mask, void* operands, const void* pc, void** all) {
  Thread& me = *current;
  if (!(mask >> me.lane & 1)) {
    fail("WARP MASK", pc, nullptr, "lane %d calls with mask %#x, which it is not in", me.lane,
         mask);
  }
  uint32_t needed = mask;
  if (const uint32_t gone = mask & ~live_lanes(me.warp)) {
    if (kind == kSyncWarp) {
      needed &= ~gone;
    } else {
      fail("WARP MASK", pc, nullptr, "lanes %#x of mask %#x have exited or never were", gone, mask);
    }
  }
  me.state = State::at_collective;
  me.pc = pc;
  me.collective = kind;
  me.mask = mask;
  me.operands = operands;
  waiting[me.warp] |= 1u << me.lane;
  if (needed & ~waiting[me.warp]) {
    wait();
    return false;
  }
  for_each_lane(needed, [&](int lane) {
    const Thread& other = warp_of(me)[lane];
    if (other.collective != kind || other.mask != mask) {
      fail("WARP DIVERGENCE", pc, other.pc,
           "lanes %d and %d meet at different collectives, or with masks %#x and %#x", me.lane,
           lane, mask, other.mask);
    }
    all[lane] = other.operands;
  });
  waiting[me.warp] &= ~needed;
  return true;
}

void collective_done(uint32_t mask) {
  Thread& me = *current;
  for_each_lane(mask & live_lanes(me.warp), [&](int lane) {
    if (lane != me.lane) make_ready(me.warp * kLanes + lane);
  });
  me.state = State::ready;
  if (schedule == Schedule::random) {
    make_ready(me.number);
    wait();
  }
}

// --- Barriers

void syncthreads() { wait_for_block(__builtin_return_address(0)); }

int syncthreads_reduce(int which, int predicate) {
  reduction.any |= predicate != 0;
  reduction.all &= predicate != 0;
  reduction.count += predicate != 0;
  wait_for_block(__builtin_return_address(0));
  return which == kOr ? reduced.any : which == kAnd ? reduced.all : reduced.count;
}

void named_barrier(int id, int expected, bool arrive_only) {
  const void* pc = __builtin_return_address(0);
  if (id < 1 || id > 15 || expected < kLanes || expected % kLanes) {
    fail("BARRIER", pc, nullptr, "barrier %d for %d threads: 1 to 15, and whole warps", id,
         expected);
  }
  Barrier& b = barriers[id];
  if (!b.arrived.empty() && b.expected != expected) {
    fail("BARRIER", pc, nullptr, "barrier %d for %d threads here, for %d elsewhere", id, expected,
         b.expected);
  }
  b.expected = expected;
  b.arrived.push_back(current->number);
  current->pc = pc;
  current->barrier = id;
  if (!arrive_only) current->state = State::at_barrier;
  if (static_cast<int>(b.arrived.size()) == expected) release(id);
  if (!arrive_only) wait();
}

// --- Warp collectives

void syncwarp(uint32_t mask) {
  collective(kSyncWarp, mask, nullptr, __builtin_return_address(0),
             [&](void**) { meet_lanes(current->warp, mask); });
}

uint64_t shuffle(int kind, uint32_t mask, uint64_t value, int source, int width) {
  struct Operands {
    uint64_t value, result;
    int kind, source, width;
  } mine = {value, value, kind, source, width};
  const void* pc = __builtin_return_address(0);
  collective(kShuffle, mask, &mine, pc, [&](void** all) {
    for_each_lane(mask, [&](int lane) {
      auto& o = *static_cast<Operands*>(all[lane]);
      const int first = lane & ~(o.width - 1);
      const int last = first + o.width - 1;
      int from = lane;
      switch (o.kind) {
        case kIndex: from = first + (o.source & (o.width - 1)); break;
        case kUp: from = lane - o.source < first ? lane : lane - o.source; break;
        case kDown: from = lane + o.source > last ? lane : lane + o.source; break;
        case kXor: from = (lane ^ o.source) > last ? lane : lane ^ o.source; break;
      }
      if (mask >> from & 1) {
        o.result = static_cast<Operands*>(all[from])->value;
      } else {
        report("SHUFFLE", pc, nullptr, "lane %d reads lane %d, which is not in mask %#x", lane,
               from, mask);
        o.result = ~uint64_t{0};
      }
    });
  });
  return mine.result;
}

uint32_t ballot(uint32_t mask, int predicate) {
  struct Operands {
    int predicate;
    uint32_t result;
  } mine = {predicate, 0};
  collective(kBallot, mask, &mine, __builtin_return_address(0), [&](void** all) {
    uint32_t votes = 0;
    for_each_lane(mask, [&](int lane) {
      if (static_cast<Operands*>(all[lane])->predicate) votes |= 1u << lane;
    });
    for_each_lane(mask, [&](int lane) { static_cast<Operands*>(all[lane])->result = votes; });
  });
  return mine.result;
}

uint32_t reduce(int which, bool is_signed, uint32_t mask, uint32_t value) {
  const auto combine = [&](uint32_t a, uint32_t b) -> uint32_t {
    const bool less = is_signed ? static_cast<int32_t>(a) < static_cast<int32_t>(b) : a < b;
    switch (which) {
      case kAdd: return a + b;
      case kMin: return less ? a : b;
      case kMax: return less ? b : a;
      case kBitAnd: return a & b;
      case kBitOr: return a | b;
      default: return a ^ b;
    }
  };
  uint32_t mine = value;
  collective(kReduce, mask, &mine, __builtin_return_address(0), [&](void** all) {
    const int first = __builtin_ctz(mask);
    uint32_t result = *static_cast<uint32_t*>(all[first]);
    for_each_lane(mask & (mask - 1),
                  [&](int lane) { result = combine(result, *static_cast<uint32_t*>(all[lane])); });
    for_each_lane(mask, [&](int lane) { *static_cast<uint32_t*>(all[lane]) = result; });
  });
  return mine;
}

uint32_t active_mask() { return live_lanes(current->warp); }

// --- ldmatrix: lane l brings the address of row l % 8 of matrix l / 8

namespace {

struct MatrixOperands {
  uint32_t* r;
  uint32_t address;
};

// The eight rows of a matrix, each checked as a read of the lane that names it.
void find_rows(void** all, int matrix, const void* pc, const uint16_t** rows) {
  for (int i = 0; i < 8; ++i) {
    const int lane = matrix * 8 + i;
    const uint32_t address = static_cast<MatrixOperands*>(all[lane])->address;
    const ActAs that(lane);
    if (address % 16) fail("MISALIGNED", pc, nullptr, "matrix row at shared address %#x", address);
    rows[i] = reinterpret_cast<const uint16_t*>(shared_at(address, 16, pc));
    if (checking) touch(rows[i], 16, Access::read, pc);
  }
}

// Lane 4 g + q holds elements 2 q and 2 q + 1 of row g; of column g when transposed.
struct Place {
  int row, column;
};
Place element(int lane, int half, bool trans) {
  const int g = lane / 4, q = lane % 4 * 2 + half;
  return trans ? Place{q, g} : Place{g, q};
}

}  // namespace

void ldmatrix(int matrices, bool trans, uint32_t* r, uint32_t address) {
  MatrixOperands mine = {r, address};
  const void* pc = __builtin_return_address(0);
  collective(kLdmatrix, kAllLanes, &mine, pc, [&](void** all) {
    for (int m = 0; m < matrices; ++m) {
      const uint16_t* rows[8];
      find_rows(all, m, pc, rows);
      for (int lane = 0; lane < kLanes; ++lane) {
        const Place low = element(lane, 0, trans), high = element(lane, 1, trans);
        static_cast<MatrixOperands*>(all[lane])->r[m] =
            rows[low.row][low.column] | uint32_t{rows[high.row][high.column]} << 16;
      }
    }
  });
}

}  // namespace emu
