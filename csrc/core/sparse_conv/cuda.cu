// SPDX-License-Identifier: BSD-3-Clause
// Block-sparse convolution as an implicit product on tensor cores: rows are output pixels, columns a group of output channels,
// and k runs over the kept blocks of the group, 32 channels of one tap each. Nothing is unfolded: cp.async gathers each
// pixel's channels where they lie.
//
// Operations: 2 C K taps a pixel, times the part of the blocks that is kept. Bytes: the input is read from memory once, and from
// L2 for each block; a block for each BM pixels.
#include "../common/gemm.cuh"
#include "../common/launch.cuh"
#include "cuda.h"

namespace pywino::sparse_conv::cuda {
namespace {

template <class G>
__global__ void __launch_bounds__(G::kThreads, G::kBlocksPerSm) convolve(Forward p) {
  using E = typename G::Element;
  constexpr int kRows = G::BM * 8 / G::kThreads;     // of A that this thread copies in each stage
  constexpr int kBlocksOfStage = G::BK / kChannels;  // one in fp32, two in 16 bits
  PYWINO_DYNAMIC_SHARED(unsigned char, shared);
  const uint32_t stages = ptx::shared_address(shared);

  const Geometry& g = p.geometry;
  const int out_h = int(g.out_h()), out_w = int(g.out_w()), h = int(g.h), w = int(g.w);
  const int64_t pixels = g.n * out_h * out_w;
  const int groups = int((g.out_channels + G::BN - 1) / G::BN);
  const int group = int(blockIdx.x % groups), n0 = group * G::BN;
  const int64_t m0 = int64_t(blockIdx.x / groups) * G::BM;
  const int c_in = int(g.c), chunks = int(chunks_of(g.c)), width = int(g.kernel_w);
  const int first = p.starts[group], last = p.starts[group + 1];
  const E* input = static_cast<const E*>(p.input);
  const E* values = static_cast<const E*>(p.values);

  // The first pixel of each row's receptive field: its number in the batch, its row and its column.
  int corner[kRows], top[kRows], left[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t pixel = m0 + G::row_of(i);
    const int y = int(pixel / out_w % out_h * g.stride_h - g.pad_h);
    left[i] = int(pixel % out_w * g.stride_w - g.pad_w);
    top[i] = pixel < pixels ? y : -(1 << 30);  // outside, whatever the tap
    corner[i] = int((pixel / out_w / out_h * g.h + y) * g.w + left[i]);
  }

  // Of each stage this thread copies 16 bytes of every row, all of the same block.
  const int element = G::chunk_of() * (16 / int(sizeof(E)));
  const int of_stage = element / kChannels, of_block = element % kChannels;
  G gemm;
  gemm.run(stages, (last - first + kBlocksOfStage - 1) / kBlocksOfStage,
           [&](int iteration, uint32_t stage) {
             const int block = first + iteration * kBlocksOfStage + of_stage;
             const int entry = block < last ? p.entries[block] : 0;
             const int tap = entry / chunks, c = entry % chunks * kChannels + of_block;
             const int down = int(tap / width * g.dil_h), right = int(tap % width * g.dil_w);
             const bool is_there = block < last && c < c_in;
#pragma unroll
             for (int i = 0; i < kRows; ++i) {
               const int y = top[i] + down, x = left[i] + right;
               const bool exists = is_there && y >= 0 && y < h && x >= 0 && x < w;
               const int pixel = corner[i] + down * w + right;
               ptx::cp_async_16(stage + G::offset(G::row_of(i), G::chunk_of()),
                                exists ? input + int64_t(pixel) * c_in + c : input,
                                exists ? 16 : 0);
             }
#pragma unroll
             for (int i = 0; i < G::BN * 8 / G::kThreads; ++i) {
               const int64_t row = int64_t(block) * G::BN + G::row_of(i);
               ptx::cp_async_16(
                   stage + G::BM * G::kRowBytes + G::offset(G::row_of(i), G::chunk_of()),
                   is_there ? values + row * kChannels + of_block : values, is_there ? 16 : 0);
             }
           });

  E* output = static_cast<E*>(p.output);
  const int64_t K = g.out_channels;
  gemm.write(reinterpret_cast<float*>(shared), [&](int row, int column, const Channels<8>& sums) {
    const int64_t pixel = m0 + row, k = n0 + column;
    if (pixel < pixels && k < K) write_channels(output + pixel * K + k, sums, p.bias, k, K);
  });
}

template <class G>
int launch(const Forward& p, void* stream) {
  const Geometry& g = p.geometry;
  const int64_t pixels = g.n * g.out_h() * g.out_w();
  const int64_t blocks = (g.out_channels + G::BN - 1) / G::BN * ((pixels + G::BM - 1) / G::BM);
  if (const auto error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(convolve<G>),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSharedBytes))
    return int(error);
  PYWINO_LAUNCH((convolve<G>), dim3(unsigned(blocks)), dim3(G::kThreads), G::kSharedBytes,
                static_cast<cudaStream_t>(stream), p);
  return int(cudaGetLastError());
}

template <class Mma>
int launch_for(const Forward& p, void* stream) {
  return p.group == 64 ? launch<Gemm<Mma, 128, 64, 4, 2>>(p, stream)
                       : launch<Gemm<Mma, 128, 128, 2, 4>>(p, stream);
}

}  // namespace

extern "C" int pywino_sparse_conv_forward(const Forward* p, void* stream) {
  switch (p->geometry.dtype) {
    case DType::f16: return launch_for<MmaF16>(*p, stream);
    case DType::bf16: return launch_for<MmaBf16>(*p, stream);
    default: return p->strict ? launch_for<MmaTf32x3>(*p, stream) : launch_for<MmaTf32>(*p, stream);
  }
}

extern "C" const char* pywino_sparse_conv_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace pywino::sparse_conv::cuda
