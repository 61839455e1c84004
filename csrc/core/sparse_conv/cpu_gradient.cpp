// SPDX-License-Identifier: BSD-3-Clause
// The gradient of the weights that are kept, compiled once per instruction set: of each vector of output channels and input
// channel whose kernels are not all zero,
//
//   dW[k, c, i, j] = sum over pixels dY[k, y, x] X[c, y s + i d - p, x s + j d - p]
//
// The pixels are cut into slabs, rows of output and as many images as fit; for each of them
//
//   load     threads share the channels: X into planes P[c][image][row][column] with its zero padding, dY into vectors
//            D[vector of k][image][row][column]
//   product  threads share the sums: of each vector of k up to kMostRows rows (c, i) of taps, with a vector of sums for each
//            (i, j); one load of D serves them all
//
// Sums belong to one thread each, so their order is the same for any number of threads.
#include "../common/scratch.h"
#include "../common/simd.h"
#include "sparse_conv.h"

namespace pywino::sparse_conv {
namespace {

constexpr int kMostRows = 8, kMostTaps = 4;  // of taps, and in one of them, in registers at once
constexpr int kSums = kRegisters == 32 ? 24 : 12;  // vectors of sums in registers
constexpr int64_t kCut = 128;                      // most terms of a partial sum
constexpr int64_t kSlabBytes = int64_t(2) << 20;   // of P and D

// Of R rows of W taps: sums[r][w][lane] += D[x][lane] P_r[x step + w apart] over `rows` rows of `width` pixels.
template <int R, int W>
void multiply(const float* const* p, int64_t p_row, int64_t step, int64_t apart, const float* d,
              int64_t rows, int64_t width, float* sums) {
  vec sum[R][W];
  PYWINO_UNROLL for (int r = 0; r < R; ++r) PYWINO_UNROLL for (int w = 0; w < W; ++w) sum[r][w] =
      zero();
  const float* row[R];
  PYWINO_UNROLL for (int r = 0; r < R; ++r) row[r] = p[r];
  for (int64_t y = 0; y < rows; ++y) {
    int64_t at = 0;
    for (int64_t x = 0; x < width; ++x, d += kLanes, at += step) {
      const vec v = load(d);
      PYWINO_UNROLL for (int r = 0; r < R; ++r) PYWINO_UNROLL for (int w = 0; w < W; ++w)
          sum[r][w] += row[r][at + w * apart] * v;
    }
    PYWINO_UNROLL for (int r = 0; r < R; ++r) row[r] += p_row;
  }
  PYWINO_UNROLL for (int r = 0; r < R; ++r) PYWINO_UNROLL for (int w = 0; w < W; ++w) {
    float* to = sums + (r * W + w) * kLanes;
    store(to, load(to) + sum[r][w]);
  }
}

using Multiply = void (*)(const float* const*, int64_t, int64_t, int64_t, const float*, int64_t,
                          int64_t, float*);
template <int R, int W>
constexpr Multiply multiply_of() {
  if constexpr (R * W <= kSums)
    return multiply<R, W>;
  else
    return nullptr;
}
template <int R>
struct OfRows {
  static constexpr Multiply table[] = {multiply_of<R, 1>(), multiply_of<R, 2>(),
                                       multiply_of<R, 3>(), multiply_of<R, 4>()};
};
constexpr const Multiply* kMultiply[] = {OfRows<1>::table, OfRows<2>::table, OfRows<3>::table,
                                         OfRows<4>::table, OfRows<5>::table, OfRows<6>::table,
                                         OfRows<7>::table, OfRows<8>::table};

template <typename T>
struct Gradient {
  const GradientParams& params;
  const Geometry& g;
  const int threads;
  int64_t out_h, out_w, units;      // vectors of output channels
  int64_t images, rows, slabs_h;    // of a slab: images, rows of output; slabs of an image
  int64_t pitch, image_p, plane;    // floats of P: a row, an image, a channel
  int64_t image_d, unit_d;          // floats of D: an image, a vector of k
  int64_t taps, parts, most_rows;   // taps of a kernel; parts of its rows; rows at once
  const int32_t* starts = nullptr;  // of each unit in `kept`, and the number of all
  const int32_t* kept = nullptr;    // input channels
  float *p = nullptr, *d = nullptr, *sums = nullptr;
  int64_t image0 = 0, y0 = 0;  // of the slab
  int64_t count_images = 0, count_rows = 0;
  int64_t next = 0;

