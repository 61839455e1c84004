// SPDX-License-Identifier: BSD-3-Clause
// The direct 3 x 3 convolution as an implicit product on tensor cores: rows are output pixels, columns output channels, and
// k runs over the nine taps and the input's channels. Nothing is unfolded: cp.async gathers each pixel's channels where they
// lie, so a dilation costs nothing.
//
// Operations: 18 C K a pixel. Bytes: the input is read from memory once and nine times from L2.
#include "../common/gemm.cuh"
#include "../common/launch.cuh"
#include "../common/lstm.cuh"
#include "cuda.h"

namespace pywino::winograd::cuda {
namespace {

// relu(g x) of the V numbers of a register, rounded to their type.
template <class E>
__device__ uint32_t gated(uint32_t bits, const float (&g)[4 / sizeof(E)]) {
  constexpr int V = 4 / int(sizeof(E));
  E x[V];
  memcpy(x, &bits, 4);
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const float product = to_float(x[e]) * g[e];
    x[e] = from_float<E>(product < 0.f ? 0.f : product);  // NaN stays
  }
  memcpy(&bits, x, 4);
  return bits;
}

// What is fused beside bias, residual and ReLU: a gate of the input, or the LSTM cell behind.
enum class Fused { none, gate, cell };

// h' and c' of two neighbouring channels, from their eight gates.
template <class E>
__device__ void write_cell(const Direct& p, int64_t place, const Channels<8>& a) {
  Channels<2> c = {}, h;
  if (p.cell) c = load_channels<E, 2>(static_cast<const E*>(p.cell) + place);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const LstmNumber number(a.x[4 * e], a.x[4 * e + 1], a.x[4 * e + 2], a.x[4 * e + 3]);
    c.x[e] = number.next_cell(c.x[e]);
    h.x[e] = number.hidden(c.x[e]);
  }
  store_channels(static_cast<E*>(p.next_cell) + place, c);
  store_channels(static_cast<E*>(p.output) + place, h);
}

