// SPDX-License-Identifier: BSD-3-Clause
// The mainloop of a grouped product on Hopper (sm_90a), D[g] = A[g] B[g]^T for all groups g, fp16 with fp32 sums. It stands
// beside gemm.cuh, which every architecture runs. Persistent blocks of three warpgroups go from tile to tile:
//
//   producer     one thread: TMA brings 64 columns of k, of BM rows of A and BN rows of B, into each stage of a ring
//   consumers    two warpgroups, BM / 2 rows each: wgmma from the stages, sums in registers, TMA stores of fp16
//
//   full[s]      completed by the bytes of stage s        empty[s]     completed when all eight warps have read it
//
// The producer does not wait for an epilogue: while one tile goes out, the ring fills with the next one.
//
// Bytes: a tile reads (BM + BN) k elements from L2 for 2 BM BN k operations, 64 a byte at 128 x 128 and 85 at 128 x 256 or
// 256 x 128. A wgmma of 64 x 256 takes 10 KB from shared memory in the 128 cycles that it computes, one of 64 x 128 6 KB in
// 64: both below the 128 bytes a cycle that there are.
#pragma once

#include <cstdint>

#include "channels.cuh"
#include "grouped_tiles.cuh"
#include "launch.cuh"
#include "wgmma.cuh"

namespace pywino {

template <int kBlockM, int kBlockN, int kStages_>
struct GemmSm90 {
  static constexpr int BM = kBlockM, BN = kBlockN, BK = 64, kStages = kStages_;
  static constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);
  static constexpr int FM = BM / kConsumers / 64;  // wgmmas, one below the other, of a warpgroup
  static constexpr int kRowBytes = BK * 2;         // swizzled by TMA, as wgmma reads it
  static constexpr int kStageBytes = (BM + BN) * kRowBytes;
  // D leaves in slabs of 64 x 64 through two buffers a warpgroup: one is filled while the other is stored.
  static constexpr int kSlabBytes = 64 * 128, kSlabs = 2;
  static constexpr int kBarriers = kStages * kStageBytes + kConsumers * kSlabs * kSlabBytes;
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
  static_assert(BM % (64 * kConsumers) == 0 && (BN == 128 || BN == 256) && FM * BN <= 256);

  using Sums = float[FM][BN / 2];

  // The next stage and the parity of its phase.
  struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ void advance() {
      if (++stage < kStages) return;
      stage = 0;
      parity ^= 1;
    }
  };

  // Maps of (k, rows, groups): what lies outside of a group is zero. `steps` of 64 columns make k.
  __device__ static void run(unsigned char* shared, const CUtensorMap* a, const CUtensorMap* b,
                             const CUtensorMap* d, const GroupedTiles& tiles, int steps) {
    const uint32_t stages = ptx::shared_address(shared);
    const uint32_t full = stages + kBarriers, empty = full + kStages * 8;
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) {
        ptx::mbarrier_init(full + 8 * s, 1);
        ptx::mbarrier_init(empty + 8 * s, 4 * kConsumers);
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
    // Of 65,536 registers a block of 384 threads starts with 168 each; the producer hands most of its own on.
    if (int(threadIdx.x) / 128 == kConsumers) {
      ptx::setmaxnreg_dec<40>();
      if (threadIdx.x % 128 == 0) produce(stages, full, empty, a, b, tiles, steps);
    } else {
      ptx::setmaxnreg_inc<232>();
      consume(shared, full, empty, d, tiles, steps);
    }
  }

  __device__ static void produce(uint32_t stages, uint32_t full, uint32_t empty,
                                 const CUtensorMap* a, const CUtensorMap* b,
                                 const GroupedTiles& tiles, int steps) {
    Ring ring;
    for (int i = int(blockIdx.x); i < tiles.count(); i += int(gridDim.x)) {
      const auto tile = tiles.at<BM, BN>(i);
      for (int step = 0; step < steps; ++step, ring.advance()) {
        // The phase before the first one counts as complete.
        ptx::mbarrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
        const uint32_t to = stages + ring.stage * kStageBytes, ready = full + 8 * ring.stage;
        ptx::mbarrier_arrive_expect_tx(ready, kStageBytes);
        ptx::tma_load_3d(to, a, step * BK, tile.row, tile.group, ready);
        ptx::tma_load_3d(to + BM * kRowBytes, b, step * BK, tile.column, tile.group, ready);
      }
    }
  }

  __device__ static void consume(unsigned char* shared, uint32_t full, uint32_t empty,
                                 const CUtensorMap* d, const GroupedTiles& tiles, int steps) {
    const uint32_t stages = ptx::shared_address(shared);
    const int first_row = int(threadIdx.x) / 128 * (BM / kConsumers);
    // All lanes have waited for a stage's wgmmas, and one says so.
    const auto release = [&](int stage) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty + 8 * stage);
    };
    Sums sums;
    Ring ring;
    for (int i = int(blockIdx.x); i < tiles.count(); i += int(gridDim.x)) {
      int before = 0;  // the stage of the step before
      for (int step = 0; step < steps; ++step, ring.advance()) {
        ptx::mbarrier_wait(full + 8 * ring.stage, ring.parity);
        multiply(sums, stages + ring.stage * kStageBytes, first_row, step > 0);
        // One step's instructions stay in flight; those before have read their stage.
        ptx::wgmma_wait_group<1>();
        if (step > 0) release(before);
        before = ring.stage;
      }
      ptx::wgmma_wait_group<0>();
      release(before);
      const auto tile = tiles.at<BM, BN>(i);
      write(sums, shared, d, tile.row + first_row, tile.column, tile.group);
    }
    if (threadIdx.x % 128 == 0) ptx::tma_store_wait_group<0>();
  }

  // Adds one stage, or begins with it.
  __device__ static void multiply(Sums& sums, uint32_t stage, int first_row, bool add) {
    const uint32_t a = stage + first_row * kRowBytes, b = stage + BM * kRowBytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kRowBytes; k += 32)
