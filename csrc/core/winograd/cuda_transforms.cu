// SPDX-License-Identifier: BSD-3-Clause
// The transforms of the three-stage Winograd convolution: V = B^T d B, Y = A^T M A, U = G g G^T; and, of the output's
// gradient, D = A dY A^T, which is V with another matrix and a patch of m x m.
//
// Bytes an output element, F(4x4,3x3), 16-bit tensors, C = K: input read 2 and V written 4.5, M read 4.5 and output written
// 2. Both transforms are bound by memory: about 290 additions and multiplications for the 72 numbers a thread moves.
#include "cuda_tiles.cuh"

namespace pywino::winograd::cuda {
namespace {

// --- input transform

// d itself, or relu(g d) of one channel: a second one's gate would be too many registers. Zeros around the image stay zero.
template <int V, bool kGated>
struct Gate {
  __device__ Gate(const InputTransform&, int64_t) {}
  __device__ Channels<V> apply(const Channels<V>& d) const { return d; }
};
template <>
struct Gate<1, true> {
  float g;

  __device__ Gate(const InputTransform& p, int64_t c) : g(c < p.map.c ? p.gate[c] : 0.f) {}
  __device__ Channels<1> apply(Channels<1> d) const {
    d.x[0] *= g;
    d.x[0] = d.x[0] < 0.f ? 0.f : d.x[0];  // NaN stays
    return d;
  }
};

// `warps_per_tile` warps share a tile: lane l of warp w has channels (w 32 + l) V to + V, then those one sweep further.
// The f16 domain needs the tile's largest input before the first V is written, so it sweeps twice; the second time the
// patch (A A C numbers) comes from the L1 cache. Where channels have scales, their peaks are given.
template <class From, int V, class In, class Out>
__global__ void __launch_bounds__(kThreads, From::kTile == 6 ? 1 : 2)
    input_transform(InputTransform p, int warps_per_tile) {
  constexpr int A = From::A, kSize = From::kSize;
  constexpr bool kScaled = std::is_same_v<Out, __half>;
  __shared__ float largest[kWarps];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t tile = int64_t(blockIdx.x) * (kWarps / warps_per_tile) + warp / warps_per_tile;
  const bool exists = tile < p.count;
  const int64_t begin = int64_t(warp % warps_per_tile * 32 + lane) * V;
  const int64_t sweep = int64_t(warps_per_tile) * 32 * V;
  const auto patch = patch_of<From::kTile, V, In>(
      p.input, p.map, p.tiles, position(p.tiles, p.first + (exists ? tile : 0)), p.pad_h, p.pad_w);

  float scale = 1.f;
  if (kScaled && !p.peaks) {
    float top = 0.f;
    if (exists)
      for (int64_t c = begin; c < p.map.c; c += sweep) {
        const Gate<V, From::kGated> gate(p, c);
#pragma unroll 1
        for (int i = 0; i < kSize; ++i)
#pragma unroll
          for (int j = 0; j < kSize; ++j) {
            const Channels<V> d = gate.apply(patch.at(i, j, c, true));
#pragma unroll
            for (int e = 0; e < V; ++e) top = fmaxf(top, fabsf(d.x[e]));
          }
      }
#pragma unroll
    for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    if (lane == 0) largest[warp] = top;
    __syncthreads();
    const int first = warp / warps_per_tile * warps_per_tile;
    for (int w = 0; w < warps_per_tile; ++w) top = fmaxf(top, largest[first + w]);
    const int exponent = exponent_above(top, From::kGrowth);
    scale = power_of_two(-exponent);
    if (exists && begin == 0) p.scale[tile] = power_of_two(exponent);
  }
  if (!exists) return;

  Out* v = static_cast<Out*>(p.v) + tile * p.channels;
  const int64_t tap = p.count * p.channels;
  for (int64_t c = begin; c < p.channels; c += sweep) {
    const Gate<V, From::kGated> gate(p, c);
    Channels<V> columns[A][kSize];  // B^T d
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      Channels<V> d[kSize], o[A];
#pragma unroll
      for (int i = 0; i < kSize; ++i) d[i] = gate.apply(patch.at(i, j, c, c < p.map.c));
      From::transform(d, o);
#pragma unroll
      for (int i = 0; i < A; ++i) columns[i][j] = o[i];
    }
    float scales[V];
#pragma unroll
    for (int e = 0; e < V; ++e)
      scales[e] = kScaled && p.peaks && c + e < p.map.c
                      ? power_of_two(-exponent_above(p.peaks[c + e], From::kGrowth))
                      : scale;
    store_in_domain<From>(columns, scales, p.relu, v + c, tap);
  }
}

// --- output transform

// Writes V neighbouring channels of a tile, and returns their sums.
template <int M, int V, class Out, class In>
__device__ Channels<V> output_tile(const OutputTransform& p, int64_t tile, int64_t k) {
  constexpr int A = Transform<M>::A;
  const In* m = static_cast<const In*>(p.m) + tile * p.channels + k;
  const int64_t tap = p.count * p.channels;
  Channels<V> columns[M][A];  // A^T M
  load_from_domain<M>(m, tap, columns);

  const Position at = position(p.tiles, p.first + tile);
  const int64_t corner = at.n * p.map.stride_n + k * p.map.stride_c;
  Channels<V> scale, bias;
#pragma unroll
  for (int e = 0; e < V; ++e) {
    scale.x[e] = std::is_same_v<In, __half> ? p.tile_scale[tile] * p.filter_scale[k + e] : 1.f;
    bias.x[e] = p.bias ? p.bias[k + e] : 0.f;
  }
  Channels<V> sum = {};
  const Out* residual = static_cast<const Out*>(p.residual);
  Out* output = static_cast<Out*>(p.output);
#pragma unroll
  for (int i = 0; i < M; ++i) {
    Channels<V> o[M];
    Transform<M>::output(columns[i], o);
    const int64_t y = int64_t(at.row * M + i) * p.tiles.dil_h + at.phase_h;
    if (y >= p.map.h) break;
#pragma unroll
    for (int j = 0; j < M; ++j) {
      const int64_t x = int64_t(at.column * M + j) * p.tiles.dil_w + at.phase_w;
      if (x >= p.map.w) break;
      const int64_t place = corner + y * p.map.stride_h + x * p.map.stride_w;
#pragma unroll
      for (int e = 0; e < V; ++e) o[j].x[e] = o[j].x[e] * scale.x[e] + bias.x[e];
      if (residual) o[j] = o[j] + load_channels<Out, V>(residual + place);
      if (p.relu)
#pragma unroll
        for (int e = 0; e < V; ++e) o[j].x[e] = o[j].x[e] < 0.f ? 0.f : o[j].x[e];
      sum = sum + o[j];
      store_channels<Out, V>(output + place, o[j]);
    }
  }
  return sum;
}

// Where sums are wanted, a block has so many whole tiles of so many groups of V channels.
struct Share {
  int groups, tiles;
  int64_t across;  // blocks for all groups
};
__host__ __device__ inline Share share_of(int64_t groups) {
  const int own = groups < kThreads ? int(groups) : kThreads;
  return {own, kThreads / own, (groups + own - 1) / own};
}

// One thread has V neighbouring channels of a tile, which V divides; neighbouring threads the next ones.
template <int M, int V, class Out, class In>
__global__ void __launch_bounds__(kThreads, 2) output_transform(OutputTransform p) {
  __shared__ float sums[kThreads * V];
  const int64_t groups = p.map.c / V;
  if (!p.partial) {
    const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (index < p.count * groups) output_tile<M, V, Out, In>(p, index / groups, index % groups * V);
    return;
  }
  const Share share = share_of(groups);
  const int row = int(threadIdx.x) / share.groups, column = int(threadIdx.x) % share.groups;
  const int64_t part = blockIdx.x / share.across, tile = part * share.tiles + row;
  const int64_t k = (blockIdx.x % share.across * share.groups + column) * V;
  Channels<V> sum = {};
  if (row < share.tiles && tile < p.count && k < p.map.c)
    sum = output_tile<M, V, Out, In>(p, tile, k);
#pragma unroll
  for (int e = 0; e < V; ++e) sums[threadIdx.x * V + e] = sum.x[e];
  __syncthreads();
  if (row > 0) return;
  for (int r = 1; r < share.tiles; ++r)
#pragma unroll
    for (int e = 0; e < V; ++e) sum.x[e] += sums[(r * share.groups + column) * V + e];
  if (k >= p.map.c) return;
#pragma unroll
  for (int e = 0; e < V; ++e) p.partial[part * p.map.c + k + e] = sum.x[e];
}

// A lane has a channel; warps share the parts, and their sums are added in one order.
constexpr int kMeanThreads = 1024;

__global__ void __launch_bounds__(kMeanThreads) means(Means p) {
  __shared__ float shares[kMeanThreads];
  const int64_t c = int64_t(blockIdx.x) * 32 + threadIdx.x % 32;
  float sum = 0.f;
  if (c < p.channels) {
#pragma unroll 8
    for (int64_t part = threadIdx.x / 32; part < p.parts; part += kMeanThreads / 32)
      sum += p.partial[part * p.channels + c];
  }
  shares[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || c >= p.channels) return;
  for (int share = 1; share < kMeanThreads / 32; ++share) sum += shares[share * 32 + threadIdx.x];
  p.mean[c] = sum / float(p.pixels);
}

// --- filter transform

// U of one pair of channels, in double precision as on the CPU: its error would be in every output.
template <int M, class W>
__device__ void transform_kernel(const FilterTransform& p, int64_t k, int64_t c, double* u) {
  constexpr int A = M == 1 ? 3 : M + 2;  // tile 1: the kernel itself
  const W* weight = static_cast<const W*>(p.weight) + k * p.stride_k + c * p.stride_c;
  const auto at = [&](int i, int j) {
    if (p.rotate && p.spatial) i = 2 - i, j = 2 - j;
    return double(to_float(weight[i * p.stride_h + j * p.stride_w]));
  };
  if constexpr (M == 1) {
    for (int i = 0; i < 9; ++i) u[i] = at(i / 3, i % 3);
  } else if (!p.spatial) {
    for (int i = 0; i < A * A; ++i) u[i] = at(i / A, i % A);
  } else {
    double columns[A][3];
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      double g[3], o[A];
#pragma unroll
      for (int i = 0; i < 3; ++i) g[i] = at(i, j);
      Transform<M>::filter(g, o);
#pragma unroll
      for (int i = 0; i < A; ++i) columns[i][j] = o[i];
    }
#pragma unroll
    for (int i = 0; i < A; ++i) Transform<M>::filter(columns[i], u + i * A);
  }
}

