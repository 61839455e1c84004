// SPDX-License-Identifier: BSD-3-Clause
// Winograd forward convolution with a filter of the Winograd domain that has zeros, and its input gradient, compiled once per
// instruction set.
//
// Stages and chunks are those of cpu_forward.cpp. The product takes one position xi after the other, for as many output
// channels as fit, so that V[xi] is read from the core's caches, and it multiplies what sparse.h lists:
//
//   blocks        M[tile][16 k] += V[tile][c] U[c][16 k]   lanes = output channels. V as in the dense product; a register block
//                                                          of tiles, and one vector of U for each listed c
//   unstructured  M[k][tiles] += U[k][c] V[c][tiles]       lanes = tiles. V and M are transposed on the way in and out, L x L
//                                                          numbers at a time; a slab of tiles, and a number of U for each of
//                                                          four k, each with a c of its own
//
// Layouts (L = lanes of a vector):
//   blocks        V [xi][group of tiles][C / L][tile][L]     M [xi][pair of vectors of k][tile][pair's width]
//   unstructured  V [xi][slab of n L tiles][C][n L]          M [xi][slab][k][n L]
//
// The chunks are shared among the threads (every chunk is the same work, whatever the zeros are). Where there are too few
// tiles for that, all threads go through each stage of one chunk
// together: V[xi] and the filter of xi are then read by one thread, once.
#include "../common/product.h"
#include "../common/scratch.h"
#include "../common/simd.h"
#include "overlap.h"
#include "sparse.h"
#include "stages.h"
#include "tiles.h"
#include "transforms.h"
#include "winograd.h"

namespace pywino::winograd {
namespace {

using Filter = SparseView<const int32_t>;

// Units of output channels of which M holds the products at once.
struct Panel {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// --- blocks ---------------------------------------------------------------------------------------------------------------
// M[r][lane] = sum over the listed c of V[r][c] U[c][lane] for MR tiles; the next tile of M is `pitch` floats on.
template <int MR>
void multiply_blocks(int64_t count, const int32_t* __restrict channels, const float* __restrict u,
                     const float* __restrict v, float* __restrict m, int64_t pitch) {
  int64_t done = 0;
  do {
    vec sum[MR];
    PYWINO_UNROLL for (int r = 0; r < MR; ++r) sum[r] = zero();
    const int64_t block = min(count, done + kSumBlock);
    for (int64_t i = done; i < block; ++i, u += kLanes) {
      const uint32_t c = uint32_t(channels[i]);
      const float* x = v + uint64_t(c / kLanes) * (MR * kLanes) + c % kLanes;
      const vec un = load(u);
      prefetch(u + 16 * kLanes);
      PYWINO_UNROLL for (int r = 0; r < MR; ++r) sum[r] += x[r * kLanes] * un;
    }
    PYWINO_UNROLL for (int r = 0; r < MR; ++r)
        store(m + r * pitch, done ? load(m + r * pitch) + sum[r] : sum[r]);
    done = block;
  } while (done < count);
}

using MultiplyBlocks = void (*)(int64_t, const int32_t*, const float*, const float*, float*,
                                int64_t);
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

struct Blocks {
  static constexpr int64_t kGrain = 1;  // chunks are cut at multiples of so many tiles

  // Products of a chunk, and how many times four of them fetch ahead (Prefetch).
  static constexpr int64_t kDepth = 4;
  static int64_t calls(const Filter& filter, int tiles) {
    return filter.lists * Groups(tiles, kRows1).count;
  }

  template <int M, typename T>
  static void input(const Job<T>& job, int64_t first, int tiles, int t0, int t1, int64_t block0,
                    int64_t block1, float* v, float*) {
    input_stage<M>(job, first, t0, t1, Groups(tiles, kRows1), block0, block1, v);
  }

  // Position xi for units [u0, u1) of `panel`.
  template <int M, typename T>
  static void product(const Job<T>& job, const Filter& filter, int64_t entries, int tiles,
                      int64_t xi, const Panel& panel, int64_t u0, int64_t u1, const float* v,
                      float* m, InputPrefetch<M, T>& ahead) {
    const Groups groups(tiles, kRows1);
    const float* values = filter.values(entries);
    for (int64_t u = u0; u < u1; ++u) {
      const int64_t pair = (u - panel.begin) / 2,
                    vectors = min<int64_t>(2, panel.size() - 2 * pair);
      const int32_t* start = filter.starts() + xi * filter.units + u;
      float* out = m + pair * tiles * kPanel + (u - panel.begin) % 2 * kLanes;
      for (int g = 0; g < groups.count; ++g) {
        const Ahead slots = ahead.next();
        const char* next = slots.next;
        fetch(slots, next, 1);
        kMultiplyBlocks[groups.size(g) - 1](
            start[1] - start[0], filter.channels() + start[0], values + int64_t(start[0]) * kLanes,
            v + groups.start(g) * job.lines * kLanes, out + groups.start(g) * vectors * kLanes,
            vectors * kLanes);
      }
    }
  }

