// SPDX-License-Identifier: BSD-3-Clause
// How a kernel gets its threads: the binding passes torch's pool, a test a plain loop.
#pragma once

#include <cstdint>

#include "inline.h"

namespace pywino {

struct Executor {
  // Calls body(arg) at most `threads` times, at once where it can, and returns when all have returned.
  // The bodies share work through an atomic counter, so fewer calls (one in a nested region) still do all of it.
  void (*run)(int threads, void (*body)(void* arg), void* arg);
  int threads;
};

namespace {

// The counter: each piece of work is given out once, to whoever asks next.
PYWINO_INLINE int64_t take(int64_t* counter) {
  return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

}  // namespace
}  // namespace pywino
