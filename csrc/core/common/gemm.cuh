// SPDX-License-Identifier: BSD-3-Clause
// The mainloops of every dense product: one block computes BM x BN of D on tensor cores (mma.sync, sm_80 and later).
//
//   Gemm      D = A B^T   A: rows of the output, B: its columns; both lie in memory with k innermost
//   GemmTn    D = A^T B   k is the row of both: what is summed over lies in the outer dimension, as tiles do in V
//
// kStages stages are in flight: while the warps multiply one, cp.async fills the others. Where a row comes from is the
// caller's: `load(iteration, stage)` issues the copies, `write` hands the finished tile out in chunks of eight columns.
// A persistent block passes its tiles through one such pipeline and writes each from registers (`write_from_registers`), so
// that the next tile's copies go on under the epilogue. `write` goes through the stages' memory, where tiles do not overlap.
//
// Bytes and operations: a block reads (BM + BN) k elements for 2 BM BN k operations; at 128 x 128 in 16 bits that is 64
// operations a byte, so with two blocks sharing an SM's L2 bandwidth the tensor cores stay the limit from k = 64 on.
#pragma once

#include <cstdint>

#include "channels.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace pywino {

// The instructions of one k-step, 32 bytes of k: what a 16 x 32-byte fragment of A and an 8 x 32-byte one of B give.
// ldmatrix moves 16-byte rows and does not look inside them, so fragments of 16 halves and of 8 floats are loaded alike.
struct MmaF16 {
  using Element = __half;
  static constexpr bool kSplit = false;
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    ptx::mma_m16n8k16_f16(d, a, b);
  }
};
struct MmaBf16 {
  using Element = __nv_bfloat16;
  static constexpr bool kSplit = false;
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    ptx::mma_m16n8k16_bf16(d, a, b);
  }
};
// fp32 numbers rounded to 10 mantissa bits.
struct MmaTf32 {
  using Element = float;
  static constexpr bool kSplit = false;
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    uint32_t ra[4], rb[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) ra[i] = ptx::to_tf32(__uint_as_float(a[i]));
#pragma unroll
    for (int i = 0; i < 2; ++i) rb[i] = ptx::to_tf32(__uint_as_float(b[i]));
    ptx::mma_m16n8k8_tf32(d, ra, rb);
  }
};
// fp32 numbers as the sum of two tf32 ones, a = high + low: a b = high high + (high low + low high) up to 2^-22.
// Tensor cores drop bits when they add to a large sum, so each stage has sums of its own, added in fp32.
struct MmaTf32x3 {
  using Element = float;
  static constexpr bool kSplit = true;
  __device__ static void split(uint32_t bits, uint32_t& high, uint32_t& low) {
    const float x = __uint_as_float(bits);
    high = ptx::to_tf32(x);
    low = ptx::to_tf32(x - __uint_as_float(high));
  }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    uint32_t ah[4], al[4], bh[2], bl[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split(a[i], ah[i], al[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) split(b[i], bh[i], bl[i]);
    ptx::mma_m16n8k8_tf32(d, al, bh);
    ptx::mma_m16n8k8_tf32(d, ah, bl);
    ptx::mma_m16n8k8_tf32(d, ah, bh);
  }
};

// The sums of a block, spread over its warps' fragments.
template <class Mma, int kBlockM, int kBlockN, int kWarpsM, int kWarpsN>
struct GemmSums {
  using Element = typename Mma::Element;
  using Sums = float[kBlockM / kWarpsM / 16][kBlockN / kWarpsN / 8][4];
  static constexpr int BM = kBlockM, BN = kBlockN;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  // Two blocks hide each other's barriers and epilogues; split products need the registers of both.
  static constexpr int kBlocksPerSm = Mma::kSplit ? 1 : 2;
  // The finished tile passes through the stages' memory; eight floats of padding spread a fragment's rows over the banks.
  static constexpr int kPitch = BN + 8;
  static constexpr int kTileBytes = BM * kPitch * int(sizeof(float));
  static constexpr int kWarpM = BM / kWarpsM, kWarpN = BN / kWarpsN;
  static constexpr int FM = kWarpM / 16, FN = kWarpN / 8;  // fragments of a warp
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);

  Sums sum = {};

  __device__ static int lane() { return int(threadIdx.x) % 32; }
  // The first row and column of this thread's warp.
  __device__ static int warp_m() { return int(threadIdx.x) / 32 % kWarpsM * kWarpM; }
  __device__ static int warp_n() { return int(threadIdx.x) / 32 / kWarpsM * kWarpN; }

