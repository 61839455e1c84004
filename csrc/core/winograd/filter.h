// SPDX-License-Identifier: BSD-3-Clause
// U = G g G^T of a filter, or the weight itself where it is in the Winograd domain, as the product reads it: [panel][xi][C][width].
// `rotate`: of the input gradient, where K and C change places.
#pragma once

#include "../common/amx.h"
#include "../common/executor.h"
#include "../common/product.h"
#include "../common/simd.h"
#include "transforms.h"
#include "winograd.h"

namespace pywino::winograd {
namespace {

// One vector of kernels at a time, in double (two halves): U is made once and every product inherits its error.
constexpr int kHalf = kLanes / 2;
typedef double dvec __attribute__((vector_size(kHalf * 8)));
typedef float half_vec __attribute__((vector_size(kHalf * 4)));

template <int M, typename T>
struct FilterRun {
  static constexpr int A = Transform<M>::A;
  static constexpr int kKernelsPerTask = kLanes;
  // What is read so many kernels later is fetched. Kernels of one k or of one c lie far apart, in too many streams, or too short
  // ones, for the processor to foresee. (Where there are no more, an address behind the weight is no harm.)
  static constexpr int kFetchKernels = 4;
  const FilterParams& p;
  int64_t K, C, stride_k, stride_c;
  int64_t next = 0;

  explicit FilterRun(const FilterParams& params)
      : p(params),
        K(p.rotate ? p.in_channels : p.out_channels),
        C(p.rotate ? p.out_channels : p.in_channels),
        stride_k(p.rotate ? p.stride_c : p.stride_k),
        stride_c(p.rotate ? p.stride_k : p.stride_c) {}

  static void body(void* arg) {
    FilterRun& run = *static_cast<FilterRun*>(arg);
    const int64_t panels = ceil_div<int64_t>(run.K, kPanel),
                  parts = ceil_div<int64_t>(run.C, kKernelsPerTask);
    for (int64_t task = take(&run.next); task < panels * parts; task = take(&run.next)) {
      const int64_t panel = task / parts, c0 = task % parts * kKernelsPerTask;
      const int64_t width = run.width(panel), first = c0 / run.channels_of_float() * width;
      run.kernels(panel, c0, min(c0 + kKernelsPerTask, run.C),
                  run.p.packed + panel * run.panel_floats() + first, run.depth() * width);
    }
  }

  int channels_of_float() const { return p.fast ? 2 : 1; }
  int64_t depth() const {
#if defined(__AVX512BF16__)
    if (p.fast) return Depth<bf16_operand>::floats(C);
#endif
    return C;
  }
  int64_t panel_floats() const { return depth() * A * A * kPanel; }

  int width(int64_t panel) const { return K - panel * kPanel > kLanes ? kPanel : kLanes; }

  // Kernels (k, c) of the k of one panel and c0 <= c < c1, c0 even, to rows of which those of c0 come first, and positions lie `pitch`
  // floats apart.
  void kernels(int64_t panel, int64_t c0, int64_t c1, float* to, int64_t pitch) const {
    // The first half of each line waits for the second, where U is streamed.
    alignas(64) float waiting[waiting_floats(kKernelsPerTask * A * A)];
    const int64_t end = min(2 * panel + 2, ceil_div<int64_t>(K, kLanes));
    // Neighbouring k lie in neighbouring lines, or in the same.
    for (int64_t c = c0; c < c1; c += kKernelsPerTask)
      for (int64_t vector = 2 * panel; vector < end; ++vector)
        kernels_of(vector, c, min(c + kKernelsPerTask, c1),
                   to + (c - c0) / channels_of_float() * width(panel), pitch, waiting);
  }

