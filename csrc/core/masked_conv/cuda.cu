// SPDX-License-Identifier: BSD-3-Clause
// Masked convolution: the pixels of the mask are listed, then they are the rows of one product on tensor cores.
//
//   compaction    starts, list, place     votes of warps, a running sum of the blocks' counts, votes again
//   rows          [place][C']             NCHW, or pixels that are no whole 16-byte chunks
//   product       Y[p][k] = b[k] + sum over taps and c of V U, p in `list`
//
// The last two do not know how many pixels there are before they run: their grids are fixed, and each block takes rows up to
// the number that the device has written.
//
// P pixels, L of them in the mask, e bytes: the compaction reads 2 P and writes 4 P + 4 L, zeros are P K e, the product reads
// L C e from memory (for each tap once more from L2) and writes L K e, for 2 C K L operations a tap.
#include "../common/gemm.cuh"
#include "../common/grouped_tiles.cuh"
#include "../common/launch.cuh"
#include "cuda.h"

namespace pywino::masked_conv::cuda {
namespace {

constexpr int kRowThreads = 256;

// --- Compaction

__device__ inline bool is_listed(const List& p, int64_t pixel) {
  return pixel < p.pixels && p.mask[pixel] != 0;
}

__global__ void __launch_bounds__(kListed) count_pixels(List p) {
  const int count = __syncthreads_count(is_listed(p, int64_t(blockIdx.x) * kListed + threadIdx.x));
  if (threadIdx.x == 0) p.starts[blockIdx.x] = count;
}

// Counts of blocks become sums of those before them. One block of threads.
__global__ void __launch_bounds__(kListed) sum_counts(List p, int64_t blocks) {
  __shared__ int of_warp[kListed / 32];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int before = 0;
  for (int64_t first = 0; first < blocks; first += kListed) {
    const int64_t block = first + threadIdx.x;
    const int count = block < blocks ? p.starts[block] : 0;
    int sum = count;  // up to this lane's
    for (int distance = 1; distance < 32; distance *= 2) {
      const int lower = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += lower;
    }
    if (lane == 31) of_warp[warp] = sum;
    __syncthreads();
    int of_chunk = 0;
    for (int w = 0; w < kListed / 32; ++w) {
      if (w == warp) sum += of_chunk;
      of_chunk += of_warp[w];
    }
    if (block < blocks) p.starts[block] = before + sum - count;
    before += of_chunk;
    __syncthreads();  // before of_warp is written again
  }
  if (threadIdx.x == 0) p.starts[blocks] = before;
}

__global__ void __launch_bounds__(kListed) list_pixels(List p) {
  __shared__ int of_warp[kListed / 32];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t pixel = int64_t(blockIdx.x) * kListed + threadIdx.x;
  const bool listed = is_listed(p, pixel);
  const unsigned votes = __ballot_sync(0xffffffffu, listed);
  if (lane == 0) of_warp[warp] = __popc(votes);
  __syncthreads();
  int place = p.starts[blockIdx.x] + __popc(votes & ((1u << lane) - 1));
  for (int w = 0; w < warp; ++w) place += of_warp[w];
  if (pixel < p.pixels) p.place[pixel] = listed ? place : -1;
  if (listed) p.list[place] = int(pixel);
}

// --- Rows

// A thread copies 16 bytes. Neighbouring threads read neighbouring numbers: pixels of a plane, or channels of a pixel.
template <class E>
__global__ void __launch_bounds__(kRowThreads) gather_rows(Forward p, const int32_t* count) {
  constexpr int V = 16 / int(sizeof(E));
  const Geometry& g = p.geometry;
  const int64_t pitch = padded(g.c, sizeof(E)), chunks = pitch / V, plane = g.h * g.w;
  const int64_t rows = *count;
  const E* input = static_cast<const E*>(p.input);
  for (int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x; i < rows * chunks;
       i += int64_t(gridDim.x) * kRowThreads) {
    const int64_t row = g.channels_last ? i / chunks : i % rows;
    const int64_t c0 = (g.channels_last ? i % chunks : i / rows) * V;
    const int64_t pixel = p.list.list[row], image = pixel / plane;
    const E* from = g.channels_last ? input + pixel * g.c
                                    : input + image * g.c * plane + (pixel - image * plane);
    const int64_t step = g.channels_last ? 1 : plane;
    Channels<V> x = {};
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (c0 + v < g.c) x.x[v] = to_float(from[(c0 + v) * step]);
    store_channels<E, V>(static_cast<E*>(p.rows) + row * pitch + c0, x);
  }
}

// --- The product

template <class G>
__global__ void __launch_bounds__(G::kThreads, G::kBlocksPerSm)
    convolve(Forward p, const int32_t* count) {
  using E = typename G::Element;
  constexpr int kRows = G::BM * 8 / G::kThreads;  // of A that this thread copies in each stage
  PYWINO_DYNAMIC_SHARED(unsigned char, shared);
  const uint32_t stages = ptx::shared_address(shared);

  const Geometry& g = p.geometry;
  const int64_t plane = g.h * g.w;
  const int pixels = *count, pitch = int(padded(g.c, sizeof(E)));
  const int h = int(g.h), w = int(g.w), width = int(g.kernel_w), taps = int(g.kernel_h) * width;
  const int blocks_n = int((g.out_channels + G::BN - 1) / G::BN);
  const int64_t blocks = (int64_t(pixels) + G::BM - 1) / G::BM * blocks_n;
  const int steps = (pitch + G::BK - 1) / G::BK;
  const E* rows = static_cast<const E*>(p.rows ? p.rows : p.input);
  const E* u = static_cast<const E*>(p.filter);

  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int n0 = int(block % blocks_n) * G::BN, m0 = int(block / blocks_n) * G::BM;
    int pixel[kRows];  // or -1
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = m0 + G::row_of(i);
      pixel[i] = row < pixels ? p.list.list[row] : -1;
    }

