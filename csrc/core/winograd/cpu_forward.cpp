// SPDX-License-Identifier: BSD-3-Clause
// Winograd forward convolution, compiled once per instruction set.
//
// A chunk of T tiles goes through three stages while its data stay in the second-level cache:
//
//   input    V[xi][tile][C]  = B^T d B       xi = 0 .. a*a - 1, lanes = channels
//   product  M[xi][tile][K'] = V[xi] U[xi]   a*a matrix products, K' = a panel of at most 2 vectors of output channels,
//                                            or a few panels
//   output   Y = A^T M A + bias + residual, ReLU
//
// `product` and `output` run panel by panel, so that M is small; where V is large, a few panels at once.
// There are two ways to share the work:
//   private  each thread takes whole chunks: no barrier. For filters that fit in the caches.
//   joint    all threads transform one large chunk, then share its panels: the filter is read once per chunk, not per thread.
//            For many channels, where reading U costs more than everything else, and for few tiles.
//
// Layouts (L = lanes of a vector, MR = tiles of a register block):
//   V  [xi][group of MR tiles][C / L][MR][L]   the product walks it with one pointer and constant displacements
//   U  [panel][xi][C][panel's width]           so does it here; derived from the weight by `filter`
//   M  [xi][panel][tile][panel's width]
#include "../common/amx.h"
#include "../common/lstm.h"
#include "../common/product.h"
#include "../common/scratch.h"
#include "../common/simd.h"
#include "filter.h"
#include "stages.h"
#include "tiles.h"
#include "transforms.h"
#include "winograd.h"