  // Tiles [t0, t1) of units [u0, u1), where u0 is even.
  template <int M, typename T>
  static void output(const Job<T>& job, int64_t first, int tiles, int t0, int t1,
                     const Panel& panel, int64_t u0, int64_t u1, int64_t stride, const float* m,
                     float*) {
    Job<T> own = job;
    own.stride_m = stride;
    for (int64_t u = u0; u < u1; u += 2) {
      const int64_t vectors = min<int64_t>(2, panel.end - u);
      output_stage<M>(own, first, t0, t1, t1 - t0, u * kLanes, int(vectors),
                      m + (u - panel.begin) / 2 * tiles * kPanel + t0 * vectors * kLanes);
    }
  }
};

// --- unstructured -----------------------------------------------------------------------------------------------------------
constexpr int kSlab = kRegisters == 32 ? 4 : 3;  // most vectors of tiles in a slab
constexpr int kChunk = 3;                        // vectors of tiles of a thread's own chunk
constexpr int64_t kListsPerCall = 16;

// M[k][tiles] (+)= sum over a list of U V[c][tiles], for its four k, NV vectors of tiles and `count` lists. Four sums that do not
// wait for one another, one load of their four numbers of U, and no end of a list but the common one.
template <int NV>
void multiply_lists(int64_t count, const int32_t* __restrict starts, const int32_t* __restrict rows,
                    const float* __restrict values, const uint8_t* __restrict channels,
                    const float* __restrict v, float* __restrict m, bool first,
                    const Ahead& ahead) {
  const char* next = ahead.next;
  for (int64_t i = 0; i < count; ++i, rows += kFour) {
    fetch(ahead, next, 1);
    vec sum[kFour][NV];
    PYWINO_UNROLL for (int k = 0; k < kFour; ++k) PYWINO_UNROLL for (int n = 0; n < NV; ++n)
        sum[k][n] = zero();
    const auto add = [&](int k, vec u, uint64_t channel) __attribute__((always_inline)) {
      const float* x = v + channel * (NV * kLanes);
      own_register(x);
      PYWINO_UNROLL for (int n = 0; n < NV; ++n) sum[k][n] += u * load(x + n * kLanes);
    };
    const float *u = values + starts[i] * kFour, *end = values + starts[i + 1] * kFour;
    const uint8_t* c = channels + starts[i] * kFour;
    for (; u < end; u += kFour, c += kFour) {
      prefetch(u + 128);
      prefetch(c + 512);
      const vec four = load_fours(u);
      add(0, of_four<0>(four), c[0]);
      add(1, of_four<1>(four), c[1]);
      add(2, of_four<2>(four), c[2]);
      add(3, of_four<3>(four), c[3]);
    }
    PYWINO_UNROLL for (int k = 0; k < kFour; ++k) {
      float* to = m + int64_t(rows[k]) * (NV * kLanes);
      PYWINO_UNROLL for (int n = 0; n < NV; ++n)
          store(to + n * kLanes, first ? sum[k][n] : load(to + n * kLanes) + sum[k][n]);
    }
  }
}

using MultiplyLists = void (*)(int64_t, const int32_t*, const int32_t*, const float*,
                               const uint8_t*, const float*, float*, bool, const Ahead&);
constexpr MultiplyLists kMultiplyLists[] = {multiply_lists<1>, multiply_lists<2>, multiply_lists<3>,
                                            multiply_lists<4>};

struct Lists {
  static constexpr int64_t kGrain = kLanes;

  static constexpr int64_t kDepth = 4 * kListsPerCall;
  static int64_t calls(const Filter& filter, int tiles) {
    return ceil_div(filter.lists, kListsPerCall) * Groups(ceil_div(tiles, kLanes), kSlab).count;
  }

  // Patches of L tiles and L channels, lanes = channels: [xi][tile][L]; or their outputs. Positions do not lie a power of two
  // apart: a tile writes one line to each, and these would evict one another.
  static constexpr int64_t kPitch = (kLanes + 1) * kLanes;
  template <int M>
  static constexpr int64_t kStage = Transform<M>::A * Transform<M>::A * kPitch;

  template <int M, typename T>
  static void input(const Job<T>& job, int64_t first, int tiles, int t0, int t1, int64_t block0,
                    int64_t block1, float* v, float* stage) {
    transposed_patches<InputPatch<M>>(job.sources[0], job.grid, first, tiles, t0, t1, block0,
                                      block1, job.params.winograd_relu, v, job.stride_v, stage);
  }

