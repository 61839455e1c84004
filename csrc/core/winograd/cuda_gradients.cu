// SPDX-License-Identifier: BSD-3-Clause
// The ends of the two gradients: dX = B [ M . (B^T d B > 0) ] B^T of a weight in the Winograd domain (the mask where it is
// Winograd-ReLU's), dW = G^T S G.
//
// Bytes a channel and pixel, F(4x4,3x3): of the input M 2.25 w (w: 2 or 4, of a number in the domain), d 2.25 e (from the
// caches as far as tiles overlap), dX 2.25 x 8, which is 2.25 tiles that read and write a pixel in fp32. Of the weight,
// S 36 x 4 a pair of channels and split: small beside the products.
#include "cuda_tiles.cuh"

namespace pywino::winograd::cuda {
namespace {

// --- input gradient

// A patch and its addresses take up to 180 registers: of small blocks more fit onto a multiprocessor.
constexpr int kPatchThreads = 64;

// One thread has V neighbouring channels of a tile; neighbouring threads the next ones. The mask is V > 0 computed again.
template <int M, int V, class In, class Dom>
__global__ void __launch_bounds__(kPatchThreads, 4) input_gradient(InputGradient p) {
  constexpr int A = Transform<M>::A;
  const int64_t groups = (p.map.c + V - 1) / V;
  const int64_t index = int64_t(blockIdx.x) * kPatchThreads + threadIdx.x;
  if (index >= p.count * groups) return;
  const int64_t tile = index / groups, c = index % groups * V;
  const Position at = position(p.tiles, p.first + tile);
  if (at.row % 2 != p.row || at.column % 2 != p.column) return;
  const auto patch = patch_of<M, V, In>(p.input, p.map, p.tiles, at, p.pad_h, p.pad_w);

  const bool masked = p.input != nullptr;
  Channels<V> columns[A][A];  // B^T d
  if (masked) {
#pragma unroll
    for (int j = 0; j < A; ++j) {
      Channels<V> d[A], o[A];
#pragma unroll
      for (int i = 0; i < A; ++i) d[i] = patch.at(i, j, c, true);
      Transform<M>::input(d, o);
#pragma unroll
      for (int i = 0; i < A; ++i) columns[i][j] = o[i];
    }
  }

  const Dom* m = static_cast<const Dom*>(p.m) + tile * p.channels + c;
  const int64_t tap = p.count * p.channels;
#pragma unroll
  for (int i = 0; i < A; ++i) {  // row i of M . (V > 0) takes its place
    Channels<V> v[A];
    if (masked) Transform<M>::input(columns[i], v);
#pragma unroll
    for (int j = 0; j < A; ++j) {
      columns[i][j] = load_channels<Dom, V>(m);
      if (std::is_same_v<Dom, __half>)
        columns[i][j] =
            1 / (tap_scale<OutputTiles<M>>(i, j) * tap_scale<Filters<M>>(i, j)) * columns[i][j];
      m += tap;
#pragma unroll
      for (int e = 0; e < V; ++e)
        if (masked && !(v[j].x[e] > 0.f)) columns[i][j].x[e] = 0.f;
    }
  }
#pragma unroll
  for (int j = 0; j < A; ++j) {  // B [ ... ]
    Channels<V> d[A], o[A];
#pragma unroll
    for (int i = 0; i < A; ++i) d[i] = columns[i][j];
    Transform<M>::input_transposed(d, o);
#pragma unroll
    for (int i = 0; i < A; ++i) columns[i][j] = o[i];
  }

  Channels<V> scale;
#pragma unroll
  for (int e = 0; e < V; ++e)
    scale.x[e] = std::is_same_v<Dom, __half> ? p.tile_scale[tile] * p.filter_scale[c + e] : 1.f;
  float* row = p.gradient + at.n * p.map.stride_n + patch.y * p.map.stride_h +
               patch.x * p.map.stride_w + c * p.map.stride_c;
#pragma unroll
  for (int i = 0; i < A; ++i) {
    const int y = patch.y + i * patch.step_y;
    if (y >= 0 && y < patch.height) {
      Channels<V> o[A];
      Transform<M>::input_transposed(columns[i], o);
      float* to = row;
#pragma unroll
      for (int j = 0; j < A; ++j) {
        const int x = patch.x + j * patch.step_x;
#pragma unroll
        for (int e = 0; e < V; ++e) o[j].x[e] *= scale.x[e];
        if (x >= 0 && x < patch.width) store_channels(to, load_channels<float, V>(to) + o[j]);
        to += patch.step_x * patch.stride_w;
      }
    }
    row += patch.step_y * patch.stride_h;
  }
}

// --- filter gradient

// One thread has one pair of channels, neighbouring threads neighbouring input channels.
template <int M, class W>
__global__ void __launch_bounds__(kThreads) filter_gradient(FilterGradient p) {
  constexpr int A = Transform<M>::A;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.out_channels * p.in_channels) return;
  const int64_t k = index / p.in_channels, c = index % p.in_channels;