namespace pywino::winograd {
namespace {

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

// --- the convolution ----------------------------------------------------------------------------------------------------------
// Of tiles [t0, t1) to the gates of a convolutional LSTM: [tile][vector of outputs][M * M pixels][lanes].
template <int M, typename T>
void gate_stage(const Job<T>& job, int t0, int t1, int all, int64_t channel, int vectors,
                const float* m, float* gates) {
  const int64_t outputs = job.geometry.out_channels / kLanes, first = channel / kLanes;
  for (int t = t0; t < t1; ++t)
    for (int n = 0; n < vectors; ++n) {
      const vec bias = job.params.bias ? load(job.params.bias + channel + n * kLanes) : zero();
      float* out = gates + (t * outputs + first + n) * M * M * kLanes;
      transform_product<M>(m + m_offset(all, vectors, t - t0, n), job.stride_m, M,
                           [&](int i, vec* y) __attribute__((always_inline)) {
                             PYWINO_UNROLL for (int j = 0; j < M; ++j)
                                 store(out + (i * M + j) * kLanes, y[j] + bias);
                           });
    }
}

// The chunk's next states from its gates, while these are in the second-level cache.
template <int M, typename T>
void cell_stage(const Job<T>& job, int64_t begin, int tiles, const float* gates) {
  const Geometry& g = job.geometry;
  const LstmState& state = *job.params.lstm;
  const int64_t C = g.out_channels / 4, apart = C * M * M;
  for (int t = 0; t < tiles;) {
    const Piece piece = job.grid.piece(begin + t, tiles - t);
    const int rows = outputs_inside(piece.y, job.out_h, g.dil_h, M);
    for (int s = 0; s < piece.count; ++s, ++t) {
      const int64_t x0 = piece.x + piece.offset(s);
      const int columns = outputs_inside(x0, job.out_w, g.dil_w, M);
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j)
          for (int64_t c = 0; c < C; c += kLanes) {
            const float* a = gates + (t * 4 * C + c) * M * M + (i * M + j) * kLanes;
            const int64_t y = piece.y + i * g.dil_h, x = x0 + j * g.dil_w,
                          at = ((piece.image * job.out_h + y) * job.out_w + x) * C + c;
            const LstmGates gate(load(a), load(a + apart), load(a + 2 * apart),
                                 load(a + 3 * apart));
            const vec next = gate.next_cell(state.cell ? load(state.cell + at) : zero()),
                      hidden = gate.hidden(next);
            if (job.stream) {
              stream(state.next_cell + at, next);
              stream(state.hidden + at, hidden);
            } else {
              store(state.next_cell + at, next);
              store(state.hidden + at, hidden);
            }
          }
    }
  }
}

// Where a chunk's outputs go beside the tensor: to the sums of their channels, or to the gates instead of it.
struct Epilogue {
  float *sums, *gates;
};

// Input channels [c0, c1) of the products of panels [panel0, panel1) and groups [g0, g1) of the chunk. Several panels: one position
// xi after the other, so that V[xi] is read from near and not all of V again for each. u: the filter of these panels and channels,
// where positions of a panel lie `pitch` floats apart, or behind one another (0).
template <int M, typename T, typename E>
void product_stage(const Job<T>& job, int64_t first, const Groups& groups, int g0, int g1,
                   int64_t panel0, int64_t panel1, int64_t c0, int64_t c1, const float* u,
                   int64_t pitch, const E* v, float* m, Products<E>& products,
                   InputPrefetch<M, T>& inputs) {
  constexpr int A2 = Transform<M>::A * Transform<M>::A;
  const int64_t depth = Depth<E>::floats(c1 - c0), K = job.geometry.out_channels,
                channel = panel0 * kPanel;
  const int all = int(min(channel_blocks(K - channel), (panel1 - panel0) * 2));  // vectors
  const int t0 = groups.start(g0), t1 = groups.start(g1 - 1) + groups.size(g1 - 1);
  const auto vectors = [&](int64_t panel) { return K - panel * kPanel > kLanes ? 2 : 1; };
  const auto filter = [&](int xi, int64_t panel) {
    return u + (panel - panel0) * kPanel * A2 * depth +
           xi * (pitch ? pitch : vectors(panel) * kLanes * depth);
  };
  // Every other position fetches for the output, the others for the next chunk.
  OutputPrefetch<M, T> outputs;
  if (job.fetch_output)
    outputs = OutputPrefetch<M, T>({&job, channel, min(K - channel, (panel1 - panel0) * kPanel)},
                                   first + t0, first + min(t1, groups.tiles),
                                   A2 / 2 * (panel1 - panel0) * (g1 - g0), depth);
  for (int xi = 0; xi < A2; ++xi)
    for (int64_t panel = panel0; panel < panel1; ++panel) {
      Ahead next_filter = kNothing;
      if (job.fetch_filter) {
        const float* next = panel + 1 < panel1 ? filter(xi, panel + 1)
                            : xi + 1 < A2      ? filter(xi + 1, panel0)
                                               : filter(0, panel1);
        constexpr int kLines = 4 * kPanel * 4 / 64;  // of four channels
        next_filter = {reinterpret_cast<const char*>(next), 64, 1, ceil_div(kLines, g1 - g0)};
      }
      for (int g = g0; g < g1; ++g) {
        const int start = groups.start(g);
        const E* block =
            v + xi * job.stride_v + start * job.lines * Depth<E>::kLine + c0 * groups.size(g);
        products.get(groups.size(g), vectors(panel))(
            depth, reinterpret_cast<const float*>(block), filter(xi, panel),
            m + xi * job.stride_m + m_offset(t1 - t0, all, start - t0, int(panel - panel0) * 2),
            job.fetch_filter                  ? next_filter
            : job.fetch_output && xi % 2 == 1 ? outputs.next()
                                              : inputs.next(),
            c0 > 0);
        next_filter.next += depth / 4 * next_filter.rate * next_filter.pitch;
      }
    }
}

// The outputs of these panels and groups, from all their products.
template <int M, typename T>
void panel_output(const Job<T>& job, int64_t first, const Groups& groups, int g0, int g1,
                  int64_t panel0, int64_t panel1, const float* m, const Epilogue& epilogue) {
  const int64_t channel = panel0 * kPanel;
  const int all =
      int(min(channel_blocks(job.geometry.out_channels - channel), (panel1 - panel0) * 2));
  const int t0 = groups.start(g0), t1 = groups.start(g1 - 1) + groups.size(g1 - 1);
  const int end = min(t1, groups.tiles);
  if (epilogue.gates)
    gate_stage<M>(job, t0, end, t1 - t0, channel, all, m, epilogue.gates);
  else
    output_stage<M>(job, first, t0, end, t1 - t0, channel, all, m, epilogue.sums);
}

// How the tiles are cut and who works on them.
struct Plan {
  int chunk;   // most tiles of a chunk
  int panels;  // of a product
  bool joint;
  bool fetch_filter;
};

template <typename E>
Plan make_plan(const Geometry& g, int64_t tiles, int threads, bool lstm) {
  using D = Depth<E>;
  const int64_t a2 = int64_t(g.tile + 2) * (g.tile + 2), K = g.out_channels,
                filter_bytes = a2 * g.input.c * K * int64_t(sizeof(E)),
                v_bytes = a2 * D::lines(g.input.c) * D::kLine * int64_t(sizeof(E));  // of a tile
  const int rows = Products<E>::rows(K);
  // Groups of one size take no more memory than the chunk's tiles, where these are a multiple of their number.
  const auto whole = [&](int64_t chunk) {
    return int(Products<E>::kEven ? chunk - chunk % ceil_div<int64_t>(chunk, rows) : chunk);
  };
  const auto m_bytes = [&](int panels) { return a2 * min<int64_t>(panels * kPanel, K) * 4; };
  // A chunk is some register blocks of tiles. A filter that leaves room for V and M in the second-level cache stays there beside
  // two blocks, or one. A larger one each thread reads once per chunk, from afar: two blocks, whose V and M stay near; more where
  // they would not anyway (256 channels), and where a block has few registers. Fewer tiles than that, and reading the filter is
  // what counts. Beside a small cache a block is 6 tiles: up to six, three eighths of it, since each position of a chunk costs
  // instructions of its own.
  const bool large = filter_bytes > (int64_t(1) << 20) && !lstm, deep = g.input.c >= 256;
  const bool two =
      kSmallCache || lstm || filter_bytes + 2 * rows * (v_bytes + m_bytes(1)) <= kCacheBytes;
  const int64_t fit = kCacheBytes * 3 / 8 / (rows * (v_bytes + m_bytes(1)));
  const int few = kSmallCache && !lstm ? int(max<int64_t>(2, min<int64_t>(fit, 6))) : two ? 2 : 1;
  const int blocks = !large ? few : kSmallCache ? (deep ? 6 : 4) : (deep ? 4 : 2);
  const auto chunk = [&](int panels) {
    const int64_t bytes = v_bytes + m_bytes(panels) + (lstm ? g.tile * g.tile * K * 4 : 0);
    return whole(min(max<int64_t>(1, kScratchPerThread / bytes), int64_t(blocks) * rows));
  };
  Plan p{chunk(1), 1, large && tiles < int64_t(threads) * 2 * rows, false};
  p.fetch_filter = p.joint || (large && p.chunk * v_bytes > kNearBytes);
  if (p.joint) {
    // The threads share V, but each has an M of the whole chunk.
    const int64_t shared = v_bytes / threads + m_bytes(1);
    p.chunk = whole(max<int64_t>(1, min<int64_t>(kScratchPerThread / shared, 8 * rows)));
  } else if (p.fetch_filter) {
    // As many panels at once as do not cost another pass over the filter: their M takes the place of tiles.
    const auto passes = [&](int chunk) { return ceil_div(tiles, int64_t(chunk) * threads); };
    for (int panels = 2; panels <= kMostPanels && passes(chunk(panels)) == passes(p.chunk);
         ++panels)
      p.panels = panels;
    p.chunk = chunk(p.panels);
  }
  return p;
}

// Input channels of which a thread makes a panel's filter at once, where it is used once: as many as a product sums, few enough for the
// second-level cache.
template <typename E>
constexpr int64_t kOwnChannels = kSumBlock * Depth<E>::kPerFloat;

// Of the filter of one panel.
template <typename E>
int64_t panel_bytes(const Geometry& g) {
  return int64_t(g.tile + 2) * (g.tile + 2) * Depth<E>::floats(g.input.c) * kPanel * 4;
}

// Whether threads may transform the filter panel by panel, each part just before its product: where every panel is used once.
template <typename E>
bool takes_weight_as(const Geometry& g, int threads) {
  if (g.input.n * g.out_h() * g.out_w() * g.out_channels * g.input.c == 0) return false;
  const int64_t tiles = Grid(g).tiles, panels = ceil_div<int64_t>(g.out_channels, kPanel);
  const Plan plan = make_plan<E>(g, tiles, threads, false);
  return plan.joint && tiles <= plan.chunk && panels >= 4 * threads;
}

template <int M, typename T, typename E>
struct Run {
  static constexpr int A2 = Transform<M>::A * Transform<M>::A;
  Job<T> job;
  Executor executor;
  int64_t panels;
  int at_once;  // panels of a product
  int64_t chunks;
  int64_t next = 0;  // work that is not taken yet
  bool failed = false;
  bool prefetch = false;
  float* sums =
      nullptr;  // K floats a chunk, where means are asked for: no sum depends on who does which chunk
  // joint:
  int64_t first = 0;
  int tiles = 0, splits = 1;
  E* shared_v = nullptr;
  int64_t v_bytes = 0, m_bytes = 0, gates_bytes = 0;
  int64_t u_bytes = 0;  // of a panel's part, where each thread makes its own