  // Tiles [t0, t1), where t0 is a multiple of L, of a chunk of `tiles`.
  template <typename Patch, typename T>
  static void transposed_patches(const Source<T>& source, const Grid& grid, int64_t first,
                                 int tiles, int t0, int t1, int64_t block0, int64_t block1,
                                 bool relu_after, float* v, int64_t stride, float* stage) {
    constexpr int A2 = Patch::kOut * Patch::kOut;
    const Groups slabs(ceil_div(tiles, kLanes), kSlab);
    const int64_t C = source.channels;
    for (int t = t0; t < t1; t += kLanes) {
      const int slab = slabs.of(t / kLanes), count = min(kLanes, t1 - t);
      const int64_t width = slabs.size(slab) * kLanes;
      float* to = v + slabs.start(slab) * C * kLanes + (t - slabs.start(slab) * kLanes);
      for (int64_t b = block0; b < block1; ++b) {
        transform_tiles<Patch>(
            source, grid, first, t, t + count, b, b + 1,
            [&](int tile, int64_t)
                __attribute__((always_inline)) { return int64_t(tile - t) * kLanes; },
            relu_after, stage, kPitch);
        const int channels = int(min<int64_t>(kLanes, C - b * kLanes));
        for (int xi = 0; xi < A2; ++xi) {
          vec r[kLanes];
          PYWINO_UNROLL for (int i = 0; i < kLanes; ++i) r[i] =
              i < count ? load(stage + xi * kPitch + i * kLanes) : zero();
          transpose(r);
          float* row = to + xi * stride + b * kLanes * width;
          if (channels == kLanes)
            PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) store(row + c * width, r[c]);
          else
            for (int c = 0; c < channels; ++c) store(row + c * width, r[c]);
        }
      }
    }
  }

  template <int M, typename T>
  static void product(const Job<T>& job, const Filter& filter, int64_t entries, int tiles,
                      int64_t xi, const Panel& panel, int64_t u0, int64_t u1, const float* v,
                      float* m, InputPrefetch<M, T>& ahead) {
    position(filter, entries, job.geometry.out_channels, job.geometry.input.c, tiles, xi, panel, u0,
             u1, v, m, [&]() -> const Ahead& { return ahead.next(); });
  }

  // [u0, u1) begins at a multiple of kSorted output channels, so that it holds whole groups of sorted lists.
  template <typename Next>
  static void position(const Filter& filter, int64_t entries, int64_t K, int64_t C, int tiles,
                       int64_t xi, const Panel& panel, int64_t u0, int64_t u1, const float* v,
                       float* m, const Next& next) {
    const Groups slabs(ceil_div(tiles, kLanes), kSlab);
    const int64_t rows = panel.size() * kLanes, fours = ceil_div(K, kFour),
                  begin = u0 * kLanes / kFour, end = min(fours, u1 * kLanes / kFour);
    for (int s = 0; s < slabs.count; ++s) {
      const int64_t width = slabs.size(s) * kLanes;
      float* out = m + slabs.start(s) * rows * kLanes - panel.begin * kLanes * width;
      for (int64_t b = 0; b < filter.sum_blocks; ++b) {
        const float* x = v + slabs.start(s) * C * kLanes + b * kSumBlock * width;
        const int64_t lists = (xi * filter.sum_blocks + b) * fours;
        for (int64_t i = begin; i < end; i += kListsPerCall)
          kMultiplyLists[slabs.size(s) - 1](min(kListsPerCall, end - i),
                                            filter.starts() + lists + i,
                                            filter.rows() + (lists + i) * kFour, filter.numbers(),
                                            filter.places(entries), x, out, b == 0, next());
      }
    }
  }

  // lanes = tiles: A^T M A first, then its M x M outputs are transposed and not the A x A products.
  template <int M, typename T>
  static void output(const Job<T>& job, int64_t first, int tiles, int t0, int t1,
                     const Panel& panel, int64_t u0, int64_t u1, int64_t stride, const float* m,
                     float* stage) {
    const Groups slabs(ceil_div(tiles, kLanes), kSlab);
    const int64_t K = job.geometry.out_channels, rows = panel.size() * kLanes;
    for (int64_t u = u0; u < u1; ++u)
      for (int t = t0; t < t1; t += kLanes) {
        const int slab = slabs.of(t / kLanes), channels = int(min<int64_t>(kLanes, K - u * kLanes));
        const int64_t width = slabs.size(slab) * kLanes;
        const float* from = m + slabs.start(slab) * rows * kLanes +
                            (u - panel.begin) * kLanes * width + (t - slabs.start(slab) * kLanes);
        for (int c = 0; c < channels; ++c)
          transform_product<M>(from + c * width, stride, M,
                               [&](int i, vec* y) __attribute__((always_inline)) {
                                 PYWINO_UNROLL for (int j = 0; j < M; ++j)
                                     store(stage + (i * M + j) * kPitch + c * kLanes, y[j]);
                               });
        for (int o = 0; o < M * M; ++o) {
          vec r[kLanes];
          float* p = stage + o * kPitch;
          PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) r[c] =
              c < channels ? load(p + c * kLanes) : zero();
          transpose(r);
          PYWINO_UNROLL for (int i = 0; i < kLanes; ++i) store(p + i * kLanes, r[i]);
        }
        store_outputs<M>(job, first, t, min(t + kLanes, t1), u * kLanes, 1,
                         [&](int tile, int, int rows, const auto& store_row)
                             __attribute__((always_inline)) {
                               PYWINO_ROLLED for (int i = 0; i < rows; ++i) {
                                 vec y[M];
                                 PYWINO_UNROLL for (int j = 0; j < M; ++j) y[j] =
                                     load(stage + (i * M + j) * kPitch + tile * kLanes);
                                 store_row(i, y);
                               }
                             });
      }
  }
};

// --- one call ---------------------------------------------------------------------------------------------------------------
constexpr int64_t kPart = kSorted / kLanes;  // units that a thread takes at a time
constexpr int kTilesPerTask = 16;
static_assert(kTilesPerTask % kLanes == 0);

template <int M, typename T, typename Format>
struct SparseRun {
  static constexpr int64_t A2 = Transform<M>::A * Transform<M>::A;
  static constexpr int64_t kStage = __is_same(Format, Lists) ? Lists::kStage<M> : 0;
  Job<T> job;
  Executor executor;
  Filter filter;
  int64_t entries;
  int64_t panel_size;  // units, a multiple of kPart or all
  int64_t chunks;      // of all tiles
  int64_t stride;      // of M
  bool joint;
  bool prefetch;
  int64_t next = 0;
  bool failed = false;
  // joint:
  int64_t first = 0;
  int tiles = 0;
  Panel panel{0, 0};
  float *shared_v = nullptr, *shared_m = nullptr;

