// SPDX-License-Identifier: BSD-3-Clause
// The direct convolution with a 2:4 weight on sparse tensor cores: rows of the product are output channels, columns are output
// pixels, and k runs over the taps and the input's channels, 64 at a time. The weight lies without its zeros; cp.async gathers
// each pixel's channels where they lie, as for a dense weight, since the instruction picks the two of four itself.
//
// Operations: 2 C K taps a pixel, at twice the dense rate. Bytes: those of the dense product, of the weight 9/16.
#include "../common/launch.cuh"
#include "../common/sparse_gemm.cuh"
#include "cuda.h"

namespace pywino::sparse_conv::cuda {
namespace {

template <class G>
__global__ void __launch_bounds__(G::kThreads, G::kBlocksPerSm) two_of_four(TwoOfFour p) {
  using E = typename G::Element;
  constexpr int kPixels =
      G::BN * 8 / G::kThreads;  // whose channels this thread copies in each stage
  PYWINO_DYNAMIC_SHARED(unsigned char, shared);

  const Geometry& g = p.geometry;
  const int out_h = int(g.out_h()), out_w = int(g.out_w()), h = int(g.h), w = int(g.w);
  const int64_t pixels = g.n * out_h * out_w;
  const int blocks_m = int((g.out_channels + G::BM - 1) / G::BM), rows = blocks_m * G::BM;
  const int m0 = int(blockIdx.x % blocks_m) * G::BM;
  const int64_t n0 = int64_t(blockIdx.x / blocks_m) * G::BN;
  const int c_in = int(g.c), steps = (c_in + kStep - 1) / kStep, width = int(g.kernel_w);
  const int thread = int(threadIdx.x), chunk = thread % 8;
  const E* input = static_cast<const E*>(p.input);
  const E* values = static_cast<const E*>(p.values);

  // The first pixel of each receptive field: its number in the batch, its row and its column.
  int corner[kPixels], top[kPixels], left[kPixels];
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const int64_t pixel = n0 + thread / 8 + i * (G::kThreads / 8);
    const int y = int(pixel / out_w % out_h * g.stride_h - g.pad_h);
    left[i] = int(pixel % out_w * g.stride_w - g.pad_w);
    top[i] = pixel < pixels ? y : -(1 << 30);  // outside, whatever the tap
    corner[i] = int((pixel / out_w / out_h * g.h + y) * g.w + left[i]);
  }

  G gemm;
  gemm.run(shared, int(g.kernel_h) * width * steps, [&](int step, uint32_t stage) {
    const int tap = step / steps, c = step % steps * kStep + chunk * 8;
    const int down = int(tap / width * g.dil_h), right = int(tap % width * g.dil_w);
    gemm.copy_sparse(stage, values, p.metadata, int64_t(step) * rows + m0);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int y = top[i] + down, x = left[i] + right;
      const bool exists = c < c_in && y >= 0 && y < h && x >= 0 && x < w;
      const int pixel = corner[i] + down * w + right;
      ptx::cp_async_16(stage + G::kBytesA + G::offset_b(thread / 8 + i * (G::kThreads / 8), chunk),
                       exists ? input + int64_t(pixel) * c_in + c : input, exists ? 16 : 0);
    }
  });

  E* output = static_cast<E*>(p.output);
  const int64_t K = g.out_channels;
  gemm.write(reinterpret_cast<float*>(shared), [&](int row, int column, const Channels<8>& sums) {
    const int64_t pixel = n0 + row, k = m0 + column;
    if (pixel < pixels && k < K) write_channels(output + pixel * K + k, sums, p.bias, k, K);
  });
}

template <class Mma>
int launch(const TwoOfFour& p, void* stream) {
  using G = SparseGemm<Mma, kOutChannels, 64, 4, 2>;
  static_assert(G::BK == kStep);
  const Geometry& g = p.geometry;
  const int64_t pixels = g.n * g.out_h() * g.out_w();
  const int64_t blocks = (g.out_channels + G::BM - 1) / G::BM * ((pixels + G::BN - 1) / G::BN);
  if (const auto error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(two_of_four<G>),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSharedBytes))
    return int(error);
  PYWINO_LAUNCH((two_of_four<G>), dim3(unsigned(blocks)), dim3(G::kThreads), G::kSharedBytes,
                static_cast<cudaStream_t>(stream), p);
  return int(cudaGetLastError());
}

}  // namespace

extern "C" int pywino_sparse_conv_two_of_four(const TwoOfFour* p, void* stream) {
  return p->geometry.dtype == DType::f16 ? launch<MmaSpF16>(*p, stream)
                                         : launch<MmaSpBf16>(*p, stream);
}

}  // namespace pywino::sparse_conv::cuda
