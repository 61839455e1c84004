// SPDX-License-Identifier: BSD-3-Clause
// Masked convolution as one matrix product, compiled once per instruction set.
//
// The rows of the product are the pixels of the mask, its depth the taps and channels:
//
//   V[p][(i, j), c] = X[c, q] where q = p + (i d - pad, j d - pad) is a pixel of the mask, else 0
//   Y[p][k]         = sum over (i, j), c of V U[(i, j), c][k]  + b[k]
//
// V is gathered for a few groups of pixels at a time, so that it stays near the core. What lies outside the mask is neither
// read nor multiplied.
//
// Layouts (L = lanes of a vector, MR = pixels of a register block, D = kernel_h kernel_w C):
//   V  [group of MR pixels][D / L][MR][L]
//   U  [panel][D][panel's width]              from `pack`
#include "../common/product.h"
#include "../common/scratch.h"
#include "../common/simd.h"
#include "masked_conv.h"

namespace pywino::masked_conv {
namespace {

constexpr int64_t kSlice = int64_t(1) << 20;  // bytes of an NCHW output that are cleared at a time
constexpr int kRowsPerTask = 256;             // pixels whose channels are gathered at a time (NCHW)

template <typename T>
struct Run {
  const ForwardParams& params;
  const Geometry& g;
  const Pixels& pixels;
  int64_t depth, panels, chunk;  // chunk: most pixels of a task
  int rows;                      // most pixels of a register block
  bool stream_zeros;
  int64_t next = 0;
  bool failed = false;

  explicit Run(const ForwardParams& p, int threads)
      : params(p),
        g(p.geometry),
        pixels(p.pixels),
        depth(g.kernel_h * g.kernel_w * g.c),
        panels(ceil_div<int64_t>(g.out_channels, kPanel)),
        rows(g.out_channels > kLanes ? kRows2 : kRows1) {
    // Each chunk reads all of U: one that is larger than the caches is read half as often.
    const int64_t groups = depth * g.out_channels * 4 > (int64_t(1) << 20) ? 4 : 2;
    const int64_t fits = kScratchPerThread / (round_up<int64_t>(depth, kLanes) * 4);
    chunk = min(max<int64_t>(1, fits), groups * rows);
    chunk = min(chunk, max<int64_t>(1, ceil_div<int64_t>(pixels.count, threads)));
    stream_zeros = sizeof(T) == 4 && output_bytes() > kStreamBytes &&
                   g.out_channels % kLanes == 0 &&
                   reinterpret_cast<uintptr_t>(p.output) % (4 * kLanes) == 0;
  }

  int64_t line_floats() const { return round_up<int64_t>(depth, kLanes); }

  // --- 1: zeros ---
  // NCHW: everywhere, before anything is written.
  static void clear(void* arg) {
    Run& run = *static_cast<Run*>(arg);
    const int64_t bytes = run.output_bytes();
    for (int64_t at = take(&run.next) * kSlice; at < bytes; at = take(&run.next) * kSlice)
      __builtin_memset(static_cast<char*>(run.params.output) + at, 0, min(kSlice, bytes - at));
  }

  // channels_last: between the pixels [a0, a1) of the list, behind them up to the next, and before the first of all.
  void clear_between(int64_t a0, int64_t a1) const {
    const int64_t total = g.n * g.h * g.w;
    int64_t from = a0 == 0 ? 0 : pixels.list[a0];
    for (int64_t a = a0; a <= a1; ++a) {
      const int64_t to = a < pixels.count ? pixels.list[a] : total;
      if (to > from) clear_pixels(from, to);
      from = to + 1;
    }
  }

  void clear_pixels(int64_t from, int64_t to) const {
    T* out = static_cast<T*>(params.output) + from * g.out_channels;
    const int64_t numbers = (to - from) * g.out_channels;
    if (stream_zeros)
      for (int64_t i = 0; i < numbers; i += kLanes)
        stream(reinterpret_cast<float*>(out) + i, zero());
    else
      __builtin_memset(out, 0, numbers * sizeof(T));
  }

