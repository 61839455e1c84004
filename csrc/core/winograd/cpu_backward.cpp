// SPDX-License-Identifier: BSD-3-Clause
// Winograd gradients, compiled once per instruction set. The input gradient of the plain convolution is a forward one with the
// turned filter (cpu_forward.cpp); here are the weight gradient, and the input gradient of a weight in the Winograd domain.
//
// Weight gradient: dU[xi][c][k] = sum over tiles V[xi][tile][c] D[xi][tile][k], with V = B^T d B and D = A dY A^T, then G^T dU G.
// The channels are cut into blocks of at most 128 x 128, so that the accumulators of a block stay near the core; where there
// are fewer blocks than threads, the tiles are cut into slices too and the slices summed in their order (deterministic).
#include "../common/product.h"
#include "../common/scratch.h"
#include "../common/simd.h"
#include "filter.h"
#include "overlap.h"
#include "patches.h"
#include "prefetch.h"
#include "tiles.h"
#include "transforms.h"
#include "winograd.h"

namespace pywino::winograd {
namespace {

// Part i of n things cut into `parts` nearly equal parts.
PYWINO_INLINE int64_t part_begin(int64_t n, int64_t parts, int64_t i) {
  return n / parts * i + min(i, n % parts);
}

// What tiles touch: rows of dY, of the input, and of dX where it is the sum (else it has no channels).
template <int M, typename T>
struct TouchedRows {
  static constexpr int A = Transform<M>::A, kRows = M + 2 * A;
  const Grid* grid;
  Source<T> grad, input;
  Source<float> sums;

  PYWINO_INLINE Piece piece(int64_t q, int64_t most) const {
    return grad.channels_last ? grid->piece(q, most) : grid->strip_piece(q, most);
  }
  Region operator()(const Piece& piece, int i) const {
    if (i < M)
      return Region::of(grad, piece.image, piece.y + i * grad.dil_h, piece.x, span(piece, M));
    const int64_t y = piece.y - input.pad_h + (i - M) / 2 * input.dil_h, x = piece.x - input.pad_w;
    return (i - M) % 2 ? Region::of(sums, piece.image, y, x, span(piece, A))
                       : Region::of(input, piece.image, y, x, span(piece, A));
  }
};

// --- weight gradient ------------------------------------------------------------------------------------------------------
// sum[r][n] += sum over tiles V[tile][r] D[tile][n]. A chunk has a sum of its own: one long sum would lose digits with its length.
template <int MR, int NR>
void accumulate(int tiles, const float* __restrict v, int64_t ldv, const float* __restrict d,
                int64_t ldd, bool first, float* __restrict sum, const Ahead& ahead) {
  vec s[MR][NR];
  PYWINO_UNROLL for (int r = 0; r < MR; ++r) PYWINO_UNROLL for (int n = 0; n < NR; ++n) s[r][n] =
      zero();
  const auto add = [&](int count) __attribute__((always_inline)) {
    for (int t = 0; t < count; ++t, v += ldv, d += ldd) {
      vec dn[NR];
      PYWINO_UNROLL for (int n = 0; n < NR; ++n) dn[n] = load(d + n * kLanes);
      PYWINO_UNROLL for (int r = 0; r < MR; ++r) {
        const float x = v[r];
        PYWINO_UNROLL for (int n = 0; n < NR; ++n) s[r][n] += x * dn[n];
      }
    }
  };
  if constexpr (NR == 1) {
    add(tiles);  // loads are the limit: nothing is fetched
  } else {
    const char* next = ahead.next;
    for (int done = 0; done < tiles; done += 16) {
      fetch(ahead, next, 4);
      add(min(16, tiles - done));
    }
  }
  PYWINO_UNROLL for (int r = 0; r < MR; ++r) PYWINO_UNROLL for (int n = 0; n < NR; ++n) store(
      sum + (r * NR + n) * kLanes, first ? s[r][n] : load(sum + (r * NR + n) * kLanes) + s[r][n]);
}

using Accumulate = void (*)(int, const float*, int64_t, const float*, int64_t, bool, float*,
                            const Ahead&);
template <int NR, int... MR>
struct Accumulates {
  static constexpr Accumulate table[] = {accumulate<MR, NR>...};
};
#if defined(__AVX512F__)
constexpr const Accumulate* kAccumulate2 =
    Accumulates<2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>::table;
constexpr const Accumulate* kAccumulate1 =
    Accumulates<1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>::table;
#else
constexpr const Accumulate* kAccumulate2 = Accumulates<2, 1, 2, 3, 4, 5, 6>::table;
constexpr const Accumulate* kAccumulate1 = Accumulates<1, 1, 2, 3, 4, 5, 6>::table;
#endif

constexpr int64_t kChannelBlock = 128;
// V and D of a chunk of tiles: half of the second-level cache. A chunk reads and writes the sums once, so where they do not fit
// beside it, larger chunks cost less than they save.
constexpr int64_t kPatchBytes = int64_t(512) << 10, kLargePatchBytes = int64_t(2) << 20,
                  kLargeSums = int64_t(256) << 10;

template <int M, typename T>
struct WeightGradient {
  static constexpr int A = Transform<M>::A, A2 = A * A;
  const WeightGradientParams& params;
  const Geometry& g;
  Source<T> input, grad;
  Grid grid;
  int64_t blocks_c, blocks_k;  // blocks of channels
  int64_t slices;
  int64_t chunk;  // tiles
  int64_t ldv, ldd, stride_v, stride_d, sum_floats;
  bool fetch;                // the next chunk's pixels
  float* partial = nullptr;  // slices > 1: their sums
  int64_t next = 0;
  bool failed = false;

