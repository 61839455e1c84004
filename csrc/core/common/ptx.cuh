// SPDX-License-Identifier: BSD-3-Clause
// The PTX instructions that have no CUDA function, one a wrapper. This file and wgmma.cuh have the only inline assembly of
// the project. Beside each stands what the emulator (tests/emulator) does in its place. Names, operands and fragment layouts are those of the PTX
// ISA; `address` is always a 32-bit address in shared memory, from shared_address().
#pragma once

#include <cuda.h>

#include <cstdint>

#include "launch.cuh"

#define PYWINO_PTX __device__ __forceinline__

namespace pywino::ptx {

// --- Addresses and vector access

PYWINO_PTX uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// One load or store of a whole vector (float2, uint4, ...). p must be aligned to sizeof(V): the emulator checks it here,
// because g++ may split the access into its words.
template <class V>
PYWINO_PTX V load(const void* p) {
#ifdef PYWINO_EMULATOR
  emu::check_align(p, sizeof(V));
#endif
  return *static_cast<const V*>(p);
}

template <class V>
PYWINO_PTX void store(void* p, V v) {
#ifdef PYWINO_EMULATOR
  emu::check_align(p, sizeof(V));
#endif
  *static_cast<V*>(p) = v;
}

// --- cp.async (sm_80): global to shared memory without registers

// Copies src_bytes (0...16) bytes and fills the rest of the 16 with zeros, past the L1 cache. src must be 16-byte aligned
// even where src_bytes is 0. The data may be read after the wait for its group and a barrier.
PYWINO_PTX void cp_async_16(uint32_t address, const void* src, int src_bytes) {
#ifdef PYWINO_EMULATOR
  emu::cp_async(address, src, 16, src_bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(__cvta_generic_to_global(src)), "r"(src_bytes)
               : "memory");
#endif
}

PYWINO_PTX void cp_async_commit_group() {
#ifdef PYWINO_EMULATOR
  emu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of this thread's groups, the youngest, are still in flight.
template <int N>
PYWINO_PTX void cp_async_wait_group() {
#ifdef PYWINO_EMULATOR
  emu::cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// --- ldmatrix (sm_75): four 8x8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8

PYWINO_PTX void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
#ifdef PYWINO_EMULATOR
  emu::ldmatrix(4, false, r, address);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

PYWINO_PTX void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
#ifdef PYWINO_EMULATOR
  emu::ldmatrix(4, true, r, address);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

// --- mma.sync (sm_80): d += a b, a 16 x k by rows, b k x 8 by columns, d in fp32

PYWINO_PTX void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
#ifdef PYWINO_EMULATOR
  emu::mma(emu::F16, 16, d, a, b, d);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

PYWINO_PTX void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
#ifdef PYWINO_EMULATOR
  emu::mma(emu::BF16, 16, d, a, b, d);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The tensor core drops the low 13 bits of a and b: round them first, with to_tf32.
PYWINO_PTX void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
#ifdef PYWINO_EMULATOR
  emu::mma(emu::TF32, 8, d, a, b, d);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// To the nearest number of 10 mantissa bits, ties away from zero.
PYWINO_PTX uint32_t to_tf32(float x) {
#ifdef PYWINO_EMULATOR
  return x != x ? 0x7fffffffu : (__float_as_uint(x) + 0x1000u) & ~0x1fffu;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

// --- mma.sp (sm_80): a has two of every four elements of a row, `metadata` their places (two bits each, ascending).
// kSelector 0 or 1: which pair of lanes in every four brings the metadata.

template <int kSelector>
PYWINO_PTX void mma_sp_m16n8k32_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                    uint32_t metadata) {
#ifdef PYWINO_EMULATOR
  emu::mma_sp(emu::F16, 32, d, a, b, d, metadata, kSelector);
#else
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(metadata), "n"(kSelector));
#endif
}

template <int kSelector>
PYWINO_PTX void mma_sp_m16n8k32_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                     uint32_t metadata) {
#ifdef PYWINO_EMULATOR
  emu::mma_sp(emu::BF16, 32, d, a, b, d, metadata, kSelector);
#else
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(metadata), "n"(kSelector));
#endif
}

// --- Named barriers: some warps of the block, `threads` of them (a multiple of 32); 0 is __syncthreads'

PYWINO_PTX void named_barrier_sync(int barrier, int threads) {
#ifdef PYWINO_EMULATOR
  emu::named_barrier(barrier, threads, false);
#else
  asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
}

