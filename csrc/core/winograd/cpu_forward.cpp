// SPDX-License-Identifier: BSD-3-Clause
// Winograd forward convolution, compiled once per instruction set.
//
// A chunk of T tiles goes through three stages while its data stay in the second-level cache:
//
//   input    V[xi][tile][C]  = B^T d B       xi = 0 .. a*a - 1, lanes = channels
//   product  M[xi][tile][K'] = V[xi] U[xi]   a*a matrix products, K' = a panel of at most 2 vectors of output channels
//   output   Y = A^T M A + bias + residual, ReLU
//
// `product` and `output` run panel by panel, so that M is small. There are two ways to share the work:
//   private  each thread takes whole chunks: no barrier. For filters that fit in the caches.
//   joint    all threads transform one large chunk, then share its panels: the filter is read once per chunk, not per thread.
//            For many channels, where reading U costs more than everything else, and for few tiles.
//
// Layouts (L = lanes of a vector, MR = tiles of a register block):
//   V  [xi][group of MR tiles][C / L][MR][L]   the product walks it with one pointer and constant displacements
//   U  [panel][xi][C][panel's width]           so does it here; derived from the weight by `filter`
//   M  [xi][tile][panel's width]
#include "../common/simd.h"
#include "patches.h"
#include "product.h"
#include "tiles.h"
#include "transforms.h"
#include "winograd.h"

#include "../common/scratch.h"

namespace pywino::winograd {
namespace {

int64_t channel_blocks(int64_t c) { return ceil_div<int64_t>(c, kLanes); }

// --- one call ---------------------------------------------------------------------------------------------------------------
template <typename T>
struct Job {
  const ForwardParams& params;
  const Geometry& geometry;
  Source<T> source;
  Grid grid;
  int64_t out_h, out_w, stride_v, stride_m;
  int64_t blocks;  // vectors of input channels
  int64_t lines;   // of a tile's channels in V
  int rows;        // most tiles of a register block
  bool stream;     // write the output past the caches
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
  transform_tiles<InputPatch<M>, M>(
      job.source, job.grid, first, t0, t1, block0, block1,
      [&](int tile, int64_t block)
          __attribute__((always_inline)) { return v_offset<E>(job, groups, tile, block); },
      job.params.winograd_relu, v, job.stride_v);
}

// --- prefetch -----------------------------------------------------------------------------------------------------------
// The product computes and hardly reads memory; the input stage waits for memory and hardly computes. So while one chunk is
// multiplied, the patches of the next are fetched into the second-level cache, a few lines after each register block.
template <int M, typename T>
class Prefetch {
 public:
  // Nothing to fetch.
  Prefetch() = default;

  // The patches of tiles [first, end), in `calls` calls of next().
  Prefetch(const Job<T>& job, int64_t first, int64_t end, int64_t calls, int64_t depth)
      : job_(&job),
        tile_(first),
        end_(end),
        strip_(job.geometry.channels_last ? 0 : most_tiles_in_strip(M)),
        quarters_(max<int64_t>(1, depth / 4)) {
    int64_t slots = 0;
    for (int64_t t = first; t < end;) {
      piece_ = job.grid.piece(t, end - t, strip_);
      row();
      slots += A * slots_;
      t += piece_.count;
    }
    ahead_.rate = int(ceil_div(slots, calls * quarters_));
    open();
  }

  // What to fetch during the next register block.
  PYWINO_INLINE const Ahead& next() {
    if (!job_) return ahead_;
    ahead_.next += ahead_.pitch * quarters_ * ahead_.rate;
    slots_ -= quarters_ * ahead_.rate;
    if (slots_ <= 0) advance();
    return ahead_;
  }

 private:
  static constexpr int A = Transform<M>::A;

  void open() {
    if (tile_ >= end_) {
      job_ = nullptr;
      ahead_.rate = 0;
      return;
    }
    piece_ = job_->grid.piece(tile_, end_ - tile_, strip_);
    tile_ += piece_.count;
    i_ = -1;
    advance();
  }