  WeightGradient(const WeightGradientParams& p, int threads)
      : params(p),
        g(p.geometry),
        input(input_source<T>(g, p.input)),
        grad(gradient_source<T>(g, p.grad)),
        grid(g),
        blocks_c(ceil_div(g.input.c, kChannelBlock)),
        blocks_k(ceil_div(g.out_channels, kChannelBlock)) {
    const int64_t jobs = blocks_c * blocks_k;
    slices = max<int64_t>(1, min<int64_t>(grid.tiles / kRows2,
                                          jobs < threads ? ceil_div<int64_t>(threads, jobs) : 1));
    // Widest block: the first ones are the larger.
    ldv = ceil_div(input.blocks(), blocks_c) * kLanes;
    ldd = ceil_div(grad.blocks(), blocks_k) * kLanes;
    sum_floats = A2 * round_up<int64_t>(ldv, 16) * ldd;
    const int64_t bytes = sum_floats * 4 > kLargeSums ? kLargePatchBytes : kPatchBytes;
    chunk = max<int64_t>(4, bytes / (A2 * (ldv + ldd) * 4));
    chunk = min(chunk, ceil_div(grid.tiles, slices));
    stride_v = padded_stride(chunk * ldv);
    stride_d = padded_stride(chunk * ldd);
    const int64_t numbers = g.input.n * (input.channels * g.input.h * g.input.w +
                                         grad.channels * g.out_h() * g.out_w());
    // With few channels the products are bound by loads, and the pixels follow one another.
    fetch = jobs == 1 && min(ldv, ldd) >= 64 && numbers * int64_t(sizeof(T)) > kPrefetchBytes;
  }

  // The sums of block (c, k) over the tiles of one slice, as [xi][group of c][panel of k][MR][panel's width].
  void sums(int64_t bc, int64_t bk, int64_t slice, float* v, float* d, float* sum) const {
    const int64_t c0 = part_begin(input.blocks(), blocks_c, bc),
                  c1 = part_begin(input.blocks(), blocks_c, bc + 1);
    const int64_t k0 = part_begin(grad.blocks(), blocks_k, bk),
                  k1 = part_begin(grad.blocks(), blocks_k, bk + 1);
    const Groups groups(int(channels(c0, c1)), kRows2);
    const int64_t begin = part_begin(grid.tiles, slices, slice),
                  end = part_begin(grid.tiles, slices, slice + 1);
    for (int64_t first = begin; first < end; first += chunk) {
      const int tiles = int(min(chunk, end - first));
      transform_tiles<InputPatch<M>>(
          input, grid, first, 0, tiles, c0, c1,
          [&](int tile, int64_t b)
              __attribute__((always_inline)) { return tile * ldv + (b - c0) * kLanes; },
          params.winograd_relu, v, stride_v);
      transform_tiles<GradientPatch<M>>(
          grad, grid, first, 0, tiles, k0, k1,
          [&](int tile, int64_t b)
              __attribute__((always_inline)) { return tile * ldd + (b - k0) * kLanes; },
          false, d, stride_d);
      Prefetch<TouchedRows<M, T>> ahead;
      if (fetch && first + tiles < end)
        ahead = {{&grid, grad, input, {}},
                 first + tiles,
                 min(first + tiles + chunk, end),
                 A2 * groups.count * ceil_div<int64_t>(k1 - k0, 2),
                 tiles};
      float* s = sum;
      for (int xi = 0; xi < A2; ++xi)
        for (int i = 0; i < groups.count; ++i)
          for (int64_t k = k0; k < k1; k += 2) {
            const int vectors = int(min<int64_t>(2, k1 - k)), rows = groups.size(i);
            (vectors == 2 ? kAccumulate2 : kAccumulate1)[rows - 1](
                tiles, v + xi * stride_v + groups.start(i), ldv,
                d + xi * stride_d + (k - k0) * kLanes, ldd, first == begin, s, ahead.next());
            s += rows * vectors * kLanes;
          }
    }
  }