  void chunk_bounds(int64_t chunk, int64_t* begin, int64_t* end) const {
    const int64_t grains = ceil_div(job.grid.tiles, Format::kGrain);
    const int64_t base = grains / chunks, larger = grains % chunks;
    *begin = chunk * base + min(chunk, larger);
    *end = min(job.grid.tiles, (*begin + base + (chunk < larger)) * Format::kGrain);
    *begin *= Format::kGrain;
  }

  Panel panel_at(int64_t unit) const { return {unit, min(unit + panel_size, filter.units)}; }

  static void private_body(void* arg) {
    SparseRun& run = *static_cast<SparseRun*>(arg);
    const Job<T>& job = run.job;
    float* stage = run.memory(A2 * (job.stride_v + run.stride));
    if (!stage) return;
    float *v = stage + kStage, *m = v + A2 * job.stride_v;
    for (int64_t chunk = take(&run.next); chunk < run.chunks; chunk = take(&run.next)) {
      int64_t begin, end;
      run.chunk_bounds(chunk, &begin, &end);
      const int tiles = int(end - begin);
      InputPrefetch<M, T> ahead;
      // The threads take turns, so this one's next chunk is most likely `threads` further on.
      if (const int64_t next = chunk + run.executor.threads; run.prefetch && next < run.chunks) {
        int64_t next_begin, next_end;
        run.chunk_bounds(next, &next_begin, &next_end);
        ahead = InputPrefetch<M, T>({&job}, next_begin, next_end, Format::calls(run.filter, tiles),
                                    Format::kDepth);
      }
      Format::template input<M>(job, begin, tiles, 0, tiles, 0, job.blocks, v, stage);
      for (int64_t u = 0; u < run.filter.units; u += run.panel_size) {
        const Panel panel = run.panel_at(u);
        for (int64_t xi = 0; xi < A2; ++xi)
          Format::product(job, run.filter, run.entries, tiles, xi, panel, panel.begin, panel.end,
                          v + xi * job.stride_v, m + xi * run.stride, ahead);
        Format::template output<M>(job, begin, tiles, 0, tiles, panel, panel.begin, panel.end,
                                   run.stride, m, stage);
      }
    }
  }

  // The stage, and behind it so many floats more.
  float* memory(int64_t floats) {
    const int64_t bytes = max<int64_t>(64, (kStage + floats) * 4);
    float* p = static_cast<float*>(scratch(bytes, ScratchSlot::own));
    if (!p) failed = true;
    return p;
  }

  static void joint_input(void* arg) {
    SparseRun& run = *static_cast<SparseRun*>(arg);
    float* stage = run.memory(0);
    if (!stage) return;
    const int64_t tasks = ceil_div(run.tiles, kTilesPerTask) * run.job.blocks;
    for (int64_t task = take(&run.next); task < tasks; task = take(&run.next)) {
      const int t0 = int(task / run.job.blocks) * kTilesPerTask;
      const int64_t block = task % run.job.blocks;
      Format::template input<M>(run.job, run.first, run.tiles, t0,
                                min(t0 + kTilesPerTask, run.tiles), block, block + 1, run.shared_v,
                                stage);
    }
  }

  static void joint_product(void* arg) {
    SparseRun& run = *static_cast<SparseRun*>(arg);
    InputPrefetch<M, T> nothing;
    const int64_t parts = ceil_div(run.panel.size(), kPart);
    for (int64_t task = take(&run.next); task < A2 * parts; task = take(&run.next)) {
      const int64_t xi = task / parts, u = run.panel.begin + task % parts * kPart;
      Format::product(run.job, run.filter, run.entries, run.tiles, xi, run.panel, u,
                      min(u + kPart, run.panel.end), run.shared_v + xi * run.job.stride_v,
                      run.shared_m + xi * run.stride, nothing);
    }
  }