  // To the next row of the patches that lies inside the input.
  void advance() {
    const Geometry& g = job_->geometry;
    for (++i_; i_ < A; ++i_) {
      const int64_t y = piece_.y - g.pad_h + i_ * g.dil_h;
      if (y >= 0 && y < g.input.h) return row();
    }
    open();
  }

  // A slot is a cache line of a row, or one pixel of it (dilated), or the row of one plane.
  void row() {
    const Geometry& g = job_->geometry;
    const int64_t C = g.input.c, y = max<int64_t>(0, piece_.y - g.pad_h + i_ * g.dil_h);
    const int64_t x0 = max<int64_t>(0, piece_.x - g.pad_w),
                  columns = (piece_.count * M + 1) * g.dil_w + 1;
    const T* input = static_cast<const T*>(job_->params.input);
    int64_t bytes;
    if (!g.channels_last) {
      input += (piece_.image * C * g.input.h + y) * g.input.w + x0;
      slots_ = C, bytes = columns * sizeof(T), ahead_.pitch = g.input.h * g.input.w * sizeof(T);
    } else {
      input += ((piece_.image * g.input.h + y) * g.input.w + x0) * C;
      if (g.dil_w == 1)
        slots_ = ceil_div<int64_t>(columns * C * sizeof(T), 64), bytes = ahead_.pitch = 64;
      else
        slots_ = piece_.count * M + 2, bytes = C * sizeof(T),
        ahead_.pitch = g.dil_w * C * sizeof(T);
    }
    ahead_.next = reinterpret_cast<const char*>(input);
    ahead_.lines = int(ceil_div<int64_t>(bytes, 64));
  }

