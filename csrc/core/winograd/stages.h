// SPDX-License-Identifier: BSD-3-Clause
// What the dense and the sparse forward share: a call's job, the input and the output stage, and what is fetched ahead.
#pragma once

#include "../common/product.h"
#include "../common/simd.h"
#include "patches.h"
#include "prefetch.h"
#include "tiles.h"
#include "transforms.h"
#include "winograd.h"

namespace pywino::winograd {
namespace {

// The second-level cache: 1 to 2 MB beside AVX-512, else often 512 KB.
constexpr bool kSmallCache = kLanes < 16;
constexpr int64_t kCacheBytes = int64_t(kSmallCache ? 512 : 1280) << 10;
// A V of more is not there any more when the next panel reads it again; so many panels' M may be there.
constexpr int64_t kNearBytes = kCacheBytes * 3 / 4;
constexpr int kMostPanels = 2;

int64_t channel_blocks(int64_t c) { return ceil_div<int64_t>(c, kLanes); }

// Whether an fp32 output is written past the caches. Each line is written whole, if pixels (or rows of a plane) start aligned and
// the vectors of a line follow one another, as those of a pixel do.
bool streams(const Geometry& g, int64_t channels, const void* output) {
  const int64_t pixels = g.out_h() * g.out_w(), row = g.channels_last ? channels : pixels,
                line = kVectorsOfLine * kLanes;
  return g.input.n * channels * pixels * 4 > kStreamBytes && row % line == 0 &&
         reinterpret_cast<uintptr_t>(output) % (4 * line) == 0 &&
         (kVectorsOfLine == 1 || g.channels_last);
}

// --- one call ---------------------------------------------------------------------------------------------------------------
template <typename T>
struct Job {
  const ForwardParams& params;
  const Geometry& geometry;
  Source<T> sources[2];  // the second's channels come behind the first's; mostly it has none
  Grid grid;
  int64_t out_h, out_w, stride_v, stride_m;
  int64_t blocks;             // vectors of input channels
  int64_t lines;              // of a tile's channels in V
  int rows;                   // most tiles of a register block
  bool stream;                // write the output past the caches
  bool fetch_filter = false;  // while it is used: it does not stay in the second-level cache
  bool fetch_output = false;  // before it is written, where that is not past the caches

  PYWINO_INLINE Piece piece(int64_t q, int64_t most) const {
    return geometry.channels_last ? grid.piece(q, most) : grid.strip_piece(q, most);
  }
};

// Where (tile, vector of channels) of V lies in its chunk, for xi = 0.
template <typename E, typename T>
PYWINO_INLINE int64_t v_offset(const Job<T>& job, const Groups& groups, int tile, int64_t block) {
  using D = Depth<E>;
  const int g = groups.of(tile), start = groups.start(g);
  return (start * job.lines + block / D::kPerFloat * groups.size(g) + (tile - start)) * D::kLine +
         block % D::kPerFloat * kLanes;
}

template <int M, typename T, typename E>
void input_stage(const Job<T>& job, int64_t first, int t0, int t1, const Groups& groups,
                 int64_t block0, int64_t block1, E* v) {
  int64_t before = 0;  // vectors of channels of the sources before
  for (const Source<T>& source : job.sources) {
    const int64_t b0 = max<int64_t>(block0 - before, 0), b1 = min(block1 - before, source.blocks());
    if (b0 < b1)
      transform_tiles<InputPatch<M>>(
          source, job.grid, first, t0, t1, b0, b1,
          [&](int tile, int64_t block) __attribute__((always_inline)) {
            return v_offset<E>(job, groups, tile, before + block);
          },
          job.params.winograd_relu, v, job.stride_v);
    before += source.blocks();
  }
  if (Depth<E>::kFilled && block1 == job.blocks && job.blocks % Depth<E>::kPerFloat)
    for (int tile = t0; tile < t1; ++tile)
      for (int xi = 0; xi < Transform<M>::A * Transform<M>::A; ++xi)
        store(v + xi * job.stride_v + v_offset<E>(job, groups, tile, job.blocks), zero());
}

// --- what is fetched for the next chunk, and for the output -------------------------------------------------------------------
// The rows of patches, of one source after the other.
template <int M, typename T>
struct InputRows {
  static constexpr int A = Transform<M>::A, kRows = 2 * A;
  const Job<T>* job;

