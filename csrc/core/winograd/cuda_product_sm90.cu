// SPDX-License-Identifier: BSD-3-Clause
// The product of the Winograd convolution on Hopper, by wgmma and TMA: M[tap] = V[tap] U[tap]^T in the f16 domain. Compiled for
// sm_90a alone; cuda_product.cu launches it where it can run, and has the product for all else.
#include <algorithm>

#include "../common/gemm_sm90.cuh"
#include "../common/tensor_maps.h"
#include "cuda.h"

namespace pywino::winograd::cuda {
namespace {

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1)
    product_sm90(const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap u,
                 const __grid_constant__ CUtensorMap m, GroupedTiles tiles, int steps) {
  PYWINO_DYNAMIC_SHARED(unsigned char, shared);
  G::run(shared, &v, &u, &m, tiles, steps);
}

// A box of `box_rows` rows of 64 channels in [tap][row][channel].
bool map_of(CUtensorMap* map, const void* p, int64_t channels, int64_t rows, int taps,
            int box_rows) {
  const cuuint64_t extent[] = {cuuint64_t(channels), cuuint64_t(rows), cuuint64_t(taps)};
  const cuuint64_t stride[] = {cuuint64_t(channels) * 2, cuuint64_t(channels * rows) * 2};
  const cuuint32_t box[] = {64, cuuint32_t(box_rows), 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, p, extent, stride, box,
                CU_TENSOR_MAP_SWIZZLE_128B);
}

template <class G>
GroupedTiles tiles_of(const Product& p) {
  return grouped_tiles<G>(p.taps, p.tiles, p.out_channels);
}

template <class G>
int launch(const Product& p, int multiprocessors, void* stream) {
  CUtensorMap v, u, m;
  if (!map_of(&v, p.v, p.channels, p.tiles, p.taps, G::BM) ||
      !map_of(&u, p.u, p.channels, p.out_channels, p.taps, G::BN) ||
      !map_of(&m, p.m, p.out_channels, p.tiles, p.taps, 64))
    return int(cudaErrorInvalidValue);
  if (const auto error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(product_sm90<G>),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSharedBytes))
    return int(error);
  const GroupedTiles tiles = tiles_of<G>(p);
  const unsigned blocks = unsigned(std::min(multiprocessors, tiles.count()));
  PYWINO_LAUNCH((product_sm90<G>), dim3(blocks), dim3(G::kThreads), G::kSharedBytes,
                static_cast<cudaStream_t>(stream), v, u, m, tiles,
                int((p.channels + G::BK - 1) / G::BK));
  return int(cudaGetLastError());
}

// What all blocks compute until the last one ends, in outputs of a block: waves of tiles.
template <class G>
int64_t waves(const Product& p, int multiprocessors) {
  const int count = tiles_of<G>(p).count();
  return int64_t((count + multiprocessors - 1) / multiprocessors) * G::BM * G::BN;
}

// Stages of 48 KB, 85 operations a byte: for many outputs, and for up to 128; and the small tile where the large ones would
// leave multiprocessors idle at the end.
using Wide = GemmSm90<128, 256, 4>;
using Tall = GemmSm90<256, 128, 4>;
using Small = GemmSm90<128, 128, 6>;

}  // namespace

extern "C" int pywino_winograd_product_sm90(const Product* p, void* stream) {
  const int n = multiprocessors();
  const int64_t wide = waves<Wide>(*p, n), tall = waves<Tall>(*p, n), small = waves<Small>(*p, n);
  if (wide <= tall && wide <= small) return launch<Wide>(*p, n, stream);
  if (tall <= small) return launch<Tall>(*p, n, stream);
  return launch<Small>(*p, n, stream);
}

}  // namespace pywino::winograd::cuda