  const Job<T>* job_ = nullptr;
  int64_t tile_ = 0, end_ = 0;
  int strip_ = 0;
  int64_t quarters_ = 0,
          slots_ = 0;  // fours of channels in a register block; slots left in the row
  int i_ = 0;          // row of the patches
  Piece piece_{};
  Ahead ahead_ = kNothing;
};

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

template <int M, typename T>
void output_channels_last(const Job<T>& job, const Piece& piece, int64_t channel, int vectors,
                          const float* m) {
  const Geometry& g = job.geometry;
  const int64_t K = g.out_channels, row = g.dil_h * job.out_w * K, column = g.dil_w * K;
  const int rows = outputs_inside(piece.y, job.out_h, g.dil_h, M);
  T* out = static_cast<T*>(job.params.output);
  const T* residual = static_cast<const T*>(job.params.residual);
  const bool relu_out = job.params.relu;
  for (int s = 0; s < piece.count; ++s) {
    const int64_t x0 = piece.x + s * M * g.dil_w;
    const int columns = outputs_inside(x0, job.out_w, g.dil_w, M);
    const int64_t at = ((piece.image * job.out_h + piece.y) * job.out_w + x0) * K + channel;
    for (int n = 0; n < vectors; ++n) {
      const int lanes = int(min<int64_t>(kLanes, K - channel - n * kLanes));
      const vec bias =
          job.params.bias ? load_part(job.params.bias + channel + n * kLanes, 0, lanes) : zero();
      T* tile = out + at + n * kLanes;
      const T* skip = residual ? residual + at + n * kLanes : nullptr;
      const float* product = m + (s * vectors + n) * kLanes;
      if (columns == M && lanes == kLanes) {
        transform_product<M>(
            product, job.stride_m, rows, [&](int i, vec* y) __attribute__((always_inline)) {
              PYWINO_UNROLL for (int j = 0; j < M; ++j) y[j] += bias;
              if (skip)
                PYWINO_UNROLL for (int j = 0; j < M; ++j) y[j] += load(skip + i * row + j * column);
              if (relu_out) PYWINO_UNROLL for (int j = 0; j < M; ++j) y[j] = relu(y[j]);
              if (sizeof(T) == 4 && job.stream)
                PYWINO_UNROLL for (int j = 0; j < M; ++j)
                    stream(reinterpret_cast<float*>(tile + i * row + j * column), y[j]);
              else
                PYWINO_UNROLL for (int j = 0; j < M; ++j) store(tile + i * row + j * column, y[j]);
            });
      } else {
        transform_product<M>(
            product, job.stride_m, rows, [&](int i, vec* y) __attribute__((always_inline)) {
              for (int j = 0; j < columns; ++j) {
                vec value = y[j] + bias;
                if (skip) value += load_part(skip + i * row + j * column, 0, lanes);
                store_part(tile + i * row + j * column, relu_out ? relu(value) : value, 0, lanes);
              }
            });
      }
    }
  }
}

template <int M, typename T>
void output_planes(const Job<T>& job, const Piece& piece, int64_t channel, int vectors,
                   const float* m) {
  const Geometry& g = job.geometry;
  const int64_t plane = job.out_h * job.out_w;
  const int rows = outputs_inside(piece.y, job.out_h, g.dil_h, M);
  const int columns = outputs_inside(piece.x, job.out_w, g.dil_w, M * piece.count);
  const bool relu_out = job.params.relu;
  alignas(64) float strip[M * kStrip * kLanes];
  for (int n = 0; n < vectors; ++n) {
    const int64_t k = channel + n * kLanes;
    const int lanes = int(min<int64_t>(kLanes, g.out_channels - k));
    const vec bias = job.params.bias ? load_part(job.params.bias + k, 0, lanes) : zero();
    for (int s = 0; s < piece.count; ++s)
      transform_product<M>(m + (s * vectors + n) * kLanes, job.stride_m, rows,
                           [&](int i, vec* y) __attribute__((always_inline)) {
                             PYWINO_UNROLL for (int j = 0; j < M; ++j)
                                 store(strip + (i * kStrip + s * M + j) * kLanes, y[j] + bias);
                           });
    const int64_t at =
        ((piece.image * g.out_channels + k) * job.out_h + piece.y) * job.out_w + piece.x;
    T* out = static_cast<T*>(job.params.output) + at;
    const T* residual =
        job.params.residual ? static_cast<const T*>(job.params.residual) + at : nullptr;
    for (int i = 0; i < rows; ++i) {
      const float* pixels = strip + i * kStrip * kLanes;
      const int64_t row = i * g.dil_h * job.out_w;
      if (g.dil_w == 1) {
        for (int j = 0; j < columns; j += kLanes) {
          const int width = min(kLanes, columns - j);
          vec r[kLanes];
          PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) r[c] = load(pixels + (j + c) * kLanes);
          transpose(r);
          if (width == kLanes && lanes == kLanes && !residual) {
            if (relu_out) PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) r[c] = relu(r[c]);
            T* to = out + row + j;
            if (sizeof(T) == 4 && job.stream && reinterpret_cast<uintptr_t>(to) % (4 * kLanes) == 0)
              PYWINO_UNROLL for (int c = 0; c < kLanes; ++c)
                  stream(reinterpret_cast<float*>(to + c * plane), r[c]);
            else
              PYWINO_UNROLL for (int c = 0; c < kLanes; ++c) store(to + c * plane, r[c]);
          } else {
            PYWINO_ROLLED for (int c = 0; c < lanes; ++c) {
              vec value = r[c];
              if (residual) value += load_part(residual + c * plane + row + j, 0, width);
              store_part(out + c * plane + row + j, relu_out ? relu(value) : value, 0, width);
            }
          }
        }
      } else {
        for (int j = 0; j < columns; ++j)
          for (int c = 0; c < lanes; ++c) {
            const int64_t offset = c * plane + row + j * g.dil_w;
            float value = pixels[j * kLanes + c];
            if (residual) value += get(residual + offset);
            put(out + offset, relu_out && value < 0.f ? 0.f : value);
          }
      }
    }
  }
}

// Tiles [t0, t1) of the chunk that starts at tile `first`; m is the product of tile t0.
template <int M, typename T>
void output_stage(const Job<T>& job, int64_t first, int t0, int t1, int64_t channel, int vectors,
                  const float* m) {
  for (int t = t0; t < t1;) {
    const Piece piece =
        job.grid.piece(first + t, t1 - t, job.geometry.channels_last ? 0 : most_tiles_in_strip(M));
    const float* product = m + int64_t(t - t0) * vectors * kLanes;
    if (job.geometry.channels_last)
      output_channels_last<M>(job, piece, channel, vectors, product);
    else
      output_planes<M>(job, piece, channel, vectors, product);
    t += piece.count;
  }
}