PYWINO_PTX void named_barrier_arrive(int barrier, int threads) {
#ifdef PYWINO_EMULATOR
  emu::named_barrier(barrier, threads, true);
#else
  asm volatile("barrier.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
}

// --- mbarrier (sm_90): 8 bytes of shared memory that count arrivals, and bytes of TMA loads, phase after phase

// One thread does this, then fence_mbarrier_init() and __syncthreads(). count: arrivals that complete a phase.
PYWINO_PTX void mbarrier_init(uint32_t barrier, uint32_t count) {
#ifdef PYWINO_EMULATOR
  emu::mbar_init(barrier, count);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
#endif
}

PYWINO_PTX void fence_mbarrier_init() {
#ifdef PYWINO_EMULATOR
  emu::fence_mbarrier_init();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

PYWINO_PTX void mbarrier_arrive(uint32_t barrier) {
#ifdef PYWINO_EMULATOR
  emu::mbar_arrive(barrier);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// Arrives, and has the phase wait for `bytes` of TMA loads as well.
PYWINO_PTX void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
#ifdef PYWINO_EMULATOR
  emu::mbar_expect_tx(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}

// Waits until the phase of this parity (0, 1, 0, ... from the first on) is complete.
PYWINO_PTX void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef PYWINO_EMULATOR
  emu::mbar_wait(barrier, parity);
#else
  uint32_t complete;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(complete)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!complete);
#endif
}

// --- TMA (sm_90): boxes of a tensor to and from shared memory, where they begin at a multiple of 128 bytes (1024 with the
// 128-byte swizzle). The map is a __grid_constant__ parameter of the kernel. Coordinates are of the box's first element,
// innermost dimension first; what lies outside of the tensor is read as zero, and not written.

// What this thread has written to shared memory becomes visible to TMA stores and wgmma. Each thread that wrote calls it,
// before the barrier that lets another issue the instruction.
PYWINO_PTX void fence_proxy_async() {
#ifdef PYWINO_EMULATOR
  emu::fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

PYWINO_PTX void tma_load_2d(uint32_t address, const CUtensorMap* map, int x, int y,
                            uint32_t barrier) {
#ifdef PYWINO_EMULATOR
  const int coordinates[] = {x, y};
  emu::tma_load(address, map, 2, coordinates, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(address),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
#endif
}

PYWINO_PTX void tma_load_3d(uint32_t address, const CUtensorMap* map, int x, int y, int z,
                            uint32_t barrier) {
#ifdef PYWINO_EMULATOR
  const int coordinates[] = {x, y, z};
  emu::tma_load(address, map, 3, coordinates, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(address),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
#endif
}

PYWINO_PTX void tma_load_4d(uint32_t address, const CUtensorMap* map, int x, int y, int z, int w,
                            uint32_t barrier) {
#ifdef PYWINO_EMULATOR
  const int coordinates[] = {x, y, z, w};
  emu::tma_load(address, map, 4, coordinates, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(address),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
#endif
}

PYWINO_PTX void tma_load_5d(uint32_t address, const CUtensorMap* map, int x, int y, int z, int w,
                            int v, uint32_t barrier) {
#ifdef PYWINO_EMULATOR
  const int coordinates[] = {x, y, z, w, v};
  emu::tma_load(address, map, 5, coordinates, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(address),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v)
      : "memory");
#endif
}

// A store's tile may be written again after wait_group_read, the tensor is written after wait_group.
PYWINO_PTX void tma_store_2d(const CUtensorMap* map, uint32_t address, int x, int y) {
#ifdef PYWINO_EMULATOR
  const int coordinates[] = {x, y};
  emu::tma_store(map, 2, address, coordinates);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(address), "r"(x), "r"(y)
      : "memory");
#endif
}

PYWINO_PTX void tma_store_3d(const CUtensorMap* map, uint32_t address, int x, int y, int z) {
#ifdef PYWINO_EMULATOR
  const int coordinates[] = {x, y, z};
  emu::tma_store(map, 3, address, coordinates);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(address), "r"(x), "r"(y), "r"(z)
      : "memory");
#endif
}

PYWINO_PTX void tma_store_4d(const CUtensorMap* map, uint32_t address, int x, int y, int z, int w) {
#ifdef PYWINO_EMULATOR
  const int coordinates[] = {x, y, z, w};
  emu::tma_store(map, 4, address, coordinates);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          map),
      "r"(address), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
#endif
}

PYWINO_PTX void tma_store_commit_group() {
#ifdef PYWINO_EMULATOR
  emu::tma_store_commit();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

template <int N>
PYWINO_PTX void tma_store_wait_group() {
#ifdef PYWINO_EMULATOR
  emu::tma_store_wait(N);
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
#endif
}

template <int N>
PYWINO_PTX void tma_store_wait_group_read() {
#ifdef PYWINO_EMULATOR
  emu::tma_store_wait(N);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
#endif
}

// --- setmaxnreg (sm_90a): all warps of a warpgroup hand registers back, or take them up to N a thread (a multiple of 8)

template <int N>
PYWINO_PTX void setmaxnreg_dec() {
#ifndef PYWINO_EMULATOR
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

template <int N>
PYWINO_PTX void setmaxnreg_inc() {
#ifndef PYWINO_EMULATOR
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

}  // namespace pywino::ptx
