// SPDX-License-Identifier: BSD-3-Clause
// The transforms of the three-stage Winograd convolution: V = B^T d B, Y = A^T M A, U = G g G^T.
//
// Bytes an output element, F(4x4,3x3), 16-bit tensors, C = K: input read 2 and V written 4.5, M read 4.5 and output written
// 2. Both transforms are bound by memory: about 290 additions and multiplications for the 72 numbers a thread moves.
#include "../common/channels.cuh"
#include "../common/launch.cuh"
#include "cuda.h"
#include "transforms.h"

namespace pywino::winograd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <class E>
struct Type {
  using type = E;
};

// The tile that has a number.
struct Position {
  int64_t n;
  int phase_h, phase_w, row, column;
};

__device__ inline Position position(const Tiles& tiles, int64_t index) {
  Position p;
  p.column = int(index % tiles.columns);
  index /= tiles.columns;
  p.row = int(index % tiles.rows);
  index /= tiles.rows;
  p.phase_w = int(index % tiles.phases_w);
  index /= tiles.phases_w;
  p.phase_h = int(index % tiles.phases_h);
  p.n = index / tiles.phases_h;
  return p;
}

// |B^T d B| <= 2^growth(m) max |d|: the square of the largest absolute row sum of B^T, rounded up to a power of two
// (F2: 2 and 4; F4: 5.28 and 27.9; F6: 15 and 225).
constexpr int growth(int tile) { return tile == 2 ? 2 : tile == 4 ? 5 : 8; }

// The power of two above 2^bits x, x >= 0, as an exponent that 2^exponent and 2^-exponent both have as floats.
__device__ inline int exponent_above(float x, int bits) {
  if (x == 0.f) return 0;
  const int exponent = int(__float_as_uint(x) >> 23) - 126 + bits;
  return exponent > 126 ? 126 : exponent;
}
__device__ inline float power_of_two(int exponent) {
  return __uint_as_float(uint32_t(exponent + 127) << 23);
}

// --- input transform

// The patch of a tile: rows and columns of the input, d apart, zeros outside.
template <int A, int V, class In>
struct Patch {
  const In* origin;  // of the image
  int64_t stride_c, stride_h, stride_w;
  int y, x, step_y, step_x, height, width;

  __device__ Channels<V> at(int i, int j, int64_t c, bool inside) const {
    const int py = y + i * step_y, px = x + j * step_x;
    if (!inside || py < 0 || py >= height || px < 0 || px >= width) return Channels<V>{};
    return load_channels<In, V>(origin + py * stride_h + px * stride_w + c * stride_c);
  }
};

// `warps_per_tile` warps share a tile: lane l of warp w has channels (w 32 + l) V to + V, then those one sweep further.
// The f16 domain needs the tile's largest input before the first V is written, so it sweeps twice; the second time the
// patch (A A C numbers) comes from the L1 cache.
template <int M, int V, class In, class Out>
__global__ void __launch_bounds__(kThreads, M == 6 ? 1 : 2)
    input_transform(InputTransform p, int warps_per_tile) {
  constexpr int A = Transform<M>::A;
  constexpr bool kScaled = std::is_same_v<Out, __half>;
  __shared__ float largest[kWarps];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t tile = int64_t(blockIdx.x) * (kWarps / warps_per_tile) + warp / warps_per_tile;
  const bool exists = tile < p.count;
  const int64_t begin = int64_t(warp % warps_per_tile * 32 + lane) * V;
  const int64_t sweep = int64_t(warps_per_tile) * 32 * V;

  const Position at = position(p.tiles, p.first + (exists ? tile : 0));
  Patch<A, V, In> patch;
  patch.origin = static_cast<const In*>(p.input) + at.n * p.map.stride_n;
  patch.stride_c = p.map.stride_c;
  patch.stride_h = p.map.stride_h;
  patch.stride_w = p.map.stride_w;
  patch.y = at.row * M * p.tiles.dil_h + at.phase_h - p.pad_h;
  patch.x = at.column * M * p.tiles.dil_w + at.phase_w - p.pad_w;
  patch.step_y = p.tiles.dil_h;
  patch.step_x = p.tiles.dil_w;
  patch.height = int(p.map.h);
  patch.width = int(p.map.w);

  float scale = 1.f;
  if constexpr (kScaled) {
    float top = 0.f;
    if (exists)
      for (int64_t c = begin; c < p.map.c; c += sweep)
#pragma unroll 1
        for (int i = 0; i < A; ++i)
#pragma unroll
          for (int j = 0; j < A; ++j) {
            const Channels<V> d = patch.at(i, j, c, true);
#pragma unroll
            for (int e = 0; e < V; ++e) top = fmaxf(top, fabsf(d.x[e]));
          }
#pragma unroll
    for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    if (lane == 0) largest[warp] = top;
    __syncthreads();
    const int first = warp / warps_per_tile * warps_per_tile;
    for (int w = 0; w < warps_per_tile; ++w) top = fmaxf(top, largest[first + w]);
    const int exponent = exponent_above(top, growth(M));
    scale = power_of_two(-exponent);
    if (exists && begin == 0) p.scale[tile] = power_of_two(exponent);
  }
  if (!exists) return;

  Out* v = static_cast<Out*>(p.v) + tile * p.channels;
  const int64_t tap = p.count * p.channels;
  for (int64_t c = begin; c < p.channels; c += sweep) {
    Channels<V> columns[A][A];  // B^T d
#pragma unroll
    for (int j = 0; j < A; ++j) {
      Channels<V> d[A], o[A];
#pragma unroll
      for (int i = 0; i < A; ++i) d[i] = patch.at(i, j, c, c < p.map.c);
      Transform<M>::input(d, o);
#pragma unroll
      for (int i = 0; i < A; ++i) columns[i][j] = o[i];
    }
#pragma unroll
    for (int i = 0; i < A; ++i) {
      Channels<V> o[A];
      Transform<M>::input(columns[i], o);
#pragma unroll
      for (int j = 0; j < A; ++j) {
        if (p.relu)
#pragma unroll
          for (int e = 0; e < V; ++e) o[j].x[e] = o[j].x[e] < 0.f ? 0.f : o[j].x[e];  // NaN stays
        store_channels<Out, V>(v + (i * A + j) * tap + c, scale * o[j]);
      }
    }
  }
}