// --- the convolution ----------------------------------------------------------------------------------------------------------
// Panel p of the product and of the output, for groups [g0, g1) of the chunk.
template <int M, typename T, typename E>
void panel_stage(const Job<T>& job, int64_t first, const Groups& groups, int g0, int g1,
                 int64_t panel, const E* v, float* m, Prefetch<M, T>& ahead) {
  constexpr int A2 = Transform<M>::A * Transform<M>::A;
  const int64_t depth = Depth<E>::floats(job.geometry.input.c), K = job.geometry.out_channels,
                channel = panel * kPanel;
  const int vectors = K - channel > kLanes ? 2 : 1;
  const Multiply* table = multiplies<E>(vectors);
  const float* u = job.params.filter + channel * depth * A2;
  const int t0 = groups.start(g0), t1 = groups.start(g1 - 1) + groups.size(g1 - 1);
  for (int xi = 0; xi < A2; ++xi, u += depth * vectors * kLanes)
    for (int g = g0; g < g1; ++g) {
      const int start = groups.start(g);
      const E* block = v + xi * job.stride_v + start * job.lines * Depth<E>::kLine;
      table[groups.size(g) - 1](depth, reinterpret_cast<const float*>(block), u,
                                m + xi * job.stride_m + (start - t0) * vectors * kLanes,
                                ahead.next());
    }
  output_stage<M>(job, first, t0, t1, channel, vectors, m);
}

// How the tiles are cut and who works on them.
struct Plan {
  int chunk;  // most tiles of a chunk
  bool joint;
};

// An output of more is written past the caches, an input of more is prefetched: a smaller one is in the second-level cache.
constexpr int64_t kStreamBytes = int64_t(4) << 20, kPrefetchBytes = int64_t(1) << 20;

Plan make_plan(const Geometry& g, int64_t tiles, int threads, int rows, int64_t element) {
  const int64_t a2 = int64_t(g.tile + 2) * (g.tile + 2),
                filter_bytes = a2 * g.input.c * g.out_channels * element;
  const int64_t tile_bytes = a2 * (round_up<int64_t>(g.input.c, kLanes) * element +
                                   min<int64_t>(kPanel, g.out_channels) * 4);
  const int64_t most = max<int64_t>(1, kScratchPerThread / tile_bytes);
  Plan p;
  // Each thread reads the whole filter once per chunk: with a filter beyond the second-level cache a chunk of four register
  // blocks instead of two halves that. Fewer tiles than that, and reading the filter is what counts.
  p.chunk = int(min<int64_t>(most, (filter_bytes > (int64_t(1) << 20) ? 4 : 2) * rows));
  p.joint = filter_bytes > (int64_t(1) << 20) && tiles < int64_t(threads) * 2 * rows;
  if (p.joint) {
    // The threads share V, but each has an M of the whole chunk.
    const int64_t m_bytes = a2 * min<int64_t>(kPanel, g.out_channels) * 4;
    const int64_t shared = (tile_bytes - m_bytes) / threads + m_bytes;
    p.chunk = int(max<int64_t>(1, min<int64_t>(kScratchPerThread / shared, 8 * rows)));
  }
  return p;
}

