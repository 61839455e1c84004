// SPDX-License-Identifier: BSD-3-Clause
// From a tensor into the Winograd domain: each tile's patch is read, zero outside the tensor, and transformed.
#pragma once

#include "../common/simd.h"
#include "tiles.h"
#include "transforms.h"

namespace pywino::winograd {
namespace {

// V = B^T d B, patches of a x a inputs.
template <int M>
struct InputPatch {
  static constexpr bool kGated = true;
  static constexpr int kSize = Transform<M>::A, kOut = Transform<M>::A;
  PYWINO_INLINE static void apply(const vec* d, vec* o) { Transform<M>::input(d, o); }
};

// D = A dY A^T, patches of m x m output gradients.
template <int M>
struct GradientPatch {
  static constexpr bool kGated = false;
  static constexpr int kSize = M, kOut = Transform<M>::A;
  PYWINO_INLINE static void apply(const vec* d, vec* o) { Transform<M>::output_transposed(d, o); }
};

// The tensor that is read; tile (y, x) starts at its pixel (y - pad_h, x - pad_w).
template <typename T>
struct Source {
  const T* data;
  int64_t channels, height, width, pad_h, pad_w, dil_h, dil_w;
  bool channels_last;
  const float* gate = nullptr;    // in channels_last: read relu(gate * data)
  const uint8_t* mask = nullptr;  // (n, height, width): read zero where it is 0

  int64_t blocks() const { return ceil_div<int64_t>(channels, kLanes); }
};

template <typename T>
Source<T> input_source(const Geometry& g, const void* input) {
  return {static_cast<const T*>(input),
          g.input.c,
          g.input.h,
          g.input.w,
          g.pad_h,
          g.pad_w,
          g.dil_h,
          g.dil_w,
          g.channels_last};
}

template <typename T>
Source<T> gradient_source(const Geometry& g, const void* grad) {
  return {static_cast<const T*>(grad),
          g.out_channels,
          g.out_h(),
          g.out_w(),
          0,
          0,
          g.dil_h,
          g.dil_w,
          g.channels_last};
}

// Rows of V and M start an odd number of cache lines apart: a*a rows at a multiple of 4 KB would share one cache set.
template <typename E = float>
int64_t padded_stride(int64_t elements) {
  constexpr int64_t kLine = 64 / sizeof(E);
  return (ceil_div(elements, kLine) | 1) * kLine;
}

// One patch, one vector of channels: load_at(i, j) gives d[i][j], position xi goes to v + xi * stride.
template <typename Patch, typename Load, typename E>
PYWINO_INLINE void transform_patch(const Load& load_at, bool relu_after, E* v, int64_t stride) {
  constexpr int P = Patch::kSize, A = Patch::kOut;
  vec t[A][P];
  // The outer loops stay rolled: unrolled, they need more registers than there are.
  PYWINO_ROLLED for (int j = 0; j < P; ++j) {
    vec d[P], o[A];
    PYWINO_UNROLL for (int i = 0; i < P; ++i) d[i] = load_at(i, j);
    Patch::apply(d, o);
    PYWINO_UNROLL for (int i = 0; i < A; ++i) t[i][j] = o[i];
  }
  PYWINO_ROLLED for (int i = 0; i < A; ++i) {
    vec o[A];
    Patch::apply(t[i], o);
    if (relu_after) PYWINO_UNROLL for (int j = 0; j < A; ++j) o[j] = relu(o[j]);
    PYWINO_UNROLL for (int j = 0; j < A; ++j) store(v + (i * A + j) * stride, o[j]);
  }
}

// Rows or columns of a patch: `first`, first + d, ... of `size` that exist. One outside is read as zero, with a load whose lanes
// are all masked. Its address is that of the nearest one inside: a masked load of a page that is not there is correct, but the
// core needs some hundred cycles to find that out.
template <int P>
struct Lines {
  int64_t at[P];
  uint32_t inside[P];

