// SPDX-License-Identifier: BSD-3-Clause
// How a small function is inlined, by a C++ compiler and by nvcc: the transforms are one source for the CPU and the GPU.
#pragma once

#if defined(__CUDACC__) || defined(PYWINO_EMULATOR)
#define PYWINO_INLINE __host__ __device__ inline __attribute__((always_inline))
#else
#define PYWINO_INLINE inline __attribute__((always_inline))
#endif