  static void joint_output(void* arg) {
    SparseRun& run = *static_cast<SparseRun*>(arg);
    float* stage = run.memory(0);
    if (!stage) return;
    const int64_t pairs = ceil_div<int64_t>(run.panel.size(), 2),
                  tasks = ceil_div(run.tiles, kTilesPerTask) * pairs;
    for (int64_t task = take(&run.next); task < tasks; task = take(&run.next)) {
      const int t0 = int(task / pairs) * kTilesPerTask;
      const int64_t u = run.panel.begin + task % pairs * 2;
      Format::template output<M>(run.job, run.first, run.tiles, t0,
                                 min(t0 + kTilesPerTask, run.tiles), run.panel, u,
                                 min(u + 2, run.panel.end), run.stride, run.shared_m, stage);
    }
  }

  void all_threads(void (*stage)(void*)) {
    next = 0;
    executor.run(executor.threads, stage, this);
  }

  Status operator()() {
    if (!joint) {
      all_threads(private_body);
      return failed ? Status::out_of_memory : Status::ok;
    }
    shared_v = static_cast<float*>(scratch(A2 * (job.stride_v + stride) * 4, ScratchSlot::shared));
    if (!shared_v) return Status::out_of_memory;
    shared_m = shared_v + A2 * job.stride_v;
    for (int64_t chunk = 0; chunk < chunks && !failed; ++chunk) {
      int64_t end;
      chunk_bounds(chunk, &first, &end);
      tiles = int(end - first);
      all_threads(joint_input);
      for (int64_t u = 0; u < filter.units && !failed; u += panel_size) {
        panel = panel_at(u);
        all_threads(joint_product);
        all_threads(joint_output);
      }
    }
    return failed ? Status::out_of_memory : Status::ok;
  }
};

template <int M, typename T, typename Format>
Status forward_format(const ForwardParams& params, const Filter& filter, int64_t entries,
                      const Executor& executor) {
  constexpr int64_t A2 = Transform<M>::A * Transform<M>::A;
  constexpr bool lists = __is_same(Format, Lists);
  const Geometry& g = params.geometry;
  Job<T> job{params,
             g,
             {input_source<T>(g, params.input)},
             Grid(g),
             g.out_h(),
             g.out_w(),
             0,
             0,
             channel_blocks(g.input.c),
             channel_blocks(g.input.c),
             kRows1,
             false};
  if (job.grid.tiles == 0 || g.out_channels == 0) return Status::ok;
  // Lists give one vector of channels at a time.
  job.stream = sizeof(T) == 4 && streams(g, g.out_channels, params.output) &&
               (kVectorsOfLine == 1 || !lists);

  // Floats of a tile and position: of V, and of M for the smallest panel.
  const int64_t depth = lists ? g.input.c : job.lines * kLanes;
  const int64_t least = min(filter.units, kPart) * kLanes;
  const int64_t block = lists ? kChunk * kLanes : kRows1;  // tiles
  const int threads = executor.threads;
  int64_t room = kScratchPerThread / 4 / A2;
  const bool joint = threads > 1 && job.grid.tiles < threads * block;
  if (joint) room *= threads;
  const int64_t chunk = max<int64_t>(
      Format::kGrain, min<int64_t>(joint ? 2 * block : block,
                                   room / (depth + least) / Format::kGrain * Format::kGrain));
  const int64_t parts = ceil_div(filter.units, kPart),
                most = max<int64_t>(1, (room / chunk - depth) / (kPart * kLanes));
  const int64_t panel_size = min(filter.units, ceil_div(parts, ceil_div(parts, most)) * kPart);
  SparseRun<M, T, Format> run{job, executor, filter, entries, panel_size, 0, 0, joint, false};
  run.prefetch =
      g.input.n * g.input.c * g.input.h * g.input.w * int64_t(sizeof(T)) > kPrefetchBytes;
  const int64_t grains = ceil_div(job.grid.tiles, Format::kGrain);
  run.chunks = ceil_div(job.grid.tiles, chunk);
  // A whole number of chunks for each thread, while there are few.
  if (!joint && run.chunks < 8 * threads)
    run.chunks = min<int64_t>(grains, round_up<int64_t>(run.chunks, threads));
  const int64_t tiles = ceil_div(grains, run.chunks) * Format::kGrain;
  run.job.stride_v = padded_stride(tiles * depth);
  run.stride = padded_stride(tiles * panel_size * kLanes);
  return run();
}

template <int M, typename T>
Status forward_as(const ForwardParams& params, const Executor& executor) {
  const auto& header = *reinterpret_cast<const SparseHeader*>(params.sparse_filter);
  const Pattern pattern = Pattern(header.pattern);
  const Filter filter(params.sparse_filter, pattern, header.out_channels, header.in_channels, M);
  return pattern == Pattern::blocks
             ? forward_format<M, T, Blocks>(params, filter, header.entries, executor)
             : forward_format<M, T, Lists>(params, filter, header.entries, executor);
}

Status run_forward(const ForwardParams& params, const Executor& executor) {
  if (params.fast) return Status::unsupported;
  return with_tile(params.geometry.tile, [&](auto tile) {
    return with_dtype(params.geometry.dtype, [&](auto element) {
      return forward_as<tile.m, decltype(element)>(params, executor);
    });
  });
}

// --- input gradient -----------------------------------------------------------------------------------------------------------
// dX = sum over tiles B [ (U^T (A dY A^T)) . mask ] B^T with the lists of U^T: blocks of output channels are none of U^T.
//
//   input    D[xi][slab][k][tiles] = A dY A^T
//   product  P[xi][slab][c][tiles] = U^T D
//   add      P is transposed, and added to dX where its patches lie. Patches overlap, so one thread does all tiles of a chunk,
//            for its vectors of input channels
//
// All threads go through each stage of one chunk together.
template <int M, typename T>
struct SparseInputGradient {
  static constexpr int64_t A2 = Transform<M>::A * Transform<M>::A;
  const DomainInputGradientParams& params;
  const Geometry& g;
  Filter filter;
  int64_t entries;
  Executor executor;
  Source<T> input, grad;
  Grid grid;
  Panel panel;  // all units of input channels
  int64_t chunks, stride_d, stride_p;
  int64_t first = 0, next = 0;
  int tiles = 0;
  float *d = nullptr, *p = nullptr;
  bool failed = false;