// --- output transform

// One thread has V neighbouring channels of a tile; neighbouring threads the next ones.
template <int M, int V, class Out, class In>
__global__ void __launch_bounds__(kThreads, 2) output_transform(OutputTransform p) {
  constexpr int A = Transform<M>::A;
  const int64_t groups = (p.map.c + V - 1) / V;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.count * groups) return;
  const int64_t tile = index / groups, k = index % groups * V;

  const In* m = static_cast<const In*>(p.m) + tile * p.channels + k;
  const int64_t tap = p.count * p.channels;
  Channels<V> columns[M][A];  // A^T M
#pragma unroll
  for (int j = 0; j < A; ++j) {
    Channels<V> d[A], o[M];
#pragma unroll
    for (int i = 0; i < A; ++i) d[i] = load_channels<In, V>(m + (i * A + j) * tap);
    Transform<M>::output(d, o);
#pragma unroll
    for (int i = 0; i < M; ++i) columns[i][j] = o[i];
  }

  const Position at = position(p.tiles, p.first + tile);
  const int64_t corner = at.n * p.map.stride_n + k * p.map.stride_c;
  Channels<V> scale, bias;
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const bool exists = k + e < p.map.c;
    scale.x[e] =
        std::is_same_v<In, __half> && exists ? p.tile_scale[tile] * p.filter_scale[k + e] : 1.f;
    bias.x[e] = p.bias && exists ? p.bias[k + e] : 0.f;
  }
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
      store_channels<Out, V>(output + place, o[j]);
    }
  }
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
      for (int i = 0; i < A * A; ++i) top = fmaxf(top, fabsf(float(u[i])));
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
    for (int i = 0; i < A * A; ++i) row[i * tap + c] = from_float<E>(float(u[i]) * scale);
  }
}

// --- launches: run-time choices to template arguments

template <class Function>
bool with_tile(int tile, Function f) {
  switch (tile) {
    case 2: f(std::integral_constant<int, 2>{}); return true;
    case 4: f(std::integral_constant<int, 4>{}); return true;
    case 6: f(std::integral_constant<int, 6>{}); return true;
    default: return false;
  }
}

template <class Function>
void with_dtype(DType dtype, Function f) {
  switch (dtype) {
    case DType::f32: f(Type<float>{}); break;
    case DType::bf16: f(Type<__nv_bfloat16>{}); break;
    case DType::f16: f(Type<__half>{}); break;
  }
}

// The types of a tensor and of its domain: only fp32 tensors have the f32 domain.
template <class Function>
bool with_types(DType dtype, Domain domain, Function f) {
  if (domain == Domain::f16) {
    with_dtype(dtype, [&](auto tensor) { f(tensor, Type<__half>{}); });
    return true;
  }
  if (dtype == DType::f32) f(Type<float>{}, Type<float>{});
  return dtype == DType::f32;
}

// Channels side by side in a thread: two where every pair is one aligned word, and where the tile leaves registers for it.
bool in_pairs(const TensorMap& map, int tile) {
  return tile != 6 && map.stride_c == 1 && map.c % 2 == 0;
}

dim3 blocks(int64_t count) { return dim3(unsigned(count)); }

}  // namespace

extern "C" int pywino_winograd_input_transform(const InputTransform* p, void* stream) {
  const bool pairs = in_pairs(p->map, p->tiles.size);
  int warps_per_tile = 1;
  while (warps_per_tile < kWarps && warps_per_tile * 32 * (pairs ? 2 : 1) < p->channels)
    warps_per_tile *= 2;
  const int64_t per_block = kWarps / warps_per_tile;
  const dim3 grid = blocks((p->count + per_block - 1) / per_block);
  bool known = true;
  known &= with_tile(p->tiles.size, [&](auto tile) {
    known &= with_types(p->dtype, p->domain, [&](auto in, auto out) {
      using In = typename decltype(in)::type;
      using Out = typename decltype(out)::type;
      constexpr int M = decltype(tile)::value, kPair = M == 6 ? 1 : 2;
      const cudaStream_t on = static_cast<cudaStream_t>(stream);
      if (pairs)
        PYWINO_LAUNCH((input_transform<M, kPair, In, Out>), grid, dim3(kThreads), 0, on, *p,
                      warps_per_tile);
      else
        PYWINO_LAUNCH((input_transform<M, 1, In, Out>), grid, dim3(kThreads), 0, on, *p,
                      warps_per_tile);
    });
  });
  return int(known ? cudaGetLastError() : cudaErrorInvalidValue);
}

extern "C" int pywino_winograd_output_transform(const OutputTransform* p, void* stream) {
  const bool pairs = in_pairs(p->map, p->tiles.size);
  const int64_t threads = p->count * ((p->map.c + pairs) / (1 + pairs));
  const dim3 grid = blocks((threads + kThreads - 1) / kThreads);
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

}  // namespace pywino::winograd::cuda
