// SPDX-License-Identifier: BSD-3-Clause
#include "isa.h"

#include <atomic>

namespace pywino {
namespace {

std::atomic<int> forced{-1};

Isa best() {
  for (int i = kIsaCount - 1; i > 0; --i)
    if (isa_built(Isa(i)) && isa_runs(Isa(i))) return Isa(i);
  return Isa::portable;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512bf16: return "avx512bf16";
  }
  return "?";
}

bool isa_built(Isa isa) {
  switch (isa) {
    case Isa::portable: return true;
#ifdef PYWINO_HAVE_AVX2
    case Isa::avx2: return true;
#endif
#ifdef PYWINO_HAVE_AVX512
    case Isa::avx512: return true;
#endif
#ifdef PYWINO_HAVE_AVX512BF16
    case Isa::avx512bf16: return true;
#endif
    default: return false;
  }
}

bool isa_runs(Isa isa) {
  if (isa == Isa::portable) return true;
#if defined(__x86_64__) && defined(__GNUC__)
  // __builtin_cpu_supports asks the processor and, through XGETBV, the operating system.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::avx2: return v3;
    case Isa::avx512: return v4;
    case Isa::avx512bf16: return v4 && __builtin_cpu_supports("avx512bf16");
    default: return false;
  }
#else
  return false;
#endif
}

Isa isa() {
  static const Isa automatic = best();
  const int f = forced.load(std::memory_order_relaxed);
  return f >= 0 ? Isa(f) : automatic;
}

bool force_isa(Isa isa) {
  if (!isa_built(isa) || !isa_runs(isa)) return false;
  forced.store(int(isa), std::memory_order_relaxed);
  return true;
}

void release_isa() { forced.store(-1, std::memory_order_relaxed); }

}  // namespace pywino
