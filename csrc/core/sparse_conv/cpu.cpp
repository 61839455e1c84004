// SPDX-License-Identifier: BSD-3-Clause
// Convolution with a spatial weight that has zeros, compiled once per instruction set.
//
// A task is a tile of output pixels, Th rows of Wt columns, for all output channels (a part of them where there are few tiles):
//
//   load     the tile's input, with its zero padding, into planes P[c][row][phase][column]: the columns of a stride s lie in s
//            phases, so that neighbouring outputs always read neighbouring columns
//   product  unstructured  M[k][row][x] += w P[tap + x]       lanes = columns; a list of {w, tap} for each k and block of c
//            blocks        M[row][x][16 k] += P[tap + x] w    lanes = output channels; a list of c for each vector of k, with a
//                                                             vector of weights for each tap
//   store    M + bias, transposed where lanes are not what is contiguous in the output
//
// tap = (c, i, j) is a constant distance in P, looked up in a table that is made once per call.
//
// Lanes that are columns are not neighbours: lane l of vector q is column l Q + q of Q vectors (Henretty et al., CC 2011). Then
// x + 1 is the next vector, and no load crosses a cache line. Vectors Q, Q + 1, ... are the columns that the kernel reaches over.
// Where rows are short, lanes are columns of several images: S segments of each, lane l column (l mod S) Q + q of image l / S.
#include "../common/scratch.h"
#include "../common/simd.h"
#include "sparse_conv.h"

#include <type_traits>

namespace pywino::sparse_conv {
namespace {

// --- the packed filter ------------------------------------------------------------------------------------------------------
//   header   16 words
//   starts   lists + 1: list i is the entries starts[i] .. starts[i + 1] - 1
//   rows     lists: the output channel of each (unstructured); kSorted neighbours are sorted by length, for the branch predictor
//   entries  from a multiple of 16 words on
//     unstructured   list (block of input channels, k): values, and apart from them 16 bits for the tap of each in its block
//     blocks         list (vector of k): input channels, and apart from them kernel_h x kernel_w vectors of values for each
struct Header {
  int32_t magic, pattern, lanes, unused;
  int64_t out_channels, in_channels, kernel_h, kernel_w, entries;
  int64_t none;
};
static_assert(sizeof(Header) == 64);
constexpr int32_t kMagic = 0x50535332;

constexpr int64_t kSorted = 64;

// Input channels of a list: what their planes hold for one row of a tile stays in the first-level cache. 16 bits count its taps.
constexpr int64_t kMostTaps = 1 << 16;
int64_t list_channels(int64_t taps) {
  const int64_t channels = max<int64_t>(8, min<int64_t>(128, 288 / taps));
  return max<int64_t>(1, min(channels, kMostTaps / taps));
}

template <typename Word, typename Float, typename Tap>
struct View {
  Word* words;
  Pattern pattern;
  int64_t K, C, taps, units, channels_of_list, channel_blocks, lists;

  View(Word* w, Pattern p, int64_t out_channels, int64_t in_channels, int64_t kernel)
      : words(w),
        pattern(p),
        K(out_channels),
        C(in_channels),
        taps(kernel),
        units(ceil_div<int64_t>(K, kLanes)),
        channels_of_list(list_channels(taps)),
        channel_blocks(ceil_div(C, channels_of_list)),
        lists(p == Pattern::blocks ? units : channel_blocks * K) {}

