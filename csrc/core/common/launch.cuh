// SPDX-License-Identifier: BSD-3-Clause
// What a .cu file needs to be compiled by nvcc for a GPU and by g++ for the emulator (tests/emulator): kernels take their
// dynamic shared memory and launchers start kernels through these two macros, and all inline PTX is in ptx.cuh.
//
//   template <int kTile> __global__ void scale(const float* x, float* y, int n) {
//     PYWINO_DYNAMIC_SHARED(float, tile);
//     ...
//   }
//   PYWINO_LAUNCH((scale<4>), grid, block, shared_bytes, stream, x, y, n);   // the kernel's name in parentheses
//   return cudaGetLastError();
#pragma once

#ifdef PYWINO_EMULATOR  // the emulator's header, included before everything else, has the types and functions of CUDA

#define PYWINO_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emu::dyn_smem())

#define PYWINO_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                    \
  emu::launch_t(#kernel, reinterpret_cast<const void*>(PYWINO_BARE kernel), grid, block, \
                shared_bytes, [=] {                                                      \
                  (void)(stream);                                                        \
                  (PYWINO_BARE kernel)(__VA_ARGS__);                                     \
                })

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// 1024 bytes: what TMA and wgmma want of a tile with the 128-byte swizzle.
#define PYWINO_DYNAMIC_SHARED(type, name)                          \
  extern __shared__ __align__(1024) unsigned char pywino_shared[]; \
  type* name = reinterpret_cast<type*>(pywino_shared)

#define PYWINO_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (PYWINO_BARE kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__))

#endif

// (kernel<4, 2>) without its parentheses, which carry the comma through the macro.
#define PYWINO_BARE(...) __VA_ARGS__
