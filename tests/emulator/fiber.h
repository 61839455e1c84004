// SPDX-License-Identifier: BSD-3-Clause
// Threads. A CUDA thread is a fiber: a stack of its own, and a switch of a few instructions to the next. All fibers of a
// block share one host thread, so plain globals hold the state of the run, and nothing here is thread-safe.
//
// A fiber runs until it must wait (at a barrier, a warp collective, an mbarrier) or ends. Which one runs next is the
// schedule's choice: a kernel that is right only in one order shows it in another.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace emu {

inline constexpr int kMaxThreads = 1024;
inline constexpr int kLanes = 32;
inline constexpr int kMaxWarps = kMaxThreads / kLanes;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

enum class State { ready, at_barrier, at_collective, at_mbarrier, exited };

struct Thread {
  void* stack_pointer;
  uint3 index;
  int number;  // in the block
  int lane;
  int warp;
  State state;
  // What it waits for, and the place in the kernel where it began to.
  const void* pc;
  int barrier;
  int collective;
  uint32_t mask;
  void* operands;
};

// The block that runs.
struct Block {
  const char* kernel = "";
  dim3 grid, size;
  uint3 index;
  int threads = 0;
  int warps = 0;
  int alive = 0;  // threads that have not exited
};

enum class Schedule { ascending, descending, random };

extern Thread threads[kMaxThreads];
extern Thread* current;  // null outside of a kernel
extern Block block;
extern Schedule schedule;
extern bool abandoned;  // this launch is to be given up

// The lanes of a warp that have not exited.
uint32_t live_lanes(int warp);

void seed_random(uint64_t seed);
uint64_t random_bits();

// Runs one block: every thread calls body(arguments). Returns when all have ended, or the launch was given up.
void run_block(void (*body)(void*), void* arguments);

// Puts a waiting thread back among those that can run.
void make_ready(int thread);
// Runs others until this thread is ready and its turn has come.
void wait();
// Leaves the kernel for good. Returns only to a caller that is not in one.
void abandon();

// Does an address lie on the fibers' stacks, and on whose?
bool on_stacks(const void* p);
int stack_owner(const void* p);

}  // namespace emu