  SparseInputGradient(const DomainInputGradientParams& params, const Filter& filter,
                      int64_t entries, const Executor& executor)
      : params(params),
        g(params.geometry),
        filter(filter),
        entries(entries),
        executor(executor),
        input(input_source<T>(g, params.input)),
        grad(gradient_source<T>(g, params.grad)),
        grid(g),
        panel{0, filter.units} {
    const int64_t depth = grad.channels, width = panel.size() * kLanes,
                  room = kScratchPerThread * executor.threads / 4 / A2,
                  grains = ceil_div<int64_t>(grid.tiles, kLanes);
    // No fewer than two vectors of tiles: a list that is read for one of them costs as much.
    chunks = ceil_div(grains, max<int64_t>(2, room / ((depth + width) * kLanes)));
    const int64_t most = ceil_div(grains, chunks) * kLanes;
    stride_d = padded_stride(most * depth);
    stride_p = padded_stride(most * width);
  }

  float* stage() {
    float* memory = static_cast<float*>(scratch(Lists::kStage<M> * 4, ScratchSlot::own));
    if (!memory) failed = true;
    return memory;
  }

  static void transform(void* arg) {
    SparseInputGradient& run = *static_cast<SparseInputGradient*>(arg);
    float* stage = run.stage();
    if (!stage) return;
    const int64_t blocks = run.grad.blocks(), tasks = ceil_div(run.tiles, kTilesPerTask) * blocks;
    for (int64_t task = take(&run.next); task < tasks; task = take(&run.next)) {
      const int t0 = int(task / blocks) * kTilesPerTask;
      Lists::transposed_patches<GradientPatch<M>>(
          run.grad, run.grid, run.first, run.tiles, t0, min(t0 + kTilesPerTask, run.tiles),
          task % blocks, task % blocks + 1, false, run.d, run.stride_d, stage);
    }
  }

  static void product(void* arg) {
    SparseInputGradient& run = *static_cast<SparseInputGradient*>(arg);
    const int64_t parts = ceil_div(run.panel.size(), kPart);
    for (int64_t task = take(&run.next); task < A2 * parts; task = take(&run.next)) {
      const int64_t xi = task / parts, u = task % parts * kPart;
      Lists::position(run.filter, run.entries, run.g.input.c, run.g.out_channels, run.tiles, xi,
                      run.panel, u, min(u + kPart, run.panel.end), run.d + xi * run.stride_d,
                      run.p + xi * run.stride_p, [] { return kNothing; });
    }
  }

  static void add(void* arg) {
    SparseInputGradient& run = *static_cast<SparseInputGradient*>(arg);
    float* stage = run.stage();
    if (!stage) return;
    for (int64_t u = take(&run.next); u < run.panel.end; u = take(&run.next))
      for (int t = 0; t < run.tiles; t += kLanes) {
        run.transpose_products(u, t, stage);
        const int count = min(kLanes, run.tiles - t);
        for (int i = 0; i < count;) {
          const Piece piece = run.grid.strip_piece(run.first + t + i, count - i);
          add_patches<M>(run.params, run.input, piece, u * kLanes, stage + i * kLanes,
                         kLanes * kLanes, kLanes);
          i += piece.count;
        }
      }
  }

  // Those of L tiles and L channels: stage[xi][tile][L].
  void transpose_products(int64_t u, int t, float* stage) const {
    const Groups slabs(ceil_div(tiles, kLanes), kSlab);
    const int slab = slabs.of(t / kLanes),
              channels = int(min<int64_t>(kLanes, g.input.c - u * kLanes));
    const int64_t width = slabs.size(slab) * kLanes;
    const float* from = p + slabs.start(slab) * panel.size() * kLanes * kLanes +
                        u * kLanes * width + (t - slabs.start(slab) * kLanes);
    for (int xi = 0; xi < A2; ++xi, from += stride_p) {
      vec r[kLanes];
      PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) r[c] =
          c < channels ? load(from + c * width) : zero();
      transpose(r);
      PYWINO_UNROLL for (int i = 0; i < kLanes; ++i)
          store(stage + (xi * kLanes + i) * kLanes, r[i]);
    }
  }

