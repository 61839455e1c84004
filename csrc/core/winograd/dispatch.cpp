// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <vector>

#include "tiles.h"
#include "transforms.h"
#include "winograd.h"

namespace pywino::winograd {

PYWINO_CHOOSE_BF16_COPY(ForwardKernels, forward_kernels)
PYWINO_CHOOSE_COPY(SparseKernels, sparse_kernels)
PYWINO_CHOOSE_COPY(BackwardKernels, backward_kernels)

namespace {

// The matrix of a linear map is the map of the unit vectors.
template <int M>
void matrices(double* bt, double* g, double* at) {
  constexpr int A = Transform<M>::A;
  for (int j = 0; j < A; ++j) {
    double unit[A] = {}, o[A];
    unit[j] = 1;
    Transform<M>::input(unit, o);
    for (int i = 0; i < A; ++i) bt[i * A + j] = o[i];
    Transform<M>::output(unit, o);
    for (int i = 0; i < M; ++i) at[i * A + j] = o[i];
    if (j < 3) {
      Transform<M>::filter(unit, o);
      for (int i = 0; i < A; ++i) g[i * 3 + j] = o[i];
    }
  }
}

}  // namespace

bool tile_exists(int tile) { return tile == 2 || tile == 4 || tile == 6; }

void transform_matrices(int tile, double* bt, double* g, double* at) {
  switch (tile) {
    case 2: return matrices<2>(bt, g, at);
    case 4: return matrices<4>(bt, g, at);
    case 6: return matrices<6>(bt, g, at);
  }
}

Status forward(const ForwardParams& params, const Executor& executor) {
  return params.sparse_filter ? sparse_kernels().forward(params, executor)
                              : forward_kernels().forward(params, executor);
}
int64_t tile_count(const Geometry& g) { return Grid(g).tiles; }

int64_t list_tiles(const Geometry& g, const uint8_t* mask, int32_t* list) {
  const Grid grid(g);
  const int64_t H = g.out_h(), W = g.out_w();
  std::vector<uint8_t> met(W);  // columns with a pixel of the mask in one row of tiles
  int64_t count = 0;
  for (int64_t q = 0; q < grid.tiles;) {
    const Piece piece = grid.piece(q, grid.columns.total);
    std::fill(met.begin(), met.end(), 0);
    for (int64_t i = 0, y = piece.y; i < g.tile && y < H; ++i, y += g.dil_h) {
      const uint8_t* row = mask + (piece.image * H + y) * W;
      for (int64_t x = 0; x < W; ++x) met[x] |= row[x];
    }
    for (int s = 0; s < piece.count; ++s, ++q) {
      uint8_t any = 0;
      for (int64_t j = 0, x = piece.offset(s); j < g.tile && x < W; ++j, x += g.dil_w)
        any |= met[x];
      list[count] = int32_t(q);
      count += any;
    }
  }
  return count;
}

bool takes_weight(const Geometry& geometry, bool fast, int threads) {
  return forward_kernels().takes_weight(geometry, fast, threads);
}
int64_t sparse_filter_size(const FilterParams& params, Pattern pattern, const Executor& executor) {
  return sparse_kernels().size(params, pattern, executor);
}
Status sparse_filter(const FilterParams& params, Pattern pattern, int32_t* packed,
                     const Executor& executor) {
  return sparse_kernels().pack(params, pattern, packed, executor);
}
bool sparse_filter_fits(const int32_t* packed, int64_t words, int64_t out_channels,
                        int64_t in_channels, int tile) {
  return sparse_kernels().fits(packed, words, out_channels, in_channels, tile);
}
Status filter(const FilterParams& params, const Executor& executor) {
  return forward_kernels().filter(params, executor);
}
int64_t filter_size(int64_t out_channels, int64_t in_channels, int tile, bool fast) {
  return forward_kernels().filter_size(out_channels, in_channels, tile, fast);
}
Status weight_gradient(const WeightGradientParams& params, const Executor& executor) {
  return backward_kernels().weight_gradient(params, executor);
}
Status domain_input_gradient(const DomainInputGradientParams& params, const Executor& executor) {
  return params.sparse_filter ? sparse_kernels().domain_input_gradient(params, executor)
                              : backward_kernels().domain_input_gradient(params, executor);
}
bool input_gradient_takes_weight(const Geometry& geometry, int threads) {
  return backward_kernels().takes_weight(geometry, threads);
}

}  // namespace pywino::winograd