  // multiply(sums) adds the products of one stage.
  template <class Multiply>
  __device__ void add(Multiply&& multiply) {
    if constexpr (Mma::kSplit) {
      Sums part = {};
      multiply(part);
#pragma unroll
      for (int i = 0; i < FM; ++i)
#pragma unroll
        for (int j = 0; j < FN; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[i][j][e] += part[i][j][e];
    } else {
      multiply(sum);
    }
  }

  // store(row, column, eight sums) for the whole tile, neighbouring threads on neighbouring columns.
  template <class Store>
  __device__ void write(float* tile, Store&& store) {
    const int m = warp_m() + lane() / 4, n = warp_n() + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < FM; ++i)
#pragma unroll
      for (int j = 0; j < FN; ++j) {
        float* p = tile + (m + i * 16) * kPitch + n + j * 8;
        store_channels(p, Channels<2>{{sum[i][j][0], sum[i][j][1]}});
        store_channels(p + 8 * kPitch, Channels<2>{{sum[i][j][2], sum[i][j][3]}});
      }
    __syncthreads();
    for (int e = int(threadIdx.x); e < BM * BN / 8; e += kThreads) {
      const int row = e / (BN / 8), column = e % (BN / 8) * 8;
      const float* p = tile + row * kPitch + column;
      const Channels<4> low = load_channels<float, 4>(p), high = load_channels<float, 4>(p + 4);
      Channels<8> sums;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums.x[i] = low.x[i];
        sums.x[i + 4] = high.x[i];
      }
      store(row, column, sums);
    }
  }

  // The whole tile as E, without shared memory and without a barrier; the sums are zero again. place(row, column) is where
  // eight columns of a row go, or null.
  //
  // Of a fragment's row each of four lanes has two columns. As 16-bit numbers that are 16 bytes, half a sector, so the four
  // exchange four fragments: lane q gets all eight columns of the q-th one. As fp32 they are a sector already.
  template <class E, class Place>
  __device__ void write_from_registers(Place&& place) {
    const int m = warp_m() + lane() / 4, n = warp_n(), q = lane() % 4;
#pragma unroll
    for (int i = 0; i < FM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m + i * 16 + half * 8;
        if constexpr (sizeof(E) == 2) {
          static_assert(FN % 4 == 0);
#pragma unroll
          for (int j = 0; j < FN; j += 4) {
            uint32_t pairs[4];
#pragma unroll
            for (int f = 0; f < 4; ++f)
              pairs[f] = bits_of<E>(sum[i][j + f][half * 2], sum[i][j + f][half * 2 + 1]);
            transpose_of_four_lanes(pairs);
            if (E* to = place(row, n + (j + q) * 8))
              ptx::store(to, uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
          }
        } else {
#pragma unroll
          for (int j = 0; j < FN; ++j)
            if (E* to = place(row, n + j * 8))
              ptx::store(to + q * 2, float2{sum[i][j][half * 2], sum[i][j][half * 2 + 1]});
        }
      }
    clear();
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < FM; ++i)
#pragma unroll
      for (int j = 0; j < FN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j][e] = 0.f;
  }

 private:
  // x[i] of lane q becomes x[q] of lane i, among four neighbouring lanes: the off-diagonal numbers of each 2 x 2, then the
  // off-diagonal 2 x 2.
  __device__ static void transpose_of_four_lanes(uint32_t (&x)[4]) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const bool upper = lane() & step;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & step) continue;
        const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + step], step);
        (upper ? x[i] : x[i + step]) = got;
      }
    }
  }
};

// load(iteration, stage's bytes from the first) and multiply(the same) for all iterations, kStages of them in flight.
template <int kStages, int kStageBytes, class Load, class Multiply>
__device__ inline void pipeline(int iterations, Load&& load, Multiply&& multiply) {
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < iterations) load(s, s * kStageBytes);
    ptx::cp_async_commit_group();
  }
  for (int it = 0; it < iterations; ++it) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncthreads();  // stage `it` is there for all, and all have left the one that is filled next
    const int next = it + kStages - 1;
    if (next < iterations) load(next, next % kStages * kStageBytes);
    ptx::cp_async_commit_group();
    multiply(it % kStages * kStageBytes);
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();  // nobody reads the stages any more: `write` may use them
}

