// SPDX-License-Identifier: BSD-3-Clause
// The direct 3 x 3 convolution as an implicit product on tensor cores: rows are output pixels, columns output channels, and
// k runs over the nine taps and the input's channels. Nothing is unfolded: cp.async gathers each pixel's channels where they
// lie, so a dilation costs nothing.
//
// Operations: 18 C K a pixel. Bytes: the input is read from memory once and nine times from L2.
#include "../common/gemm.cuh"
#include "../common/launch.cuh"
#include "cuda.h"

namespace pywino::winograd::cuda {
namespace {

template <class G>
__global__ void __launch_bounds__(G::kThreads, G::kBlocksPerSm) direct(Direct p) {
  using E = typename G::Element;
  constexpr int kRows = G::BM * 8 / G::kThreads;  // of A that this thread copies in each stage
  PYWINO_DYNAMIC_SHARED(unsigned char, shared);
  const uint32_t stages = ptx::shared_address(shared);

  const int64_t pixels = p.n * p.out_h * p.out_w;
  const int64_t blocks_n = (p.padded_out + G::BN - 1) / G::BN;
  const int64_t n0 = blockIdx.x % blocks_n * G::BN;
  const int64_t m0 = blockIdx.x / blocks_n * G::BM;
  const E* input = static_cast<const E*>(p.input);
  const E* u = static_cast<const E*>(p.u);

  // The first pixel of each row's receptive field: its number in the batch (less than 2^31), its row and its column.
  int corner[kRows], top[kRows], left[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t pixel = m0 + G::row_of(i);
    const bool exists = pixel < pixels;
    const int x = int(pixel % p.out_w), y = int(pixel / p.out_w % p.out_h);
    const int n = int(pixel / p.out_w / p.out_h);
    top[i] = exists ? y - p.pad_h : -(1 << 30);  // outside, whatever the tap
    left[i] = x - p.pad_w;
    corner[i] = (n * int(p.h) + y - p.pad_h) * int(p.w) + left[i];
  }

  const int steps = int((p.c + G::BK - 1) / G::BK);
  G gemm;
  gemm.run(stages, 9 * steps, [&](int iteration, uint32_t stage) {
    const int tap = iteration / steps, down = tap / 3 * p.dil_h, right = tap % 3 * p.dil_w;
    const int64_t k = int64_t(iteration % steps) * G::BK + G::chunk_of() * (16 / int(sizeof(E)));
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int y = top[i] + down, x = left[i] + right;
      const bool exists = y >= 0 && y < p.h && x >= 0 && x < p.w && k < p.c;
      const int64_t pixel = corner[i] + down * int(p.w) + right;
      ptx::cp_async_16(stage + G::offset(G::row_of(i), G::chunk_of()),
                       exists ? input + pixel * p.c + k : input, exists ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < G::BN * 8 / G::kThreads; ++i) {
      const int64_t row = n0 + G::row_of(i);
      const bool exists = row < p.padded_out && k < p.c;
      ptx::cp_async_16(stage + G::BM * G::kRowBytes + G::offset(G::row_of(i), G::chunk_of()),
                       exists ? u + (tap * p.padded_out + row) * p.c + k : u, exists ? 16 : 0);
    }
  });

  const E* residual = static_cast<const E*>(p.residual);
  E* output = static_cast<E*>(p.output);
  const bool whole = p.k % 8 == 0;  // every chunk of eight channels is aligned
  gemm.write(reinterpret_cast<float*>(shared), [&](int row, int column, Channels<8> sums) {
    const int64_t pixel = m0 + row, k = n0 + column;
    if (pixel >= pixels || k >= p.k) return;
    const int64_t place = pixel * p.k + k;
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (k + e < p.k) {
        if (p.bias) sums.x[e] += p.bias[k + e];
        if (residual) sums.x[e] += to_float(residual[place + e]);
        if (p.relu) sums.x[e] = sums.x[e] < 0.f ? 0.f : sums.x[e];  // NaN stays
        if (!whole) output[place + e] = from_float<E>(sums.x[e]);
      }
    if (!whole) return;
    if constexpr (sizeof(E) == 2) {
      store_channels<E, 8>(output + place, sums);
    } else {
      store_channels<E, 4>(output + place, {{sums.x[0], sums.x[1], sums.x[2], sums.x[3]}});
      store_channels<E, 4>(output + place + 4, {{sums.x[4], sums.x[5], sums.x[6], sums.x[7]}});
    }
  });
}

template <class G>
int launch(const Direct& p, void* stream) {
  const int64_t pixels = p.n * p.out_h * p.out_w;
  const int64_t blocks = (p.padded_out + G::BN - 1) / G::BN * ((pixels + G::BM - 1) / G::BM);
  if (const auto error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(direct<G>),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSharedBytes))
    return int(error);
  PYWINO_LAUNCH((direct<G>), dim3(unsigned(blocks)), dim3(G::kThreads), G::kSharedBytes,
                static_cast<cudaStream_t>(stream), p);
  return int(cudaGetLastError());
}

template <class Mma>
int launch_for(const Direct& p, void* stream) {
  return p.k <= 64 ? launch<Gemm<Mma, 128, 64, 4, 2>>(p, stream)
                   : launch<Gemm<Mma, 128, 128, 2, 4>>(p, stream);
}

}  // namespace

extern "C" int pywino_winograd_direct(const Direct* p, void* stream) {
  switch (p->dtype) {
    case DType::f16: return launch_for<MmaF16>(*p, stream);
    case DType::bf16: return launch_for<MmaBf16>(*p, stream);
    default: return p->strict ? launch_for<MmaTf32x3>(*p, stream) : launch_for<MmaTf32>(*p, stream);
  }
}

}  // namespace pywino::winograd::cuda
