// SPDX-License-Identifier: BSD-3-Clause
// The tiles of a grouped product D[g] = A[g] B[g]^T, and how many persistent blocks go from one to the next.
#pragma once

#include <algorithm>
#include <cstdint>

#include "launch.cuh"

namespace pywino {

// The tiles of all groups in one row: neighbours share rows of A, then come the other rows, then the other groups, so that
// blocks that run at the same time read A once from memory and one group's B from L2. A tile is kilobytes of D, so an int
// counts them all.
struct GroupedTiles {
  int groups, blocks_m, blocks_n;

  struct Tile {
    int group, row, column;  // the first ones
  };

  __host__ __device__ int count() const { return groups * blocks_m * blocks_n; }
  template <int kBlockM, int kBlockN>
  __device__ Tile at(int index) const {
    const int block_m = index / blocks_n;
    return {block_m / blocks_m, block_m % blocks_m * kBlockM, index % blocks_n * kBlockN};
  }
};

// The tiles, of G's size, of so many products of `rows` x `columns`.
template <class G>
GroupedTiles grouped_tiles(int64_t groups, int64_t rows, int64_t columns) {
  return {int(groups), int((rows + G::BM - 1) / G::BM), int((columns + G::BN - 1) / G::BN)};
}

inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// How many blocks of a kernel run at the same time, and no more than there are tiles.
template <class Kernel>
inline unsigned persistent_blocks(Kernel* kernel, int threads, int shared_bytes, int64_t tiles) {
  int of_each = 1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, threads, size_t(shared_bytes));
  return unsigned(std::min<int64_t>(tiles, int64_t(multiprocessors()) * std::max(of_each, 1)));
}

}  // namespace pywino
