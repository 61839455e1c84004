// SPDX-License-Identifier: BSD-3-Clause
// Included by the compiler before a .cu file (g++ -x c++ -include emulator.h): turns CUDA C++ into C++ that runs here.
//
// A CUDA thread is a fiber (fiber.h); all run on one host thread, block after block. Barriers and warp collectives are
// where a fiber hands over to the next. What a kernel calls is either an inline function of builtins.h or one of the
// functions of interface.h, which live in files compiled without instrumentation:
//   fiber.cpp        threads, the scheduler                    launch.cpp   the grid, shared memory, the CUDA runtime's calls
//   collectives.cpp  barriers, shuffles, votes, ldmatrix       matrix.cpp   mma.sync, mma.sp, wgmma
//   async.cpp        cp.async, mbarrier, TMA                   shadow.cpp   check mode: every access of the kernel is checked
//   report.cpp       what was found, where
//
// Three things that CUDA has a syntax for and C++ has not go through csrc/core/common: launches and dynamic shared memory
// (launch.cuh) and inline PTX (ptx.cuh). A `<<<`, `extern __shared__` or PTX of its own does not compile here.
#pragma once

#define PYWINO_EMULATOR 1

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#undef __cluster_dims__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
// Thread-local variables of a module are one block of memory, templates' included, which launch.cpp finds: the block's
// static shared memory.
#define __shared__ static thread_local

#include "interface.h"

namespace emu {

inline uint3 identity(int which) {
  const uint64_t xy = identity_xy(which);
  return {static_cast<unsigned>(xy), static_cast<unsigned>(xy >> 32), identity_z(which)};
}

// So that every module has thread-local storage, and one address in it to find it by.
static thread_local char shared_anchor[16];

template <class Body>
int launch_t(const char* name, const void* function, dim3 grid, dim3 block, size_t shared_bytes,
             Body body) {
  return launch(
      name, function, grid, block, shared_bytes, [](void* b) { (*static_cast<Body*>(b))(); }, &body,
      sizeof body, shared_anchor);
}

}  // namespace emu

#include "builtins.h"