  PYWINO_INLINE Piece piece(int64_t q, int64_t most) const { return job->piece(q, most); }
  Region operator()(const Piece& piece, int i) const {
    const Geometry& g = job->geometry;
    return Region::of(job->sources[i / A], piece.image, piece.y - g.pad_h + i % A * g.dil_h,
                      piece.x - g.pad_w, span(piece, A));
  }
};

// In NCHW the rows that the output stage will write, where their lines cannot go past the caches: of `channels` planes.
template <int M, typename T>
struct OutputRows {
  static constexpr int kRows = M;
  const Job<T>* job;
  int64_t channel, channels;

  PYWINO_INLINE Piece piece(int64_t q, int64_t most) const { return job->piece(q, most); }
  Region operator()(const Piece& piece, int i) const {
    const int64_t y = piece.y + i * job->geometry.dil_h, x = piece.x;
    if (y >= job->out_h) return {};
    const int64_t K = job->geometry.out_channels, plane = job->out_h * job->out_w;
    const T* row = static_cast<const T*>(job->params.output) + (piece.image * K + channel) * plane +
                   y * job->out_w + x;
    return Region::of_planes(row, min(span(piece, M), job->out_w - x), channels, plane);
  }
};

template <int M, typename T>
using InputPrefetch = Prefetch<InputRows<M, T>>;
template <int M, typename T>
using OutputPrefetch = Prefetch<OutputRows<M, T>>;

// --- output transform -----------------------------------------------------------------------------------------------------
// Y = A^T m A of one tile and one vector of channels, row by row: store_row(i, y) gets M vectors.
template <int M, typename Store>
PYWINO_INLINE void transform_product(const float* m, int64_t stride, int rows,
                                     const Store& store_row) {
  constexpr int A = Transform<M>::A;
  vec t[M][A];
  PYWINO_ROLLED for (int j = 0; j < A; ++j) {
    vec q[A], o[M];
    PYWINO_UNROLL for (int i = 0; i < A; ++i) q[i] = load(m + (i * A + j) * stride);
    Transform<M>::output(q, o);
    PYWINO_UNROLL for (int i = 0; i < M; ++i) t[i][j] = o[i];
  }
  PYWINO_ROLLED for (int i = 0; i < rows; ++i) {
    vec y[M];
    Transform<M>::output(t[i], y);
    store_row(i, y);
  }
}

// Outputs of a tile that exist: those before `end`, d apart from `first`.
PYWINO_INLINE int outputs_inside(int64_t first, int64_t end, int64_t d, int m) {
  return int(max<int64_t>(0, min<int64_t>(m, ceil_div(end - first, d))));
}

// outputs(tile, n, rows, store_row): the outputs of a tile, counted from the first one of the stage, and vector n of channels.
// sums: K floats, to which each channel's outputs are added, or nullptr.
template <int M, typename T, typename Outputs>
void output_channels_last(const Job<T>& job, const Piece& piece, int64_t channel, int vectors,
                          const Outputs& outputs, float* sums) {
  const Geometry& g = job.geometry;
  const int64_t K = g.out_channels, row = g.dil_h * job.out_w * K, column = g.dil_w * K;
  const int rows = outputs_inside(piece.y, job.out_h, g.dil_h, M);
  T* out = static_cast<T*>(job.params.output);
  const T* residual = static_cast<const T*>(job.params.residual);
  const bool relu_out = job.params.relu;
  const uint8_t* mask = job.params.mask ? job.params.mask->pixels : nullptr;
  // The first half of each line waits for the second, where the output is streamed.
  alignas(64) float waiting[waiting_floats(M * M)];
  for (int s = 0; s < piece.count; ++s) {
    const int64_t x0 = piece.x + piece.offset(s);
    const int columns = outputs_inside(x0, job.out_w, g.dil_w, M);
    const int64_t pixel = (piece.image * job.out_h + piece.y) * job.out_w + x0,
                  at = pixel * K + channel;
    const auto kept = [&](vec y, int i, int j) __attribute__((always_inline)) {
      return keep_if(y, 0u - mask[pixel + i * g.dil_h * job.out_w + j * g.dil_w]);
    };
    for (int n = 0; n < vectors; ++n) {
      const int lanes = int(min<int64_t>(kLanes, K - channel - n * kLanes));
      const vec bias =
          job.params.bias ? load_part(job.params.bias + channel + n * kLanes, 0, lanes) : zero();
      T* tile = out + at + n * kLanes;
      const T* skip = residual ? residual + at + n * kLanes : nullptr;
      vec sum = zero();
      if (columns == M && lanes == kLanes) {
        outputs(piece.local + s, n, rows, [&](int i, vec* y) __attribute__((always_inline)) {
          PYWINO_UNROLL for (int j = 0; j < M; ++j) y[j] += bias;
          if (skip)
            PYWINO_UNROLL for (int j = 0; j < M; ++j) y[j] += load(skip + i * row + j * column);
          if (relu_out) PYWINO_UNROLL for (int j = 0; j < M; ++j) y[j] = relu(y[j]);
          if (mask) PYWINO_UNROLL for (int j = 0; j < M; ++j) y[j] = kept(y[j], i, j);
          if (sums) PYWINO_UNROLL for (int j = 0; j < M; ++j) sum += y[j];
          if (sizeof(T) == 2 || !job.stream) {
            PYWINO_UNROLL for (int j = 0; j < M; ++j) store(tile + i * row + j * column, y[j]);
          } else {
            PYWINO_UNROLL for (int j = 0; j < M; ++j) stream_line(
                reinterpret_cast<float*>(tile + i * row + j * column), y[j], n, waiting, i * M + j);
          }
        });
      } else {
        outputs(piece.local + s, n, rows, [&](int i, vec* y) __attribute__((always_inline)) {
          for (int j = 0; j < columns; ++j) {
            vec value = y[j] + bias;
            if (skip) value += load_part(skip + i * row + j * column, 0, lanes);
            if (relu_out) value = relu(value);
            if (mask) value = kept(value, i, j);
            sum += value;
            store_part(tile + i * row + j * column, value, 0, lanes);
          }
        });
      }
      if (sums) {
        float* of_channel = sums + channel + n * kLanes;
        store_part(of_channel, load_part(of_channel, 0, lanes) + sum, 0, lanes);
      }
    }
  }
}

template <int M, typename T, typename Outputs>
void output_planes(const Job<T>& job, const Piece& piece, int64_t channel, int vectors,
                   const Outputs& outputs) {
  const Geometry& g = job.geometry;
  const int64_t plane = job.out_h * job.out_w;
  const int rows = outputs_inside(piece.y, job.out_h, g.dil_h, M);
  const Strip map = write_strip(piece);
  const bool relu_out = job.params.relu;
  alignas(64) float strip[M * kStrip * kLanes];
  for (int n = 0; n < vectors; ++n) {
    const int64_t k = channel + n * kLanes;
    const int lanes = int(min<int64_t>(kLanes, g.out_channels - k));
    const vec bias = job.params.bias ? load_part(job.params.bias + k, 0, lanes) : zero();
    for (int s = 0; s < piece.count; ++s)
      outputs(piece.local + s, n, rows, [&](int i, vec* y) __attribute__((always_inline)) {
        PYWINO_UNROLL for (int j = 0; j < M; ++j)
            store(strip + (i * kStrip + map.at(s) + j * map.step) * kLanes, y[j] + bias);
      });
    const int64_t at =
        ((piece.image * g.out_channels + k) * job.out_h + piece.y) * job.out_w + piece.x;
    T* out = static_cast<T*>(job.params.output) + at;
    const T* residual =
        job.params.residual ? static_cast<const T*>(job.params.residual) + at : nullptr;
    for (int i = 0; i < rows; ++i)
      for (int segment = 0; segment < map.segments; ++segment) {
        float* pixels = strip + (i * kStrip + segment * map.length) * kLanes;
        const int64_t row = i * g.dil_h * job.out_w + map.pixel(segment);
        const int columns = int(min<int64_t>(map.length, job.out_w - piece.x - map.pixel(segment)));
        if (job.params.mask) {
          const uint8_t* mask = job.params.mask->pixels +
                                (piece.image * job.out_h + piece.y) * job.out_w + piece.x + row;
          for (int j = 0; j < columns; ++j)
            if (!mask[j]) store(pixels + j * kLanes, zero());
        }
        // Where the output is streamed, all planes are aligned alike: what comes before the first whole line is written first.
        const int before =
            job.stream ? int(-(reinterpret_cast<uintptr_t>(out + row) / sizeof(T)) % kLanes) : 0;
        for (int j = 0, width; j < columns; j += width) {
          width = min(j < before ? before : kLanes, columns - j);
          vec r[kLanes];
          PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) r[c] = load(pixels + (j + c) * kLanes);
          transpose(r);
          T* to = out + row + j;
          const T* skip = residual ? residual + row + j : nullptr;
          if (width == kLanes && lanes == kLanes) {
            if (skip) PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) r[c] += load(skip + c * plane);
            if (relu_out) PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) r[c] = relu(r[c]);
            if (sizeof(T) == 4 && job.stream)
              PYWINO_UNROLL for (int c = 0; c < kLanes; ++c)
                  stream(reinterpret_cast<float*>(to + c * plane), r[c]);
            else
              PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) store(to + c * plane, r[c]);
          } else {
            PYWINO_ROLLED for (int c = 0; c < lanes; ++c) {
              vec value = r[c];
              if (skip) value += load_part(skip + c * plane, 0, width);
              store_part(to + c * plane, relu_out ? relu(value) : value, 0, width);
            }
          }
        }
      }
  }
}