  Status operator()() {
    __builtin_memset(params.input_gradient, 0,
                     g.input.n * g.input.c * g.input.h * g.input.w * sizeof(float));
    d = static_cast<float*>(scratch(A2 * (stride_d + stride_p) * 4, ScratchSlot::shared));
    if (!d) return Status::out_of_memory;
    p = d + A2 * stride_d;
    const int64_t grains = ceil_div<int64_t>(grid.tiles, kLanes), base = grains / chunks,
                  larger = grains % chunks;
    for (int64_t chunk = 0, grain = 0; chunk < chunks && !failed; ++chunk) {
      const int64_t count = base + (chunk < larger);
      first = grain * kLanes;
      tiles = int(min(grid.tiles - first, count * kLanes));
      grain += count;
      void (*const stages[])(void*) = {transform, product, add};
      for (const auto stage : stages) {
        next = 0;
        executor.run(executor.threads, stage, this);
      }
    }
    return failed ? Status::out_of_memory : Status::ok;
  }
};

Status run_input_gradient(const DomainInputGradientParams& params, const Executor& executor) {
  const auto& header = *reinterpret_cast<const SparseHeader*>(params.sparse_filter);
  if (Pattern(header.pattern) != Pattern::unstructured) return Status::unsupported;
  const Geometry& g = params.geometry;
  const Filter filter(params.sparse_filter, Pattern::unstructured, g.input.c, g.out_channels,
                      g.tile);
  return with_tile(g.tile, [&](auto tile) {
    return with_dtype(g.dtype, [&](auto element) {
      return SparseInputGradient<tile.m, decltype(element)>(params, filter, header.entries,
                                                            executor)();
    });
  });
}

// --- packing ----------------------------------------------------------------------------------------------------------------
// Two passes over the weight, by units: count what is left, then write it.
template <typename T>
struct Packing {
  const FilterParams& p;
  int64_t K, C, stride_k, stride_c;
  SparseView<int32_t> view;
  int64_t columns;  // of cursors: units or output channels
  // Of (xi, unit), or (xi, block, k): how many there are; then where the next one goes.
  int32_t* cursors = nullptr;
  int64_t entries = 0;
  bool writes = false;
  int64_t next = 0;

  Packing(const FilterParams& params, Pattern pattern, int32_t* words)
      : p(params),
        K(p.rotate ? p.in_channels : p.out_channels),
        C(p.rotate ? p.out_channels : p.in_channels),
        stride_k(p.rotate ? p.stride_c : p.stride_k),
        stride_c(p.rotate ? p.stride_k : p.stride_c),
        view(words, pattern, K, C, p.tile),
        columns(pattern == Pattern::blocks ? view.units : K) {}

  int64_t groups() const {
    return view.positions * (view.pattern == Pattern::blocks ? 1 : view.sum_blocks);
  }

  PYWINO_INLINE float weight(int64_t k, int64_t c, int i, int j) const {
    return get(static_cast<const T*>(p.weight) + k * stride_k + c * stride_c + i * p.stride_h +
               j * p.stride_w);
  }

  void unit(int64_t u) {
    const int a = p.tile + 2;
    const int64_t k0 = u * kLanes, k1 = min(K, k0 + kLanes);
    if (view.pattern == Pattern::blocks) {
      for (int64_t c = 0; c < C; ++c)
        for (int i = 0; i < a; ++i)
          for (int j = 0; j < a; ++j) {
            float row[kLanes] = {};
            bool any = false;
            for (int64_t k = k0; k < k1; ++k) {
              row[k - k0] = weight(k, c, i, j);
              any |= row[k - k0] != 0;
            }
            if (!any) continue;
            const int64_t at = cursors[(i * a + j) * view.units + u]++;
            if (!writes) continue;
            view.channels()[at] = int32_t(c);
            __builtin_memcpy(view.values(entries) + at * kLanes, row, sizeof row);
          }
      return;
    }
    for (int64_t k = k0; k < k1; ++k)
      for (int64_t c = 0; c < C; ++c)
        for (int i = 0; i < a; ++i)
          for (int j = 0; j < a; ++j) {
            const float value = weight(k, c, i, j);
            if (value == 0) continue;
            const int64_t group = (i * a + j) * view.sum_blocks + c / kSumBlock;
            int32_t& cursor = cursors[group * K + k];
            if (writes) {
              view.numbers()[cursor] = value;
              view.places(entries)[cursor] = uint8_t(c % kSumBlock);
            }
            cursor += writes ? kFour : 1;
          }
  }

  static void body(void* arg) {
    Packing& run = *static_cast<Packing*>(arg);
    for (int64_t u = take(&run.next); u < run.view.units; u = take(&run.next)) run.unit(u);
  }

  void pass(const Executor& executor) {
    next = 0;
    executor.run(executor.threads, body, this);
  }

  // Entries in all; -1 where a word cannot count them, or memory has run out.
  int64_t count(const Executor& executor) {
    const int64_t size = groups() * columns;
    cursors = static_cast<int32_t*>(scratch((size + 1) * sizeof(int32_t), ScratchSlot::shared));
    if (!cursors) return -1;
    __builtin_memset(cursors, 0, size * sizeof(int32_t));
    pass(executor);
    if (view.pattern == Pattern::blocks)
      for (int64_t i = 0; i < size; ++i) entries += cursors[i];
    else
      each_four([&](int64_t, int64_t, const int32_t*, int64_t longest) { entries += longest; });
    return entries * kFour > INT32_MAX ? -1 : entries;
  }