// D = A B^T. A stage holds 128 bytes of k of each row:
//
//        shared memory, one stage          BM rows of A, then BN rows of B
//        row r:  | chunk 0 ^ (r & 7) | 1 ^ (r & 7) | ... | 7 ^ (r & 7) |    eight chunks of 16 bytes
//
// The exclusive or spreads the eight rows that one ldmatrix phase reads over all 32 banks.
template <class Mma, int kBlockM, int kBlockN, int kWarpsM, int kWarpsN, int kStages_ = 3>
struct Gemm : GemmSums<Mma, kBlockM, kBlockN, kWarpsM, kWarpsN> {
  using Base = GemmSums<Mma, kBlockM, kBlockN, kWarpsM, kWarpsN>;
  using Base::BM, Base::BN, Base::FM, Base::FN, Base::kThreads, Base::lane;
  using typename Base::Element;
  using typename Base::Sums;
  static constexpr int kStages = kStages_;
  static constexpr int kRowBytes = 128;
  static constexpr int BK = kRowBytes / int(sizeof(Element));
  static constexpr int kStageBytes = (BM + BN) * kRowBytes;
  static constexpr int kSharedBytes =
      kStages * kStageBytes > Base::kTileBytes ? kStages * kStageBytes : Base::kTileBytes;
  static_assert(kThreads % 8 == 0 && BM * 8 % kThreads == 0 && BN * 8 % kThreads == 0);

  // Byte offset of 16-byte chunk `chunk` of row `row`, from the stage's first row of A or of B.
  __device__ static uint32_t offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  }
  // One operand's chunk that this thread copies in step i: 8 threads a row.
  __device__ static int row_of(int i) { return int(threadIdx.x) / 8 + i * (kThreads / 8); }
  __device__ static int chunk_of() { return int(threadIdx.x) % 8; }

  struct AsTheyLie {
    __device__ void operator()(int, int, uint32_t (&)[FM][4]) const {}
  };

  // load(iteration, stage address) issues the cp.async copies of one stage: A's rows first, B's at stage + BM * kRowBytes.
  // change(iteration, step, fragments) may change A's fragments of a step of k before they are multiplied.
  template <class Load, class Change = AsTheyLie>
  __device__ void run(uint32_t shared, int iterations, Load&& load, Change&& change = {}) {
    int iteration = 0;
    pipeline<kStages, kStageBytes>(
        iterations, [&](int filled, int stage) { load(filled, shared + stage); },
        [&](int stage) {
          this->add([&](Sums& sums) {
            multiply(sums, shared + stage,
                     [&](int step, uint32_t (&a)[FM][4]) { change(iteration, step, a); });
          });
          ++iteration;
        });
  }

  // `tiles` of `steps` stages each, one after the other: finish() when the sums of one are done, while the copies of the next
  // are in flight.
  template <class Load, class Finish>
  __device__ void run_tiles(uint32_t shared, int tiles, int steps, Load&& load, Finish&& finish) {
    int left = steps;
    pipeline<kStages, kStageBytes>(
        tiles * steps, [&](int filled, int stage) { load(filled, shared + stage); },
        [&](int stage) {
          this->add(
              [&](Sums& sums) { multiply(sums, shared + stage, [](int, uint32_t (&)[FM][4]) {}); });
          if (--left) return;
          left = steps;
          finish();
        });
  }

  template <class Change>
  __device__ static void multiply(Sums& d, uint32_t stage, Change&& change) {
    const int m = Base::warp_m(), n = Base::warp_n();
#pragma unroll
    for (int step = 0; step < kRowBytes / 32; ++step) {
      uint32_t a[FM][4], b[FN / 2][4];
      // a[i]: matrices (rows 0-7, 8-15) x (bytes 0-15, 16-31). b[j]: two fragments, each (bytes 0-15, 16-31) of 8 columns.
#pragma unroll
      for (int i = 0; i < FM; ++i)
        ptx::ldmatrix_x4(a[i], stage + offset(m + i * 16 + lane() % 16, step * 2 + lane() / 16));
      change(step, a);
#pragma unroll
      for (int j = 0; j < FN / 2; ++j)
        ptx::ldmatrix_x4(
            b[j], stage + BM * kRowBytes +
                      offset(n + j * 16 + lane() / 16 * 8 + lane() % 8, step * 2 + lane() / 8 % 2));
#pragma unroll
      for (int i = 0; i < FM; ++i)
#pragma unroll
        for (int j = 0; j < FN; ++j) Mma::multiply(d[i][j], a[i], &b[j / 2][j % 2 * 2]);
    }
  }
};

