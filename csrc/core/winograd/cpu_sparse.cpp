// SPDX-License-Identifier: BSD-3-Clause
// Winograd forward convolution with a filter of the Winograd domain that has zeros, compiled once per instruction set.
//
// Stages and chunks are those of cpu_forward.cpp. The product takes one position xi after the other, for as many output
// channels as fit, so that V[xi] is read from the core's caches, and it multiplies what sparse.h lists:
//
//   blocks        M[tile][16 k] += V[tile][c] U[c][16 k]   lanes = output channels. V as in the dense product; a register block
//                                                          of tiles, and one vector of U for each listed c
//   unstructured  M[k][tiles] += U[k][c] V[c][tiles]       lanes = tiles. V and M are transposed on the way in and out, L x L
//                                                          numbers at a time; a slab of tiles, and one number of U
//
// Layouts (L = lanes of a vector):
//   blocks        V [xi][group of tiles][C / L][tile][L]     M [xi][pair of vectors of k][tile][pair's width]
//   unstructured  V [xi][slab of n L tiles][C][n L]          M [xi][slab][k][n L]
//
// The chunks are shared among the threads (every chunk is the same work, whatever the zeros are). Where there are too few
// tiles for that, all threads transform one chunk together and then take vectors of output channels, those with the most
// entries first.
#include "../common/product.h"
#include "../common/scratch.h"
#include "../common/simd.h"
#include "sparse.h"
#include "stages.h"
#include "tiles.h"
#include "transforms.h"
#include "winograd.h"

namespace pywino::winograd {
namespace {

using Filter = SparseView<const int32_t>;

PYWINO_INLINE int64_t take(int64_t* counter) {
  return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

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

  // Products of a chunk.
  static int64_t calls(const Filter& filter, int tiles) {
    return filter.lists * Groups(tiles, kRows1).count;
  }

  template <int M, typename T>
  static void input(const Job<T>& job, int64_t first, int tiles, int t0, int t1, int64_t block0,
                    int64_t block1, float* v, float*) {
    input_stage<M>(job, first, t0, t1, Groups(tiles, kRows1), block0, block1, v);
  }

  // Position xi for units [u0, u1).
  template <int M, typename T>
  static void product(const Job<T>& job, const Filter& filter, int64_t entries, int tiles,
                      int64_t xi, int64_t u0, int64_t u1, const float* v, float* m,
                      Prefetch<M, T>& ahead) {
    const Groups groups(tiles, kRows1);
    const float* values = filter.values(entries);
    for (int64_t u = u0; u < u1; ++u) {
      const int64_t pair = (u - u0) / 2, vectors = min<int64_t>(2, u1 - u0 - 2 * pair);
      const int32_t* start = filter.starts() + xi * filter.units + u;
      float* out = m + pair * tiles * kPanel + (u - u0) % 2 * kLanes;
      for (int g = 0; g < groups.count; ++g) {
        fetch(ahead.next(), 0);
        kMultiplyBlocks[groups.size(g) - 1](
            start[1] - start[0], filter.channels() + start[0], values + int64_t(start[0]) * kLanes,
            v + groups.start(g) * job.lines * kLanes, out + groups.start(g) * vectors * kLanes,
            vectors * kLanes);
      }
    }
  }

  template <int M, typename T>
  static void output(const Job<T>& job, int64_t first, int tiles, int64_t u0, int64_t u1,
                     int64_t stride, const float* m, float*) {
    Job<T> own = job;
    own.stride_m = stride;
    for (int64_t u = u0; u < u1; u += 2)
      output_stage<M>(own, first, 0, tiles, u * kLanes, int(min<int64_t>(2, u1 - u)),
                      m + (u - u0) / 2 * tiles * kPanel);
  }
};

// --- unstructured -----------------------------------------------------------------------------------------------------------
constexpr int kSums = 4;                         // of a list: an addition takes four cycles
constexpr int kSlab = kRegisters == 32 ? 4 : 3;  // most vectors of tiles in a slab

// M[tiles] (+)= sum over a list of U V[c][tiles], for NV vectors of tiles. The order of the sums is the same for every NV.
template <int NV>
void multiply_list(const Entry* __restrict e, const Entry* __restrict end,
                   const float* __restrict v, float* __restrict m, bool first) {
  constexpr int Q = kSums;
  vec sum[Q][NV];
  PYWINO_UNROLL for (int q = 0; q < Q; ++q) PYWINO_UNROLL for (int n = 0; n < NV; ++n) sum[q][n] =
      zero();
  for (; e + Q <= end; e += Q) PYWINO_UNROLL for (int q = 0; q < Q; ++q) {
      const float* x = v + uint64_t(e[q].channel) * (NV * kLanes);
      const float u = e[q].value;
      PYWINO_UNROLL for (int n = 0; n < NV; ++n) sum[q][n] += u * load(x + n * kLanes);
    }
  for (; e < end; ++e) {
    const float* x = v + uint64_t(e->channel) * (NV * kLanes);
    const float u = e->value;
    PYWINO_UNROLL for (int n = 0; n < NV; ++n) sum[0][n] += u * load(x + n * kLanes);
  }
  PYWINO_UNROLL for (int n = 0; n < NV; ++n) {
    PYWINO_UNROLL for (int q = 1; q < Q; ++q) sum[0][n] += sum[q][n];
    store(m + n * kLanes, first ? sum[0][n] : load(m + n * kLanes) + sum[0][n]);
  }
}

using MultiplyList = void (*)(const Entry*, const Entry*, const float*, float*, bool);
constexpr MultiplyList kMultiplyList[] = {multiply_list<1>, multiply_list<2>, multiply_list<3>,
                                          multiply_list<4>};

struct Lists {
  static constexpr int64_t kGrain = kLanes;