#pragma unroll
      for (int f = 0; f < FM; ++f) {
        const uint64_t rows = ptx::matrix_descriptor_128b(a + f * 64 * kRowBytes + k);
        const uint64_t columns = ptx::matrix_descriptor_128b(b + k);
        if constexpr (BN == 256)
          ptx::wgmma_m64n256k16_f16(sums[f], rows, columns, add || k > 0);
        else
          ptx::wgmma_m64n128k16_f16(sums[f], rows, columns, add || k > 0);
      }
    ptx::wgmma_commit_group();
  }

  // A warpgroup's sums, rounded. In a slab chunks of 16 bytes are exchanged as TMA wants it, and so the eight rows that a
  // warp writes at a time fall on different banks.
  __device__ static void write(const Sums& sums, unsigned char* shared, const CUtensorMap* d,
                               int row, int column, int group) {
    const int warpgroup = int(threadIdx.x) / 128, thread = int(threadIdx.x) % 128;
    const int lane = thread % 32;
    unsigned char* slabs = shared + kStages * kStageBytes + warpgroup * kSlabs * kSlabBytes;
#pragma unroll
    for (int f = 0; f < FM; ++f)
#pragma unroll
      for (int c = 0; c < BN / 64; ++c) {
        unsigned char* slab = slabs + (f * (BN / 64) + c) % kSlabs * kSlabBytes;
        if (thread == 0) ptx::tma_store_wait_group_read<kSlabs - 1>();
        ptx::named_barrier_sync(1 + warpgroup, 128);  // its last store has read the buffer
#pragma unroll
        for (int chunk = 0; chunk < 8; ++chunk)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int r = thread / 32 * 16 + lane / 4 + half * 8,
                      s = (c * 8 + chunk) * 4 + half * 2;
            unsigned char* to = slab + r * 128 + ((chunk ^ r % 8) << 4) + lane % 4 * 4;
            store_channels(reinterpret_cast<__half*>(to),
                           Channels<2>{{sums[f][s], sums[f][s + 1]}});
          }
        ptx::fence_proxy_async();
        ptx::named_barrier_sync(1 + warpgroup, 128);
        if (thread == 0) {
          ptx::tma_store_3d(d, ptx::shared_address(slab), column + c * 64, row + f * 64, group);
          ptx::tma_store_commit_group();
        }
      }
  }
};

}  // namespace pywino