  Lines(int64_t first, int64_t d, int64_t size, int64_t pitch) {
    for (int i = 0; i < P; ++i) {
      const int64_t line = first + i * d;
      at[i] = max<int64_t>(0, min(line, size - 1)) * pitch;
      inside[i] = line >= 0 && line < size ? ~0u : 0u;
    }
  }
};

template <typename Patch, bool Gated, typename T, typename Place, typename E>
void patches_channels_last(const Source<T>& src, const Piece& piece, int64_t block0, int64_t block1,
                           const Place& place, bool relu_after, E* v, int64_t stride) {
  constexpr int P = Patch::kSize;
  const int64_t C = src.channels, row = src.dil_h * src.width * C, column = src.dil_w * C;
  const int64_t y0 = piece.y - src.pad_h;
  const bool rows_inside = y0 >= 0 && y0 + (P - 1) * src.dil_h < src.height;
  const T* image = src.data + piece.image * src.height * src.width * C;
  const int64_t whole = min(block1, C / kLanes);
  const auto gate_of = [&](int64_t b, int lanes) __attribute__((always_inline)) {
    return Gated ? load_part(src.gate + b * kLanes, 0, lanes) : zero();
  };
  const auto gated = [](vec x, vec gate)
                         __attribute__((always_inline)) { return Gated ? relu(x * gate) : x; };
  for (int s = 0; s < piece.count; ++s) {
    const int64_t x0 = piece.x + piece.offset(s) - src.pad_w;
    const T* patch = image + (y0 * src.width + x0) * C;
    const int tile = piece.local + s;
    if (rows_inside && x0 >= 0 && x0 + (P - 1) * src.dil_w < src.width) {
      for (int64_t b = block0; b < whole; ++b) {
        const T* p = patch + b * kLanes;
        const vec gate = gate_of(b, kLanes);
        transform_patch<Patch>(
            [&](int i, int j) __attribute__((always_inline)) {
              return gated(load(p + i * row + j * column), gate);
            },
            relu_after, v + place(tile, b), stride);
      }
      if (whole < block1) {
        const T* p = patch + whole * kLanes;
        const int lanes = int(C - whole * kLanes);
        const vec gate = gate_of(whole, lanes);
        transform_patch<Patch>(
            [&](int i, int j) __attribute__((always_inline)) {
              return gated(load_part(p + i * row + j * column, 0, lanes), gate);
            },
            relu_after, v + place(tile, whole), stride);
      }
    } else {
      const Lines<P> rows(y0, src.dil_h, src.height, src.width * C),
          columns(x0, src.dil_w, src.width, C);
      for (int64_t b = block0; b < block1; ++b) {
        const int lanes = int(min<int64_t>(kLanes, C - b * kLanes));
        const vec gate = gate_of(b, lanes);
        const auto pixel = [&](int i, int j) __attribute__((always_inline)) {
          return image + rows.at[i] + columns.at[j] + b * kLanes;
        };
        if (lanes == kLanes)
          transform_patch<Patch>(
              [&](int i, int j) __attribute__((always_inline)) {
                return gated(load_if(pixel(i, j), rows.inside[i] & columns.inside[j]), gate);
              },
              relu_after, v + place(tile, b), stride);
        else
          transform_patch<Patch>(
              [&](int i, int j) __attribute__((always_inline)) {
                return rows.inside[i] & columns.inside[j]
                           ? gated(load_part(pixel(i, j), 0, lanes), gate)
                           : zero();
              },
              relu_after, v + place(tile, b), stride);
      }
    }
  }
}

// Of the pixels of a mask; what lies outside is not read.
template <typename Patch, typename T, typename Place, typename E>
void patches_of_mask(const Source<T>& src, const Piece& piece, int64_t block0, int64_t block1,
                     const Place& place, bool relu_after, E* v, int64_t stride) {
  constexpr int P = Patch::kSize;
  const int64_t C = src.channels, H = src.height, W = src.width;
  const T* image = src.data + piece.image * H * W * C;
  const uint8_t* mask = src.mask + piece.image * H * W;
  const Lines<P> rows(piece.y - src.pad_h, src.dil_h, H, W);
  for (int s = 0; s < piece.count; ++s) {
    const Lines<P> columns(piece.x + piece.offset(s) - src.pad_w, src.dil_w, W, 1);
    uint32_t inside[P][P];
    for (int i = 0; i < P; ++i)
      for (int j = 0; j < P; ++j)
        inside[i][j] = rows.inside[i] & columns.inside[j] & (0u - mask[rows.at[i] + columns.at[j]]);
    for (int64_t b = block0; b < block1; ++b) {
      const int lanes = int(min<int64_t>(kLanes, C - b * kLanes));
      const auto pixel = [&](int i, int j) __attribute__((always_inline)) {
        return image + (rows.at[i] + columns.at[j]) * C + b * kLanes;
      };
      E* to = v + place(piece.local + s, b);
      if (lanes == kLanes)
        transform_patch<Patch>(
            [&](int i, int j)
                __attribute__((always_inline)) { return load_if(pixel(i, j), inside[i][j]); },
            relu_after, to, stride);
      else
        transform_patch<Patch>(
            [&](int i, int j) __attribute__((always_inline)) {
              return inside[i][j] ? load_part(pixel(i, j), 0, lanes) : zero();
            },
            relu_after, to, stride);
    }
  }
}

// Planes to pixels: the strip's pixels of rows y0, y0 + d, ..., of kLanes channels, zero outside the tensor.
template <int P, typename T>
void stage(const Source<T>& src, const T* planes, int channels, int64_t y0, int64_t x0,
           const Strip& map, float* strip) {
  const int64_t H = src.height, W = src.width;
  for (int i = 0; i < P; ++i) {
    const int64_t y = y0 + i * src.dil_h;
    const T* in = planes + y * W;
    for (int segment = 0; segment < map.segments; ++segment) {
      // Columns behind a segment are overwritten by the next.
      float* out = strip + (i * kStrip + segment * map.length) * kLanes;
      for (int j = 0; j < map.length; j += kLanes, out += kLanes * kLanes) {
        const int64_t x = x0 + map.pixel(segment) + j;
        const int lo = int(max<int64_t>(0, min<int64_t>(kLanes, -x))),
                  hi = int(max<int64_t>(0, min<int64_t>(kLanes, W - x)));
        vec r[kLanes];
        if (y < 0 || y >= H || lo >= hi) {
          PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) r[c] = zero();
        } else {
          if (channels == kLanes && lo == 0 && hi == kLanes) {
            PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) r[c] = load(in + c * H * W + x);
          } else {
            PYWINO_ROLLED for (int c = 0; c < kLanes; ++c) r[c] =
                c < channels ? load_part(in + c * H * W + x, lo, hi) : zero();
          }
          transpose(r);
        }
        PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) store(out + c * kLanes, r[c]);
      }
    }
  }
}

