// SPDX-License-Identifier: BSD-3-Clause
// The middle stage of the Winograd convolution where U has zeros: for each tap, M = V U^T without the products of some of them.
//
//   blocks   kBlockChannels input channels of a group of 64 or 128 output channels; k runs over the kept ones of the group
//   2:4      at most two of four neighbouring input channels, on sparse tensor cores; fp16 domain
//
// A block is what a tensor core can skip: its 16 x 16 operands would be fed at 10 % of their rate by blocks of the CPU, 16
// output channels of one input channel (../sparse_conv/README.md has the bytes).
//
// Operations: those of the dense product (cuda_product.cu), times the part of the blocks that is kept; of 2:4, all at twice the
// rate. Input, V, M and output are read and written as ever: with C = K and F(4x4,3x3) on an H200 that alone takes as long as
// the dense product up to C = 900 in 16 bits, up to C = 300 in fp32 with 3xTF32. So there is little to gain in 16 bits.
#include "../common/launch.cuh"
#include "../common/sparse_gemm.cuh"
#include "cuda.h"

namespace pywino::winograd::cuda {
namespace {

// Lists are by tap, then group: of the blocks' first numbers in `places`, behind them the channels of each block.
template <class G>
__global__ void __launch_bounds__(G::kThreads, G::kBlocksPerSm)
    block_product(Product p, const int32_t* starts) {
  using E = typename G::Element;
  constexpr int kBlocksOfStage = G::BK / kBlockChannels;  // one in fp32, two in fp16
  PYWINO_DYNAMIC_SHARED(unsigned char, shared);
  const uint32_t stages = ptx::shared_address(shared);

  const int64_t groups = (p.out_channels + G::BN - 1) / G::BN;
  const int64_t blocks_m = (p.tiles + G::BM - 1) / G::BM;
  const int64_t group = blockIdx.x % groups, n0 = group * G::BN;
  const int64_t m0 = blockIdx.x / groups % blocks_m * G::BM;
  const int64_t tap = blockIdx.x / groups / blocks_m;
  const int32_t* entries = starts + p.taps * groups + 1;
  const int first = starts[tap * groups + group], last = starts[tap * groups + group + 1];
  const E* v = static_cast<const E*>(p.v) + (tap * p.tiles + m0) * p.channels;
  const E* values = static_cast<const E*>(p.u);

  // Of each stage this thread copies 16 bytes of every row, all of the same block.
  const int element = G::chunk_of() * (16 / int(sizeof(E)));
  const int of_stage = element / kBlockChannels, of_block = element % kBlockChannels;
  G gemm;
  gemm.run(stages, (last - first + kBlocksOfStage - 1) / kBlocksOfStage,
           [&](int iteration, uint32_t stage) {
             const int block = first + iteration * kBlocksOfStage + of_stage;
             const bool is_there = block < last;
             const int k = is_there ? entries[block] * kBlockChannels + of_block : 0;
#pragma unroll
             for (int i = 0; i < G::BM * 8 / G::kThreads; ++i) {
               const int row = G::row_of(i);
               const bool exists = is_there && m0 + row < p.tiles && k < p.channels;
               ptx::cp_async_16(stage + G::offset(row, G::chunk_of()),
                                exists ? v + row * p.channels + k : v, exists ? 16 : 0);
             }
#pragma unroll
             for (int i = 0; i < G::BN * 8 / G::kThreads; ++i) {
               const int64_t row = int64_t(block) * G::BN + G::row_of(i);
               ptx::cp_async_16(
                   stage + G::BM * G::kRowBytes + G::offset(G::row_of(i), G::chunk_of()),
                   is_there ? values + row * kBlockChannels + of_block : values, is_there ? 16 : 0);
             }
           });

  E* m = static_cast<E*>(p.m) + (tap * p.tiles + m0) * p.out_channels + n0;
  gemm.write(reinterpret_cast<float*>(shared), [&](int row, int column, const Channels<8>& sums) {
    if (m0 + row < p.tiles && n0 + column < p.out_channels)
      store_channels(m + row * p.out_channels + column, sums);
  });
}

// Rows of the product are output channels, its columns tiles: the sparse operand is the first one.
template <class G>
__global__ void __launch_bounds__(G::kThreads, G::kBlocksPerSm)
    two_of_four_product(Product p, const int32_t* metadata) {
  using E = typename G::Element;
  PYWINO_DYNAMIC_SHARED(unsigned char, shared);

  const int64_t blocks_m = (p.out_channels + G::BM - 1) / G::BM, rows = blocks_m * G::BM;
  const int64_t blocks_n = (p.tiles + G::BN - 1) / G::BN;
  const int64_t m0 = blockIdx.x % blocks_m * G::BM;
  const int64_t n0 = blockIdx.x / blocks_m % blocks_n * G::BN;
  const int64_t tap = blockIdx.x / blocks_m / blocks_n;
  const int64_t steps = (p.channels + G::BK - 1) / G::BK;
  const int thread = int(threadIdx.x), chunk = thread % 8;
  const E* v = static_cast<const E*>(p.v) + (tap * p.tiles + n0) * p.channels;
  const E* values = static_cast<const E*>(p.u);

  G gemm;
  gemm.run(shared, int(steps), [&](int step, uint32_t stage) {
    const int64_t row0 = (tap * steps + step) * rows + m0;  // of U
    gemm.copy_sparse(stage, values, metadata, row0);
    const int64_t k = step * G::BK + chunk * 8;
#pragma unroll
    for (int i = 0; i < G::BN * 8 / G::kThreads; ++i) {
      const int row = thread / 8 + i * (G::kThreads / 8);
      const bool exists = n0 + row < p.tiles && k < p.channels;
      ptx::cp_async_16(stage + G::kBytesA + G::offset_b(row, chunk),
                       exists ? v + row * p.channels + k : v, exists ? 16 : 0);
    }
  });

  E* m = static_cast<E*>(p.m) + (tap * p.tiles + n0) * p.out_channels + m0;
  gemm.write(reinterpret_cast<float*>(shared), [&](int row, int column, const Channels<8>& sums) {
    if (n0 + row < p.tiles && m0 + column < p.out_channels)
      store_channels(m + row * p.out_channels + column, sums);
  });
}

template <class G>
int launch_blocks(const Product& p, const int32_t* places, void* stream) {
  const int64_t blocks = (p.out_channels + G::BN - 1) / G::BN * ((p.tiles + G::BM - 1) / G::BM);
  if (const auto error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(block_product<G>),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSharedBytes))
    return int(error);
  PYWINO_LAUNCH((block_product<G>), dim3(unsigned(blocks * p.taps)), dim3(G::kThreads),
                G::kSharedBytes, static_cast<cudaStream_t>(stream), p, places);
  return int(cudaGetLastError());
}

template <class Mma>
int launch_blocks_for(const Product& p, int group, const int32_t* places, void* stream) {
  return group == 64 ? launch_blocks<Gemm<Mma, 128, 64, 4, 2>>(p, places, stream)
                     : launch_blocks<Gemm<Mma, 128, 128, 2, 4>>(p, places, stream);
}

int launch_two_of_four(const Product& p, const int32_t* metadata, void* stream) {
  using G = SparseGemm<MmaSpF16, kOutChannels, 64, 4, 2>;
  static_assert(G::BK == kStep);
  const int64_t blocks = (p.out_channels + G::BM - 1) / G::BM * ((p.tiles + G::BN - 1) / G::BN);
  if (const auto error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(two_of_four_product<G>),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSharedBytes))
    return int(error);
  PYWINO_LAUNCH((two_of_four_product<G>), dim3(unsigned(blocks * p.taps)), dim3(G::kThreads),
                G::kSharedBytes, static_cast<cudaStream_t>(stream), p, metadata);
  return int(cudaGetLastError());
}

}  // namespace

extern "C" int pywino_winograd_sparse_product(const Product* p, const Zeros* zeros, void* stream) {
  if (zeros->group == 0) return launch_two_of_four(*p, zeros->places, stream);
  return p->domain == Domain::f16
             ? launch_blocks_for<MmaF16>(*p, zeros->group, zeros->places, stream)
             : launch_blocks_for<MmaTf32x3>(*p, zeros->group, zeros->places, stream);
}

}  // namespace pywino::winograd::cuda
