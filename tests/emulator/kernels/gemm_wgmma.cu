// SPDX-License-Identifier: BSD-3-Clause
// C (M x N, fp32) = A (M x K) B (N x K)^T, bf16 by rows, for sm_90a: one warpgroup brings tiles by TMA, two compute with
// wgmma, and mbarriers hand the ring's stages to and fro.
#include "common/tensor_maps.h"
#include "common/wgmma.cuh"

using namespace pywino;

namespace {

constexpr int kTileM = 128, kTileN = 64, kTileK = 64, kStages = 3;
constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);
constexpr int kBytesA = kTileM * kTileK * 2, kBytesB = kTileN * kTileK * 2;
constexpr int kStageBytes = kBytesA + kBytesB;
constexpr int kSharedBytes = kStages * kStageBytes + 2 * kStages * 8;

__global__ void __launch_bounds__(kThreads, 1)
    gemm_wgmma(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
               float* __restrict__ c, int m, int n, int k, int ldc) {
  PYWINO_DYNAMIC_SHARED(unsigned char, shared);
  const uint32_t stages = ptx::shared_address(shared);
  const uint32_t full = stages + kStages * kStageBytes, empty = full + kStages * 8;
  const int thread = threadIdx.x % 128, group = threadIdx.x / 128;
  const int m0 = blockIdx.y * kTileM, n0 = blockIdx.x * kTileN;
  const int steps = (k + kTileK - 1) / kTileK;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, kConsumers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (group == kConsumers) {
    ptx::setmaxnreg_dec<40>();
    if (thread > 0) return;
    for (int step = 0; step < steps; ++step) {
      const int s = step % kStages, round = step / kStages;
      if (round > 0) ptx::mbarrier_wait(empty + 8 * s, (round - 1) % 2);
      ptx::mbarrier_arrive_expect_tx(full + 8 * s, kStageBytes);
      const uint32_t stage = stages + s * kStageBytes;
      ptx::tma_load_2d(stage, &a_map, step * kTileK, m0, full + 8 * s);
      ptx::tma_load_2d(stage + kBytesA, &b_map, step * kTileK, n0, full + 8 * s);
    }
    return;
  }

  ptx::setmaxnreg_inc<232>();
  float d[32] = {};
  for (int step = 0; step < steps; ++step) {
    const int s = step % kStages;
    ptx::mbarrier_wait(full + 8 * s, step / kStages % 2);
    const uint32_t a = stages + s * kStageBytes + group * 64 * kTileK * 2;
    const uint32_t b = stages + s * kStageBytes + kBytesA;
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kTileK / 16; ++kk) {
      ptx::wgmma_m64n64k16_bf16(d, ptx::matrix_descriptor_128b(a + 32 * kk),
                                ptx::matrix_descriptor_128b(b + 32 * kk), 1);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    // One thread hands the stage back when all four warps have read it.
    ptx::named_barrier_sync(1 + group, 128);
    if (thread == 0) ptx::mbarrier_arrive(empty + 8 * s);
  }
  for (int i = 0; i < 32; ++i) {
    const int row = m0 + group * 64 + thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    const int column = n0 + i / 4 * 8 + thread % 4 * 2 + i % 2;
    if (row < m && column < n) c[static_cast<int64_t>(row) * ldc + column] = d[i];
  }
}

bool map_of(CUtensorMap* map, const void* p, int rows, int columns, int pitch, int box_rows) {
  const cuuint64_t extent[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[] = {static_cast<cuuint64_t>(pitch) * 2};
  const cuuint32_t box[] = {kTileK, static_cast<cuuint32_t>(box_rows)};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, p, extent, stride, box,
                CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace

extern "C" int gemm_wgmma_launch(const void* a, const void* b, float* c, int m, int n, int k,
                                 int lda, int ldb, int ldc, void* stream) {
  CUtensorMap a_map, b_map;
  if (!map_of(&a_map, a, m, k, lda, kTileM) || !map_of(&b_map, b, n, k, ldb, kTileN)) {
    return cudaErrorInvalidValue;
  }
  cudaFuncSetAttribute(reinterpret_cast<const void*>(gemm_wgmma),
                       cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  const dim3 grid((n + kTileN - 1) / kTileN, (m + kTileM - 1) / kTileM);
  PYWINO_LAUNCH((gemm_wgmma), grid, dim3(kThreads), kSharedBytes, static_cast<cudaStream_t>(stream),
                a_map, b_map, c, m, n, k, ldc);
  return cudaGetLastError();
}