  int64_t channels(int64_t c0, int64_t c1) const {
    return min(c1 * kLanes, input.channels) - c0 * kLanes;
  }

  // Group i of block (c, k): out of the Winograd domain, into the weight's layout. `sum` holds n slices, sum_floats apart.
  void finish(int64_t bc, int64_t bk, int i, const float* sum, int64_t n) const {
    const int64_t c0 = part_begin(input.blocks(), blocks_c, bc),
                  c1 = part_begin(input.blocks(), blocks_c, bc + 1);
    const int64_t k0 = part_begin(grad.blocks(), blocks_k, bk),
                  k1 = part_begin(grad.blocks(), blocks_k, bk + 1);
    const Groups groups(int(channels(c0, c1)), kRows2);
    const int64_t per_xi = channels(c0, c1) * (k1 - k0) * kLanes;
    const int rows = groups.size(i), size = params.spatial ? 3 : A;
    const int entries = rows * size * size;
    vec kernels[round_up(kRows2 * A2, kLanes)];  // the group's kernels, lanes = k
    for (int64_t k = k0; k < k1; ++k) {
      const int64_t panel = (k - k0) / 2 * 2, vectors = min<int64_t>(2, k1 - k0 - panel);
      for (int r = 0; r < rows; ++r) {
        const float* at = sum + groups.start(i) * (k1 - k0) * kLanes + panel * rows * kLanes +
                          (r * vectors + (k - k0 - panel)) * kLanes;
        vec u[A][A], t[3][A];
        for (int xi = 0; xi < A2; ++xi) {
          vec total = load(at + xi * per_xi);
          for (int64_t s = 1; s < n; ++s) total += load(at + s * sum_floats + xi * per_xi);
          u[xi / A][xi % A] = total;
        }
        if (params.spatial) {
          for (int x = 0; x < A; ++x) {
            vec column[A], o[3];
            for (int y = 0; y < A; ++y) column[y] = u[y][x];
            Transform<M>::filter_transposed(column, o);
            for (int y = 0; y < 3; ++y) t[y][x] = o[y];
          }
          for (int y = 0; y < 3; ++y) Transform<M>::filter_transposed(t[y], u[y]);
        }
        for (int y = 0; y < size; ++y)
          for (int x = 0; x < size; ++x) kernels[(r * size + y) * size + x] = u[y][x];
      }
      // The kernels of one k lie together in the weight: (K, C, size, size).
      const int lanes = int(min<int64_t>(kLanes, g.out_channels - k * kLanes));
      const int64_t pitch = g.input.c * size * size;
      float* out =
          params.gradient + k * kLanes * pitch + (c0 * kLanes + groups.start(i)) * size * size;
      for (int e = 0; e < entries; e += kLanes) transpose(kernels + e);
      // One k after the other: their weights often lie a multiple of 4 KB apart, and would evict one another line by line.
      for (int lane = 0; lane < lanes; ++lane)
        for (int e = 0; e < entries; e += kLanes)
          store_part(out + lane * pitch + e, kernels[e + lane], 0, min(kLanes, entries - e));
    }
  }

  int groups_of(int64_t bc) const {
    return Groups(int(channels(part_begin(input.blocks(), blocks_c, bc),
                               part_begin(input.blocks(), blocks_c, bc + 1))),
                  kRows2)
        .count;
  }