// D = A^T B. A stage holds BK rows of k, each BM elements of A; behind them BK rows of B. Eight elements of padding move
// neighbouring rows by 16 bytes (16-bit elements: ldmatrix.trans reads eight of them at once) or 32 (fp32: the four rows
// and eight columns of a fragment, read word by word, since ldmatrix transposes 16-bit elements only) over the banks.
template <class Mma, int kBlockM, int kBlockN, int kWarpsM, int kWarpsN, int kStages_ = 4>
struct GemmTn : GemmSums<Mma, kBlockM, kBlockN, kWarpsM, kWarpsN> {
  using Base = GemmSums<Mma, kBlockM, kBlockN, kWarpsM, kWarpsN>;
  using Base::BM, Base::BN, Base::FM, Base::FN, Base::kThreads, Base::lane;
  using typename Base::Element;
  using typename Base::Sums;
  static constexpr int kStages = kStages_;
  static constexpr int kElementsOfChunk = 16 / int(sizeof(Element));
  static constexpr int BK = 64 / int(sizeof(Element));      // two steps of the instructions
  static constexpr int kPitchA = BM + 8, kPitchB = BN + 8;  // elements
  static constexpr int kBytesA = BK * kPitchA * int(sizeof(Element));
  static constexpr int kStageBytes = kBytesA + BK * kPitchB * int(sizeof(Element));
  static constexpr int kSharedBytes =
      kStages * kStageBytes > Base::kTileBytes ? kStages * kStageBytes : Base::kTileBytes;
  static_assert(BK * BM / kElementsOfChunk % kThreads == 0 &&
                BK * BN / kElementsOfChunk % kThreads == 0);

  // copy(row of the stage, first column, address) for each chunk that this thread copies of one operand, `width` columns.
  template <int kWidth, class Copy>
  __device__ static void for_chunks(uint32_t operand, Copy&& copy) {
    constexpr int kChunks = kWidth / kElementsOfChunk;
#pragma unroll
    for (int i = 0; i < BK * kChunks / kThreads; ++i) {
      const int index = int(threadIdx.x) + i * kThreads;
      const int row = index / kChunks, column = index % kChunks * kElementsOfChunk;
      copy(row, column, operand + (row * (kWidth + 8) + column) * int(sizeof(Element)));
    }
  }

  // load(iteration, address of A's rows, address of B's) issues the cp.async copies of one stage.
  template <class Load>
  __device__ void run(const unsigned char* shared, int iterations, Load&& load) {
    const uint32_t address = ptx::shared_address(shared);
    pipeline<kStages, kStageBytes>(
        iterations,
        [&](int iteration, int stage) {
          load(iteration, address + stage, address + stage + kBytesA);
        },
        [&](int stage) {
          this->add([&](Sums& sums) {
            if constexpr (sizeof(Element) == 2)
              multiply(sums, address + stage);
            else
              multiply(sums, reinterpret_cast<const float*>(shared + stage));
          });
        });
  }

  __device__ static void multiply(Sums& d, uint32_t stage) {
    const int m = Base::warp_m(), n = Base::warp_n();
#pragma unroll
    for (int k = 0; k < BK; k += 16) {
      uint32_t a[FM][4], b[FN / 2][4];
      // a[i]: matrices (rows of k 0-7, 8-15) x (columns 0-7, 8-15), the columns first. b[j]: the rows first.
#pragma unroll
      for (int i = 0; i < FM; ++i)
        ptx::ldmatrix_x4_trans(a[i], stage + ((k + lane() / 16 * 8 + lane() % 8) * kPitchA + m +
                                              i * 16 + lane() / 8 % 2 * 8) *
                                                 2);
#pragma unroll
      for (int j = 0; j < FN / 2; ++j)
        ptx::ldmatrix_x4_trans(
            b[j],
            stage + kBytesA + ((k + lane() % 16) * kPitchB + n + j * 16 + lane() / 16 * 8) * 2);
#pragma unroll
      for (int i = 0; i < FM; ++i)
#pragma unroll
        for (int j = 0; j < FN; ++j) Mma::multiply(d[i][j], a[i], &b[j / 2][j % 2 * 2]);
    }
  }

  __device__ static void multiply(Sums& d, const float* stage) {
    // Of a fragment a lane has column lane / 4 and row lane % 4, then those 8 columns and 4 rows on.
    const float* from_a = stage + lane() % 4 * kPitchA + Base::warp_m() + lane() / 4;
    const float* from_b = stage + BK * kPitchA + lane() % 4 * kPitchB + Base::warp_n() + lane() / 4;
#pragma unroll
    for (int k = 0; k < BK; k += 8) {
      uint32_t a[FM][4], b[FN][2];
#pragma unroll
      for (int i = 0; i < FM; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          a[i][e] = __float_as_uint(from_a[(k + e / 2 * 4) * kPitchA + i * 16 + e % 2 * 8]);
#pragma unroll
      for (int j = 0; j < FN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          b[j][e] = __float_as_uint(from_b[(k + e * 4) * kPitchB + j * 8]);
#pragma unroll
      for (int i = 0; i < FM; ++i)
#pragma unroll
        for (int j = 0; j < FN; ++j) Mma::multiply(d[i][j], a[i], b[j]);
    }
  }
};

}  // namespace pywino