  static int64_t calls(const Filter& filter, int tiles) {
    return filter.lists * Groups(ceil_div(tiles, kLanes), kSlab).count;
  }

  // Patches or products of L tiles and L channels, lanes = channels: [xi][tile][L].
  template <int M>
  static constexpr int64_t kStage = Transform<M>::A * Transform<M>::A * kLanes * kLanes;

  // Tiles [t0, t1), where t0 is a multiple of L, of a chunk of `tiles`.
  template <int M, typename T>
  static void input(const Job<T>& job, int64_t first, int tiles, int t0, int t1, int64_t block0,
                    int64_t block1, float* v, float* stage) {
    constexpr int A2 = Transform<M>::A * Transform<M>::A;
    constexpr int64_t pitch = kLanes * kLanes;
    const Groups slabs(ceil_div(tiles, kLanes), kSlab);
    const int64_t C = job.geometry.input.c;
    for (int t = t0; t < t1; t += kLanes) {
      const int slab = slabs.of(t / kLanes), count = min(kLanes, t1 - t);
      const int64_t width = slabs.size(slab) * kLanes;
      float* to = v + slabs.start(slab) * C * kLanes + (t - slabs.start(slab) * kLanes);
      for (int64_t b = block0; b < block1; ++b) {
        transform_tiles<InputPatch<M>>(
            job.sources[0], job.grid, first, t, t + count, b, b + 1,
            [&](int tile, int64_t)
                __attribute__((always_inline)) { return int64_t(tile - t) * kLanes; },
            job.params.winograd_relu, stage, pitch);
        const int channels = int(min<int64_t>(kLanes, C - b * kLanes));
        for (int xi = 0; xi < A2; ++xi) {
          vec r[kLanes];
          PYWINO_UNROLL for (int i = 0; i < kLanes; ++i) r[i] =
              i < count ? load(stage + xi * pitch + i * kLanes) : zero();
          transpose(r);
          float* row = to + xi * job.stride_v + b * kLanes * width;
          if (channels == kLanes)
            PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) store(row + c * width, r[c]);
          else
            for (int c = 0; c < channels; ++c) store(row + c * width, r[c]);
        }
      }
    }
  }

