// SPDX-License-Identifier: BSD-3-Clause
#include "fiber.h"

#include <sys/mman.h>

#include "async.h"
#include "collectives.h"
#include "interface.h"
#include "report.h"

#if !defined(__x86_64__)
#error "the emulator's context switch is written for x86-64"
#endif

// Saves the registers that a callee must keep on this stack, and continues where `to` was left.
extern "C" void emu_switch(void** from, void* to);
asm(R"(
.text
.globl emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");

namespace emu {

Thread threads[kMaxThreads];
Thread* current = nullptr;
Block block;
Schedule schedule = Schedule::ascending;
bool abandoned = false;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kPage = 4096;
constexpr int kSavedRegisters = 6;

char* stacks = nullptr;
void* host_stack;  // where run_block waits
void (*thread_body)(void*);
void* thread_arguments;

uint32_t ready_lanes[kMaxWarps];
uint32_t ready_warps;
uint32_t live[kMaxWarps];
int last_warp;

uint64_t random_state = 1;

int lowest(uint32_t set) { return __builtin_ctz(set); }
int highest(uint32_t set) { return 31 - __builtin_clz(set); }
int any(uint32_t set) {
  for (uint64_t skip = random_bits() % __builtin_popcount(set); skip; --skip) set &= set - 1;
  return lowest(set);
}

// Of the threads that are ready, the one whose warp and lane `choose` picks. In order, a warp runs as long as one of its
// lanes can: that is the quick way through warp collectives.
Thread* take(int (*choose)(uint32_t), bool stay_in_warp) {
  const int warp = stay_in_warp && ready_lanes[last_warp] ? last_warp : choose(ready_warps);
  const int lane = choose(ready_lanes[warp]);
  ready_lanes[warp] &= ~(1u << lane);
  if (!ready_lanes[warp]) ready_warps &= ~(1u << warp);
  last_warp = warp;
  return &threads[warp * kLanes + lane];
}

Thread* take_next() {
  switch (schedule) {
    case Schedule::ascending: return take(lowest, true);
    case Schedule::descending: return take(highest, true);
    default: return take(any, false);
  }
}

void run(Thread* next) {
  Thread* me = current;
  if (next == me) return;
  current = next;
  emu_switch(&me->stack_pointer, next->stack_pointer);
}

void leave_kernel() {
  void* never_resumed;
  current = nullptr;
  emu_switch(&never_resumed, host_stack);
}

void report_deadlock() {
  int at_barrier = 0, at_collective = 0, at_mbarrier = 0;
  const void* first = nullptr;
  const void* other = nullptr;  // a place that is not the first one's
  for (int i = 0; i < block.threads; ++i) {
    const Thread& t = threads[i];
    if (t.state == State::exited) continue;
    at_barrier += t.state == State::at_barrier;
    at_collective += t.state == State::at_collective;
    at_mbarrier += t.state == State::at_mbarrier;
    if (!first) first = t.pc;
    if (!other && t.pc != first) other = t.pc;
  }
  current = nullptr;  // it is nobody's fault in particular
  report("DEADLOCK", first, other,
         "%d threads wait at a barrier, %d at a warp collective, %d at an mbarrier, %d have exited",
         at_barrier, at_collective, at_mbarrier, block.threads - block.alive);
  abandoned = true;
}

void fiber_main() {
  thread_body(thread_arguments);
  Thread& me = *current;
  me.state = State::exited;
  --block.alive;
  live[me.warp] &= ~(1u << me.lane);
  check_pending_copies(me);
  complete_without(me);
  if (!block.alive) leave_kernel();
  wait();
  __builtin_trap();
}

}  // namespace

uint32_t live_lanes(int warp) { return live[warp]; }

// A multiplication spreads small seeds, and 1 keeps the generator off its fixed point.
void seed_random(uint64_t seed) { random_state = (seed + 1) * 0x9e3779b97f4a7c15u | 1; }

uint64_t random_bits() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void make_ready(int thread) {
  const int warp = thread / kLanes;
  threads[thread].state = State::ready;
  ready_lanes[warp] |= 1u << thread % kLanes;
  ready_warps |= 1u << warp;
}

void wait() {
  // What is in flight lands as late as it can, when nobody else can run, or at a random time.
  if (schedule == Schedule::random && random_bits() % 64 == 0) land_one();
  while (!ready_warps && land_one()) {
  }
  if (!ready_warps) {
    report_deadlock();
    leave_kernel();
  }
  run(take_next());
}

// To any other thread, in every schedule: two that wait for a third must not hand over to each other for ever.
void yield() {
  land_one();
  if (!ready_warps) return;
  Thread* next = take(any, false);
  make_ready(current->number);
  run(next);
}

void abandon() {
  abandoned = true;
  if (current) leave_kernel();
}

void run_block(void (*body)(void*), void* arguments) {
  if (!stacks) {
    stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (int i = 0; i < kMaxThreads; ++i) mprotect(stacks + i * kStackBytes, kPage, PROT_NONE);
  }
  thread_body = body;
  thread_arguments = arguments;
  last_warp = 0;
  ready_warps = 0;
  for (int w = 0; w < kMaxWarps; ++w) ready_lanes[w] = live[w] = 0;
  for (int i = 0; i < block.threads; ++i) {
    Thread& t = threads[i];
    t = Thread{};
    t.number = i;
    t.lane = i % kLanes;
    t.warp = i / kLanes;
    t.index.x = i % block.size.x;
    t.index.y = i / block.size.x % block.size.y;
    t.index.z = i / (block.size.x * block.size.y);
    live[t.warp] |= 1u << t.lane;
    // A stack as emu_switch leaves one: six registers, then where to return to. Tops differ by a few cache lines, so that
    // the frames of 1024 threads do not all fall on the same lines of the cache.
    void** top = reinterpret_cast<void**>(stacks + (i + 1) * kStackBytes - 128 - i % 16 * 256);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int r = 0; r < kSavedRegisters; ++r) *--top = nullptr;
    t.stack_pointer = top;
    make_ready(i);
  }
  current = take_next();
  emu_switch(&host_stack, current->stack_pointer);
}

bool on_stacks(const void* p) {
  return static_cast<size_t>(static_cast<const char*>(p) - stacks) < kMaxThreads * kStackBytes;
}

int stack_owner(const void* p) {
  return static_cast<int>((static_cast<const char*>(p) - stacks) / kStackBytes);
}

}  // namespace emu
