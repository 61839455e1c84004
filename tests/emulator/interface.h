// SPDX-License-Identifier: BSD-3-Clause
// The functions of the emulator that kernels call, through builtins.h, ptx.cuh and launch.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace emu {

// --- threadIdx, blockIdx, blockDim, gridDim: by value and const, so that the compiler may keep them in registers.
enum Identity { kThreadIndex, kBlockIndex, kBlockSize, kGridSize };
__attribute__((const)) uint64_t identity_xy(int which);
__attribute__((const)) unsigned identity_z(int which);

// --- Barriers and warp collectives
void syncthreads();
enum BlockReduction { kOr, kAnd, kCount };
int syncthreads_reduce(int reduction, int predicate);
void named_barrier(int id, int threads, bool arrive_only);
void syncwarp(uint32_t mask);
enum Shuffle { kIndex, kUp, kDown, kXor };
uint64_t shuffle(int kind, uint32_t mask, uint64_t value, int source, int width);
uint32_t ballot(uint32_t mask, int predicate);
enum WarpReduction { kAdd, kMin, kMax, kBitAnd, kBitOr, kBitXor };
uint32_t reduce(int reduction, bool is_signed, uint32_t mask, uint32_t value);
uint32_t active_mask();
void yield();  // lets another thread run, for loops that wait for memory

// --- ldmatrix, mma.sync, mma.sp, wgmma: operands as in ptx.cuh
enum Type { BF16, F16, TF32 };
void ldmatrix(int matrices, bool trans, uint32_t* r, uint32_t address);
void mma(int type, int k, float* d, const uint32_t* a, const uint32_t* b, const float* c);
void mma_sp(int type, int k, float* d, const uint32_t* a, const uint32_t* b, const float* c,
            uint32_t metadata, int selector);
void wgmma_fence();
void wgmma(int type, int n, float* d, const uint32_t* a, uint64_t a_descriptor,
           uint64_t b_descriptor, int scale_d);  // a == nullptr: from shared memory
void wgmma_commit();
void wgmma_wait(int keep);

// --- Asynchronous copies
uint32_t to_shared(const void* p);
void cp_async(uint32_t address, const void* src, int bytes, int src_bytes);
void cp_async_commit();
void cp_async_wait(int keep);
void mbar_init(uint32_t address, uint32_t count);
void fence_mbarrier_init();
void mbar_arrive(uint32_t address);
void mbar_expect_tx(uint32_t address, uint32_t bytes);
void mbar_wait(uint32_t address, uint32_t parity);
void fence_proxy_async();
void tma_load(uint32_t address, const void* map, int rank, const int* coordinates,
              uint32_t barrier);
void tma_store(const void* map, int rank, uint32_t address, const int* coordinates);
void tma_store_commit();
void tma_store_wait(int keep);

// --- Memory
void* dyn_smem();
void check_align(const void* p, int bytes);
void atomic_access(void* p, int bytes);  // an atomic one is about to happen: check it

// --- Launch
int launch(const char* name, const void* function, dim3 grid, dim3 block, size_t shared_bytes,
           void (*body)(void*), void* arguments, size_t arguments_bytes, void* anchor);

}  // namespace emu