  const float* s = p.s + k * p.padded_in + c;
  const int64_t tap = p.padded_out * p.padded_in;
  // Both scales as one exponent: their product may leave the range of fp32 where its use does not.
  const int exponent = p.grad_peaks ? exponent_above(p.grad_peaks[k], OutputTiles<M>::kGrowth) +
                                          exponent_above(p.input_peaks[c], Patches<M>::kGrowth)
                                    : 0;
  const auto sum = [&](int i) {
    float x = 0.f;
    for (int split = 0; split < p.splits; ++split) x += s[(split * A * A + i) * tap];
    const int of_tap = OutputTiles<M>::shift(i / A) + OutputTiles<M>::shift(i % A);
    return ldexpf(x, exponent - (p.grad_peaks ? of_tap : 0));
  };
  W* gradient = static_cast<W*>(p.gradient);
  if (!p.spatial) {
    for (int i = 0; i < A * A; ++i) gradient[index * A * A + i] = from_float<W>(sum(i));
    return;
  }
  float columns[3][A];  // G^T S
#pragma unroll
  for (int j = 0; j < A; ++j) {
    float u[A], o[3];
#pragma unroll
    for (int i = 0; i < A; ++i) u[i] = sum(i * A + j);
    Transform<M>::filter_transposed(u, o);
#pragma unroll
    for (int i = 0; i < 3; ++i) columns[i][j] = o[i];
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    float o[3];
    Transform<M>::filter_transposed(columns[i], o);
#pragma unroll
    for (int j = 0; j < 3; ++j) gradient[index * 9 + i * 3 + j] = from_float<W>(o[j]);
  }
}

}  // namespace

extern "C" int pywino_winograd_input_gradient(const InputGradient* p, void* stream) {
  const bool pairs = in_pairs(p->map, p->tiles.size, {p->input, p->gradient});
  const int64_t threads = p->count * ((p->map.c + pairs) / (1 + pairs));
  const dim3 grid = blocks((threads + kPatchThreads - 1) / kPatchThreads);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  bool known = true;
  known &= with_tile(p->tiles.size, [&](auto tile) {
    known &= with_types(p->dtype, p->domain, [&](auto in, auto domain) {
      using In = typename decltype(in)::type;
      using Dom = typename decltype(domain)::type;
      constexpr int M = decltype(tile)::value, kPair = M == 6 ? 1 : 2;
      if (pairs)
        PYWINO_LAUNCH((input_gradient<M, kPair, In, Dom>), grid, dim3(kPatchThreads), 0, on, *p);
      else
        PYWINO_LAUNCH((input_gradient<M, 1, In, Dom>), grid, dim3(kPatchThreads), 0, on, *p);
    });
  });
  return int(known ? cudaGetLastError() : cudaErrorInvalidValue);
}

extern "C" int pywino_winograd_filter_gradient(const FilterGradient* p, void* stream) {
  const dim3 grid = blocks((p->out_channels * p->in_channels + kThreads - 1) / kThreads);
  const bool known = with_tile(p->tile, [&](auto tile) {
    with_dtype(p->dtype, [&](auto weight) {
      using W = typename decltype(weight)::type;
      PYWINO_LAUNCH((filter_gradient<decltype(tile)::value, W>), grid, dim3(kThreads), 0,
                    static_cast<cudaStream_t>(stream), *p);
    });
  });
  return int(known ? cudaGetLastError() : cudaErrorInvalidValue);
}

}  // namespace pywino::winograd::cuda