// Tiles [t0, t1) of the chunk that starts at tile `first`.
template <int M, typename T, typename Outputs>
void store_outputs(const Job<T>& job, int64_t first, int t0, int t1, int64_t channel, int vectors,
                   const Outputs& outputs, float* sums = nullptr) {
  for (int t = t0; t < t1;) {
    Piece piece = job.piece(first + t, t1 - t);
    piece.local = t - t0;
    if (job.geometry.channels_last)
      output_channels_last<M>(job, piece, channel, vectors, outputs, sums);
    else
      output_planes<M>(job, piece, channel, vectors, outputs);
    t += piece.count;
  }
}

// Where M of a tile and a vector of channels lies, of so many tiles and vectors: [panel][tile][vector of the panel].
PYWINO_INLINE int64_t m_offset(int tiles, int vectors, int tile, int n) {
  const int in_panel = n % 2, before = n - in_panel;
  return (before * tiles + tile * min(2, vectors - before) + in_panel) * kLanes;
}

// The same from their products; m is that of tile t0, and has `all` tiles.
template <int M, typename T>
void output_stage(const Job<T>& job, int64_t first, int t0, int t1, int all, int64_t channel,
                  int vectors, const float* m, float* sums = nullptr) {
  store_outputs<M>(
      job, first, t0, t1, channel, vectors,
      [&](int tile, int n, int rows, const auto& store_row) __attribute__((always_inline)) {
        transform_product<M>(m + m_offset(all, vectors, tile, n), job.stride_m, rows, store_row);
      },
      sums);
}

}  // namespace
}  // namespace pywino::winograd