  Word* starts() const { return words + 16; }
  Word* rows() const { return words + 16 + lists + 1; }
  int64_t head() const {
    return round_up<int64_t>(16 + lists + 1 + (pattern == Pattern::blocks ? 0 : lists), 16);
  }
  int64_t size(int64_t entries) const {
    const int64_t n = round_up<int64_t>(entries, 16);
    return head() + n + (pattern == Pattern::blocks ? entries * taps * kLanes : n / 2);
  }
  // Pattern::unstructured
  Float* numbers() const { return reinterpret_cast<Float*>(words + head()); }
  Tap* places(int64_t entries) const {
    return reinterpret_cast<Tap*>(words + head() + round_up<int64_t>(entries, 16));
  }
  // Pattern::blocks
  Word* channels() const { return words + head(); }
  Float* values(int64_t entries) const {
    return reinterpret_cast<Float*>(words + head() + round_up<int64_t>(entries, 16));
  }
};
using Filter = View<const int32_t, const float, const uint16_t>;
using Writing = View<int32_t, float, uint16_t>;

// --- products ---------------------------------------------------------------------------------------------------------------
constexpr int kSums = 2;                             // of a list
constexpr int kVectors = kRegisters == 32 ? 4 : 3;   // most vectors of columns at once
constexpr int kPixels = kRegisters == 32 ? 28 : 12;  // most pixels at once
constexpr int64_t kSumBlock = 128;                   // most terms of a partial sum

// M[k] (+)= the products of the list of k, for R rows of V vectors of columns and `count` lists; `pitch` floats from row to row,
// of P and of M, `channel` from k to k. One load brings four values: loads are what limits this loop.
template <int R, int V>
void multiply_lists(int64_t count, const int32_t* __restrict starts, const int32_t* __restrict rows,
                    const float* __restrict values, const uint16_t* __restrict taps,
                    const int32_t* __restrict distance, const float* __restrict p, int64_t pitch_p,
                    float* __restrict m, int64_t pitch_m, int64_t channel, bool first) {
  constexpr int Q = kSums;
  for (int64_t i = 0; i < count; ++i) {
    int64_t e = starts[i];
    const int64_t end = starts[i + 1];
    vec sum[Q][R][V];
    PYWINO_UNROLL for (int q = 0; q < Q; ++q) PYWINO_UNROLL for (int r = 0; r < R; ++r)
        PYWINO_UNROLL for (int n = 0; n < V; ++n) sum[q][r][n] = zero();
    const auto add = [&](int q, vec w, int64_t at) __attribute__((always_inline)) {
      const float* x = p + distance[taps[at]];
      PYWINO_UNROLL for (int r = 0; r < R; ++r) PYWINO_UNROLL for (int n = 0; n < V; ++n)
          sum[q][r][n] += w * load(x + r * pitch_p + n * kLanes);
    };
    for (; e + 4 <= end; e += 4) {
      prefetch(values + e + 128);
      prefetch(taps + e + 256);
      const vec w = load_fours(values + e);
      add(0 % Q, of_four<0>(w), e);
      add(1 % Q, of_four<1>(w), e + 1);
      add(2 % Q, of_four<2>(w), e + 2);
      add(3 % Q, of_four<3>(w), e + 3);
    }
    for (; e < end; ++e) add(0, values[e] - vec{}, e);
    PYWINO_UNROLL for (int r = 0; r < R; ++r) PYWINO_UNROLL for (int n = 0; n < V; ++n) {
      PYWINO_UNROLL for (int q = 1; q < Q; ++q) sum[0][r][n] += sum[q][r][n];
      float* to = m + rows[i] * channel + r * pitch_m + n * kLanes;
      store(to, first ? sum[0][r][n] : load(to) + sum[0][r][n]);
    }
  }
}

// M[x][lane] = sum over the listed c and the taps of P[c][tap + x] W[c][tap][lane], for MR pixels of a row.
template <int MR>
void multiply_blocks(const int32_t* __restrict c, const int32_t* __restrict end, int64_t taps,
                     const int32_t* __restrict distance, const float* __restrict w,
                     const float* __restrict p, int64_t plane, float* __restrict m) {
  const int64_t most = max<int64_t>(1, kSumBlock / taps);
  bool first = true;
  do {
    vec sum[MR];
    PYWINO_UNROLL for (int r = 0; r < MR; ++r) sum[r] = zero();
    const int32_t* stop = min(end, c + most);
    for (; c < stop; ++c) {
      const float* x = p + *c * plane;
      for (int64_t t = 0; t < taps; ++t, w += kLanes) {
        const vec wn = load(w);
        const float* at = x + distance[t];
        prefetch(w + 16 * kLanes);
        PYWINO_UNROLL for (int r = 0; r < MR; ++r) sum[r] += at[r] * wn;
      }
    }
    PYWINO_UNROLL for (int r = 0; r < MR; ++r)
        store(m + r * kLanes, first ? sum[r] : load(m + r * kLanes) + sum[r]);
    first = false;
  } while (c < end);
}

using MultiplyLists = void (*)(int64_t, const int32_t*, const int32_t*, const float*,
                               const uint16_t*, const int32_t*, const float*, int64_t, float*,
                               int64_t, int64_t, bool);
// By rows and vectors: as many rows together as there are registers for.
constexpr MultiplyLists kMultiplyLists[4][4] = {
    {multiply_lists<1, 1>, multiply_lists<1, 2>, multiply_lists<1, 3>, multiply_lists<1, 4>},
    {multiply_lists<2, 1>, multiply_lists<2, 2>},
    {multiply_lists<3, 1>},
    {multiply_lists<4, 1>}};

using MultiplyBlocks = void (*)(const int32_t*, const int32_t*, int64_t, const int32_t*,
                                const float*, const float*, int64_t, float*);
template <int... MR>
struct BlockTable {
  static constexpr MultiplyBlocks table[] = {multiply_blocks<MR>...};
};
#if defined(__AVX512F__)
constexpr const MultiplyBlocks* kMultiplyBlocks =
    BlockTable<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
               24, 25, 26, 27, 28>::table;
#else
constexpr const MultiplyBlocks* kMultiplyBlocks =
    BlockTable<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>::table;
#endif

// --- one call ---------------------------------------------------------------------------------------------------------------
constexpr int64_t kScratchPerThread = int64_t(4) << 20;
constexpr int64_t kPlanesBytes = int64_t(512)
                                 << 10;  // of a tile's input: half of a second-level cache
constexpr int64_t kMostColumns = 112, kMostRows = 8;

// A 1 x 1 convolution of stride 1 does not know rows: all pixels of an image are one.
Geometry flattened(Geometry g) {
  if (g.kernel_h * g.kernel_w * g.stride_h * g.stride_w == 1 && g.pad_h + g.pad_w == 0)
    g.w *= g.h, g.h = 1;
  return g;
}

// How many images' columns fill the lanes best: a row of 7 columns alone fills less than half of 16.
int64_t images_of_vector(const Geometry& g) {
  const int64_t columns = g.out_w();
  int64_t best = 1;
  double most = 0;
  for (int64_t images = 1; images <= min<int64_t>(kLanes, g.n) && columns <= kMostColumns;
       images *= 2) {
    const int64_t lanes = round_up(columns, kLanes / images) * round_up(g.n, images);
    // Several images share the caches, so a small gain is none.
    if (const double part = double(columns * g.n) / double(lanes); part > 1.1 * most)
      best = images, most = part;
  }
  return best;
}

// One: the lanes are of one image. It is common, and constants make it faster.
template <typename T, bool One>
struct Run {
  const ForwardParams& params;
  const Geometry g;
  Filter filter;
  int64_t entries;
  int threads;
  int64_t out_h, out_w;
  bool by_channel;                                  // lanes of M are channels
  bool stream;                                      // write the output past the caches
  int64_t images, segments;                         // of a vector: images * segments = lanes
  int64_t tile_h, tile_w, tiles_h, tiles_w, parts;  // parts of the output channels
  int64_t phases, lane_step, vector_step;           // columns from lane to lane, vector to vector
  int64_t vectors;                // of a row and phase of P, those that the kernel reaches over too
  int64_t columns, pitch, plane;  // floats of P: a phase, a row, a channel
  int64_t m_row;                  // floats of a row of M, of one k or vector of k
  const int32_t* distance = nullptr;
  int64_t next = 0;
  bool failed = false;