  Gradient(const GradientParams& given, int t)
      : params(given), g(given.geometry), threads(t), out_h(g.out_h()), out_w(g.out_w()) {
    units = ceil_div<int64_t>(g.out_channels, kLanes);
    taps = g.kernel_h * g.kernel_w;
    parts = ceil_div<int64_t>(g.kernel_w, kMostTaps);
    most_rows = min<int64_t>(kMostRows, kSums / min<int64_t>(g.kernel_w, kMostTaps));
    // Vectors are stored beyond the last column that is needed.
    pitch = round_up<int64_t>((out_w - 1) * g.stride_w + (g.kernel_w - 1) * g.dil_w + 1, kLanes);
    rows = out_h;
    images = 1;
    while (rows > 1 && slab_floats() * 4 > kSlabBytes) rows = ceil_div<int64_t>(rows, 2);
    if (rows == out_h) {
      while (images < g.n && slab_floats() * 8 <= kSlabBytes) images *= 2;
      images = min(images, g.n);
    }
    slabs_h = ceil_div(out_h, rows);
    set_sizes();
  }

  void set_sizes() {
    image_p = ((rows - 1) * g.stride_h + (g.kernel_h - 1) * g.dil_h + 1) * pitch;
    plane = images * image_p;
    image_d = rows * out_w * kLanes;
    unit_d = images * image_d;
  }
  int64_t slab_floats() {
    set_sizes();
    return round_up<int64_t>(g.c, kLanes) * plane + units * unit_d;
  }

  // --- which kernels ---
  const T* kernel(int64_t k, int64_t c) const {
    return static_cast<const T*>(params.weight) + (k * g.c + c) * taps;
  }
  // The lists; how many there are in all. The weight is read as it lies.
  int64_t list(int32_t* first, int32_t* channels) const {
    int64_t count = 0;
    for (int64_t unit = 0; unit < units; ++unit) {
      first[unit] = int32_t(count);
      int32_t* is_kept = channels + count;  // of each input channel, where the list will be
      std::memset(is_kept, 0, g.c * sizeof(int32_t));
      for (int64_t k = unit * kLanes; k < min((unit + 1) * kLanes, g.out_channels); ++k)
        for (int64_t c = 0; c < g.c; ++c)
          for (int64_t t = 0; t < taps; ++t) is_kept[c] |= get(kernel(k, c) + t) != 0;
      for (int64_t c = 0; c < g.c; ++c)
        if (is_kept[c]) channels[count++] = int32_t(c);
    }
    first[units] = int32_t(count);
    return count;
  }

  // --- load ---
  // L numbers of a row of planes from column x on, zero outside of the image.
  // A vector of channels of the slab: P[c .. c + L].
  void load_input(int64_t c) {
    const int lanes = int(min<int64_t>(kLanes, g.c - c));
    const int64_t input_rows = (count_rows - 1) * g.stride_h + (g.kernel_h - 1) * g.dil_h + 1;
    for (int64_t n = 0; n < count_images; ++n)
      for (int64_t row = 0; row < input_rows; ++row) {
        const int64_t y = y0 * g.stride_h - g.pad_h + row, image = image0 + n;
        const bool inside = y >= 0 && y < g.h;
        float* to = p + c * plane + n * image_p + row * pitch;
        const T* in = static_cast<const T*>(params.input);
        for (int64_t q = 0; q < pitch; q += kLanes) {
          const int64_t x = q - g.pad_w;
          vec r[kLanes];
          if (!inside) {
            for (int i = 0; i < lanes; ++i) r[i] = zero();
          } else if (g.channels_last) {
            for (int i = 0; i < kLanes; ++i)
              r[i] = x + i >= 0 && x + i < g.w
                         ? load_part(in + ((image * g.h + y) * g.w + x + i) * g.c + c, 0, lanes)
                         : zero();
            transpose(r);
          } else {
            for (int i = 0; i < lanes; ++i)
              r[i] = load_columns(in + ((image * g.c + c + i) * g.h + y) * g.w, x, g.w);
          }
          for (int i = 0; i < lanes; ++i) store(to + i * plane + q, r[i]);
        }
      }
  }