  // use(its list, the first of its group's cursors, its output channels, entries) for all fours, in the order of their lists. From K
  // on there are output channels that no one reads.
  template <typename Use>
  void each_four(const Use& use) {
    int64_t list = 0;
    for (int64_t group = 0; group < groups(); ++group) {
      const int64_t first = group * K;
      for (int64_t k0 = 0; k0 < K; k0 += kSorted) {
        int32_t order[kSorted];
        const int64_t n = min(kSorted, K - k0);
        for (int64_t k = 0; k < n; ++k) {
          const int32_t left = cursors[first + k0 + k];
          int64_t i = k;
          for (; i > 0 && cursors[first + order[i - 1]] < left; --i) order[i] = order[i - 1];
          order[i] = int32_t(k0 + k);
        }
        for (int64_t k = n; k < round_up(n, kFour); ++k) order[k] = int32_t(k0 + k);
        for (int64_t i = 0; i < n; i += kFour)
          use(list++, first, order + i, cursors[first + order[i]]);
      }
    }
  }

  // Where each list begins, and where the weights of each output channel go.
  void arrange() {
    int32_t at = 0;
    const auto begin = [&](int64_t list, int64_t count) {
      view.starts()[list] = at;
      at += int32_t(count);
    };
    if (view.pattern == Pattern::blocks) {
      for (int64_t i = 0; i < view.lists; ++i) {
        begin(i, cursors[i]);
        cursors[i] = view.starts()[i];
      }
    } else {
      each_four([&](int64_t list, int64_t first, const int32_t* order, int64_t longest) {
        const int32_t from = at;
        begin(list, longest);
        for (int k = 0; k < kFour; ++k) {
          view.rows()[list * kFour + k] = order[k];
          if (order[k] < K) cursors[first + order[k]] = from * int32_t(kFour) + k;
        }
      });
    }
    view.starts()[view.lists] = at;
  }

  // Zeros at the ends of lists are multiplied by a channel that their output channel reads anyway, so that no NaN comes from others;
  // where it reads none, by those of the longest.
  void fill() {
    const int32_t *starts = view.starts(), *rows = view.rows();
    const int64_t fours = ceil_div(K, kFour);
    uint8_t* places = view.places(entries);
    for (int64_t list = 0; list < view.lists; ++list)
      for (int k = 1; k < kFour; ++k) {
        const int32_t row = rows[list * kFour + k];
        const int64_t begin = starts[list] * kFour + k, end = starts[list + 1] * kFour,
                      filled = row < K ? cursors[list / fours * K + row] : begin;
        for (int64_t at = filled; at < end; at += kFour)
          places[at] = places[filled > begin ? filled - kFour : at - k];
      }
  }
};

int64_t packed_words(const FilterParams& params, Pattern pattern, const Executor& executor) {
  return with_dtype(params.dtype, [&](auto element) -> int64_t {
    using T = decltype(element);
    Packing<T> packing(params, pattern, nullptr);
    const int64_t entries = packing.count(executor);
    return entries < 0 ? -1 : packing.view.size(entries);
  });
}

Status pack(const FilterParams& params, Pattern pattern, int32_t* packed,
            const Executor& executor) {
  return with_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    Packing<T> packing(params, pattern, packed);
    const int64_t entries = packing.count(executor);
    if (entries < 0) return Status::unsupported;
    // Zeros: the head, the ends of the shorter ones of four, and of what makes a whole number of words.
    const bool blocks = pattern == Pattern::blocks;
    const int64_t zeros =
        blocks ? packing.view.head() + round_up<int64_t>(entries, 16) : packing.view.size(entries);
    __builtin_memset(packed, 0, zeros * sizeof(int32_t));
    packing.arrange();
    packing.writes = true;
    packing.pass(executor);
    if (!blocks) packing.fill();
    *reinterpret_cast<SparseHeader*>(packed) = {
        kSparseMagic, int32_t(pattern), kLanes, params.tile, packing.K, packing.C, entries, {}};
    return Status::ok;
  });
}

bool fits(const int32_t* packed, int64_t words, int64_t out_channels, int64_t in_channels,
          int tile) {
  if (words < 16) return false;
  const auto& header = *reinterpret_cast<const SparseHeader*>(packed);
  const Pattern pattern = Pattern(header.pattern);
  return header.magic == kSparseMagic && header.lanes == kLanes && header.tile == tile &&
         header.out_channels == out_channels && header.in_channels == in_channels &&
         words == Filter(packed, pattern, out_channels, in_channels, tile).size(header.entries);
}

}  // namespace

extern const SparseKernels PYWINO_ISA_NAME(sparse_kernels_);
const SparseKernels PYWINO_ISA_NAME(sparse_kernels_) = {run_forward, run_input_gradient,
                                                        packed_words, pack, fits};

}  // namespace pywino::winograd
