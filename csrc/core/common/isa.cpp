// SPDX-License-Identifier: BSD-3-Clause
#include "isa.h"

#include <atomic>
#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pywino {
namespace {

// Has the processor tile registers with bfloat16 products, and may this process use them? Linux gives them to those who ask, since
// a thread's state grows by 8 KB.
bool tiles_allowed() {
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0)
    return false;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}

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
    case Isa::amx: return "amx";
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
#ifdef PYWINO_HAVE_AMX
    case Isa::amx: return true;
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
    case Isa::amx: return v4 && __builtin_cpu_supports("avx512bf16") && tiles_allowed();
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