  // A vector of output channels of the slab: D[unit].
  void load_grad(int64_t unit) {
    const int64_t k = unit * kLanes, K = g.out_channels;
    const int lanes = int(min<int64_t>(kLanes, K - k));
    const T* in = static_cast<const T*>(params.grad);
    for (int64_t n = 0; n < count_images; ++n)
      for (int64_t row = 0; row < count_rows; ++row) {
        const int64_t y = y0 + row, image = image0 + n;
        float* to = d + unit * unit_d + n * image_d + row * out_w * kLanes;
        if (g.channels_last) {
          const T* from = in + (image * out_h + y) * out_w * K + k;
          for (int64_t x = 0; x < out_w; ++x)
            store(to + x * kLanes, load_part(from + x * K, 0, lanes));
          continue;
        }
        for (int64_t x = 0; x < out_w; x += kLanes) {
          vec r[kLanes];
          for (int i = 0; i < kLanes; ++i)
            r[i] = i < lanes
                       ? load_columns(in + ((image * K + k + i) * out_h + y) * out_w, x, out_w)
                       : zero();
          transpose(r);
          for (int i = 0; i < min<int64_t>(kLanes, out_w - x); ++i)
            store(to + (x + i) * kLanes, r[i]);
        }
      }
  }

  // --- product ---
  // Rows (c, i) of a unit from `first` on, `count` of them, of part `part` of their taps.
  void add(int64_t unit, int64_t part, int64_t first, int64_t count) {
    const int64_t begin = part * kMostTaps, width = min<int64_t>(kMostTaps, g.kernel_w - begin);
    const int64_t all = (starts[unit + 1] - starts[unit]) * g.kernel_h;
    float* to = sums + (starts[unit] * taps + all * begin + first * width) * kLanes;
    const Multiply run = kMultiply[count - 1][width - 1];
    // Several rows, or a part of one.
    const int64_t tall = max<int64_t>(1, kCut / out_w), wide = min(out_w, kCut);
    for (int64_t n = 0; n < count_images; ++n)
      for (int64_t y = 0; y < count_rows; y += tall)
        for (int64_t x = 0; x < out_w; x += wide) {
          const float* from[kMostRows];
          for (int64_t r = 0; r < count; ++r) {
            const int64_t c = kept[starts[unit] + (first + r) / g.kernel_h];
            const int64_t i = (first + r) % g.kernel_h;
            from[r] = p + c * plane + n * image_p + (y * g.stride_h + i * g.dil_h) * pitch +
                      x * g.stride_w + begin * g.dil_w;
          }
          run(from, g.stride_h * pitch, g.stride_w, g.dil_w,
              d + unit * unit_d + n * image_d + (y * out_w + x) * kLanes, min(tall, count_rows - y),
              min(wide, out_w - x), to);
        }
  }

  // Tasks of a unit: groups of rows, of each part.
  int64_t groups(int64_t unit) const {
    return ceil_div<int64_t>((starts[unit + 1] - starts[unit]) * g.kernel_h, most_rows);
  }

  static void load_body(void* arg) {
    Gradient& run = *static_cast<Gradient*>(arg);
    const int64_t vectors = ceil_div<int64_t>(run.g.c, kLanes);
    for (int64_t task = take(&run.next); task < vectors + run.units; task = take(&run.next))
      if (task < vectors)
        run.load_input(task * kLanes);
      else
        run.load_grad(task - vectors);
  }