template <class G, Fused kFused>
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

  const int64_t channels = kFused == Fused::cell ? p.c + p.second_c : p.c;
  const int steps = int((channels + G::BK - 1) / G::BK);
  // Of a fragment's step of k, 32 bytes, a lane has four bytes in each half.
  const auto gate = [&](int iteration, int step, uint32_t (&a)[G::FM][4]) {
    if constexpr (kFused == Fused::gate) {
      constexpr int V = 4 / int(sizeof(E));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t k = int64_t(iteration % steps) * G::BK +
                          (step * 32 + half * 16 + G::lane() % 4 * 4) / int(sizeof(E));
        float g[V];
#pragma unroll
        for (int e = 0; e < V; ++e) g[e] = k < p.c ? p.gate[k + e] : 0.f;
#pragma unroll
        for (int i = 0; i < G::FM; ++i)
#pragma unroll
          for (int r = 2 * half; r < 2 * half + 2; ++r) a[i][r] = gated<E>(a[i][r], g);
      }
    }
  };

  G gemm;
  const auto load = [&](int iteration, uint32_t stage) {
    const int tap = iteration / steps, down = tap / 3 * p.dil_h, right = tap % 3 * p.dil_w;
    const int64_t k = int64_t(iteration % steps) * G::BK + G::chunk_of() * (16 / int(sizeof(E)));
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int y = top[i] + down, x = left[i] + right;
      const bool exists = y >= 0 && y < p.h && x >= 0 && x < p.w && k < channels;
      const int64_t pixel = corner[i] + down * int(p.w) + right;
      const E* from = input + pixel * p.c + k;
      if (kFused == Fused::cell && k >= p.c)
        from = static_cast<const E*>(p.second) + pixel * p.second_c + k - p.c;
      ptx::cp_async_16(stage + G::offset(G::row_of(i), G::chunk_of()), exists ? from : input,
                       exists ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < G::BN * 8 / G::kThreads; ++i) {
      const int64_t row = n0 + G::row_of(i);
      const bool exists = row < p.padded_out && k < channels;
      ptx::cp_async_16(stage + G::BM * G::kRowBytes + G::offset(G::row_of(i), G::chunk_of()),
                       exists ? u + (tap * p.padded_out + row) * channels + k : u, exists ? 16 : 0);
    }
  };
  gemm.run(stages, 9 * steps, load, gate);

  const E* residual = static_cast<const E*>(p.residual);
  E* output = static_cast<E*>(p.output);
  const bool whole = p.k % 8 == 0;  // every chunk of eight channels is aligned
  Channels<8> total = {};           // a thread has the same eight channels of all its rows
  gemm.write(reinterpret_cast<float*>(shared), [&](int row, int column, Channels<8> sums) {
    const int64_t pixel = m0 + row, k = n0 + column;
    if (pixel >= pixels || k >= p.k) return;
    if constexpr (kFused == Fused::cell) {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (p.bias) sums.x[e] += p.bias[k + e];
      write_cell<E>(p, pixel * (p.k / 4) + k / 4, sums);
      return;
    }
    const int64_t place = pixel * p.k + k;
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (k + e < p.k) {
        if (p.bias) sums.x[e] += p.bias[k + e];
        if (residual) sums.x[e] += to_float(residual[place + e]);
        if (p.relu) sums.x[e] = sums.x[e] < 0.f ? 0.f : sums.x[e];  // NaN stays
        if (!whole) output[place + e] = from_float<E>(sums.x[e]);
      }
    total = total + sums;
    if (!whole) return;
    if constexpr (sizeof(E) == 2) {
      store_channels<E, 8>(output + place, sums);
    } else {
      store_channels<E, 4>(output + place, {{sums.x[0], sums.x[1], sums.x[2], sums.x[3]}});
      store_channels<E, 4>(output + place + 4, {{sums.x[4], sums.x[5], sums.x[6], sums.x[7]}});
    }
  });
  if (!p.partial) return;

  // Sums of the block's pixels, in one order.
  constexpr int kColumns = G::BN / 8;
  static_assert(G::kThreads % kColumns == 0 && G::kThreads >= G::BN);
  float* totals = reinterpret_cast<float*>(shared);
  __syncthreads();  // nobody reads the tile any more
#pragma unroll
  for (int e = 0; e < 8; ++e) totals[threadIdx.x * 8 + e] = total.x[e];
  __syncthreads();
  const int column = int(threadIdx.x);
  if (column >= G::BN || n0 + column >= p.k) return;
  float sum = 0.f;
  for (int t = column / 8; t < G::kThreads; t += kColumns) sum += totals[t * 8 + column % 8];
  p.partial[blockIdx.x / blocks_n * p.k + n0 + column] = sum;
}

template <class G, Fused kFused>
int launch(const Direct& p, void* stream) {
  const int64_t pixels = p.n * p.out_h * p.out_w;
  const int64_t blocks = (p.padded_out + G::BN - 1) / G::BN * ((pixels + G::BM - 1) / G::BM);
  if (const auto error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(direct<G, kFused>),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSharedBytes))
    return int(error);
  PYWINO_LAUNCH((direct<G, kFused>), dim3(unsigned(blocks)), dim3(G::kThreads), G::kSharedBytes,
                static_cast<cudaStream_t>(stream), p);
  static_assert(G::BM == 128);  // direct_parts
  if (!p.mean) return int(cudaGetLastError());
  const Means means{direct_parts(pixels), p.k, pixels, p.partial, p.mean};
  return pywino_winograd_means(&means, stream);
}

template <class Mma>
int launch_for(const Direct& p, void* stream) {
  using Narrow = Gemm<Mma, 128, 64, 4, 2>;
  using Wide = Gemm<Mma, 128, 128, 2, 4>;
  if (p.gate) return launch<Narrow, Fused::gate>(p, stream);
  if (p.next_cell) return launch<Wide, Fused::cell>(p, stream);
  return p.k <= 64 ? launch<Narrow, Fused::none>(p, stream) : launch<Wide, Fused::none>(p, stream);
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
