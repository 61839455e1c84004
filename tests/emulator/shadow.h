// SPDX-License-Identifier: BSD-3-Clause
// Check mode. The kernel is compiled with -fsanitize=thread, which calls __tsan_read4(address) and its kin before every
// access to memory; those functions are ours. Each access is looked up in the buffers that are registered and checked:
//   bounds and alignment                  is all of it inside one buffer?
//   initialisation                        was it written before it is read?
//   copies in flight                      has the cp.async or TMA load that writes it been waited for?
//   races                                 is it ordered after the last accesses of other threads?
//
// Order is kept with vector clocks. Time is cut into epochs by __syncthreads: whatever happened in an earlier epoch of
// this block is ordered before. Inside an epoch each thread has a clock, and seen[u][t] is the last tick of thread t that is
// ordered before what thread u does now; __syncwarp, named barriers and mbarriers raise it.
//
// Each cell of a buffer (two bytes; one in buffers of bytes) remembers its last write and the last reads of two threads.
// A write that races with the third-last reader alone is not seen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emu {

extern bool checking;

// An access by the current thread.
enum class Access { read, write, atomic };
void touch(const void* p, int bytes, Access access, const void* pc);
// Any number of bytes, in accesses of powers of two.
void touch_range(const void* p, size_t bytes, Access access, const void* pc);
// A read by TMA or wgmma: what threads wrote must be behind their fence.proxy.async.
void touch_async_read(const void* p, int bytes, const void* pc);

// --- Order
void begin_launch();
void begin_block();
void begin_epoch();                    // all threads of the block have met
void meet(const int* who, int count);  // these have
void release_to(
    uint32_t* clocks);  // clocks: kMaxThreads of them, raised to what this thread has done
void acquire_from(const uint32_t* clocks);  // what follows is ordered after them
uint32_t current_epoch();
void fence_async_proxy();
void host_write(const void* p, size_t bytes);  // between two launches

// --- Copies in flight
struct Stamp {
  uint32_t epoch;
  int thread;
  uint32_t clock;
};
Stamp now();  // of the current thread
void tick();  // what this thread does from here on is later than now() was
void mark_in_flight(const void* p, int bytes, const void* pc);
void mark_landed(const void* p, int bytes, Stamp when, bool by_async_proxy);

// --- What lies where
void set_shared(char* dynamic_base, size_t dynamic_bytes, char* static_base, size_t static_bytes);
void set_module(char* low, char* high);
void set_arguments(void* p, size_t bytes);
// For a report: "at 16 bytes behind the end of buffer x".
std::string describe(const void* p);

}  // namespace emu