  Run(const ForwardParams& p, const Filter& f, int64_t n, int t)
      : params(p),
        g(flattened(p.geometry)),
        filter(f),
        entries(n),
        threads(t),
        out_h(g.out_h()),
        out_w(g.out_w()),
        by_channel(f.pattern == Pattern::blocks) {
    stream = sizeof(T) == 4 && kVectorsOfLine == 1 && g.channels_last && filter.K % kLanes == 0 &&
             reinterpret_cast<uintptr_t>(params.output) % (4 * kLanes) == 0 &&
             g.n * filter.K * out_h * out_w * int64_t(sizeof(T)) > kStreamBytes;
    phases = g.kernel_w == 1 ? 1 : g.stride_w;
    images = One ? 1 : images_of_vector(g);
    segments = kLanes / images;
    const int64_t most = out_h == 1 ? kMostRows * kMostColumns : kMostColumns;
    tile_w = ceil_div(out_w, ceil_div(out_w, most));
    tile_h = min(out_h, kMostRows);
    set_planes();
    // Smaller tiles where the planes would leave the cache, or threads would wait for work.
    const auto halve = [&] {
      return g.c * plane * 4 > kPlanesBytes ||
             groups() * ceil_div(out_h, tile_h) * ceil_div(out_w, tile_w) < 2 * threads;
    };
    while (tile_h > 1 && halve()) {
      tile_h = ceil_div<int64_t>(tile_h, 2);
      set_planes();
    }
    while (tile_w > kVectors * kLanes && out_h == 1 && halve()) {
      tile_w = round_up<int64_t>(tile_w / 2, kLanes);
      set_planes();
    }
    while (tile_w > 2 * kLanes && g.c * plane * 4 > kScratchPerThread / 2) {
      tile_w = round_up<int64_t>(tile_w / 2, kLanes);
      set_planes();
    }
    tiles_h = ceil_div(out_h, tile_h);
    tiles_w = ceil_div(out_w, tile_w);
    const int64_t tiles = groups() * tiles_h * tiles_w;
    parts = tiles >= 2 * threads ? 1
                                 : min(ceil_div(filter.K, grain()),
                                       ceil_div<int64_t>(2 * threads, max<int64_t>(tiles, 1)));
    m_row = (by_channel ? tile_w : own_vectors()) * kLanes;
  }