template <int M, typename T, typename E>
struct Run {
  static constexpr int A2 = Transform<M>::A * Transform<M>::A;
  Job<T> job;
  Executor executor;
  int64_t panels;
  int64_t chunks;
  int64_t next = 0;  // work that is not taken yet
  bool failed = false;
  bool prefetch = false;
  // joint:
  int64_t first = 0;
  int tiles = 0, splits = 1;
  E* shared_v = nullptr;
  int64_t v_bytes = 0, m_bytes = 0;

  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }

  void chunk_bounds(int64_t chunk, int64_t* begin, int64_t* end) const {
    const int64_t base = job.grid.tiles / chunks, larger = job.grid.tiles % chunks;
    *begin = chunk * base + min(chunk, larger);
    *end = *begin + base + (chunk < larger);
  }

  static void private_body(void* arg) {
    Run& run = *static_cast<Run*>(arg);
    const Job<T>& job = run.job;
    E* v = static_cast<E*>(scratch(run.v_bytes + run.m_bytes, ScratchSlot::own));
    float* m = reinterpret_cast<float*>(reinterpret_cast<char*>(v) + run.v_bytes);
    if (!v) {
      run.failed = true;
      return;
    }
    for (int64_t chunk = run.take(); chunk < run.chunks; chunk = run.take()) {
      int64_t begin, end, next_begin, next_end;
      run.chunk_bounds(chunk, &begin, &end);
      Prefetch<M, T> ahead;
      // The threads take turns, so this one's next chunk is most likely `threads` further on.
      if (const int64_t next = chunk + run.executor.threads; run.prefetch && next < run.chunks) {
        run.chunk_bounds(next, &next_begin, &next_end);
        ahead = Prefetch<M, T>(job, next_begin, next_end,
                               run.panels * A2 * Groups(int(end - begin), job.rows).count,
                               Depth<E>::floats(job.geometry.input.c));
      }
      const int tiles = int(end - begin);
      const Groups groups(tiles, job.rows);
      input_stage<M>(job, begin, 0, tiles, groups, 0, job.blocks, v);
      for (int64_t panel = 0; panel < run.panels; ++panel)
        panel_stage<M>(job, begin, groups, 0, groups.count, panel, v, m, ahead);
    }
  }

  static constexpr int kTilesPerTask = 4, kBlocksPerTask = 8;

  static void joint_input(void* arg) {
    Run& run = *static_cast<Run*>(arg);
    const Groups groups(run.tiles, run.job.rows);
    const int64_t parts = ceil_div<int64_t>(run.job.blocks, kBlocksPerTask),
                  tasks = parts * ceil_div(run.tiles, kTilesPerTask);
    for (int64_t task = run.take(); task < tasks; task = run.take()) {
      const int t0 = int(task / parts) * kTilesPerTask;
      const int64_t b0 = task % parts * kBlocksPerTask;
      input_stage<M>(run.job, run.first, t0, min(t0 + kTilesPerTask, run.tiles), groups, b0,
                     min(b0 + kBlocksPerTask, run.job.blocks), run.shared_v);
    }
  }

  static void joint_panels(void* arg) {
    Run& run = *static_cast<Run*>(arg);
    const Groups groups(run.tiles, run.job.rows);
    float* m = static_cast<float*>(scratch(run.m_bytes, ScratchSlot::own));
    if (!m) {
      run.failed = true;
      return;
    }
    const int splits = min(run.splits, groups.count);
    Prefetch<M, T> nothing;
    for (int64_t task = run.take(); task < run.panels * splits; task = run.take()) {
      const int part = int(task % splits);
      const int g0 = groups.count * part / splits, g1 = groups.count * (part + 1) / splits;
      panel_stage<M>(run.job, run.first, groups, g0, g1, task / splits, run.shared_v, m, nothing);
    }
  }

  Status operator()(const Plan& plan) {
    if (!plan.joint) {
      executor.run(executor.threads, private_body, this);
      return failed ? Status::out_of_memory : Status::ok;
    }
    shared_v = static_cast<E*>(scratch(v_bytes, ScratchSlot::shared));
    if (!shared_v) return Status::out_of_memory;
    for (int64_t chunk = 0; chunk < chunks && !failed; ++chunk) {
      int64_t end;
      chunk_bounds(chunk, &first, &end);
      tiles = int(end - first);
      next = 0;
      executor.run(executor.threads, joint_input, this);
      next = 0;
      executor.run(executor.threads, joint_panels, this);
    }
    return failed ? Status::out_of_memory : Status::ok;
  }
};

