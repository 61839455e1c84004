// SPDX-License-Identifier: BSD-3-Clause
// D = A B^T where A has at most two of every four neighbouring elements of k (2:4), on sparse tensor cores: mma.sp, sm_80 and
// later, twice the operations of mma.sync a cycle.
//
//        shared memory, one stage: 64 elements of k
//        BM rows of A, the 32 that are stored    row r: | chunk 0 ^ (r / 2 & 3) | ... | 3 ^ (r / 2 & 3) |
//        BN rows of B                            row r: | chunk 0 ^ (r & 7) | ... | 7 ^ (r & 7) |
//        metadata                                for every 16 rows of A a word a lane
//
// The exclusive or spreads the eight rows that one ldmatrix phase reads over all 32 banks. A word of metadata belongs to lane
// 4 g + 2 s + h: rows g (its low half) and g + 8, 16 elements of k from 32 s + 16 h on, two bits for each that is stored. So
// one load brings what both instructions of a stage ask for, s being their selector.
#pragma once

#include "gemm.cuh"

namespace pywino {

struct MmaSpF16 {
  using Element = __half;
  static constexpr bool kSplit = false;
  template <int kSelector>
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                  uint32_t metadata) {
    ptx::mma_sp_m16n8k32_f16<kSelector>(d, a, b, metadata);
  }
};
struct MmaSpBf16 {
  using Element = __nv_bfloat16;
  static constexpr bool kSplit = false;
  template <int kSelector>
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                  uint32_t metadata) {
    ptx::mma_sp_m16n8k32_bf16<kSelector>(d, a, b, metadata);
  }
};

template <class Mma, int kBlockM, int kBlockN, int kWarpsM, int kWarpsN, int kStages_ = 3>
struct SparseGemm : GemmSums<Mma, kBlockM, kBlockN, kWarpsM, kWarpsN> {
  using Base = GemmSums<Mma, kBlockM, kBlockN, kWarpsM, kWarpsN>;
  using Base::BM, Base::BN, Base::FM, Base::FN, Base::kThreads, Base::lane;
  using typename Base::Element;
  using typename Base::Sums;
  static constexpr int kStages = kStages_;
  static constexpr int BK = 64, kStored = BK / 2;
  static constexpr int kBytesA = BM * kStored * int(sizeof(Element));
  static constexpr int kBytesB = BN * BK * int(sizeof(Element));
  static constexpr int kBytesMetadata = BM / 16 * 32 * int(sizeof(uint32_t));
  static constexpr int kStageBytes = kBytesA + kBytesB + kBytesMetadata;
  // The finished tile lies transposed, a row for each of B's.
  static constexpr int kPitch = BM + 4;
  static constexpr int kTileBytes = BN * kPitch * int(sizeof(float));
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kTileBytes ? kStages * kStageBytes : kTileBytes;
  static_assert(sizeof(Element) == 2 && BM * 4 % kThreads == 0 && BN * 8 % kThreads == 0);

  // Byte offset of 16-byte chunk `chunk` of a row, from the first row of A or of B.
  __device__ static uint32_t offset_a(int row, int chunk) {
    return row * 64 + ((chunk ^ (row / 2 & 3)) << 4);
  }
  __device__ static uint32_t offset_b(int row, int chunk) {
    return row * 128 + ((chunk ^ (row & 7)) << 4);
  }

  // load(iteration, stage address) issues the cp.async copies of one stage: A's rows, B's at kBytesA, metadata behind them.
  template <class Load>
  __device__ void run(const unsigned char* shared, int iterations, Load&& load) {
    const uint32_t address = ptx::shared_address(shared);
    pipeline<kStages, kStageBytes>(
        iterations, [&](int iteration, int stage) { load(iteration, address + stage); },
        [&](int stage) {
          const auto* words = reinterpret_cast<const uint32_t*>(shared + stage + kBytesA + kBytesB);
          uint32_t metadata[FM];
#pragma unroll
          for (int i = 0; i < FM; ++i) metadata[i] = words[(Base::warp_m() / 16 + i) * 32 + lane()];
          step<0>(address + stage, metadata);
          step<1>(address + stage, metadata);
        });
  }

  // Issues the copies of A and its metadata into a stage, from row `first` of what is stored: rows of BM, step by step.
  __device__ static void copy_sparse(uint32_t stage, const Element* values, const int32_t* metadata,
                                     int64_t first) {
    const int thread = int(threadIdx.x);
#pragma unroll
    for (int i = 0; i < BM * 4 / kThreads; ++i) {
      const int row = (thread + i * kThreads) / 4, chunk = thread % 4;
      ptx::cp_async_16(stage + offset_a(row, chunk), values + (first + row) * kStored + chunk * 8,
                       16);
    }
    if (thread < kBytesMetadata / 16)
      ptx::cp_async_16(stage + kBytesA + kBytesB + thread * 16,
                       metadata + first / 16 * 32 + thread * 4, 16);
  }

  // 32 elements of k: 16 that are stored.
  template <int kStep>
  __device__ void step(uint32_t stage, const uint32_t (&metadata)[FM]) {
    const int m = Base::warp_m(), n = Base::warp_n();
    uint32_t a[FM][4];
#pragma unroll
    for (int i = 0; i < FM; ++i)
      ptx::ldmatrix_x4(a[i], stage + offset_a(m + i * 16 + lane() % 16, kStep * 2 + lane() / 16));
#pragma unroll
    for (int j = 0; j < FN; ++j) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b,
                       stage + kBytesA + offset_b(n + j * 8 + lane() % 8, kStep * 4 + lane() / 8));
#pragma unroll
      for (int i = 0; i < FM; ++i)
        Mma::template multiply<kStep>(this->sum[i][j], a[i], b, metadata[i]);
    }
  }

  // store(row of B, first of eight rows of A, their sums) for the whole tile, neighbouring threads on neighbouring rows of A.
  template <class Store>
  __device__ void write(float* tile, Store&& store) {
    const int m = Base::warp_m() + lane() / 4, n = Base::warp_n() + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < FM; ++i)
#pragma unroll
      for (int j = 0; j < FN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          tile[(n + j * 8 + e % 2) * kPitch + m + i * 16 + e / 2 * 8] = this->sum[i][j][e];
    __syncthreads();
    for (int e = int(threadIdx.x); e < BM * BN / 8; e += kThreads) {
      const int row = e / (BM / 8), column = e % (BM / 8) * 8;
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
};

}  // namespace pywino