  const float* filter_of(int64_t panel) const {
    return job.params.filter + panel * panel_bytes<E>(job.geometry) / int64_t(sizeof(float));
  }

  Groups groups(int tiles) const { return Groups(tiles, job.rows, Products<E>::kEven); }

  void chunk_bounds(int64_t chunk, int64_t* begin, int64_t* end) const {
    const int64_t base = job.grid.tiles / chunks, larger = job.grid.tiles % chunks;
    *begin = chunk * base + min(chunk, larger);
    *end = *begin + base + (chunk < larger);
  }

  static void private_body(void* arg) {
    Run& run = *static_cast<Run*>(arg);
    const Job<T>& job = run.job;
    E* v = static_cast<E*>(scratch(run.v_bytes + run.m_bytes + run.gates_bytes, ScratchSlot::own));
    float* m = reinterpret_cast<float*>(reinterpret_cast<char*>(v) + run.v_bytes);
    float* gates = run.gates_bytes
                       ? reinterpret_cast<float*>(reinterpret_cast<char*>(m) + run.m_bytes)
                       : nullptr;
    if (!v) {
      run.failed = true;
      return;
    }
    Products<E> products;
    for (int64_t chunk = take(&run.next); chunk < run.chunks; chunk = take(&run.next)) {
      int64_t begin, end, next_begin, next_end;
      run.chunk_bounds(chunk, &begin, &end);
      InputPrefetch<M, T> ahead;
      // The threads take turns, so this one's next chunk is most likely `threads` further on.
      if (const int64_t next = chunk + run.executor.threads; run.prefetch && next < run.chunks) {
        run.chunk_bounds(next, &next_begin, &next_end);
        const int64_t calls = run.panels * A2 * run.groups(int(end - begin)).count;
        ahead =
            InputPrefetch<M, T>({&job}, next_begin, next_end, job.fetch_output ? calls / 2 : calls,
                                Depth<E>::floats(job.geometry.input.c));
      }
      const int tiles = int(end - begin);
      const Groups groups = run.groups(tiles);
      const int64_t K = job.geometry.out_channels;
      const Epilogue epilogue{run.sums ? run.sums + chunk * K : nullptr, gates};
      if (epilogue.sums) __builtin_memset(epilogue.sums, 0, K * sizeof(float));
      input_stage<M>(job, begin, 0, tiles, groups, 0, job.blocks, v);
      for (int64_t panel = 0; panel < run.panels; panel += run.at_once) {
        const int64_t end = min(panel + run.at_once, run.panels);
        product_stage<M>(job, begin, groups, 0, groups.count, panel, end, 0, job.geometry.input.c,
                         run.filter_of(panel), 0, v, m, products, ahead);
        panel_output<M>(job, begin, groups, 0, groups.count, panel, end, m, epilogue);
      }
      if (gates) cell_stage<M>(job, begin, tiles, gates);
    }
    products.end();
  }