  int64_t groups() const { return ceil_div(g.n, images); }
  int64_t own_vectors() const { return ceil_div(tile_w, segments); }

  void set_planes() {
    const int64_t reach = (g.kernel_w - 1) * g.dil_w / g.stride_w, own = own_vectors();
    const bool apart = !by_channel && (reach > 0 || !One);
    lane_step = apart ? own : 1;
    vector_step = apart ? 1 : kLanes;
    vectors = apart ? own + reach : ceil_div<int64_t>(tile_w + reach, kLanes);
    columns = vectors * kLanes;
    pitch = phases * columns;
    const int64_t rows = (tile_h - 1) * g.stride_h + (g.kernel_h - 1) * g.dil_h + 1;
    plane = (rows * pitch / kLanes | 1) * kLanes;
  }

  // Distances in P of the taps of one list of channels, or of one channel.
  void set_distances(int32_t* to) const {
    const int64_t channels = by_channel ? 1 : filter.channels_of_list,
                  column = by_channel ? 1 : kLanes;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < g.kernel_h; ++i)
        for (int64_t j = 0; j < g.kernel_w; ++j)
          *to++ = int32_t(c * plane + i * g.dil_h * pitch + j * g.dil_w % g.stride_w * columns +
                          j * g.dil_w / g.stride_w * column);
  }

  // Output channels that are not cut: a vector, or lists that are sorted together.
  int64_t grain() const { return by_channel ? kLanes : kSorted; }

  // First output channel of a part: parts have equal shares of the entries.
  int64_t part_begin(int64_t part) const {
    if (part == 0 || part == parts) return part ? filter.K : 0;
    int64_t k = 0;
    for (int64_t before = 0; k < filter.K && before * parts < part * entries; k += grain())
      for (int64_t b = 0; b < (by_channel ? 1 : filter.channel_blocks); ++b) {
        const int32_t* start = filter.starts() + (by_channel ? k / kLanes : b * filter.K + k);
        before += start[by_channel ? 1 : min(kSorted, filter.K - k)] - start[0];
      }
    return min(filter.K, k);
  }

  // Of a lane: its column, counted in lane steps, and its image.
  PYWINO_INLINE int64_t segment(int lane) const { return One ? lane : lane & int(segments - 1); }
  PYWINO_INLINE int64_t image_of(int lane) const {
    return One ? 0 : lane >> __builtin_ctz(unsigned(segments));
  }
  // Lanes of the group of images that begins with `image`: the last may have fewer.
  PYWINO_INLINE int lanes_of(int64_t image) const {
    return One ? kLanes : int(min(images, g.n - image) * segments);
  }

  // --- load ---
  void load_planes(int64_t image, int64_t y0, int64_t x0, int64_t rows, float* planes) const {
    const int all = lanes_of(image);
    const int64_t top = y0 * g.stride_h - g.pad_h, left = x0 * g.stride_w - g.pad_w;
    const int64_t input_rows = (rows - 1) * g.stride_h + (g.kernel_h - 1) * g.dil_h + 1;
    const T* in = static_cast<const T*>(params.input) + image * g.c * g.h * g.w;
    for (int64_t row = 0; row < input_rows; ++row) {
      const int64_t y = top + row;
      for (int64_t phase = 0; phase < phases; ++phase) {
        float* to = planes + row * pitch + phase * columns;
        if (y < 0 || y >= g.h) {
          for (int64_t c = 0; c < g.c; ++c)
            __builtin_memset(to + c * plane, 0, columns * sizeof(float));
        } else if (g.channels_last) {
          load_pixels(in + y * g.w * g.c, all, left + phase, to);
        } else {
          for (int64_t c = 0; c < g.c; ++c)
            load_row(in + (c * g.h + y) * g.w, all, left + phase, to + c * plane);
        }
      }
    }
  }