// One block has one output channel k of U; where there is a scale, it sweeps twice.
template <int M, class W, class E>
__global__ void __launch_bounds__(kThreads) filter_transform(FilterTransform p) {
  constexpr int A = M == 1 ? 3 : M + 2;
  __shared__ float largest[kWarps];
  const int64_t k = blockIdx.x;
  float scale = 1.f;
  if (p.scale && k < p.out_channels) {
    float top = 0.f;
    for (int64_t c = threadIdx.x; c < p.in_channels; c += kThreads) {
      double u[A * A];
      transform_kernel<M, W>(p, k, c, u);
#pragma unroll
      for (int i = 0; i < A * A; ++i)
        top = fmaxf(top, fabsf(float(u[i])) * tap_scale<Filters<M>>(i / A, i % A));
    }
#pragma unroll
    for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = top;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, largest[w]);
    const int exponent = exponent_above(top, 0);
    scale = power_of_two(-exponent);
    if (threadIdx.x == 0) p.scale[k] = power_of_two(exponent);
  }
  E* row = static_cast<E*>(p.u) + k * p.padded_in;
  const int64_t tap = p.padded_out * p.padded_in;
  for (int64_t c = threadIdx.x; c < p.padded_in; c += kThreads) {
    double u[A * A] = {};
    if (k < p.out_channels && c < p.in_channels) transform_kernel<M, W>(p, k, c, u);
#pragma unroll
    for (int i = 0; i < A * A; ++i) {
      const float of_tap = std::is_same_v<E, __half> ? tap_scale<Filters<M>>(i / A, i % A) : 1.f;
      row[i * tap + c] = from_float<E>(float(u[i]) * (scale * of_tap));
    }
  }
}