    int from[kRows];  // this tap's row of each pixel, or -1
    G gemm;
    gemm.run(stages, taps * steps, [&](int iteration, uint32_t stage) {
      const int tap = iteration / steps;
      const int k = iteration % steps * G::BK + G::chunk_of() * (16 / int(sizeof(E)));
      if (iteration % steps == 0) {
        const int down = int(tap / width * g.dil_h - g.pad_h);
        const int right = int(tap % width * g.dil_w - g.pad_w);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int y = pixel[i] / w % h + down, x = pixel[i] % w + right;
          from[i] = -1;
          if (pixel[i] < 0 || y < 0 || y >= h || x < 0 || x >= w) continue;
          const int q = pixel[i] + down * w + right, place = p.list.place[q];
          if (place >= 0) from[i] = p.rows ? place : q;
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool exists = from[i] >= 0 && k < pitch;
        ptx::cp_async_16(stage + G::offset(G::row_of(i), G::chunk_of()),
                         exists ? rows + int64_t(from[i]) * pitch + k : rows, exists ? 16 : 0);
      }
#pragma unroll
      for (int i = 0; i < G::BN * 8 / G::kThreads; ++i) {
        const int row = n0 + G::row_of(i);
        const bool exists = row < g.out_channels && k < pitch;
        ptx::cp_async_16(stage + G::BM * G::kRowBytes + G::offset(G::row_of(i), G::chunk_of()),
                         exists ? u + (int64_t(row) * taps + tap) * pitch + k : u, exists ? 16 : 0);
      }
    });

    E* output = static_cast<E*>(p.output);
    const int64_t K = g.out_channels;
    gemm.write(reinterpret_cast<float*>(shared), [&](int row, int column, const Channels<8>& sums) {
      const int64_t k = n0 + column;
      if (m0 + row >= pixels || k >= K) return;
      const int64_t place = p.list.list[m0 + row], image = place / plane;
      E* to = g.channels_last ? output + place * K + k
                              : output + (image * K + k) * plane + (place - image * plane);
      write_channels(to, sums, p.bias, k, K, g.channels_last ? 1 : plane);
    });
    __syncthreads();  // the finished tile lies where the next block's stages are filled
  }
}

// --- Launches

template <class G>
int launch(const Forward& p, const int32_t* count, void* stream) {
  const int64_t most =
      (p.list.pixels + G::BM - 1) / G::BM * ((p.geometry.out_channels + G::BN - 1) / G::BN);
  if (const auto error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(convolve<G>),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSharedBytes))
    return int(error);
  const unsigned blocks = persistent_blocks(convolve<G>, G::kThreads, G::kSharedBytes, most);
  PYWINO_LAUNCH((convolve<G>), dim3(blocks), dim3(G::kThreads), G::kSharedBytes,
                static_cast<cudaStream_t>(stream), p, count);
  return int(cudaGetLastError());
}

template <class Mma>
int launch_for(const Forward& p, const int32_t* count, void* stream) {
  using E = typename Mma::Element;
  const int64_t bytes = p.list.pixels * p.geometry.out_channels * int64_t(sizeof(E));
  const auto on = static_cast<cudaStream_t>(stream);
  if (const auto error = cudaMemsetAsync(p.output, 0, bytes, on)) return int(error);
  if (p.rows)
    PYWINO_LAUNCH((gather_rows<E>), dim3(unsigned(8 * multiprocessors())), dim3(kRowThreads), 0, on,
                  p, count);
  return p.geometry.out_channels <= 64 ? launch<Gemm<Mma, 128, 64, 4, 2>>(p, count, stream)
                                       : launch<Gemm<Mma, 128, 128, 2, 4>>(p, count, stream);
}

}  // namespace

extern "C" int pywino_masked_conv_list(const List* p, void* stream) {
  const int64_t blocks = list_blocks(p->pixels);
  const auto on = static_cast<cudaStream_t>(stream);
  PYWINO_LAUNCH((count_pixels), dim3(unsigned(blocks)), dim3(kListed), 0, on, *p);
  PYWINO_LAUNCH((sum_counts), dim3(1), dim3(kListed), 0, on, *p, blocks);
  PYWINO_LAUNCH((list_pixels), dim3(unsigned(blocks)), dim3(kListed), 0, on, *p);
  return int(cudaGetLastError());
}

extern "C" int pywino_masked_conv_forward(const Forward* p, void* stream) {
  if (const int error = pywino_masked_conv_list(&p->list, stream)) return error;
  const int32_t* count = p->list.starts + list_blocks(p->list.pixels);
  switch (p->geometry.dtype) {
    case DType::f16: return launch_for<MmaF16>(*p, count, stream);
    case DType::bf16: return launch_for<MmaBf16>(*p, count, stream);
    default:
      return p->strict ? launch_for<MmaTf32x3>(*p, count, stream)
                       : launch_for<MmaTf32>(*p, count, stream);
  }
}

extern "C" const char* pywino_masked_conv_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace pywino::masked_conv::cuda