  // L numbers of a row from column x on, zero outside.
  // Every stride-th number of a row, from column x on, zero outside; of each image that lanes [0, all) are of.
  void load_row(const T* in, int all, int64_t x, float* to) const {
    const int64_t image = g.c * g.h * g.w;
    if (g.stride_w == 1 && vector_step == kLanes) {
      for (int64_t q = 0; q < columns; q += kLanes) store(to + q, load_columns(in, x + q, g.w));
    } else if (g.stride_w == 1) {
      for (int64_t q = 0; q < vectors; q += kLanes) {
        vec r[kLanes];
        for (int l = 0; l < kLanes; ++l)
          r[l] = One || l < all
                     ? load_columns(in + image_of(l) * image, x + segment(l) * lane_step + q, g.w)
                     : zero();
        transpose(r);
        for (int i = 0; i < min<int64_t>(kLanes, vectors - q); ++i)
          store(to + (q + i) * kLanes, r[i]);
      }
    } else {
      const int64_t step = lane_step * g.stride_w;
      for (int64_t q = 0; q < vectors; ++q, to += kLanes) {
        const int64_t first = x + q * vector_step * g.stride_w;
        if (first >= 0 && first + (segments - 1) * step < g.w && all == kLanes) {
          for (int l = 0; l < kLanes; ++l)
            to[l] = get(in + image_of(l) * image + first + segment(l) * step);
        } else {
          for (int l = 0; l < kLanes; ++l) {
            const int64_t at = first + segment(l) * step;
            to[l] = at >= 0 && at < g.w && l < all ? get(in + image_of(l) * image + at) : 0.f;
          }
        }
      }
    }
  }

  // The same for all channels of a row of pixels.
  void load_pixels(const T* in, int all, int64_t x0, float* to) const {
    const int64_t step = lane_step * g.stride_w, image = g.h * g.w;
    for (int64_t q = 0; q < vectors; ++q) {
      const int64_t first = x0 + q * vector_step * g.stride_w;
      const bool inside = first >= 0 && first + (segments - 1) * step < g.w && all == kLanes;
      for (int64_t c = 0; c < g.c; c += kLanes) {
        const int lanes = int(min<int64_t>(kLanes, g.c - c));
        vec r[kLanes];
        if (inside && lanes == kLanes) {
          const T* from = in + first * g.c + c;
          PYWINO_UNROLL for (int i = 0; i < kLanes; ++i) r[i] =
              load(from + (image_of(i) * image + segment(i) * step) * g.c);
        } else {
          for (int i = 0; i < kLanes; ++i) {
            const int64_t x = first + segment(i) * step;
            r[i] = x >= 0 && x < g.w && (One || i < all)
                       ? load_part(in + (image_of(i) * image + x) * g.c + c, 0, lanes)
                       : zero();
          }
        }
        transpose(r);
        float* p = to + c * plane + q * kLanes;
        if (lanes == kLanes)
          PYWINO_UNROLL for (int i = 0; i < kLanes; ++i) store(p + i * plane, r[i]);
        else
          for (int i = 0; i < lanes; ++i) store(p + i * plane, r[i]);
      }
    }
  }

  // --- product ---
  void lists(int64_t k0, int64_t k1, int64_t rows, int64_t width, const float* planes,
             float* m) const {
    const int own = int(vector_step == 1 ? m_row / kLanes : ceil_div<int64_t>(width, kLanes)),
              most = kVectors / min(own, kVectors);
    const int64_t step = g.stride_h * pitch, channel = rows * m_row;
    for (int64_t b = 0; b < filter.channel_blocks; ++b) {
      const int64_t list = b * filter.K + k0;
      for (int64_t row = 0; row < rows; row += most) {
        const int together = int(min<int64_t>(most, rows - row));
        for (int v = 0; v < own; v += kVectors)
          kMultiplyLists[together - 1][min(kVectors, own - v) - 1](
              k1 - k0, filter.starts() + list, filter.rows() + list, filter.numbers(),
              filter.places(entries), distance,
              planes + b * filter.channels_of_list * plane + row * step + v * kLanes, step,
              m - k0 * channel + row * m_row + v * kLanes, m_row, channel, b == 0);
      }
    }
  }

  void blocks(int64_t k0, int64_t k1, int64_t rows, int64_t width, const float* planes,
              float* m) const {
    const int64_t groups = ceil_div<int64_t>(width, kPixels), base = width / groups,
                  larger = width % groups;
    const float* values = filter.values(entries);
    for (int64_t u = k0 / kLanes; u < ceil_div<int64_t>(k1, kLanes); ++u) {
      const int32_t* start = filter.starts() + u;
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0, x = 0; i < groups; ++i) {
          const int64_t count = base + (i < larger);
          kMultiplyBlocks[count - 1](
              filter.channels() + start[0], filter.channels() + start[1], filter.taps, distance,
              values + start[0] * filter.taps * kLanes, planes + row * g.stride_h * pitch + x,
              plane, m + ((u - k0 / kLanes) * rows + row) * m_row + x * kLanes);
          x += count;
        }
    }
  }

