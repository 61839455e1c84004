// SPDX-License-Identifier: BSD-3-Clause
// What the transforms forward (cuda_transforms.cu) and backward (cuda_gradients.cu) share: where a tile lies, powers of two,
// the patch of a tile, and the way from run-time choices to template arguments.
#pragma once

#include <initializer_list>

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

// The f16 domain has powers of two for taps, too: tap (i, j) of D, and of U in F6, is times 2^(shift(i) + shift(j)), which
// brings each row of the matrix up to the largest absolute sum of a row. Without them what is small by its row alone, and
// large again by A^T or G^T, would lie among fp16's subnormal numbers (F6: rows of A from 1 to 63, of G from 0.08 to 1.2).
template <class X>
__device__ constexpr float tap_scale(int i, int j) {
  return float(1 << (X::shift(i) + X::shift(j)));
}

// What goes into the domain by X d X^T, |X d X^T| <= 2^kGrowth max |d|: the square of X's largest absolute row sum, rounded
// up to a power of two.
template <int M>
struct Patches {  // of the input, by B^T (F2: 2 and 4; F4: 5.28 and 27.9; F6: 15 and 225)
  static constexpr bool kGated = false;
  static constexpr int kTile = M, A = Transform<M>::A, kSize = A;
  static constexpr int kGrowth = M == 2 ? 2 : M == 4 ? 5 : 8;
  static constexpr int shift(int) { return 0; }
  template <class T>
  PYWINO_INLINE static void transform(const T* d, T* o) {
    Transform<M>::input(d, o);
  }
};
template <int M>
struct GatedPatches : Patches<M> {  // of relu(gate input)
  static constexpr bool kGated = true;
};
template <int M>
struct
    OutputTiles {  // of the output's gradient, by A (F2: 2 and 4; F4: 8.125 and 66.02; F6: 63 and 3969)
  static constexpr bool kGated = false;
  static constexpr int kTile = M, A = Transform<M>::A, kSize = M;
  static constexpr int kGrowth = M == 2 ? 2 : M == 4 ? 7 : 12;
  // A hexadecimal digit for each row, the first one on the right: a table would be memory where i is not constant.
  static constexpr int shift(int i) {
    return (M == 2 ? 0x1001 : M == 4 ? 0x300113 : 0x55500335) >> 4 * i & 15;
  }
  template <class T>
  PYWINO_INLINE static void transform(const T* y, T* o) {
    Transform<M>::output_transposed(y, o);
  }
};

// The filters', by G.
template <int M>
struct Filters {
  static constexpr int shift(int i) { return M == 6 && (i == 3 || i == 4) ? 4 : 0; }
};

// The power of two above 2^bits x, x >= 0, as an exponent that 2^exponent and 2^-exponent both have as floats.
__device__ inline int exponent_above(float x, int bits) {
  if (x == 0.f) return 0;
  const int exponent = int(__float_as_uint(x) >> 23) - 126 + bits;
  return exponent > 126 ? 126 : exponent;
}
__device__ inline float power_of_two(int exponent) {
  return __uint_as_float(uint32_t(exponent + 127) << 23);
}

// The patch of a tile: rows and columns of a tensor, d apart, zeros outside.
template <int V, class In>
struct Patch {
  const In* origin;  // of the image
  int64_t stride_c, stride_h, stride_w;
  int y, x, step_y, step_x, height, width;

  // The conditions stand here one by one: as a function of its own they took more registers than there are.
  __device__ Channels<V> at(int i, int j, int64_t c, bool inside) const {
    const int py = y + i * step_y, px = x + j * step_x;
    if (!inside || py < 0 || py >= height || px < 0 || px >= width) return Channels<V>{};
    return load_channels<In, V>(origin + py * stride_h + px * stride_w + c * stride_c);
  }
};

template <int M, int V, class In>
__device__ inline Patch<V, In> patch_of(const void* tensor, const TensorMap& map,
                                        const Tiles& tiles, const Position& tile, int pad_h,
                                        int pad_w) {
  Patch<V, In> patch;
  patch.origin = static_cast<const In*>(tensor) + tile.n * map.stride_n;
  patch.stride_c = map.stride_c;
  patch.stride_h = map.stride_h;
  patch.stride_w = map.stride_w;
  patch.y = tile.row * M * tiles.dil_h + tile.phase_h - pad_h;
  patch.x = tile.column * M * tiles.dil_w + tile.phase_w - pad_w;
  patch.step_y = tiles.dil_h;
  patch.step_x = tiles.dil_w;
  patch.height = int(map.h);
  patch.width = int(map.w);
  return patch;
}

// The last step into the domain, from the columns X d: X d X^T, ReLU, scales, and V of all taps, `tap` elements apart.
template <class From, class Out, int V>
__device__ inline void store_in_domain(const Channels<V> (&columns)[From::A][From::kSize],
                                       const float (&scales)[V], bool relu, Out* v, int64_t tap) {
#pragma unroll
  for (int i = 0; i < From::A; ++i) {
    Channels<V> o[From::A];
    From::transform(columns[i], o);
#pragma unroll
    for (int j = 0; j < From::A; ++j) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (relu) o[j].x[e] = o[j].x[e] < 0.f ? 0.f : o[j].x[e];  // NaN stays
        o[j].x[e] *= std::is_same_v<Out, __half> ? scales[e] * tap_scale<From>(i, j) : scales[e];
      }
      store_channels<Out, V>(v + (i * From::A + j) * tap, o[j]);
    }
  }
}

// The first step out of it: A^T M.
template <int M, class In, int V>
__device__ inline void load_from_domain(const In* m, int64_t tap,
                                        Channels<V> (&columns)[M][Transform<M>::A]) {
  constexpr int A = Transform<M>::A;
#pragma unroll
  for (int j = 0; j < A; ++j) {
    Channels<V> d[A], o[M];
#pragma unroll
    for (int i = 0; i < A; ++i) {
      d[i] = load_channels<In, V>(m + (i * A + j) * tap);
      if (std::is_same_v<In, __half>) d[i] = 1 / tap_scale<Filters<M>>(i, j) * d[i];
    }
    Transform<M>::output(d, o);
#pragma unroll
    for (int i = 0; i < M; ++i) columns[i][j] = o[i];
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
// A tensor of the user's may begin in the middle of a word, as slices do.
inline bool in_pairs(const TensorMap& map, int tile, std::initializer_list<const void*> tensors) {
  bool pairs = tile != 6 && map.stride_c == 1 && map.c % 2 == 0;
  for (const void* t : tensors) pairs &= reinterpret_cast<uintptr_t>(t) % 8 == 0;
  return pairs;
}

// Whether neighbours in memory are pixels, not channels: cuda_nchw.cu.
inline bool is_nchw(const TensorMap& map) { return map.stride_c != 1 && map.stride_w == 1; }

inline dim3 blocks(int64_t count) { return dim3(unsigned(count)); }

}  // namespace
}  // namespace pywino::winograd::cuda