  int64_t output_bytes() const { return g.n * g.out_channels * g.h * g.w * int64_t(sizeof(T)); }

  // --- 2, NCHW: the channels of each pixel of the mask, side by side ---
  static void gather_rows(void* arg) {
    Run& run = *static_cast<Run*>(arg);
    const int64_t C = run.g.c, plane = run.g.h * run.g.w;
    const T* input = static_cast<const T*>(run.params.input);
    for (int64_t a0 = take(&run.next) * kRowsPerTask; a0 < run.pixels.count;
         a0 = take(&run.next) * kRowsPerTask) {
      const int64_t a1 = min(a0 + kRowsPerTask, run.pixels.count);
      for (int64_t c0 = 0; c0 < C; c0 += kLanes) {
        const int lanes = int(min<int64_t>(kLanes, C - c0));
        for (int64_t a = a0; a < a1; ++a) {
          const int64_t q = run.pixels.list[a], image = q / plane;
          const T* in = input + (image * C + c0) * plane + (q - image * plane);
          float* row = run.params.rows + a * C + c0;
          for (int c = 0; c < lanes; ++c) row[c] = get(in + c * plane);
        }
      }
    }
  }

  // --- 3: the product ---
  // V of `size` pixels; source(q) has the channels of pixel q.
  template <typename Source>
  void gather(const int32_t* list, int size, const Source& source, float* v) const {
    const int64_t C = g.c, plane = g.h * g.w;
    for (int r = 0; r < size; ++r) {
      const int64_t p = list[r];
      const uint32_t in_image = uint32_t(p) % uint32_t(plane);
      const int64_t y = in_image / uint32_t(g.w), x = in_image % uint32_t(g.w);
      int64_t k = 0;
      for (int64_t i = 0; i < g.kernel_h; ++i) {
        const int64_t dy = i * g.dil_h - g.pad_h;
        const bool row_inside = y + dy >= 0 && y + dy < g.h;
        for (int64_t j = 0; j < g.kernel_w; ++j, k += C) {
          const int64_t dx = j * g.dil_w - g.pad_w, q = p + dy * g.w + dx;
          const bool inside = row_inside && x + dx >= 0 && x + dx < g.w && pixels.place[q] >= 0;
          if (C % kLanes == 0) {
            float* out = v + (k * size + r * kLanes);
            if (inside) {
              const auto* in = source(q);
              for (int64_t c = 0; c < C; c += kLanes) store(out + c * size, load(in + c));
            } else {
              for (int64_t c = 0; c < C; c += kLanes) store(out + c * size, zero());
            }
          } else {
            const auto* in = inside ? source(q) : nullptr;
            for (int64_t c = 0; c < C; ++c) {
              const int64_t at = k + c;
              v[at / kLanes * kLanes * size + r * kLanes + at % kLanes] = in ? get(in + c) : 0.f;
            }
          }
        }
      }
    }
  }

  // Y of `size` pixels and the panel that starts at `channel`.
  void write(const int32_t* list, int size, int64_t channel, int vectors, const float* m) const {
    const int64_t K = g.out_channels, plane = g.h * g.w;
    T* output = static_cast<T*>(params.output);
    for (int n = 0; n < vectors; ++n) {
      const int64_t k0 = channel + n * kLanes;
      const int lanes = int(min<int64_t>(kLanes, K - k0));
      const vec bias = params.bias ? load_part(params.bias + k0, 0, lanes) : zero();
      for (int r = 0; r < size; ++r) {
        const int64_t p = list[r];
        const vec y = load(m + (r * vectors + n) * kLanes) + bias;
        if (g.channels_last) {
          if (lanes == kLanes)
            store(output + p * K + k0, y);
          else
            store_part(output + p * K + k0, y, 0, lanes);
        } else {
          const int64_t image = p / plane;
          T* to = output + (image * K + k0) * plane + (p - image * plane);
          for (int lane = 0; lane < lanes; ++lane) put(to + lane * plane, y[lane]);
        }
      }
    }
  }

