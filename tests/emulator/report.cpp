// SPDX-License-Identifier: BSD-3-Clause
#include "report.h"

#include <dlfcn.h>
#include <sys/time.h>
#include <ucontext.h>

#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <set>
#include <string>
#include <tuple>

#include "fiber.h"
#include "shadow.h"

namespace emu {
namespace {

constexpr size_t kMaxFindings = 40;

long count = 0;
std::set<std::tuple<std::string, const void*, const void*>> seen;
std::string text;  // one line a finding, its fields separated by tabs
int time_limit = 0;

// Inside the module that it lies in, for addr2line; one back, from a return address to its call.
long offset(const void* pc) {
  Dl_info info;
  if (!pc || !dladdr(pc, &info)) return -1;
  return static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1;
}

void add(const char* kind, const void* pc, const void* other, const char* format, va_list values) {
  ++count;
  if (seen.size() >= kMaxFindings || !seen.insert({kind, pc, other}).second) return;
  char sentence[600];
  vsnprintf(sentence, sizeof sentence, format, values);
  char place[160];
  const int n = snprintf(place, sizeof place, "block (%u, %u, %u)", block.index.x, block.index.y,
                         block.index.z);
  if (current) {
    snprintf(place + n, sizeof place - n, " thread (%u, %u, %u)", current->index.x,
             current->index.y, current->index.z);
  }
  char offsets[64];
  snprintf(offsets, sizeof offsets, "%ld\t%ld", offset(pc), offset(other));
  for (const char* field :
       {kind, block.kernel, static_cast<const char*>(place), static_cast<const char*>(sentence)}) {
    text += std::string(field) + "\t";
  }
  text += std::string(offsets) + "\n";
}

const void* fault_address(void* context) {
  if (OnBehalfOf::instruction) return OnBehalfOf::instruction;
  const auto* machine = &static_cast<ucontext_t*>(context)->uc_mcontext;
  return reinterpret_cast<const char*>(machine->gregs[REG_RIP]) + 1;
}

void on_memory_fault(int number, siginfo_t* info, void* context) {
  if (!current) {  // not a kernel's: let it kill the process
    signal(number, SIG_DFL);
    return;
  }
  if (on_stacks(info->si_addr)) {
    fail("STACK", fault_address(context), nullptr, "the thread's stack has overflown");
  } else {
    fail("OUT-OF-BOUNDS", fault_address(context), nullptr, "memory fault %s",
         describe(info->si_addr).c_str());
  }
}

void on_division(int number, siginfo_t*, void* context) {
  if (!current) {
    signal(number, SIG_DFL);
    return;
  }
  fail("UNDEFINED", fault_address(context), nullptr, "a division by zero");
}

void on_alarm(int, siginfo_t*, void* context) {
  if (!current) return;
  fail("HANG", fault_address(context), current->pc, "still running after %d s of processor time",
       time_limit);
}

void handle(int number, void (*handler)(int, siginfo_t*, void*)) {
  struct sigaction action = {};
  action.sa_sigaction = handler;
  // The handler may leave for another stack and never return: the signal stays unblocked.
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigaction(number, &action, nullptr);
}

// Processor time, not the clock's: a busy machine must not look like a hanging kernel.
void set_timer(int seconds) {
  itimerval timer = {};
  timer.it_value.tv_sec = seconds;
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

}  // namespace

const void* OnBehalfOf::instruction = nullptr;

void report(const char* kind, const void* pc, const void* other, const char* format, ...) {
  va_list values;
  va_start(values, format);
  add(kind, pc, other, format, values);
  va_end(values);
}

void fail(const char* kind, const void* pc, const void* other, const char* format, ...) {
  va_list values;
  va_start(values, format);
  add(kind, pc, other, format, values);
  va_end(values);
  abandon();
}

long findings() { return count; }

void install_signal_handlers() {
  static bool done = false;
  if (done) return;
  done = true;
  static char handler_stack[64 << 10];
  stack_t stack = {};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, nullptr);
  handle(SIGSEGV, on_memory_fault);
  handle(SIGBUS, on_memory_fault);
  handle(SIGVTALRM, on_alarm);
  handle(SIGFPE, on_division);
}

void set_time_limit(int seconds) { time_limit = seconds; }
void start_timer() { set_timer(time_limit); }
void stop_timer() { set_timer(0); }

}  // namespace emu

// For the harness.
extern "C" const char* emu_findings() { return emu::text.c_str(); }
extern "C" void emu_forget_findings() {
  emu::count = 0;
  emu::seen.clear();
  emu::text.clear();
}

// --- What the compiler calls where something is undefined

#define PYWINO_ON_UNDEFINED(name, what)                                 \
  extern "C" void __ubsan_handle_##name(void*, uintptr_t, uintptr_t) {  \
    emu::fail("UNDEFINED", __builtin_return_address(0), nullptr, what); \
  }
PYWINO_ON_UNDEFINED(out_of_bounds, "an index outside of its array")
PYWINO_ON_UNDEFINED(shift_out_of_bounds, "a shift by as many bits as there are, or more")
PYWINO_ON_UNDEFINED(add_overflow, "an integer overflows in +")
PYWINO_ON_UNDEFINED(sub_overflow, "an integer overflows in -")
PYWINO_ON_UNDEFINED(mul_overflow, "an integer overflows in *")
PYWINO_ON_UNDEFINED(negate_overflow, "an integer overflows in -")
PYWINO_ON_UNDEFINED(divrem_overflow, "a division by zero, or one that overflows")
