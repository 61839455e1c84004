// SPDX-License-Identifier: BSD-3-Clause
// What was found. A finding has a kind, the block and thread, a sentence, and one or two places: addresses in the kernel's
// code, which the harness turns into file and line. The same finding at the same places is kept once.
#pragma once

namespace emu {

// pc: behind the instruction at fault, as a return address is. other: the access it collides with, or null.
__attribute__((format(printf, 4, 5))) void report(const char* kind, const void* pc,
                                                  const void* other, const char* format, ...);
// The same, and the launch ends here: returns only to a caller outside of a kernel.
__attribute__((format(printf, 4, 5))) void fail(const char* kind, const void* pc, const void* other,
                                                const char* format, ...);

long findings();

// While it lives, a memory fault is put down to the instruction of the kernel for which the runtime works.
class OnBehalfOf {
 public:
  explicit OnBehalfOf(const void* pc) { instruction = pc; }
  ~OnBehalfOf() { instruction = nullptr; }
  static const void* instruction;
};

// Turns a memory fault and a kernel that does not end into findings, from here to the end of the process.
void install_signal_handlers();
// How much processor time a launch may take. 0: as much as it likes.
void set_time_limit(int seconds);
void start_timer();
void stop_timer();

}  // namespace emu
