// SPDX-License-Identifier: BSD-3-Clause
// C (M x N, fp32) = A (M x K) B (K x N), fp16 by rows: a ring of cp.async stages, ldmatrix, mma.sync. The kind of kernel that
// the emulator is for, small enough to be read; test_gemm.py runs it, mutate.py breaks it.
#include "common/ptx.cuh"

using namespace pywino;

namespace {

constexpr int kTileM = 64, kTileN = 64, kTileK = 32, kStages = 3, kThreads = 128;
constexpr int kRowA = kTileK * 2, kRowB = kTileN * 2;  // bytes
constexpr int kBytesA = kTileM * kRowA, kBytesB = kTileK * kRowB, kStageBytes = kBytesA + kBytesB;
constexpr int kSharedBytes = kStages * kStageBytes;

// Rows of 4 and of 8 chunks of 16 bytes, permuted so that the 8 rows of a matrix fall on different banks.
__device__ uint32_t chunk_of_a(int row, int chunk) {
  return row * kRowA + ((chunk ^ (row / 2 % 4)) * 16);
}
__device__ uint32_t chunk_of_b(int row, int chunk) {
  return row * kRowB + ((chunk ^ (row % 8)) * 16);
}

// How many of the 8 halves from column `first` on are there, in bytes.
__device__ int bytes_left(int first, int columns) { return min(max(columns - first, 0), 8) * 2; }

__device__ void load_stage(uint32_t stage, const __half* a, const __half* b, int m, int n, int k,
                           int lda, int ldb, int m0, int n0, int k0) {
  for (int i = threadIdx.x; i < kBytesA / 16; i += kThreads) {
    const int row = i / 4, chunk = i % 4;
    const int bytes = m0 + row < m ? bytes_left(k0 + chunk * 8, k) : 0;
    const __half* source = a + static_cast<int64_t>(m0 + row) * lda + k0 + chunk * 8;
    ptx::cp_async_16(stage + chunk_of_a(row, chunk), bytes ? source : a, bytes);
  }
  for (int i = threadIdx.x; i < kBytesB / 16; i += kThreads) {
    const int row = i / 8, chunk = i % 8;
    const int bytes = k0 + row < k ? bytes_left(n0 + chunk * 8, n) : 0;
    const __half* source = b + static_cast<int64_t>(k0 + row) * ldb + n0 + chunk * 8;
    ptx::cp_async_16(stage + kBytesA + chunk_of_b(row, chunk), bytes ? source : b, bytes);
  }
}

__global__ void __launch_bounds__(kThreads)
    gemm_mma(const __half* __restrict__ a, const __half* __restrict__ b, float* __restrict__ c,
             int m, int n, int k, int lda, int ldb, int ldc) {
  PYWINO_DYNAMIC_SHARED(unsigned char, shared);
  const uint32_t stages = ptx::shared_address(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp % 2 * 32, warp_n = warp / 2 * 32;
  const int m0 = blockIdx.y * kTileM, n0 = blockIdx.x * kTileN;
  const int steps = (k + kTileK - 1) / kTileK;
  float d[2][4][4] = {};

  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) {
      load_stage(stages + s * kStageBytes, a, b, m, n, k, lda, ldb, m0, n0, s * kTileK);
    }
    ptx::cp_async_commit_group();
  }
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncthreads();  // the stage is there for all, and all have left the one that is filled next
    const int next = step + kStages - 1;
    if (next < steps) {
      load_stage(stages + next % kStages * kStageBytes, a, b, m, n, k, lda, ldb, m0, n0,
                 next * kTileK);
    }
    ptx::cp_async_commit_group();
    const uint32_t stage_a = stages + step % kStages * kStageBytes, stage_b = stage_a + kBytesA;
#pragma unroll
    for (int kk = 0; kk < kTileK / 16; ++kk) {
      uint32_t a_fragments[2][4], b_fragments[2][4];
      for (int i = 0; i < 2; ++i) {
        const int row = warp_m + i * 16 + lane % 16;
        ptx::ldmatrix_x4(a_fragments[i], stage_a + chunk_of_a(row, kk * 2 + lane / 16));
      }
      for (int j = 0; j < 2; ++j) {
        const int chunk = warp_n / 8 + j * 2 + lane / 16;
        ptx::ldmatrix_x4_trans(b_fragments[j], stage_b + chunk_of_b(kk * 16 + lane % 16, chunk));
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
          ptx::mma_m16n8k16_f16(d[i][j], a_fragments[i], &b_fragments[j / 2][j % 2 * 2]);
        }
      }
    }
  }
  ptx::cp_async_wait_group<0>();

  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int v = 0; v < 4; ++v) {
        const int row = m0 + warp_m + i * 16 + lane / 4 + v / 2 * 8;
        const int column = n0 + warp_n + j * 8 + lane % 4 * 2 + v % 2;
        if (row < m && column < n) c[static_cast<int64_t>(row) * ldc + column] = d[i][j][v];
      }
    }
  }
}

}  // namespace

extern "C" int gemm_mma_launch(const __half* a, const __half* b, float* c, int m, int n, int k,
                               int lda, int ldb, int ldc, void* stream) {
  const dim3 grid((n + kTileN - 1) / kTileN, (m + kTileM - 1) / kTileM);
  PYWINO_LAUNCH((gemm_mma), grid, dim3(kThreads), kSharedBytes, static_cast<cudaStream_t>(stream),
                a, b, c, m, n, k, lda, ldb, ldc);
  return cudaGetLastError();
}