  static void multiply_chunks(void* arg) {
    Run& run = *static_cast<Run*>(arg);
    float* v = static_cast<float*>(
        scratch(run.chunk * run.line_floats() * sizeof(float), ScratchSlot::own));
    if (!v) {
      run.failed = true;
      return;
    }
    alignas(64) float m[kRows1 * kPanel];
    const int64_t C = run.g.c, count = run.pixels.count;
    for (int64_t a0 = take(&run.next) * run.chunk; a0 < count; a0 = take(&run.next) * run.chunk) {
      const int64_t a1 = min(a0 + run.chunk, count);
      if (run.g.channels_last) run.clear_between(a0, a1);
      for (int64_t a = a0; a < a1; a += run.rows) {
        const int size = int(min<int64_t>(run.rows, a1 - a));
        float* group = v + (a - a0) * run.line_floats();
        if (run.g.channels_last)
          run.gather(
              run.pixels.list + a, size,
              [&](int64_t q) { return static_cast<const T*>(run.params.input) + q * C; }, group);
        else
          run.gather(
              run.pixels.list + a, size,
              [&](int64_t q) -> const float* { return run.params.rows + run.pixels.place[q] * C; },
              group);
      }
      for (int64_t panel = 0; panel < run.panels; ++panel) {
        const int64_t channel = panel * kPanel;
        const int vectors = run.g.out_channels - channel > kLanes ? 2 : 1;
        const Multiply* table = multiplies<float>(vectors);
        const float* u = run.params.filter + channel * run.depth;
        for (int64_t a = a0; a < a1; a += run.rows) {
          const int size = int(min<int64_t>(run.rows, a1 - a));
          table[size - 1](run.depth, v + (a - a0) * run.line_floats(), u, m, kNothing, false);
          run.write(run.pixels.list + a, size, channel, vectors, m);
        }
      }
    }
  }

  Status operator()(const Executor& executor) {
    auto each = [&](void (*body)(void*)) {
      next = 0;
      executor.run(executor.threads, body, this);
    };
    const bool all = pixels.count == g.n * g.h * g.w, none = pixels.count == 0;
    if (!all && (none || !g.channels_last)) each(clear);
    if (none) return Status::ok;
    if (!g.channels_last) each(gather_rows);
    each(multiply_chunks);
    return failed ? Status::out_of_memory : Status::ok;
  }
};

Status run_forward(const ForwardParams& params, const Executor& executor) {
  return with_dtype(params.geometry.dtype, [&](auto element) {
    return Run<decltype(element)>(params, executor.threads)(executor);
  });
}

// --- the filter ---
int64_t packed_size(const FilterParams& p) {
  return round_up<int64_t>(p.out_channels, kLanes) * p.in_channels * p.kernel_h * p.kernel_w;
}

template <typename T>
void pack_typed(const FilterParams& p, float* packed) {
  for (int64_t channel = 0; channel < p.out_channels; channel += kPanel) {
    const int width = p.out_channels - channel > kLanes ? kPanel : kLanes;
    for (int64_t i = 0; i < p.kernel_h; ++i)
      for (int64_t j = 0; j < p.kernel_w; ++j)
        for (int64_t c = 0; c < p.in_channels; ++c, packed += width) {
          const T* w =
              static_cast<const T*>(p.weight) + c * p.stride_c + i * p.stride_h + j * p.stride_w;
          for (int64_t k = 0; k < width; ++k)
            packed[k] = channel + k < p.out_channels ? get(w + (channel + k) * p.stride_k) : 0.f;
        }
  }
}

void pack_filter(const FilterParams& p, float* packed) {
  with_dtype(p.dtype, [&](auto element) { pack_typed<decltype(element)>(p, packed); });
}

}  // namespace

extern const Kernels PYWINO_ISA_NAME(kernels_);
const Kernels PYWINO_ISA_NAME(kernels_) = {run_forward, packed_size, pack_filter};

}  // namespace pywino::masked_conv