  // --- store ---
  void store_tile(int64_t image, int64_t y0, int64_t x0, int64_t k0, int64_t k1, int64_t rows,
                  int64_t width, const float* m) const {
    T* out = static_cast<T*>(params.output) + image * filter.K * out_h * out_w;
    const int all = lanes_of(image);
    for (int64_t k = k0; k < k1; k += kLanes) {
      const int lanes = int(min<int64_t>(kLanes, k1 - k));
      const vec bias = params.bias ? load_part(params.bias + k, 0, lanes) : zero();
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t pixel = (y0 + row) * out_w + x0;
        if (by_channel)
          store_channels(m + ((k - k0) / kLanes * rows + row) * m_row, width, k, lanes, bias, out,
                         pixel);
        else
          store_columns(m + ((k - k0) * rows + row) * m_row, rows * m_row, all, width, k, lanes,
                        bias, out, pixel);
      }
    }
  }

  // L output channels of a row of pixels, lanes = channels.
  void store_channels(const float* m, int64_t width, int64_t k, int lanes, vec bias, T* out,
                      int64_t pixel) const {
    for (int64_t x = 0; x < width; x += kLanes) {
      const int pixels = int(min<int64_t>(kLanes, width - x));
      vec r[kLanes];
      for (int i = 0; i < kLanes; ++i)
        r[i] = i < pixels ? load(m + (x + i) * kLanes) + bias : zero();
      if (g.channels_last) {
        for (int i = 0; i < pixels; ++i) store_pixel(out, pixel + x + i, k, lanes, r[i]);
      } else {
        transpose(r);
        for (int i = 0; i < lanes; ++i)
          store_part(out + (k + i) * out_h * out_w + pixel + x, r[i], 0, pixels);
      }
    }
  }

  // The same, lanes = columns, of which `all` are; the next channel is `pitch` floats on.
  void store_columns(const float* m, int64_t pitch, int all, int64_t width, int64_t k, int lanes,
                     vec bias, T* out, int64_t pixel) const {
    const int64_t own = m_row / kLanes, image = out_h * out_w;
    vec r[kLanes];
    if (g.channels_last) {
      for (int64_t q = 0; q < own; ++q) {
        for (int i = 0; i < kLanes; ++i)
          r[i] = i < lanes ? load(m + i * pitch + q * kLanes) : zero();
        transpose(r);
        for (int i = 0; i < (One ? kLanes : all); ++i)
          if (const int64_t x = q * vector_step + segment(i) * lane_step; x < width)
            store_pixel(out, image_of(i) * image + pixel + x, k, lanes, r[i] + bias);
      }
      return;
    }
    for (int i = 0; i < lanes; ++i, m += pitch) {
      T* to = out + (k + i) * image + pixel;
      if (One && lane_step == 1) {
        for (int64_t x = 0; x < width; x += kLanes)
          store_part(to + x, load(m + x) + bias[i], 0, int(min<int64_t>(kLanes, width - x)));
        continue;
      }
      for (int64_t q = 0; q < own; q += kLanes) {
        const int64_t count = min<int64_t>(kLanes, own - q);
        for (int n = 0; n < kLanes; ++n)
          r[n] = n < count ? load(m + (q + n) * kLanes) + bias[i] : zero();
        transpose(r);
        for (int l = 0; l < (One ? kLanes : all); ++l)
          if (const int64_t x = segment(l) * lane_step + q; x < width)
            store_part(to + image_of(l) * filter.K * image + x, r[l], 0,
                       int(min(count, width - x)));
      }
    }
  }

  PYWINO_INLINE void store_pixel(T* out, int64_t pixel, int64_t k, int lanes, vec value) const {
    T* to = out + pixel * filter.K + k;
    if constexpr (sizeof(T) == 4)
      if (stream) return pywino::stream(reinterpret_cast<float*>(to), value);
    store_part(to, value, 0, lanes);
  }

  static void body(void* arg) {
    Run& run = *static_cast<Run*>(arg);
    const int64_t K = round_up<int64_t>(run.filter.K, kLanes);
    const int64_t planes = run.g.c * run.plane;
    const int64_t m_floats =
        (run.filter.pattern == Pattern::blocks ? K / kLanes : K) * run.tile_h * run.m_row;
    float* memory = static_cast<float*>(scratch((planes + m_floats) * 4, ScratchSlot::own));
    if (!memory) {
      run.failed = true;
      return;
    }
    const int64_t tiles = run.groups() * run.tiles_h * run.tiles_w;
    for (int64_t task = take(&run.next); task < tiles * run.parts; task = take(&run.next)) {
      const int64_t tile = task / run.parts, part = task % run.parts;
      const int64_t image = tile / (run.tiles_h * run.tiles_w) * run.images;
      const int64_t y0 = tile / run.tiles_w % run.tiles_h * run.tile_h,
                    x0 = tile % run.tiles_w * run.tile_w;
      const int64_t rows = min(run.tile_h, run.out_h - y0), width = min(run.tile_w, run.out_w - x0);
      const int64_t k0 = run.part_begin(part), k1 = run.part_begin(part + 1);
      if (k0 == k1) continue;
      run.load_planes(image, y0, x0, rows, memory);
      float* m = memory + planes;
      if (run.filter.pattern == Pattern::blocks)
        run.blocks(k0, k1, rows, width, memory, m);
      else
        run.lists(k0, k1, rows, width, memory, m);
      run.store_tile(image, y0, x0, k0, k1, rows, width, m);
    }
  }

  Status operator()(const Executor& executor) {
    if (g.n == 0) return Status::ok;
    const int64_t taps =
        filter.taps * (filter.pattern == Pattern::blocks ? 1 : filter.channels_of_list);
    int32_t* table = static_cast<int32_t*>(scratch(taps * sizeof(int32_t), ScratchSlot::shared));
    if (!table) return Status::out_of_memory;
    set_distances(table);
    distance = table;
    executor.run(executor.threads, body, this);
    return failed ? Status::out_of_memory : Status::ok;
  }
};