  template <int M, typename T>
  static void product(const Job<T>& job, const Filter& filter, int64_t, int tiles, int64_t xi,
                      int64_t u0, int64_t u1, const float* v, float* m, Prefetch<M, T>& ahead) {
    const Groups slabs(ceil_div(tiles, kLanes), kSlab);
    const int64_t C = job.geometry.input.c, K = job.geometry.out_channels,
                  rows = (u1 - u0) * kLanes, k0 = u0 * kLanes, k1 = min(K, u1 * kLanes);
    for (int s = 0; s < slabs.count; ++s) {
      const int64_t width = slabs.size(s) * kLanes;
      const MultiplyList multiply = kMultiplyList[slabs.size(s) - 1];
      for (int64_t b = 0; b < filter.sum_blocks; ++b) {
        const float* x = v + slabs.start(s) * C * kLanes + b * kSumBlock * width;
        const int32_t* start = filter.starts() + (xi * filter.sum_blocks + b) * K;
        float* out = m + slabs.start(s) * rows * kLanes;
        for (int64_t k = k0; k < k1; ++k) {
          fetch(ahead.next(), 0);
          multiply(filter.entries() + start[k], filter.entries() + start[k + 1], x,
                   out + (k - k0) * width, b == 0);
        }
      }
    }
  }

  template <int M, typename T>
  static void output(const Job<T>& job, int64_t first, int tiles, int64_t u0, int64_t u1,
                     int64_t stride, const float* m, float* stage) {
    constexpr int A2 = Transform<M>::A * Transform<M>::A;
    constexpr int64_t pitch = kLanes * kLanes;
    Job<T> own = job;
    own.stride_m = pitch;
    const Groups slabs(ceil_div(tiles, kLanes), kSlab);
    const int64_t K = job.geometry.out_channels, rows = (u1 - u0) * kLanes;
    for (int64_t u = u0; u < u1; ++u)
      for (int t = 0; t < tiles; t += kLanes) {
        const int slab = slabs.of(t / kLanes), channels = int(min<int64_t>(kLanes, K - u * kLanes));
        const int64_t width = slabs.size(slab) * kLanes;
        const float* from = m + slabs.start(slab) * rows * kLanes + (u - u0) * kLanes * width +
                            (t - slabs.start(slab) * kLanes);
        for (int xi = 0; xi < A2; ++xi) {
          vec r[kLanes];
          PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) r[c] =
              c < channels ? load(from + xi * stride + c * width) : zero();
          transpose(r);
          PYWINO_UNROLL for (int i = 0; i < kLanes; ++i)
              store(stage + xi * pitch + i * kLanes, r[i]);
        }
        output_stage<M>(own, first, t, min(t + kLanes, tiles), u * kLanes, 1, stage);
      }
  }
};

// --- one call ---------------------------------------------------------------------------------------------------------------
template <int M, typename T, typename Format>
struct SparseRun {
  static constexpr int64_t A2 = Transform<M>::A * Transform<M>::A;
  static constexpr int64_t kStage = __is_same(Format, Lists) ? Lists::kStage<M> : 0;
  Job<T> job;
  Executor executor;
  Filter filter;
  int64_t entries;
  int64_t panel;   // units of a panel
  int64_t chunks;  // of all tiles
  int64_t stride;  // of M
  bool joint;
  bool prefetch;
  int64_t next = 0;
  bool failed = false;
  // joint:
  int64_t first = 0;
  int tiles = 0;
  float* shared_v = nullptr;