  static constexpr int kTilesPerTask = 4, kBlocksPerTask = 8;

  static void joint_input(void* arg) {
    Run& run = *static_cast<Run*>(arg);
    const Groups groups = run.groups(run.tiles);
    const int64_t parts = ceil_div<int64_t>(run.job.blocks, kBlocksPerTask),
                  tasks = parts * ceil_div(run.tiles, kTilesPerTask);
    for (int64_t task = take(&run.next); task < tasks; task = take(&run.next)) {
      const int t0 = int(task / parts) * kTilesPerTask;
      const int64_t b0 = task % parts * kBlocksPerTask;
      input_stage<M>(run.job, run.first, t0, min(t0 + kTilesPerTask, run.tiles), groups, b0,
                     min(b0 + kBlocksPerTask, run.job.blocks), run.shared_v);
    }
  }

  static void joint_panels(void* arg) {
    Run& run = *static_cast<Run*>(arg);
    const Groups groups = run.groups(run.tiles);
    float* m = static_cast<float*>(scratch(run.m_bytes + run.u_bytes, ScratchSlot::own));
    if (!m) {
      run.failed = true;
      return;
    }
    float* own = reinterpret_cast<float*>(reinterpret_cast<char*>(m) + run.m_bytes);
    const int splits = min(run.splits, groups.count);
    InputPrefetch<M, T> nothing;
    Products<E> products;
    for (int64_t task = take(&run.next); task < run.panels * splits; task = take(&run.next)) {
      const int part = int(task % splits);
      const int g0 = groups.count * part / splits, g1 = groups.count * (part + 1) / splits;
      const int64_t panel = task / splits;
      const auto product = [&](int64_t c0, int64_t c1, const float* u, int64_t pitch) {
        product_stage<M>(run.job, run.first, groups, g0, g1, panel, panel + 1, c0, c1, u, pitch,
                         run.shared_v, m, products, nothing);
      };
      const int64_t C = run.job.geometry.input.c;
      if (run.u_bytes) {
        const FilterRun<M, T> filter(*run.job.params.weight);
        const int64_t pitch = run.u_bytes / int64_t(sizeof(float)) / A2;
        for (int64_t c0 = 0; c0 < C; c0 += kOwnChannels<E>) {
          const int64_t c1 = min(c0 + kOwnChannels<E>, C);
          filter.kernels(panel, c0, c1, own, pitch);
          product(c0, c1, own, pitch);
        }
      } else {
        product(0, C, run.filter_of(panel), 0);
      }
      panel_output<M>(run.job, run.first, groups, g0, g1, panel, panel + 1, m, Epilogue{});
    }
    products.end();
  }