  static void body(void* arg) {
    WeightGradient& run = *static_cast<WeightGradient*>(arg);
    const int64_t patches = A2 * (run.stride_v + run.stride_d),
                  own_sums = run.slices == 1 ? run.sum_floats : 0;
    float* v = static_cast<float*>(scratch((patches + own_sums) * sizeof(float), ScratchSlot::own));
    if (!v) {
      run.failed = true;
      return;
    }
    float* d = v + A2 * run.stride_v;
    const int64_t tasks = run.blocks_c * run.blocks_k * run.slices;
    for (int64_t task = take(&run.next); task < tasks; task = take(&run.next)) {
      const int64_t job = task / run.slices, bc = job / run.blocks_k, bk = job % run.blocks_k;
      float* sum = run.slices == 1 ? v + patches : run.partial + task * run.sum_floats;
      run.sums(bc, bk, task % run.slices, v, d, sum);
      if (run.slices == 1)
        for (int i = 0; i < run.groups_of(bc); ++i) run.finish(bc, bk, i, sum, 1);
    }
  }

  static void reduce(void* arg) {
    WeightGradient& run = *static_cast<WeightGradient*>(arg);
    const int64_t most = ceil_div<int64_t>(kChannelBlock, kRows2) + 1,
                  tasks = run.blocks_c * run.blocks_k * most;
    for (int64_t task = take(&run.next); task < tasks; task = take(&run.next)) {
      const int64_t job = task / most, bc = job / run.blocks_k;
      if (task % most < run.groups_of(bc))
        run.finish(bc, job % run.blocks_k, int(task % most),
                   run.partial + job * run.slices * run.sum_floats, run.slices);
    }
  }

  Status operator()(const Executor& executor) {
    if (slices > 1) {
      partial = static_cast<float*>(
          scratch(blocks_c * blocks_k * slices * sum_floats * sizeof(float), ScratchSlot::shared));
      if (!partial) return Status::out_of_memory;
    }
    executor.run(executor.threads, body, this);
    if (slices > 1 && !failed) {
      next = 0;
      executor.run(executor.threads, reduce, this);
    }
    return failed ? Status::out_of_memory : Status::ok;
  }
};

// --- input gradient of a weight in the Winograd domain ---------------------------------------------------------------------------
// dX = sum over tiles B [ P . (V > 0) ] B^T, P[xi][tile][c] = sum_k D[xi][tile][k] U[xi][k][c], D = A dY A^T.
//
// Patches overlap in dX. One thread does the tiles of an image, row after row. Where there are few images they are cut into bands of
// rows of tiles: one reaches into the next, but never further, so the even bands are done first, then the odd ones. Where that is
// not enough (few tiles), threads share the input channels. What a sum's order depends on is the geometry alone.
template <int M, typename T>
struct DomainInputGradient {
  static constexpr int A = Transform<M>::A, A2 = A * A;
  const DomainInputGradientParams& params;
  const Geometry& g;
  Source<T> input, grad;
  Source<float> sums;  // dX
  Grid grid;
  int threads;
  int64_t panels, bands, shares, images;  // of input channels, of an image, of a band, of a task
  int rows;                               // most tiles of a register block
  int64_t chunk, stride_d, stride_p, stride_u;
  bool own_filter;           // each panel is used once: it may be made for that
  bool own_zeros;            // each task zeroes its images itself
  bool fetch, fetch_filter;  // what the next tiles touch, or the filter, while one multiplies
  int parity = 0;            // of the bands
  int64_t next = 0;
  bool failed = false;

