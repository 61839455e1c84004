// SPDX-License-Identifier: BSD-3-Clause
// How a kernel gets its threads: the binding passes torch's pool, a test a plain loop.
#pragma once

namespace pywino {

struct Executor {
  // Calls body(arg) at most `threads` times, at once where it can, and returns when all have returned.
  // The bodies share work through an atomic counter, so fewer calls (one in a nested region) still do all of it.
  void (*run)(int threads, void (*body)(void* arg), void* arg);
  int threads;
};

}  // namespace pywino
