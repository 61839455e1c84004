// SPDX-License-Identifier: BSD-3-Clause
// Instruction sets of the CPU kernels. Each kernel file is compiled once per set; `isa()` says which copy runs.
#pragma once

#define PYWINO_API __attribute__((visibility("default")))

namespace pywino {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4 };
inline constexpr int kIsaCount = 5;

PYWINO_API const char* isa_name(Isa);
// Was a copy compiled into this library?
PYWINO_API bool isa_built(Isa);
// Does this processor (and its operating system) run it?
PYWINO_API bool isa_runs(Isa);
// The set in force: the forced one, else the best that is built and runs.
PYWINO_API Isa isa();
// For tests and benches: false, and no change, where the set is not built or does not run.
PYWINO_API bool force_isa(Isa);
PYWINO_API void release_isa();

}  // namespace pywino