bool writes_pairs(const OutputTransform& p) {
  return in_pairs(p.map, p.tiles.size, {p.residual, p.output});
}

// Groups of the channels that a thread has.
int64_t groups_of(const OutputTransform& p) { return p.map.c / (writes_pairs(p) ? 2 : 1); }

}  // namespace

int64_t sum_parts(const OutputTransform& p) {
  const int64_t tiles = share_of(groups_of(p)).tiles;
  return (p.count + tiles - 1) / tiles;
}

extern "C" int pywino_winograd_input_transform(const InputTransform* p, void* stream) {
  if (is_nchw(p->map) && !p->gate) return pywino_winograd_input_transform_nchw(p, stream);
  const bool pairs = !p->gate && in_pairs(p->map, p->tiles.size, {p->input});
  int warps_per_tile = 1;
  while (warps_per_tile < kWarps && warps_per_tile * 32 * (pairs ? 2 : 1) < p->channels)
    warps_per_tile *= 2;
  const int64_t per_block = kWarps / warps_per_tile;
  const dim3 grid = blocks((p->count + per_block - 1) / per_block);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  bool known = true;
  known &= with_tile(p->tiles.size, [&](auto tile) {
    constexpr int M = decltype(tile)::value, kPair = M == 6 ? 1 : 2;
    const auto launch_as = [&](auto from) {
      using From = typename decltype(from)::type;
      known &= with_types(p->dtype, p->domain, [&](auto in, auto out) {
        using In = typename decltype(in)::type;
        using Out = typename decltype(out)::type;
        if (pairs)
          PYWINO_LAUNCH((input_transform<From, kPair, In, Out>), grid, dim3(kThreads), 0, on, *p,
                        warps_per_tile);
        else
          PYWINO_LAUNCH((input_transform<From, 1, In, Out>), grid, dim3(kThreads), 0, on, *p,
                        warps_per_tile);
      });
    };
    if (p->gate)
      known &= with_types(p->dtype, p->domain, [&](auto in, auto out) {
        PYWINO_LAUNCH((input_transform<GatedPatches<M>, 1, typename decltype(in)::type,
                                       typename decltype(out)::type>),
                      grid, dim3(kThreads), 0, on, *p, warps_per_tile);
      });
    else
      p->gradient ? launch_as(Type<OutputTiles<M>>{}) : launch_as(Type<Patches<M>>{});
  });
  return int(known ? cudaGetLastError() : cudaErrorInvalidValue);
}