Status run_forward(const ForwardParams& params, const Executor& executor) {
  const Header& header = *reinterpret_cast<const Header*>(params.filter);
  const Filter filter(params.filter, Pattern(header.pattern), header.out_channels,
                      header.in_channels, header.kernel_h * header.kernel_w);
  return with_dtype(params.geometry.dtype, [&](auto element) {
    const auto run = [&](auto one) {
      return Run<decltype(element), one()>(params, filter, header.entries,
                                           executor.threads)(executor);
    };
    const bool one =
        filter.pattern == Pattern::blocks || images_of_vector(flattened(params.geometry)) == 1;
    return one ? run(std::true_type{}) : run(std::false_type{});
  });
}

// --- packing ----------------------------------------------------------------------------------------------------------------
template <typename T>
struct Packing {
  const FilterParams& p;
  int64_t K, C, stride_k, stride_c;
  Writing view;

  Packing(const FilterParams& params, Pattern pattern, int32_t* words)
      : p(params),
        K(p.rotate ? p.in_channels : p.out_channels),
        C(p.rotate ? p.out_channels : p.in_channels),
        stride_k(p.rotate ? p.stride_c : p.stride_k),
        stride_c(p.rotate ? p.stride_k : p.stride_c),
        view(words, pattern, K, C, p.kernel_h * p.kernel_w) {}

  PYWINO_INLINE float weight(int64_t k, int64_t c, int64_t i, int64_t j) const {
    if (p.rotate) i = p.kernel_h - 1 - i, j = p.kernel_w - 1 - j;
    return get(static_cast<const T*>(p.weight) + k * stride_k + c * stride_c + i * p.stride_h +
               j * p.stride_w);
  }

  // begin(list, entries so far) and use(entries so far, k, c, i, j) in the order of the lists; how many entries there are. `rows`:
  // the output channel of each list, nullptr: as they come.
  template <typename Begin, typename Use>
  int64_t walk(const int32_t* rows, const Begin& begin, const Use& use) const {
    int64_t entries = 0;
    const bool blocks = view.pattern == Pattern::blocks;
    const int64_t width = blocks ? kLanes : 1, depth = blocks ? C : view.channels_of_list;
    int64_t list = 0;
    for (int64_t c0 = 0; c0 < C; c0 += depth)
      for (int64_t k0 = 0; k0 < K; k0 += width) {
        const int64_t k = rows ? rows[list] : k0;
        begin(list++, entries);
        for (int64_t c = c0; c < min(C, c0 + depth); ++c) {
          if (blocks) {
            bool any = false;
            for (int64_t lane = k; lane < min(K, k + width); ++lane)
              for (int64_t i = 0; i < p.kernel_h; ++i)
                for (int64_t j = 0; j < p.kernel_w; ++j) any |= weight(lane, c, i, j) != 0;
            if (any) use(entries++, k, c, 0, 0);
          } else {
            for (int64_t i = 0; i < p.kernel_h; ++i)
              for (int64_t j = 0; j < p.kernel_w; ++j)
                if (weight(k, c, i, j) != 0) use(entries++, k, c, i, j);
          }
        }
      }
    begin(view.lists, entries);
    return entries;
  }