template <int M, typename T, typename E>
Status forward_as(const ForwardParams& params, const Executor& executor) {
  const Geometry& g = params.geometry;
  constexpr int64_t A2 = Transform<M>::A * Transform<M>::A;
  Job<T> job{params,
             g,
             input_source<T>(g, params.input),
             Grid(g),
             g.out_h(),
             g.out_w(),
             0,
             0,
             channel_blocks(g.input.c),
             Depth<E>::lines(g.input.c),
             0,
             false};
  if (job.grid.tiles == 0 || g.out_channels == 0) return Status::ok;
  job.rows = g.out_channels > kLanes ? kRows2 : kRows1;
  const Plan plan = make_plan(g, job.grid.tiles, executor.threads, job.rows, sizeof(E));
  const int64_t panels = ceil_div<int64_t>(g.out_channels, kPanel);
  int64_t chunks = ceil_div<int64_t>(job.grid.tiles, plan.chunk);
  // A whole number of chunks for each thread, while there are few.
  if (!plan.joint && chunks < 8 * executor.threads)
    chunks = min<int64_t>(job.grid.tiles, round_up<int64_t>(chunks, executor.threads));
  const int64_t chunk = ceil_div(job.grid.tiles, chunks);
  job.stride_v = padded_stride<E>(chunk * job.lines * Depth<E>::kLine);
  job.stride_m =
      padded_stride(chunk * min<int64_t>(kPanel, round_up<int64_t>(g.out_channels, kLanes)));
  const int64_t output_bytes =
      g.input.n * g.out_channels * job.out_h * job.out_w * int64_t(sizeof(T));
  // Lines that the next layer would find evicted anyway; each is written whole, if pixels (or rows of a plane) start aligned.
  job.stream = sizeof(T) == 4 && output_bytes > kStreamBytes &&
               reinterpret_cast<uintptr_t>(params.output) % (4 * kLanes) == 0 &&
               (g.channels_last ? g.out_channels : job.out_h * job.out_w) % kLanes == 0;
  Run<M, T, E> run{job, executor, panels, chunks};
  run.prefetch =
      g.input.n * g.input.c * g.input.h * g.input.w * int64_t(sizeof(T)) > kPrefetchBytes;
  run.v_bytes = A2 * job.stride_v * int64_t(sizeof(E));
  run.m_bytes = A2 * job.stride_m * 4;
  if (panels < 4 * executor.threads)
    run.splits = int(ceil_div<int64_t>(4 * executor.threads, panels));
  return run(plan);
}

template <int M, typename E>
Status forward_typed(const ForwardParams& params, const Executor& executor) {
  switch (params.geometry.dtype) {
    case DType::f32: return forward_as<M, float, E>(params, executor);
    case DType::bf16: return forward_as<M, bf16, E>(params, executor);
    case DType::f16: return forward_as<M, f16, E>(params, executor);
  }
  return Status::unsupported;
}

template <int M>
Status forward_tile(const ForwardParams& params, const Executor& executor) {
  if (!params.fast) return forward_typed<M, float>(params, executor);
#if defined(__AVX512BF16__)
  return forward_typed<M, bf16_operand>(params, executor);
#else
  return Status::unsupported;
#endif
}

Status run_forward(const ForwardParams& params, const Executor& executor) {
  switch (params.geometry.tile) {
    case 2: return forward_tile<2>(params, executor);
    case 4: return forward_tile<4>(params, executor);
    case 6: return forward_tile<6>(params, executor);
  }
  return Status::unsupported;
}

// --- filter transform ----------------------------------------------------------------------------------------------------------
int64_t packed_size(int64_t out_channels, int64_t in_channels, int tile, bool fast) {
#if defined(__AVX512BF16__)
  const int64_t depth = fast ? Depth<bf16_operand>::floats(in_channels) : in_channels;
#else
  if (fast) return 0;
  const int64_t depth = in_channels;
#endif
  return int64_t(tile + 2) * (tile + 2) * depth * round_up<int64_t>(out_channels, kLanes);
}

// One vector of kernels at a time, in double (two halves): U is made once and every product inherits its error.
constexpr int kHalf = kLanes / 2;
typedef double dvec __attribute__((vector_size(kHalf * 8)));
typedef float half_vec __attribute__((vector_size(kHalf * 4)));