extern "C" int pywino_winograd_output_transform(const OutputTransform* p, void* stream) {
  if (is_nchw(p->map) && !p->partial) return pywino_winograd_output_transform_nchw(p, stream);
  const bool pairs = writes_pairs(*p);
  const int64_t groups = groups_of(*p);
  const dim3 grid = blocks(p->partial ? sum_parts(*p) * share_of(groups).across
                                      : (p->count * groups + kThreads - 1) / kThreads);
  bool known = true;
  known &= with_tile(p->tiles.size, [&](auto tile) {
    known &= with_types(p->dtype, p->domain, [&](auto out, auto in) {
      using Out = typename decltype(out)::type;
      using In = typename decltype(in)::type;
      constexpr int M = decltype(tile)::value, kPair = M == 6 ? 1 : 2;
      const cudaStream_t on = static_cast<cudaStream_t>(stream);
      if (pairs)
        PYWINO_LAUNCH((output_transform<M, kPair, Out, In>), grid, dim3(kThreads), 0, on, *p);
      else
        PYWINO_LAUNCH((output_transform<M, 1, Out, In>), grid, dim3(kThreads), 0, on, *p);
    });
  });
  return int(known ? cudaGetLastError() : cudaErrorInvalidValue);
}

extern "C" int pywino_winograd_means(const Means* p, void* stream) {
  PYWINO_LAUNCH((means), blocks((p->channels + 31) / 32), dim3(kMeanThreads), 0,
                static_cast<cudaStream_t>(stream), *p);
  return int(cudaGetLastError());
}

extern "C" int pywino_winograd_filter_transform(const FilterTransform* p, void* stream) {
  const dim3 grid = blocks(p->padded_out);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  bool known = true;
  if (p->tile == 1) {
    known = p->element == p->dtype;
    with_dtype(p->dtype, [&](auto weight) {
      using W = typename decltype(weight)::type;
      if (known) PYWINO_LAUNCH((filter_transform<1, W, W>), grid, dim3(kThreads), 0, on, *p);
    });
  } else {
    const Domain domain = p->element == DType::f16 ? Domain::f16 : Domain::f32;
    known &= with_tile(p->tile, [&](auto tile) {
      known &= with_types(p->dtype, domain, [&](auto weight, auto element) {
        using W = typename decltype(weight)::type;
        using E = typename decltype(element)::type;
        PYWINO_LAUNCH((filter_transform<decltype(tile)::value, W, E>), grid, dim3(kThreads), 0, on,
                      *p);
      });
    });
  }
  return int(known ? cudaGetLastError() : cudaErrorInvalidValue);
}

extern "C" const char* pywino_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

extern "C" int pywino_cuda_versions(int* driver, int* library) {
  const auto error = cudaDriverGetVersion(driver);
  return int(error ? error : cudaRuntimeGetVersion(library));
}

}  // namespace pywino::winograd::cuda
