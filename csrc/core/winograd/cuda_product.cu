// SPDX-License-Identifier: BSD-3-Clause
// The middle stage of the Winograd convolution: for each tap, M = V U^T on tensor cores; and of the weight gradient,
// S = D^T V, which is summed over tiles.
//
// Operations: 2 C K a tile and tap, so a^2 / (9 m^2) of the direct convolution's (F4: a quarter). Bytes: V read once from
// memory when the blocks that share its rows run side by side (columns innermost in the block order), U from L2.
#include <atomic>

#include "../common/gemm.cuh"
#include "../common/grouped_tiles.cuh"
#include "../common/launch.cuh"
#include "../common/tensor_maps.h"
#include "cuda.h"

namespace pywino::winograd::cuda {
namespace {

// Blocks are persistent: the steps of k of all tiles of a block follow one another in one pipeline.
template <class G>
__global__ void __launch_bounds__(G::kThreads, G::kBlocksPerSm)
    product(Product p, GroupedTiles tiles) {
  using E = typename G::Element;
  PYWINO_DYNAMIC_SHARED(unsigned char, shared);

  const int first = int(blockIdx.x), stride = int(gridDim.x);
  const int steps = int((p.channels + G::BK - 1) / G::BK);
  const int count = (tiles.count() - first + stride - 1) / stride;  // of this block

  // What the next copies read: a tile's rows of V and U, how many of each there are, and k.
  const E *v = nullptr, *u = nullptr;
  int rows_of_v = 0, rows_of_u = 0, k = steps * G::BK, loaded = first;
  const auto load = [&](int, uint32_t stage) {
    if (k == steps * G::BK) {
      const auto tile = tiles.at<G::BM, G::BN>(loaded);
      v = static_cast<const E*>(p.v) + (tile.group * p.tiles + tile.row) * p.channels;
      u = static_cast<const E*>(p.u) + (tile.group * p.out_channels + tile.column) * p.channels;
      rows_of_v = int(p.tiles) - tile.row;
      rows_of_u = int(p.out_channels) - tile.column;
      loaded += stride;
      k = 0;
    }
    // Rows that do not exist, and k beyond C', are filled with zeros; the address must be a good one all the same.
    const int column = k + G::chunk_of() * (16 / int(sizeof(E)));
    const auto copy = [&](uint32_t to, const E* from, int rows, int row) {
      const bool exists = row < rows && column < p.channels;
      ptx::cp_async_16(to + G::offset(row, G::chunk_of()),
                       exists ? from + row * p.channels + column : from, exists ? 16 : 0);
    };
#pragma unroll
    for (int i = 0; i < G::BM * 8 / G::kThreads; ++i) copy(stage, v, rows_of_v, G::row_of(i));
#pragma unroll
    for (int i = 0; i < G::BN * 8 / G::kThreads; ++i)
      copy(stage + G::BM * G::kRowBytes, u, rows_of_u, G::row_of(i));
    k += G::BK;
  };

  G gemm;
  int written = first;
  gemm.run_tiles(ptx::shared_address(shared), count, steps, load, [&] {
    const auto tile = tiles.at<G::BM, G::BN>(written);
    written += stride;
    E* m = static_cast<E*>(p.m) + (tile.group * p.tiles + tile.row) * p.out_channels + tile.column;
    gemm.template write_from_registers<E>([&](int row, int column) -> E* {
      const bool exists = tile.row + row < p.tiles && tile.column + column < p.out_channels;
      return exists ? m + row * p.out_channels + column : nullptr;
    });
  });
}

// S[split][tap] (+)= D[tap]^T V[tap]. Blocks of one split and tap run side by side: they share its rows of D and V in L2.
template <class G>
__global__ void __launch_bounds__(G::kThreads, G::kBlocksPerSm) summed_product(SummedProduct p) {
  using E = typename G::Element;
  PYWINO_DYNAMIC_SHARED(unsigned char, shared);

  const int64_t blocks_n = (p.channels + G::BN - 1) / G::BN;
  const int64_t blocks_m = (p.out_channels + G::BM - 1) / G::BM;
  const int64_t n0 = blockIdx.x % blocks_n * G::BN;
  const int64_t m0 = blockIdx.x / blocks_n % blocks_m * G::BM;
  const int64_t tap = blockIdx.x / blocks_n / blocks_m % p.taps;
  const int64_t split = blockIdx.x / blocks_n / blocks_m / p.taps;
  const int64_t steps = (p.tiles + G::BK - 1) / G::BK;
  const int64_t begin = split * steps / p.splits, end = (split + 1) * steps / p.splits;
  const E* d = static_cast<const E*>(p.d) + tap * p.tiles * p.out_channels;
  const E* v = static_cast<const E*>(p.v) + tap * p.tiles * p.channels;

  // Tiles and channels that do not exist are filled with zeros.
  const auto copy = [&](uint32_t to, const E* from, int64_t tile, int64_t c, int64_t channels) {
    const bool exists = tile < p.tiles && c < channels;
    ptx::cp_async_16(to, exists ? from + tile * channels + c : from, exists ? 16 : 0);
  };
  G gemm;
  gemm.run(shared, int(end - begin), [&](int iteration, uint32_t to_d, uint32_t to_v) {
    const int64_t tile = (begin + iteration) * G::BK;
    G::template for_chunks<G::BM>(to_d, [&](int row, int column, uint32_t to) {
      copy(to, d, tile + row, m0 + column, p.out_channels);
    });
    G::template for_chunks<G::BN>(to_v, [&](int row, int column, uint32_t to) {
      copy(to, v, tile + row, n0 + column, p.channels);
    });
  });

  float* s = p.s + (split * p.taps + tap) * p.out_channels * p.channels;
  gemm.write(reinterpret_cast<float*>(shared), [&](int row, int column, const Channels<8>& sums) {
    if (m0 + row >= p.out_channels || n0 + column >= p.channels) return;
    float* to = s + (m0 + row) * p.channels + n0 + column;
#pragma unroll
    for (int half = 0; half < 8; half += 4) {
      Channels<4> sum = {{sums.x[half], sums.x[half + 1], sums.x[half + 2], sums.x[half + 3]}};
      if (p.accumulate) sum = sum + load_channels<float, 4>(to + half);
      store_channels(to + half, sum);
    }
  });
}

template <class G>
int launch(const SummedProduct& p, void* stream) {
  const int64_t blocks = (p.out_channels + G::BM - 1) / G::BM * ((p.channels + G::BN - 1) / G::BN);
  if (const auto error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(summed_product<G>),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSharedBytes))
    return int(error);
  PYWINO_LAUNCH((summed_product<G>), dim3(unsigned(blocks * p.taps * p.splits)), dim3(G::kThreads),
                G::kSharedBytes, static_cast<cudaStream_t>(stream), p);
  return int(cudaGetLastError());
}

template <class Mma>
int launch_for(const SummedProduct& p, void* stream) {
  if (p.channels <= 64 || p.out_channels <= 64) return launch<GemmTn<Mma, 64, 64, 2, 2>>(p, stream);
  return launch<GemmTn<Mma, 128, 128, 2, 4>>(p, stream);
}

template <class G>
int launch(const Product& p, void* stream) {
  if (const auto error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(product<G>),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSharedBytes))
    return int(error);
  const GroupedTiles tiles = grouped_tiles<G>(p.taps, p.tiles, p.out_channels);
  const unsigned blocks =
      persistent_blocks(product<G>, G::kThreads, G::kSharedBytes, tiles.count());
  PYWINO_LAUNCH((product<G>), dim3(blocks), dim3(G::kThreads), G::kSharedBytes,
                static_cast<cudaStream_t>(stream), p, tiles);
  return int(cudaGetLastError());
}