  int64_t count() const {
    return walk(nullptr, [](auto...) {}, [](auto...) {});
  }

  // The longer ones of kSorted neighbouring lists first; `starts` are theirs as they come.
  void sort(const int32_t* starts, int32_t* rows) const {
    for (int64_t first = 0; first < view.lists; first += K)
      for (int64_t k0 = 0; k0 < K; k0 += kSorted)
        for (int64_t k = k0; k < min(K, k0 + kSorted); ++k) {
          const auto length = [&](int64_t of) {
            return starts[first + of + 1] - starts[first + of];
          };
          int64_t i = first + k;
          for (; i > first + k0 && length(rows[i - 1]) < length(k); --i) rows[i] = rows[i - 1];
          rows[i] = int32_t(k);
        }
  }

  void write(int64_t entries) const {
    // The heads, and the ends of what makes a whole number of words.
    __builtin_memset(view.words, 0,
                     (view.head() + round_up<int64_t>(entries, 16)) * sizeof(int32_t));
    const auto begin = [&](int64_t list, int64_t entry) { view.starts()[list] = int32_t(entry); };
    if (view.pattern == Pattern::unstructured) {
      __builtin_memset(view.places(entries), 0, round_up<int64_t>(entries, 16) * sizeof(uint16_t));
      walk(nullptr, begin, [](auto...) {});
      sort(view.starts(), view.rows());
      walk(view.rows(), begin, [&](int64_t at, int64_t k, int64_t c, int64_t i, int64_t j) {
        const int64_t tap = (c % view.channels_of_list * p.kernel_h + i) * p.kernel_w + j;
        view.numbers()[at] = weight(k, c, i, j);
        view.places(entries)[at] = uint16_t(tap);
      });
      return;
    }
    walk(nullptr, begin, [&](int64_t at, int64_t k, int64_t c, int64_t, int64_t) {
      view.channels()[at] = int32_t(c);
      float* to = view.values(entries) + at * view.taps * kLanes;
      for (int64_t i = 0; i < p.kernel_h; ++i)
        for (int64_t j = 0; j < p.kernel_w; ++j)
          for (int64_t lane = k; lane < k + kLanes; ++lane)
            *to++ = lane < K ? weight(lane, c, i, j) : 0.f;
    });
  }
};

int64_t packed_words(const FilterParams& params, Pattern pattern) {
  return with_dtype(params.dtype, [&](auto element) -> int64_t {
    const Packing<decltype(element)> packing(params, pattern, nullptr);
    if (packing.view.taps > kMostTaps) return -1;
    const int64_t entries = packing.count();
    return entries > INT32_MAX ? -1 : packing.view.size(entries);
  });
}

Status write_packed(const FilterParams& params, Pattern pattern, int32_t* packed) {
  return with_dtype(params.dtype, [&](auto element) {
    const Packing<decltype(element)> packing(params, pattern, packed);
    const int64_t entries = packing.count();
    if (entries > INT32_MAX) return Status::unsupported;
    packing.write(entries);
    *reinterpret_cast<Header*>(packed) = {
        kMagic,    int32_t(pattern), kLanes,          0,       packing.K,
        packing.C, params.kernel_h,  params.kernel_w, entries, 0};
    return Status::ok;
  });
}

bool fits(const int32_t* packed, int64_t words, const Geometry& g) {
  if (words < 16) return false;
  const Header& header = *reinterpret_cast<const Header*>(packed);
  return header.magic == kMagic && header.lanes == kLanes &&
         header.out_channels == g.out_channels && header.in_channels == g.c &&
         header.kernel_h == g.kernel_h && header.kernel_w == g.kernel_w &&
         words ==
             Filter(packed, Pattern(header.pattern), g.out_channels, g.c, g.kernel_h * g.kernel_w)
                 .size(header.entries);
}

}  // namespace

extern const Kernels PYWINO_ISA_NAME(kernels_);
const Kernels PYWINO_ISA_NAME(kernels_) = {run_forward, packed_words, write_packed, fits};

}  // namespace pywino::sparse_conv