  // Outside the mask's tiles.
  static void clear(void* arg) {
    Run& run = *static_cast<Run*>(arg);
    const Job<T>& job = run.job;
    constexpr int64_t kSlice = int64_t(1) << 16;
    T* output = static_cast<T*>(job.params.output);
    const int64_t all = job.geometry.input.n * job.geometry.out_channels * job.out_h * job.out_w;
    for (int64_t at = take(&run.next) * kSlice; at < all; at = take(&run.next) * kSlice) {
      const int64_t end = min(at + kSlice, all);
      if (!job.stream)
        __builtin_memset(output + at, 0, (end - at) * sizeof(T));
      else
        for (; at < end; at += kLanes) stream(reinterpret_cast<float*>(output + at), zero());
    }
  }

  Status operator()(const Plan& plan) {
    if (job.params.mask) executor.run(executor.threads, clear, this);
    next = 0;
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
  Source<T> first = input_source<T>(g, params.input);
  first.channels -= params.second_channels;
  first.gate = params.gate;
  first.mask = params.mask ? params.mask->pixels : nullptr;
  Source<T> second = first;
  second.data = static_cast<const T*>(params.second);
  second.channels = params.second_channels;
  second.gate = params.gate ? params.gate + first.channels : nullptr;
  Job<T> job{params, g, {first, second},           Grid(g, params.mask),       g.out_h(), g.out_w(),
             0,      0, channel_blocks(g.input.c), Depth<E>::lines(g.input.c), 0,         false};
  if (job.grid.tiles == 0 || g.out_channels == 0) return Status::ok;
  job.rows = Products<E>::rows(g.out_channels);
  Plan plan = make_plan<E>(g, job.grid.tiles, executor.threads, params.lstm);
  plan.joint = plan.joint && !params.mean;
  const int64_t panels = ceil_div<int64_t>(g.out_channels, kPanel);
  int64_t chunks = ceil_div<int64_t>(job.grid.tiles, plan.chunk);
  // A whole number of chunks for each thread, while there are few.
  if (!plan.joint && chunks < 8 * executor.threads)
    chunks = min<int64_t>(job.grid.tiles, round_up<int64_t>(chunks, executor.threads));
  const int64_t chunk = ceil_div(job.grid.tiles, chunks);
  const Groups groups(int(chunk), job.rows, Products<E>::kEven);
  const int64_t rows = groups.start(groups.count);  // of V and M
  job.stride_v = padded_stride<E>(rows * job.lines * Depth<E>::kLine);
  job.stride_m = padded_stride(
      rows * min<int64_t>(plan.panels * kPanel, round_up<int64_t>(g.out_channels, kLanes)));
  job.fetch_filter = plan.fetch_filter;
  // Each of the two states has a quarter of the gates' channels.
  const int64_t channels = params.lstm ? g.out_channels / 4 : g.out_channels;
  job.stream = sizeof(T) == 4 && (params.lstm ? streams(g, channels, params.lstm->hidden) &&
                                                    streams(g, channels, params.lstm->next_cell)
                                              : streams(g, channels, params.output));
  job.fetch_output =
      !g.channels_last && !job.stream && !plan.fetch_filter &&
      g.input.n * g.out_channels * g.out_h() * g.out_w() * int64_t(sizeof(T)) > kPrefetchBytes;
  Run<M, T, E> run{job, executor, panels, plan.panels, chunks};
  run.prefetch =
      g.input.n * g.input.c * g.input.h * g.input.w * int64_t(sizeof(T)) > kPrefetchBytes;
  run.v_bytes = A2 * job.stride_v * int64_t(sizeof(E));
  run.m_bytes = A2 * job.stride_m * 4;
  run.gates_bytes = params.lstm ? chunk * M * M * g.out_channels * 4 : 0;
  if (params.weight)
    run.u_bytes = A2 * padded_stride(kSumBlock * kPanel) * 4;
  else if (panels < 4 * executor.threads)
    run.splits = int(ceil_div<int64_t>(4 * executor.threads, panels));
  if (!params.mean) return run(plan);
  run.sums =
      static_cast<float*>(scratch(chunks * g.out_channels * sizeof(float), ScratchSlot::shared));
  if (!run.sums) return Status::out_of_memory;
  const Status status = run(plan);
  for (int64_t k = 0; k < g.out_channels; ++k) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      sum += double(run.sums[chunk * g.out_channels + k]);
    params.mean[k] = float(sum / double(job.out_h * job.out_w));
  }
  return status;
}

template <typename E>
Status forward_in(const ForwardParams& params, const Executor& executor) {
  return with_tile(params.geometry.tile, [&](auto tile) {
    return with_dtype(params.geometry.dtype, [&](auto element) {
      return forward_as<tile.m, decltype(element), E>(params, executor);
    });
  });
}

bool run_takes_weight(const Geometry& g, bool fast, int threads) {
#if defined(__AVX512BF16__)
  if (fast) return takes_weight_as<bf16_operand>(g, threads);
#endif
  return !fast && takes_weight_as<float>(g, threads);
}

Status run_forward(const ForwardParams& params, const Executor& executor) {
  if (!params.fast) return forward_in<float>(params, executor);
#if defined(__AVX512BF16__)
  return forward_in<bf16_operand>(params, executor);
#else
  return Status::unsupported;
#endif
}

Status run_filter(const FilterParams& params, const Executor& executor) {
  FilterParams p = params;
  p.stream = !p.fast &&
             packed_size(p.out_channels, p.in_channels, p.tile, false) * 4 > (int64_t(1) << 20) &&
             reinterpret_cast<uintptr_t>(p.packed) % (4 * kVectorsOfLine * kLanes) == 0;
  return with_tile(p.tile, [&](auto tile) {
    return with_dtype(p.dtype, [&](auto element) {
      FilterRun<tile.m, decltype(element)> run(p);
      executor.run(executor.threads, run.body, &run);
      return Status::ok;
    });
  });
}

}  // namespace

extern const ForwardKernels PYWINO_ISA_NAME(forward_kernels_);
const ForwardKernels PYWINO_ISA_NAME(forward_kernels_) = {run_forward, run_takes_weight, run_filter,
                                                          packed_size};

}  // namespace pywino::winograd