// Whether blocks of 128 x 128 keep every multiprocessor busy.
bool is_large(const Product& p) {
  const int64_t blocks = p.taps * ((p.tiles + 127) / 128) * ((p.out_channels + 127) / 128);
  return blocks >= 128 && p.tiles > 64;
}

// 128 x 128 where there is enough work for it, narrower blocks for few channels, small ones for few tiles.
template <class Mma>
int launch_for(const Product& p, void* stream) {
  if (!is_large(p)) return launch<Gemm<Mma, 64, 64, 2, 2>>(p, stream);
  if (p.out_channels <= 64) return launch<Gemm<Mma, 128, 64, 4, 2>>(p, stream);
  return launch<Gemm<Mma, 128, 128, 2, 4>>(p, stream);
}

std::atomic<bool> wgmma_allowed{true};

}  // namespace

extern "C" int pywino_winograd_product(const Product* p, void* stream) {
  if (p->domain == Domain::f32) return launch_for<MmaTf32x3>(*p, stream);
#ifdef PYWINO_HAVE_SM90A
  if (is_large(*p) && p->out_channels > 64 && wgmma_allowed && !pywino_winograd_why_no_wgmma())
    return pywino_winograd_product_sm90(p, stream);
#endif
  return launch_for<MmaF16>(*p, stream);
}

extern "C" const char* pywino_winograd_why_no_wgmma() {
#ifdef PYWINO_HAVE_SM90A
  int device = 0, major = 0, minor = 0;
  auto error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error) return cudaGetErrorString(error);
  if (major != 9 || minor != 0) return "wgmma is for GPUs of compute capability 9.0 alone";
  if (!tensor_map_encoder())
    return "the driver makes no tensor maps: update it to CUDA 12 or later";
  return nullptr;
#else
  return "this library holds no code for sm_90a: build it with 9.0a in TORCH_CUDA_ARCH_LIST";
#endif
}

extern "C" void pywino_winograd_allow_wgmma(bool allowed) { wgmma_allowed = allowed; }

extern "C" int pywino_winograd_summed_product(const SummedProduct* p, void* stream) {
  return p->domain == Domain::f16 ? launch_for<MmaF16>(*p, stream)
                                  : launch_for<MmaTf32x3>(*p, stream);
}

}  // namespace pywino::winograd::cuda