  void chunk_bounds(int64_t chunk, int64_t* begin, int64_t* end) const {
    const int64_t grains = ceil_div(job.grid.tiles, Format::kGrain);
    const int64_t base = grains / chunks, larger = grains % chunks;
    *begin = chunk * base + min(chunk, larger);
    *end = min(job.grid.tiles, (*begin + base + (chunk < larger)) * Format::kGrain);
    *begin *= Format::kGrain;
  }

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
      Prefetch<M, T> ahead;
      // The threads take turns, so this one's next chunk is most likely `threads` further on.
      if (const int64_t next = chunk + run.executor.threads; run.prefetch && next < run.chunks) {
        int64_t next_begin, next_end;
        run.chunk_bounds(next, &next_begin, &next_end);
        ahead = Prefetch<M, T>(job, next_begin, next_end, Format::calls(run.filter, tiles), 4);
      }
      Format::template input<M>(job, begin, tiles, 0, tiles, 0, job.blocks, v, stage);
      for (int64_t u = 0; u < run.filter.units; u += run.panel)
        run.units(begin, tiles, u, min(u + run.panel, run.filter.units), v, m, stage, ahead);
    }
  }

  // Product and output of units [u0, u1) of a chunk.
  void units(int64_t first, int tiles, int64_t u0, int64_t u1, const float* v, float* m,
             float* stage, Prefetch<M, T>& ahead) const {
    for (int64_t xi = 0; xi < A2; ++xi)
      Format::product(job, filter, entries, tiles, xi, u0, u1, v + xi * job.stride_v,
                      m + xi * stride, ahead);
    Format::template output<M>(job, first, tiles, u0, u1, stride, m, stage);
  }

  // The stage, and behind it so many floats more.
  float* memory(int64_t floats) {
    const int64_t bytes = max<int64_t>(64, (kStage + floats) * 4);
    float* p = static_cast<float*>(scratch(bytes, ScratchSlot::own));
    if (!p) failed = true;
    return p;
  }

  static constexpr int kTilesPerTask = 16;

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

  static void joint_units(void* arg) {
    SparseRun& run = *static_cast<SparseRun*>(arg);
    float* stage = run.memory(A2 * run.stride);
    if (!stage) return;
    Prefetch<M, T> nothing;
    for (int64_t task = take(&run.next); task < run.filter.units; task = take(&run.next)) {
      const int64_t u = run.filter.order()[task];
      run.units(run.first, run.tiles, u, u + 1, run.shared_v, stage + kStage, stage, nothing);
    }
  }

  Status operator()() {
    if (!joint) {
      executor.run(executor.threads, private_body, this);
      return failed ? Status::out_of_memory : Status::ok;
    }
    shared_v = static_cast<float*>(scratch(A2 * job.stride_v * 4, ScratchSlot::shared));
    if (!shared_v) return Status::out_of_memory;
    for (int64_t chunk = 0; chunk < chunks && !failed; ++chunk) {
      int64_t end;
      chunk_bounds(chunk, &first, &end);
      tiles = int(end - first);
      next = 0;
      executor.run(executor.threads, joint_input, this);
      next = 0;
      executor.run(executor.threads, joint_units, this);
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
  const int64_t output_bytes =
      g.input.n * g.out_channels * job.out_h * job.out_w * int64_t(sizeof(T));
  job.stream = sizeof(T) == 4 && output_bytes > kStreamBytes &&
               reinterpret_cast<uintptr_t>(params.output) % (4 * kLanes) == 0 &&
               (g.channels_last ? g.out_channels : job.out_h * job.out_w) % kLanes == 0;

  // Floats of a tile and position: of V, and of M for a panel.
  const int64_t depth = lists ? g.input.c : job.lines * kLanes;
  const int64_t room = kScratchPerThread / 4 / A2;
  const int64_t block = lists ? kSlab * kLanes : kRows1;  // tiles
  const int threads = executor.threads;
  SparseRun<M, T, Format> run{job, executor, filter, entries, filter.units, 1, 0, false, false};
  run.prefetch =
      g.input.n * g.input.c * g.input.h * g.input.w * int64_t(sizeof(T)) > kPrefetchBytes;
  run.joint = threads > 1 && job.grid.tiles < threads * block;
  int64_t chunk;
  if (run.joint) {
    chunk = min<int64_t>(2 * block, max<int64_t>(Format::kGrain, room * (threads - 1) / depth));
    run.panel = 1;
  } else {
    chunk = block;
    while (chunk > Format::kGrain && chunk * (depth + kPanel) > room)
      chunk = max<int64_t>(Format::kGrain, chunk / 2);
    const int64_t most = max<int64_t>(kPanel, room / chunk - depth) / kPanel * 2;
    run.panel = min(filter.units,
                    round_up<int64_t>(ceil_div(filter.units, ceil_div(filter.units, most)), 2));
  }
  const int64_t grains = ceil_div(job.grid.tiles, Format::kGrain);
  run.chunks = ceil_div(job.grid.tiles, chunk);
  // A whole number of chunks for each thread, while there are few.
  if (!run.joint && run.chunks < 8 * threads)
    run.chunks = min<int64_t>(grains, round_up<int64_t>(run.chunks, threads));
  const int64_t tiles = ceil_div(grains, run.chunks) * Format::kGrain;
  run.job.stride_v = padded_stride(tiles * depth);
  run.stride = padded_stride(tiles * run.panel * kLanes);
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

template <int M>
Status forward_tile(const ForwardParams& params, const Executor& executor) {
  switch (params.geometry.dtype) {
    case DType::f32: return forward_as<M, float>(params, executor);
    case DType::bf16: return forward_as<M, bf16>(params, executor);
    case DType::f16: return forward_as<M, f16>(params, executor);
  }
  return Status::unsupported;
}

Status run_forward(const ForwardParams& params, const Executor& executor) {
  if (params.fast) return Status::unsupported;
  switch (params.geometry.tile) {
    case 2: return forward_tile<2>(params, executor);
    case 4: return forward_tile<4>(params, executor);
    case 6: return forward_tile<6>(params, executor);
  }
  return Status::unsupported;
}

// --- packing ----------------------------------------------------------------------------------------------------------------
// Two passes over the weight, by units: count the entries of each list, then write them.
template <typename T>
struct Packing {
  const FilterParams& p;
  int64_t K, C, stride_k, stride_c;
  SparseView<int32_t> view;
  int32_t*
      starts;  // counting: entries of list i, at i + 1; writing: where the next one goes, which ends as the list's end
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
        starts(words ? view.starts() : nullptr) {}

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
            const int64_t at = starts[(i * a + j) * view.units + u + 1]++;
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
            const int64_t list = ((i * a + j) * view.sum_blocks + c / kSumBlock) * K + k;
            const int64_t at = starts[list + 1]++;
            if (writes) view.entries()[at] = {value, uint32_t(c % kSumBlock)};
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

  // Counts into `starts`, and makes of starts[i + 1] where list i begins. Entries in all, -1 where a word cannot count them.
  int64_t count(const Executor& executor) {
    __builtin_memset(starts, 0, (view.lists + 1) * sizeof(int32_t));
    pass(executor);
    for (int64_t i = 1; i <= view.lists; ++i) {
      const int64_t here = starts[i];
      starts[i] = int32_t(entries);
      entries += here;
      if (entries > INT32_MAX) return -1;
    }
    return entries;
  }

  void order() {
    int32_t* units = view.order();
    for (int64_t i = 0; i < view.units; ++i) {
      const int64_t mine = entries_of(i);
      int64_t at = i;
      for (; at > 0 && entries_of(units[at - 1]) < mine; --at) units[at] = units[at - 1];
      units[at] = int32_t(i);
    }
  }

  int64_t entries_of(int64_t u) const {
    int64_t sum = 0;
    if (view.pattern == Pattern::blocks)
      for (int64_t xi = 0; xi < view.positions; ++xi) {
        const int32_t* start = starts + xi * view.units + u;
        sum += start[1] - start[0];
      }
    else
      for (int64_t list = 0; list < view.positions * view.sum_blocks; ++list) {
        const int32_t* start = starts + list * K;
        sum += start[min(K, (u + 1) * kLanes)] - start[u * kLanes];
      }
    return sum;
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

int64_t packed_words(const FilterParams& params, Pattern pattern, const Executor& executor) {
  return with_dtype(params.dtype, [&](auto element) -> int64_t {
    using T = decltype(element);
    Packing<T> packing(params, pattern, nullptr);
    packing.starts = static_cast<int32_t*>(
        scratch((packing.view.lists + 1) * sizeof(int32_t), ScratchSlot::shared));
    if (!packing.starts) return -1;
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
    __builtin_memset(packing.view.order(), 0,
                     (packing.view.head() - 16 - packing.view.lists - 1) * sizeof(int32_t));
    if (pattern == Pattern::blocks)
      __builtin_memset(packing.view.channels(), 0,
                       round_up<int64_t>(entries, 16) * sizeof(int32_t));
    packing.writes = true;
    packing.pass(executor);
    packing.order();
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
const SparseKernels PYWINO_ISA_NAME(sparse_kernels_) = {run_forward, packed_words, pack, fits};

}  // namespace pywino::winograd