  // Of the k of one vector.
  void kernels_of(int64_t vector, int64_t c0, int64_t c1, float* to, int64_t pitch,
                  float* waiting) const {
    const int size = p.spatial ? 3 : A;
    const int lanes = int(min<int64_t>(kLanes, K - vector * kLanes));
    const bool turn = p.rotate && p.spatial;
    const T* kernel = static_cast<const T*>(p.weight) + vector * kLanes * stride_k;
    const auto at = [&](int i, int j) {
      return (turn ? 2 - i : i) * p.stride_h + (turn ? 2 - j : j) * p.stride_w;
    };
    // Where a vector of one k's weights holds several c: [c][tap][k], of as many c as there are lanes. What is read at once
    // does not wait for the stores of what was transformed before.
    const bool by_tap = stride_c == 1,
               by_kernel = stride_c == 9 && p.stride_h == 3 && p.stride_w == 1,
               together = p.spatial && lanes == kLanes && stride_k != 1 && (by_tap || by_kernel);
    alignas(64) float g[A * A][kLanes], block[kLanes * 9][kLanes];
    for (int64_t c = c0; c < c1; ++c) {
      const T* from = kernel + c * stride_c;
      if (together) {
        const int in_block = int(c - c0) % kLanes * 9;
        if (in_block == 0) {
          const int count = int(min<int64_t>(kLanes, c1 - c));
          for (int e = 0; e < 9; ++e) {
            const int64_t offset = by_tap ? e / 3 * p.stride_h + e % 3 * p.stride_w : e * kLanes;
            const int most = by_tap ? count : min(kLanes, max(0, 9 * count - e * kLanes));
            vec r[kLanes];
            PYWINO_UNROLL for (int lane = 0; lane < kLanes; ++lane) {
              r[lane] = load_part(from + lane * stride_k + offset, 0, most);
              prefetch(from + lane * stride_k + offset + kLanes * stride_c);
            }
            transpose(r);
            PYWINO_UNROLL for (int n = 0; n < kLanes; ++n)
                store(block[by_tap ? n * 9 + e : e * kLanes + n], r[n]);
          }
        }
        for (int e = 0; e < 9; ++e) store(g[e], load(block[in_block + (turn ? 8 - e : e)]));
      } else if (stride_k == 1 && lanes == kLanes) {
        for (int i = 0; i < size; ++i)
          for (int j = 0; j < size; ++j) {
            store(g[i * size + j], load(from + at(i, j)));
            prefetch(from + at(i, j) + kFetchKernels * stride_c);
          }
      } else if (p.stride_w == 1 && p.stride_h == size && lanes == kLanes) {
        const int entries = size * size;
        for (int lane = 0; lane < kLanes; ++lane)
          for (int e = 0; e < entries; e += 64 / int(sizeof(T)))
            prefetch(from + lane * stride_k + kFetchKernels * stride_c + e);
        for (int e = 0; e < entries; e += kLanes) {
          vec r[kLanes];
          const int count = min(kLanes, entries - e);
          PYWINO_UNROLL for (int lane = 0; lane < kLanes; ++lane) r[lane] =
              load_part(from + lane * stride_k + e, 0, count);
          transpose(r);
          for (int i = 0; i < count; ++i) store(g[turn ? entries - 1 - e - i : e + i], r[i]);
        }
      } else {
        for (int lane = 0; lane < kLanes; ++lane)
          for (int i = 0; i < size; ++i)
            for (int j = 0; j < size; ++j)
              g[i * size + j][lane] = lane < lanes ? get(from + lane * stride_k + at(i, j)) : 0.f;
      }
      if (p.spatial) transform(g);
      write(g, vector, c, c - c0, to, pitch, waiting);
    }
    if (c1 == C) fill_up(vector, c0, to, pitch);
  }

  // Zeros behind the last channel, where rows are filled up with them.
  void fill_up(int64_t vector, int64_t c0, float* to, int64_t pitch) const {
    const int64_t width = this->width(vector / 2), before = c0 / channels_of_float();
    for (int64_t n = ceil_div<int64_t>(C, channels_of_float()); n < depth(); ++n)
      for (int xi = 0; xi < A * A; ++xi)
        store(to + xi * pitch + (n - before) * width + vector % 2 * kLanes, zero());
  }

  // U of channel c, in row n.
  void write(const float (*g)[kLanes], int64_t vector, [[maybe_unused]] int64_t c, int64_t n,
             float* to, int64_t pitch, float* waiting) const {
    const int64_t first = vector % 2 * kLanes, width = this->width(vector / 2);
#if defined(__AVX512BF16__)
    if (p.fast) {
      for (int xi = 0; xi < A * A; ++xi) {
        bf16_operand row[kLanes];
        store(row, load(g[xi]));
        bf16_operand* pairs =
            reinterpret_cast<bf16_operand*>(to + xi * pitch + n / 2 * width + first);
        for (int lane = 0; lane < kLanes; ++lane) {
          pairs[2 * lane + c % 2] = row[lane];
          if (c % 2 == 0 && c + 1 == C) pairs[2 * lane + 1] = {0};
        }
      }
      return;
    }
#endif
    for (int xi = 0; xi < A * A; ++xi) {
      // The rows of U lie C * width apart, often a multiple of 4 KB: ordinary stores of a large U would evict one another.
      float* row = to + xi * pitch + n * width + first;
      if (p.stream && width >= kVectorsOfLine * kLanes)
        stream_line(row, load(g[xi]), vector, waiting, n % kKernelsPerTask * A * A + xi);
      else
        store(row, load(g[xi]));
    }
  }

  // In place: rows 0 .. 8 hold the 3 x 3 kernels, then all hold G g G^T.
  static void transform(float (*g)[kLanes]) {
    dvec d[2][9], u[A];
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 9; ++i) {
        half_vec h;
        __builtin_memcpy(&h, g[i] + half * kHalf, sizeof h);
        d[half][i] = __builtin_convertvector(h, dvec);
      }
    for (int half = 0; half < 2; ++half) {
      dvec t[A][3];
      PYWINO_UNROLL for (int j = 0; j < 3; ++j) {
        const dvec column[3] = {d[half][j], d[half][3 + j], d[half][6 + j]};
        Transform<M>::filter(column, u);
        PYWINO_UNROLL for (int i = 0; i < A; ++i) t[i][j] = u[i];
      }
      for (int i = 0; i < A; ++i) {
        Transform<M>::filter(t[i], u);
        PYWINO_UNROLL for (int j = 0; j < A; ++j) {
          const half_vec h = __builtin_convertvector(u[j], half_vec);
          __builtin_memcpy(g[i * A + j] + half * kHalf, &h, sizeof h);
        }
      }
    }
  }
};

}  // namespace
}  // namespace pywino::winograd