template <int M, typename T>
struct FilterRun {
  static constexpr int A = Transform<M>::A;
  static constexpr int kKernelsPerTask = 16;
  const FilterParams& p;
  int64_t K, C, stride_k, stride_c;
  int64_t next = 0;

  static void body(void* arg) {
    FilterRun& run = *static_cast<FilterRun*>(arg);
    const int64_t vectors = channel_blocks(run.K),
                  parts = ceil_div<int64_t>(run.C, kKernelsPerTask), tasks = vectors * parts;
    for (int64_t task = run.take(); task < tasks; task = run.take()) {
      const int64_t c0 = task % parts * kKernelsPerTask;
      for (int64_t c = c0; c < min(c0 + kKernelsPerTask, run.C); ++c) run.kernels(task / parts, c);
    }
  }

  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }

  // Kernels (k, c) of the k of one vector.
  void kernels(int64_t vector, int64_t c) const {
    const int64_t panel = vector / 2 * kPanel;
    const int width = K - panel > kLanes ? kPanel : kLanes, size = p.spatial ? 3 : A;
    const int64_t first = vector % 2 * kLanes;
    float* out = p.packed + panel * C * A * A + c * width + first;
    const bool turn = p.rotate && p.spatial;
    alignas(64) float g[A * A][kLanes];
    const int lanes = int(min<int64_t>(kLanes, K - vector * kLanes));
    for (int lane = 0; lane < kLanes; ++lane) {
      const T* kernel =
          static_cast<const T*>(p.weight) + (vector * kLanes + lane) * stride_k + c * stride_c;
      for (int i = 0; i < size; ++i)
        for (int j = 0; j < size; ++j)
          g[i * size + j][lane] =
              lane < lanes
                  ? get(kernel + (turn ? 2 - i : i) * p.stride_h + (turn ? 2 - j : j) * p.stride_w)
                  : 0.f;
    }
    if (p.spatial) transform(g);
#if defined(__AVX512BF16__)
    if (p.fast) {
      const int64_t depth = Depth<bf16_operand>::floats(C);
      for (int xi = 0; xi < A * A; ++xi) {
        bf16_operand row[kLanes];
        store(row, load(g[xi]));
        bf16_operand* pairs = reinterpret_cast<bf16_operand*>(p.packed + panel * depth * A * A +
                                                              (xi * depth + c / 2) * width + first);
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
      float* row = out + xi * C * width;
      if (p.stream)
        stream(row, load(g[xi]));
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

template <int M>
Status filter_tile(const FilterParams& p, const Executor& executor) {
  const int64_t K = p.rotate ? p.in_channels : p.out_channels,
                C = p.rotate ? p.out_channels : p.in_channels;
  const int64_t sk = p.rotate ? p.stride_c : p.stride_k, sc = p.rotate ? p.stride_k : p.stride_c;
  auto run = [&](auto typed) {
    executor.run(executor.threads, typed.body, &typed);
    return Status::ok;
  };
  switch (p.dtype) {
    case DType::f32: return run(FilterRun<M, float>{p, K, C, sk, sc});
    case DType::bf16: return run(FilterRun<M, bf16>{p, K, C, sk, sc});
    case DType::f16: return run(FilterRun<M, f16>{p, K, C, sk, sc});
  }
  return Status::unsupported;
}

Status run_filter(const FilterParams& params, const Executor& executor) {
  FilterParams p = params;
  p.stream = !p.fast &&
             packed_size(p.out_channels, p.in_channels, p.tile, false) * 4 > (int64_t(1) << 20) &&
             reinterpret_cast<uintptr_t>(p.packed) % (4 * kLanes) == 0;
  switch (p.tile) {
    case 2: return filter_tile<2>(p, executor);
    case 4: return filter_tile<4>(p, executor);
    case 6: return filter_tile<6>(p, executor);
  }
  return Status::unsupported;
}

}  // namespace

extern const ForwardKernels PYWINO_ISA_NAME(forward_kernels_);
const ForwardKernels PYWINO_ISA_NAME(forward_kernels_) = {run_forward, run_filter, packed_size};

}  // namespace pywino::winograd