// Zeros for the strip's pixels outside the mask.
template <int P, typename T>
void stage_mask(const Source<T>& src, int64_t image, int64_t y0, int64_t x0, const Strip& map,
                float* strip) {
  const int64_t H = src.height, W = src.width;
  for (int i = 0; i < P; ++i) {
    const int64_t y = y0 + i * src.dil_h;
    if (y < 0 || y >= H) continue;
    const uint8_t* mask = src.mask + (image * H + y) * W;
    for (int segment = 0; segment < map.segments; ++segment)
      for (int j = 0; j < map.length; ++j) {
        const int64_t x = x0 + map.pixel(segment) + j;
        if (x >= 0 && x < W && !mask[x])
          store(strip + (i * kStrip + segment * map.length + j) * kLanes, zero());
      }
  }
}

template <typename Patch, typename T, typename Place, typename E>
void patches_planes(const Source<T>& src, const Piece& piece, int64_t block0, int64_t block1,
                    const Place& place, bool relu_after, E* v, int64_t stride) {
  constexpr int P = Patch::kSize;
  const int64_t plane = src.height * src.width;
  const T* image = src.data + piece.image * src.channels * plane;
  const Strip map = read_strip(piece, P);
  alignas(64) float strip[P * kStrip * kLanes];
  for (int64_t b = block0; b < block1; ++b) {
    const int channels = int(min<int64_t>(kLanes, src.channels - b * kLanes));
    stage<P>(src, image + b * kLanes * plane, channels, piece.y - src.pad_h, piece.x - src.pad_w,
             map, strip);
    if (src.mask)
      stage_mask<P>(src, piece.image, piece.y - src.pad_h, piece.x - src.pad_w, map, strip);
    for (int s = 0; s < piece.count; ++s) {
      const float* p = strip + map.at(s) * kLanes;
      transform_patch<Patch>(
          [&](int i, int j) __attribute__((always_inline)) {
            return load(p + (i * kStrip + j * map.step) * kLanes);
          },
          relu_after, v + place(piece.local + s, b), stride);
    }
  }
}

// Tiles [t0, t1) of the chunk that starts at tile `first`, blocks of channels [block0, block1). Position xi of (tile, block)
// goes to v + xi * stride + place(tile, block).
template <typename Patch, typename T, typename Place, typename E>
void transform_tiles(const Source<T>& src, const Grid& grid, int64_t first, int t0, int t1,
                     int64_t block0, int64_t block1, const Place& place, bool relu_after, E* v,
                     int64_t stride) {
  constexpr bool kGated = Patch::kGated && sizeof(T) == 4;
  for (int t = t0; t < t1;) {
    Piece piece =
        src.channels_last ? grid.piece(first + t, t1 - t) : grid.strip_piece(first + t, t1 - t);
    piece.local = t;
    if (!src.channels_last)
      patches_planes<Patch>(src, piece, block0, block1, place, relu_after, v, stride);
    else if (src.mask)
      patches_of_mask<Patch>(src, piece, block0, block1, place, relu_after, v, stride);
    else if (kGated && src.gate)
      patches_channels_last<Patch, kGated>(src, piece, block0, block1, place, relu_after, v,
                                           stride);
    else
      patches_channels_last<Patch, false>(src, piece, block0, block1, place, relu_after, v, stride);
    t += piece.count;
  }
}

}  // namespace
}  // namespace pywino::winograd