  static void multiply_body(void* arg) {
    Gradient& run = *static_cast<Gradient*>(arg);
    int64_t unit = 0, before = 0;  // tasks of the units before
    for (int64_t task = take(&run.next);; task = take(&run.next)) {
      while (unit < run.units && task - before >= run.groups(unit) * run.parts)
        before += run.groups(unit++) * run.parts;
      if (unit == run.units) return;
      const int64_t part = (task - before) / run.groups(unit),
                    first = (task - before) % run.groups(unit) * run.most_rows;
      const int64_t all = (run.starts[unit + 1] - run.starts[unit]) * run.g.kernel_h;
      run.add(unit, part, first, min(run.most_rows, all - first));
    }
  }

  // Sums to the gradient, which is zero elsewhere.
  void write() const {
    for (int64_t k = 0; k < g.out_channels; ++k) {
      const int64_t unit = k / kLanes, count = starts[unit + 1] - starts[unit];
      const float* sum = sums + starts[unit] * taps * kLanes + k % kLanes;
      for (int64_t e = 0; e < count; ++e) {
        const int64_t c = kept[starts[unit] + e];
        T* to = static_cast<T*>(params.gradient) + (k * g.c + c) * taps;
        for (int64_t t = 0; t < taps; ++t)
          if (get(kernel(k, c) + t) != 0) put(to + t, sum[place(count, e, t) * kLanes]);
      }
    }
  }

  // Of the vectors of sums of a unit with `count` kernels: [part][row of taps][taps of the part].
  int64_t place(int64_t count, int64_t kernel, int64_t tap) const {
    const int64_t row = kernel * g.kernel_h + tap / g.kernel_w, j = tap % g.kernel_w;
    const int64_t begin = j / kMostTaps * kMostTaps;
    return count * g.kernel_h * begin + row * min<int64_t>(kMostTaps, g.kernel_w - begin) + j -
           begin;
  }

  Status operator()(const Executor& executor) {
    const int64_t lists = round_up<int64_t>(units + 1 + units * g.c, 16);
    const int64_t slab = slab_floats();
    int32_t* first = static_cast<int32_t*>(scratch(lists * 4, ScratchSlot::own));
    if (!first) return Status::out_of_memory;
    const int64_t count = list(first, first + units + 1);
    // The lists lie behind the floats, in one piece of memory.
    const int64_t floats = slab + count * taps * kLanes;
    float* memory =
        static_cast<float*>(scratch((floats + units + 1 + count) * 4, ScratchSlot::shared));
    if (!memory) return Status::out_of_memory;
    int32_t* copy = reinterpret_cast<int32_t*>(memory + floats);
    std::memcpy(copy, first, (units + 1 + count) * 4);
    starts = copy;
    kept = copy + units + 1;
    p = memory;
    d = p + round_up<int64_t>(g.c, kLanes) * plane;
    sums = memory + slab;
    std::memset(sums, 0, count * taps * kLanes * 4);
    for (image0 = 0; image0 < g.n; image0 += images)
      for (y0 = 0; y0 < out_h; y0 += rows) {
        count_images = min(images, g.n - image0);
        count_rows = min(rows, out_h - y0);
        next = 0;
        executor.run(executor.threads, load_body, this);
        next = 0;
        executor.run(executor.threads, multiply_body, this);
      }
    write();
    return Status::ok;
  }
};

Status run_gradient(const GradientParams& params, const Executor& executor) {
  return with_dtype(params.geometry.dtype, [&](auto element) {
    return Gradient<decltype(element)>(params, executor.threads)(executor);
  });
}

}  // namespace

extern const GradientKernel PYWINO_ISA_NAME(gradient_kernel_);
const GradientKernel PYWINO_ISA_NAME(gradient_kernel_) = run_gradient;

}  // namespace pywino::sparse_conv