  DomainInputGradient(const DomainInputGradientParams& p, int threads)
      : params(p),
        g(p.geometry),
        input(input_source<T>(g, p.input)),
        grad(gradient_source<T>(g, p.grad)),
        sums(input_source<float>(g, p.input_gradient)),
        grid(g),
        threads(threads),
        panels(ceil_div<int64_t>(g.input.c, kPanel)),
        rows(g.input.c > kLanes ? kRows2 : kRows1) {
    const int64_t n = g.input.n, tiles = max<int64_t>(1, grid.tiles_per_image),
                  panel_floats = A2 * g.out_channels * kPanel,
                  image_bytes = g.input.c * g.input.h * g.input.w * 4,
                  tile_bytes = A2 * (grad.blocks() * kLanes + kPanel) * 4,
                  most = max<int64_t>(1, kScratchPerThread / tile_bytes);
    const bool large = panel_floats * panels * 4 > kLargeFilterBytes;
    fetch_filter = large && g.out_channels >= 512;
    const int64_t wanted = min<int64_t>((fetch_filter ? 4 : 2) * rows, most),
                  together = ceil_div(wanted, tiles);
    // Small images together: all that fit, for a large filter, else while there are enough for the threads.
    images = large ? min(n, together) : max<int64_t>(1, min(together, n / (2 * threads)));
    chunk = min(tiles < wanted ? images * tiles : wanted, most);
    // Bands of two rows and two register blocks or more, an even number. A large filter each would read whole, a share but its part.
    bands = min(kMostBands / n, min(grid.rows.total / 2, tiles / (2 * rows))) & ~int64_t(1);
    if (bands < 2 || large) bands = 1;
    const int64_t at_once = ceil_div(n, images) * max<int64_t>(1, bands / 2);
    shares = min(panels, max<int64_t>(1, threads / at_once));
    own_filter = large && images == n && chunk >= n * tiles;
    stride_d = padded_stride(chunk * grad.blocks() * kLanes);
    stride_p = padded_stride(chunk * kPanel);
    stride_u = padded_stride(kSumBlock * kPanel);
    own_zeros = bands == 1 && shares == 1 && images * image_bytes <= kPrefetchBytes;
    fetch = !fetch_filter && shares == 1 && n * image_bytes > kPrefetchBytes;
  }

  static constexpr int64_t kMostBands = 16, kLargeFilterBytes = int64_t(1) << 20;

  // Tiles [begin, end), panels [panel0, panel1).
  void band(int64_t begin, int64_t end, int64_t panel0, int64_t panel1, float* d, float* p) const {
    const int64_t chunks = ceil_div(end - begin, chunk);
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t first = begin + part_begin(end - begin, chunks, i),
                    last = begin + part_begin(end - begin, chunks, i + 1);
      const int tiles = int(last - first);
      const Groups groups(tiles, rows);
      transform_tiles<GradientPatch<M>>(
          grad, grid, first, 0, tiles, 0, grad.blocks(),
          [&](int tile, int64_t b) __attribute__((always_inline)) {
            const int group = groups.of(tile), start = groups.start(group);
            return (start * grad.blocks() + b * groups.size(group) + tile - start) * kLanes;
          },
          false, d, stride_d);
      Prefetch<TouchedRows<M, T>> ahead;
      // This thread's next chunk is in this band, or most likely in that which follows those of the other threads.
      const int64_t skip =
          i + 1 < chunks ? 0 : (end - begin) * (threads * min<int64_t>(2, bands) - 1);
      if (fetch && last + skip < grid.tiles)
        ahead = {{&grid, grad, params.winograd_relu ? input : Source<T>{}, sums},
                 last + skip,
                 min(last + skip + chunk, grid.tiles),
                 A2 * groups.count * (panel1 - panel0),
                 g.out_channels};
      for (int64_t panel = panel0; panel < panel1; ++panel)
        products(first, groups, panel, d, p, ahead);
    }
  }

  void products(int64_t first, const Groups& groups, int64_t panel, const float* d, float* p,
                Prefetch<TouchedRows<M, T>>& ahead) const {
    const int64_t channel = panel * kPanel, depth = g.out_channels;
    const int vectors = g.input.c - channel > kLanes ? 2 : 1,
              tiles = groups.start(groups.count - 1) + groups.size(groups.count - 1);
    const Multiply* table = multiplies<float>(vectors);
    // Channels [k0, k1) of the products, with their filter.
    const auto product = [&](int64_t k0, int64_t k1, const float* u, int64_t pitch) {
      for (int xi = 0; xi < A2; ++xi, u += pitch) {
        Ahead next_filter = {reinterpret_cast<const char*>(u + pitch), 64, 1,
                             ceil_div(4 * vectors * kLanes * 4 / 64, groups.count)};
        for (int i = 0; i < groups.count; ++i) {
          table[groups.size(i) - 1](
              k1 - k0,
              d + xi * stride_d + groups.start(i) * grad.blocks() * kLanes + k0 * groups.size(i), u,
              p + xi * stride_p + groups.start(i) * vectors * kLanes,
              fetch_filter ? next_filter : ahead.next(), k0 > 0);
          next_filter.next += (k1 - k0) / 4 * next_filter.rate * next_filter.pitch;
        }
      }
    };
    if (params.weight) {
      float* own = p + A2 * stride_p;
      const FilterRun<M, T> filter(*params.weight);
      for (int64_t k0 = 0; k0 < depth; k0 += kSumBlock) {
        const int64_t k1 = min(k0 + kSumBlock, depth);
        filter.kernels(panel, k0, k1, own, stride_u);
        product(k0, k1, own, stride_u);
      }
    } else {
      product(0, depth, params.filter + channel * depth * A2, depth * vectors * kLanes);
    }
    for (int t = 0; t < tiles;) {
      const Piece piece = g.channels_last ? grid.piece(first + t, tiles - t)
                                          : grid.strip_piece(first + t, tiles - t);
      for (int v = 0; v < vectors; ++v)
        add_patches<M>(params, input, piece, channel + v * kLanes, p + (t * vectors + v) * kLanes,
                       stride_p, vectors * kLanes);
      t += piece.count;
    }
  }

