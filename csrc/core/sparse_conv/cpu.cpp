// SPDX-License-Identifier: BSD-3-Clause
// Convolution with a spatial weight that has zeros, compiled once per instruction set.
//
// A task is a tile of output pixels, Th rows of Wt columns, for all output channels (a part of them where there are few tiles):
//
//   load     the tile's input, with its zero padding, into planes P[c][row][phase][column]: the columns of a stride s lie in s
//            phases, so that neighbouring outputs always read neighbouring floats
//   product  unstructured  M[k][row][x] += w P[tap + x]       lanes = columns; a list of {w, tap} for each k and block of c
//            blocks        M[row][x][16 k] += P[tap + x] w    lanes = output channels; a list of c for each vector of k, with a
//                                                             vector of weights for each tap
//   store    M + bias, transposed where lanes are not what is contiguous in the output
//
// tap = (c, i, j) is a constant distance in P, looked up in a table that is made once per call.
#include "../common/scratch.h"
#include "../common/simd.h"
#include "sparse_conv.h"

namespace pywino::sparse_conv {
namespace {

PYWINO_INLINE int64_t take(int64_t* counter) {
  return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

// --- the packed filter ------------------------------------------------------------------------------------------------------
//   header   16 words
//   starts   lists + 1: list i is the entries starts[i] .. starts[i + 1] - 1
//   entries  from a multiple of 16 words on
//     unstructured   list (block of input channels, k): {value, tap in the block}
//     blocks         list (vector of k): input channels, and apart from them kernel_h x kernel_w vectors of values for each
struct Header {
  int32_t magic, pattern, lanes, unused;
  int64_t out_channels, in_channels, kernel_h, kernel_w, entries;
  int64_t none;
};
static_assert(sizeof(Header) == 64);
constexpr int32_t kMagic = 0x50535332;

struct Entry {
  float value;
  uint32_t tap;
};

// Input channels of a list: their planes of a tile stay in the first-level cache.
int64_t list_channels(int64_t taps) { return max<int64_t>(8, min<int64_t>(128, 288 / taps)); }

template <typename Word, typename Float, typename Item>
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
  int64_t head() const { return round_up<int64_t>(16 + lists + 1, 16); }
  int64_t size(int64_t entries) const {
    return head() + (pattern == Pattern::blocks
                         ? round_up<int64_t>(entries, 16) + entries * taps * kLanes
                         : 2 * entries);
  }
  Item* entries() const { return reinterpret_cast<Item*>(words + head()); }
  Word* channels() const { return words + head(); }
  Float* values(int64_t entries) const {
    return reinterpret_cast<Float*>(words + head() + round_up<int64_t>(entries, 16));
  }
  // The list that begins with output channel k, of channel block b.
  int64_t list(int64_t b, int64_t k) const {
    return pattern == Pattern::blocks ? k / kLanes : b * K + k;
  }
};
using Filter = View<const int32_t, const float, const Entry>;
using Writing = View<int32_t, float, Entry>;

// --- products ---------------------------------------------------------------------------------------------------------------
constexpr int kSums = 4;                             // of a list: an addition takes four cycles
constexpr int kVectors = kRegisters == 32 ? 4 : 3;   // most vectors of columns at once
constexpr int kPixels = kRegisters == 32 ? 28 : 12;  // most pixels at once
constexpr int64_t kSumBlock = 128;                   // most terms of a partial sum

// M (+)= the products of a list, for R rows of V vectors of columns; `pitch` floats from row to row, of P and of M.
template <int R, int V>
void multiply_list(const Entry* __restrict e, const Entry* __restrict end,
                   const int32_t* __restrict distance, const float* __restrict p, int64_t pitch_p,
                   float* __restrict m, int64_t pitch_m, bool first) {
  vec sum[kSums][R][V];
  PYWINO_UNROLL for (int q = 0; q < kSums; ++q) PYWINO_UNROLL for (int r = 0; r < R; ++r)
      PYWINO_UNROLL for (int n = 0; n < V; ++n) sum[q][r][n] = zero();
  for (; e + kSums <= end; e += kSums) PYWINO_UNROLL for (int q = 0; q < kSums; ++q) {
      const float* x = p + distance[e[q].tap];
      const float w = e[q].value;
      PYWINO_UNROLL for (int r = 0; r < R; ++r) PYWINO_UNROLL for (int n = 0; n < V; ++n)
          sum[q][r][n] += w * load(x + r * pitch_p + n * kLanes);
    }
  for (; e < end; ++e) {
    const float* x = p + distance[e->tap];
    const float w = e->value;
    PYWINO_UNROLL for (int r = 0; r < R; ++r) PYWINO_UNROLL for (int n = 0; n < V; ++n)
        sum[0][r][n] += w * load(x + r * pitch_p + n * kLanes);
  }
  PYWINO_UNROLL for (int r = 0; r < R; ++r) PYWINO_UNROLL for (int n = 0; n < V; ++n) {
    PYWINO_UNROLL for (int q = 1; q < kSums; ++q) sum[0][r][n] += sum[q][r][n];
    float* to = m + r * pitch_m + n * kLanes;
    store(to, first ? sum[0][r][n] : load(to) + sum[0][r][n]);
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

using MultiplyList = void (*)(const Entry*, const Entry*, const int32_t*, const float*, int64_t,
                              float*, int64_t, bool);
constexpr MultiplyList kOneRow[] = {multiply_list<1, 1>, multiply_list<1, 2>, multiply_list<1, 3>,
                                    multiply_list<1, 4>};
constexpr MultiplyList kTwoRows = multiply_list<2, 2>, kThreeRows = multiply_list<3, 1>;

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

template <typename T>
struct Run {
  const ForwardParams& params;
  const Geometry& g;
  Filter filter;
  int64_t entries;
  int threads;
  int64_t out_h, out_w;
  int64_t tile_h, tile_w, tiles_h, tiles_w, parts;  // parts of the output channels
  int64_t used;                                     // columns of a phase that are read
  int64_t columns, pitch, plane;                    // of P: a phase, a row, a channel
  int64_t m_row;                                    // floats of a row of M, of one k or vector of k
  const int32_t* distance = nullptr;
  int64_t next = 0;
  bool failed = false;

  Run(const ForwardParams& p, const Filter& f, int64_t n, int t)
      : params(p),
        g(p.geometry),
        filter(f),
        entries(n),
        threads(t),
        out_h(g.out_h()),
        out_w(g.out_w()) {
    tile_w = ceil_div(out_w, ceil_div(out_w, kMostColumns));
    tile_h = min(out_h, kMostRows);
    set_planes();
    // Smaller tiles where the planes would leave the cache, or threads would wait for work.
    while (tile_h > 1 && (g.c * plane * 4 > kPlanesBytes ||
                          g.n * ceil_div(out_h, tile_h) * ceil_div(out_w, tile_w) < 2 * threads)) {
      tile_h = ceil_div<int64_t>(tile_h, 2);
      set_planes();
    }
    while (tile_w > 2 * kLanes && g.c * plane * 4 > kScratchPerThread / 2) {
      tile_w = round_up<int64_t>(tile_w / 2, kLanes);
      set_planes();
    }
    tiles_h = ceil_div(out_h, tile_h);
    tiles_w = ceil_div(out_w, tile_w);
    const int64_t tiles = g.n * tiles_h * tiles_w;
    parts = tiles >= 2 * threads
                ? 1
                : min(filter.units, ceil_div<int64_t>(2 * threads, max<int64_t>(tiles, 1)));
    m_row = filter.pattern == Pattern::blocks ? tile_w * kLanes : round_up<int64_t>(tile_w, kLanes);
  }

  void set_planes() {
    const int64_t reach = (g.kernel_w - 1) * g.dil_w / g.stride_w + 1;
    used = tile_w + reach;
    columns = round_up<int64_t>(tile_w, kLanes) + reach;  // vectors of columns go past the last one
    pitch = g.stride_w * columns;
    const int64_t rows = (tile_h - 1) * g.stride_h + (g.kernel_h - 1) * g.dil_h + 1;
    plane = (ceil_div<int64_t>(rows * pitch, kLanes) | 1) * kLanes;
  }

  // Distances in P of the taps of one list of channels, or of one channel.
  void set_distances(int32_t* to) const {
    const int64_t channels = filter.pattern == Pattern::blocks ? 1 : filter.channels_of_list;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < g.kernel_h; ++i)
        for (int64_t j = 0; j < g.kernel_w; ++j)
          *to++ = int32_t(c * plane + i * g.dil_h * pitch + j * g.dil_w % g.stride_w * columns +
                          j * g.dil_w / g.stride_w);
  }

  // First output channel of a part: parts have equal shares of the entries.
  int64_t part_begin(int64_t part) const {
    if (part == 0 || part == parts) return part ? filter.K : 0;
    int64_t unit = 0;
    for (int64_t before = 0; unit < filter.units && before * parts < part * entries; ++unit)
      for (int64_t b = 0; b < (filter.pattern == Pattern::blocks ? 1 : filter.channel_blocks);
           ++b) {
        const int32_t* start = filter.starts();
        const int64_t k0 = unit * kLanes, k1 = min(filter.K, k0 + kLanes);
        before += filter.pattern == Pattern::blocks
                      ? start[unit + 1] - start[unit]
                      : start[filter.list(b, k0) + (k1 - k0)] - start[filter.list(b, k0)];
      }
    return min(filter.K, unit * kLanes);
  }

  // --- load ---
  void load_planes(int64_t image, int64_t y0, int64_t x0, int64_t rows, float* planes) const {
    const int64_t top = y0 * g.stride_h - g.pad_h, left = x0 * g.stride_w - g.pad_w;
    const int64_t input_rows = (rows - 1) * g.stride_h + (g.kernel_h - 1) * g.dil_h + 1;
    const T* in = static_cast<const T*>(params.input) + image * g.c * g.h * g.w;
    for (int64_t row = 0; row < input_rows; ++row) {
      const int64_t y = top + row;
      for (int64_t phase = 0; phase < g.stride_w; ++phase) {
        float* to = planes + row * pitch + phase * columns;
        if (y < 0 || y >= g.h) {
          for (int64_t c = 0; c < g.c; ++c)
            __builtin_memset(to + c * plane, 0, used * sizeof(float));
        } else if (g.channels_last) {
          load_pixels(in + y * g.w * g.c, left + phase, to);
        } else {
          for (int64_t c = 0; c < g.c; ++c)
            load_row(in + (c * g.h + y) * g.w, left + phase, to + c * plane);
        }
      }
    }
  }

  // Every stride-th number of a row, from column x on, zero outside.
  void load_row(const T* in, int64_t x, float* to) const {
    if (g.stride_w == 1) {
      for (int64_t q = 0; q < used; q += kLanes) {
        const int lo = int(max<int64_t>(0, min<int64_t>(kLanes, -x - q)));
        const int hi = int(max<int64_t>(0, min<int64_t>(kLanes, g.w - x - q)));
        const vec v = lo >= hi                  ? zero()
                      : lo == 0 && hi == kLanes ? load(in + x + q)
                                                : load_part(in + x + q, lo, hi);
        store_part(to + q, v, 0, int(min<int64_t>(kLanes, used - q)));
      }
      return;
    }
    for (int64_t q = 0; q < used; ++q, x += g.stride_w)
      to[q] = x >= 0 && x < g.w ? get(in + x) : 0.f;
  }

  // The same for all channels of a row of pixels.
  void load_pixels(const T* in, int64_t x0, float* to) const {
    for (int64_t q = 0; q < used; q += kLanes) {
      const int width = int(min<int64_t>(kLanes, used - q));
      const int64_t first = x0 + q * g.stride_w, step = g.stride_w * g.c;
      const bool inside = first >= 0 && first + (kLanes - 1) * g.stride_w < g.w;
      for (int64_t c = 0; c < g.c; c += kLanes) {
        const int lanes = int(min<int64_t>(kLanes, g.c - c));
        vec r[kLanes];
        if (inside && lanes == kLanes) {
          const T* from = in + first * g.c + c;
          PYWINO_UNROLL for (int i = 0; i < kLanes; ++i) r[i] = load(from + i * step);
        } else {
          for (int i = 0; i < kLanes; ++i) {
            const int64_t x = first + i * g.stride_w;
            r[i] = x >= 0 && x < g.w ? load_part(in + x * g.c + c, 0, lanes) : zero();
          }
        }
        transpose(r);
        for (int i = 0; i < lanes; ++i) store_part(to + (c + i) * plane + q, r[i], 0, width);
      }
    }
  }

  // --- product ---
  void lists(int64_t k0, int64_t k1, int64_t rows, int64_t width, const float* planes,
             float* m) const {
    const int vectors = int(ceil_div<int64_t>(width, kLanes));
    const int together = kVectors >= 4 && vectors == 2 ? 2 : vectors == 1 ? 3 : 1;
    const int64_t step = g.stride_h * pitch;
    for (int64_t b = 0; b < filter.channel_blocks; ++b)
      for (int64_t row = 0; row < rows;) {
        const bool several = together > 1 && row + together <= rows;
        for (int v = 0; v < vectors; v += kVectors) {
          const MultiplyList multiply = !several        ? kOneRow[min(kVectors, vectors - v) - 1]
                                        : together == 2 ? kTwoRows
                                                        : kThreeRows;
          const float* p = planes + b * filter.channels_of_list * plane + row * step + v * kLanes;
          for (int64_t k = k0; k < k1; ++k) {
            const int32_t* start = filter.starts() + filter.list(b, k);
            multiply(filter.entries() + start[0], filter.entries() + start[1], distance, p, step,
                     m + ((k - k0) * rows + row) * m_row + v * kLanes, m_row, b == 0);
          }
        }
        row += several ? together : 1;
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
  // L output channels of L neighbouring pixels at a time, as rows of pixels in r.
  void store_tile(int64_t image, int64_t y0, int64_t x0, int64_t k0, int64_t k1, int64_t rows,
                  int64_t width, const float* m) const {
    const bool by_channel = filter.pattern == Pattern::blocks;  // lanes of M are channels
    T* out = static_cast<T*>(params.output);
    for (int64_t k = k0; k < k1; k += kLanes) {
      const int lanes = int(min<int64_t>(kLanes, k1 - k));
      const vec bias = params.bias ? load_part(params.bias + k, 0, lanes) : zero();
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t x = 0; x < width; x += kLanes) {
          const int pixels = int(min<int64_t>(kLanes, width - x));
          vec r[kLanes];
          if (by_channel) {
            const float* from = m + ((k - k0) / kLanes * rows + row) * m_row + x * kLanes;
            for (int i = 0; i < kLanes; ++i)
              r[i] = i < pixels ? load(from + i * kLanes) + bias : zero();
            if (!g.channels_last) transpose(r);
          } else {
            const float* from = m + ((k - k0) * rows + row) * m_row + x;
            for (int i = 0; i < kLanes; ++i)
              r[i] = i < lanes ? load(from + i * rows * m_row) + bias[i] : zero();
            if (g.channels_last) transpose(r);
          }
          const int64_t y = y0 + row;
          if (g.channels_last) {
            T* to = out + ((image * out_h + y) * out_w + x0 + x) * filter.K + k;
            for (int i = 0; i < pixels; ++i) store_part(to + i * filter.K, r[i], 0, lanes);
          } else {
            T* to = out + ((image * filter.K + k) * out_h + y) * out_w + x0 + x;
            for (int i = 0; i < lanes; ++i) store_part(to + i * out_h * out_w, r[i], 0, pixels);
          }
        }
    }
  }

  static void body(void* arg) {
    Run& run = *static_cast<Run*>(arg);
    const int64_t K = round_up<int64_t>(run.filter.K, kLanes);
    const int64_t planes = run.g.c * run.plane + kLanes;
    const int64_t m_floats =
        (run.filter.pattern == Pattern::blocks ? K / kLanes : K) * run.tile_h * run.m_row;
    float* memory = static_cast<float*>(scratch((planes + m_floats) * 4, ScratchSlot::own));
    if (!memory) {
      run.failed = true;
      return;
    }
    // Columns that are not used are multiplied too, in the last lanes of a row; what comes out is not stored.
    __builtin_memset(memory, 0, planes * sizeof(float));
    const int64_t tiles = run.g.n * run.tiles_h * run.tiles_w;
    for (int64_t task = take(&run.next); task < tiles * run.parts; task = take(&run.next)) {
      const int64_t tile = task / run.parts, part = task % run.parts;
      const int64_t image = tile / (run.tiles_h * run.tiles_w);
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

template <typename Use>
auto with_dtype(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::bf16: return use(bf16{});
    case DType::f16: return use(f16{});
    default: return use(float{});
  }
}

Status run_forward(const ForwardParams& params, const Executor& executor) {
  const Header& header = *reinterpret_cast<const Header*>(params.filter);
  const Filter filter(params.filter, Pattern(header.pattern), header.out_channels,
                      header.in_channels, header.kernel_h * header.kernel_w);
  return with_dtype(params.geometry.dtype, [&](auto element) {
    return Run<decltype(element)>(params, filter, header.entries, executor.threads)(executor);
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

  // use(list, entries so far, …) for every entry in the order of the lists; how many there are.
  template <typename Begin, typename Use>
  int64_t walk(const Begin& begin, const Use& use) const {
    int64_t entries = 0;
    const bool blocks = view.pattern == Pattern::blocks;
    const int64_t width = blocks ? kLanes : 1, depth = blocks ? C : view.channels_of_list;
    int64_t list = 0;
    for (int64_t c0 = 0; c0 < C; c0 += depth)
      for (int64_t k = 0; k < K; k += width) {
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
    return walk([](auto...) {}, [](auto...) {});
  }

  void write(int64_t entries) const {
    __builtin_memset(view.words, 0, view.head() * sizeof(int32_t));
    const auto begin = [&](int64_t list, int64_t entry) { view.starts()[list] = int32_t(entry); };
    if (view.pattern == Pattern::unstructured) {
      walk(begin, [&](int64_t at, int64_t k, int64_t c, int64_t i, int64_t j) {
        const int64_t tap = (c % view.channels_of_list * p.kernel_h + i) * p.kernel_w + j;
        view.entries()[at] = {weight(k, c, i, j), uint32_t(tap)};
      });
      return;
    }
    __builtin_memset(view.channels(), 0, round_up<int64_t>(entries, 16) * sizeof(int32_t));
    walk(begin, [&](int64_t at, int64_t k, int64_t c, int64_t, int64_t) {
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

extern const Kernels PYWINO_ISA_NAME(sparse_conv_kernels_);
const Kernels PYWINO_ISA_NAME(sparse_conv_kernels_) = {run_forward, packed_words, write_packed,
                                                       fits};

}  // namespace pywino::sparse_conv