  static void body(void* arg) {
    DomainInputGradient& run = *static_cast<DomainInputGradient*>(arg);
    const int64_t own = run.params.weight ? run.stride_u : 0;
    float* d = static_cast<float*>(
        scratch(A2 * (run.stride_d + run.stride_p + own) * sizeof(float), ScratchSlot::own));
    if (!d) {
      run.failed = true;
      return;
    }
    const Geometry& g = run.g;
    const int64_t columns = run.grid.columns.total, rows = run.grid.rows.total,
                  image = g.input.c * g.input.h * g.input.w,
                  in_turn = (run.bands + 1 - run.parity) / 2,
                  tasks = ceil_div(g.input.n, run.images) * in_turn * run.shares;
    for (int64_t task = take(&run.next); task < tasks; task = take(&run.next)) {
      const int64_t share = task % run.shares, first = task / run.shares / in_turn * run.images,
                    last = min(first + run.images, g.input.n),
                    band = task / run.shares % in_turn * 2 + run.parity;
      if (run.own_zeros)
        __builtin_memset(run.params.input_gradient + first * image, 0, (last - first) * image * 4);
      run.band((first * rows + part_begin(rows, run.bands, band)) * columns,
               ((last - 1) * rows + part_begin(rows, run.bands, band + 1)) * columns,
               part_begin(run.panels, run.shares, share),
               part_begin(run.panels, run.shares, share + 1), d, d + A2 * run.stride_d);
    }
  }

  static void zeros(void* arg) {
    DomainInputGradient& run = *static_cast<DomainInputGradient*>(arg);
    constexpr int64_t kSlice = int64_t(1) << 16;
    const int64_t all = run.g.input.n * run.g.input.c * run.g.input.h * run.g.input.w;
    for (int64_t at = take(&run.next) * kSlice; at < all; at = take(&run.next) * kSlice)
      __builtin_memset(run.params.input_gradient + at, 0, min(kSlice, all - at) * sizeof(float));
  }

  Status operator()(const Executor& executor) {
    if (!own_zeros) executor.run(executor.threads, zeros, this);
    for (parity = 0; parity < min<int64_t>(2, bands) && !failed; ++parity) {
      next = 0;
      executor.run(executor.threads, body, this);
    }
    return failed ? Status::out_of_memory : Status::ok;
  }
};

// --- by tile and dtype --------------------------------------------------------------------------------------------------------------
template <template <int, typename> class Run, typename Params>
Status run(const Params& params, const Executor& executor) {
  return with_tile(params.geometry.tile, [&](auto tile) {
    return with_dtype(params.geometry.dtype, [&](auto element) {
      return Run<tile.m, decltype(element)>(params, executor.threads)(executor);
    });
  });
}

bool takes_weight(const Geometry& geometry, int threads) {
  DomainInputGradientParams params{};
  params.geometry = geometry;
  bool takes = false;
  with_tile(geometry.tile, [&](auto tile) {
    takes = DomainInputGradient<tile.m, float>(params, threads).own_filter;
    return Status::ok;
  });
  return takes;
}

}  // namespace

extern const BackwardKernels PYWINO_ISA_NAME(backward_kernels_);
const BackwardKernels PYWINO_ISA_NAME(backward_kernels_) = {
    run<WeightGradient, WeightGradientParams>, run<DomainInputGradient, DomainInputGradientParams>,
    takes_weight};

}  // namespace pywino::winograd
