// SPDX-License-Identifier: BSD-3-Clause
// The LSTM cell, compiled once per instruction set: one pass over the tensors, a vector of the four gates at a time.
// In channels_last the lanes are channels, else pixels of one channel; only the distances between numbers differ.
#include "../common/lstm.h"
#include "../common/simd.h"
#include "conv_lstm.h"

namespace pywino::conv_lstm {
namespace {

// Numbers of a state that a thread takes at a time.
constexpr int64_t kBlock = 8 * 1024;

template <typename T>
PYWINO_INLINE vec load_lanes(const T* p, int lanes) {
  return lanes == kLanes ? load(p) : load_part(p, 0, lanes);
}

template <typename T>
PYWINO_INLINE void store_lanes(T* p, vec v, int lanes) {
  lanes == kLanes ? store(p, v) : store_part(p, v, 0, lanes);
}

// --- the cell ---------------------------------------------------------------------------------------------------------
// `apart` is the distance between the gates.
template <typename T>
PYWINO_INLINE LstmGates load_gates(const T* gates, int64_t apart, int lanes) {
  return LstmGates(load_lanes(gates, lanes), load_lanes(gates + apart, lanes),
                   load_lanes(gates + 2 * apart, lanes), load_lanes(gates + 3 * apart, lanes));
}

template <typename T>
struct Forward {
  const T *gates, *cell;
  T *hidden, *next_cell;
  bool past_caches;

  PYWINO_INLINE void operator()(int64_t gate, int64_t apart, int64_t at, int lanes) const {
    const LstmGates a = load_gates(gates + gate, apart, lanes);
    const vec c = a.next_cell(cell ? load_lanes(cell + at, lanes) : zero()), h = a.hidden(c);
    if (sizeof(T) == 4 && past_caches && lanes == kLanes) {
      stream(reinterpret_cast<float*>(next_cell + at), c);
      stream(reinterpret_cast<float*>(hidden + at), h);
    } else {
      store_lanes(next_cell + at, c, lanes);
      store_lanes(hidden + at, h, lanes);
    }
  }
};

template <typename T>
struct Backward {
  const T *grad_hidden, *grad_next_cell, *gates, *cell;
  T *grad_gates, *grad_cell;

  PYWINO_INLINE void operator()(int64_t gate, int64_t apart, int64_t at, int lanes) const {
    const LstmGates a = load_gates(gates + gate, apart, lanes);
    const vec c = cell ? load_lanes(cell + at, lanes) : zero();
    const vec t = hyperbolic_tangent(a.next_cell(c)), dh = load_lanes(grad_hidden + at, lanes);
    const vec e = load_lanes(grad_next_cell + at, lanes) + dh * a.o * (1.f - t * t);
    T* out = grad_gates + gate;
    store_lanes(out, e * a.g * a.i * (1.f - a.i), lanes);
    store_lanes(out + apart, e * c * a.f * (1.f - a.f), lanes);
    store_lanes(out + 2 * apart, e * a.i * (1.f - a.g * a.g), lanes);
    store_lanes(out + 3 * apart, dh * t * a.o * (1.f - a.o), lanes);
    store_lanes(grad_cell + at, e * a.f, lanes);
  }
};

// --- one call ---------------------------------------------------------------------------------------------------------
// A row is a pixel's channels (channels_last) or a channel's pixels.
template <typename Cell>
struct Run {
  const Shape& shape;
  const Cell& cell;
  bool aligned;  // start vectors at aligned addresses of the outputs
  int64_t rows, width, row_step, column_step;
  int64_t next = 0;

  Run(const Shape& s, const Cell& c, bool align)
      : shape(s),
        cell(c),
        aligned(align),
        rows(s.n * (s.channels_last ? s.pixels : s.c)),
        width(s.channels_last ? s.c : s.pixels),
        row_step(max<int64_t>(1, kBlock / width)),
        column_step(width > kBlock ? kBlock : width) {}

  static void body(void* arg) {
    Run& run = *static_cast<Run*>(arg);
    const int64_t across = ceil_div(run.width, run.column_step),
                  tasks = ceil_div(run.rows, run.row_step) * across;
    for (;;) {
      const int64_t task = take(&run.next);
      if (task >= tasks) return;
      const int64_t first = task / across * run.row_step, column = task % across * run.column_step;
      for (int64_t row = first; row < min(first + run.row_step, run.rows); ++row)
        run.columns(row, column, min(column + run.column_step, run.width));
    }
  }

  PYWINO_INLINE void columns(int64_t row, int64_t column, int64_t end) const {
    const bool last = shape.channels_last;
    const int64_t apart = last ? shape.c : shape.c * shape.pixels;
    const int64_t gates =
        last ? row * 4 * shape.c : (row / shape.c * 4 * shape.c + row % shape.c) * shape.pixels;
    const int64_t at = row * width;
    if (aligned && (at + column) % kLanes) {
      const int64_t head = min(end - column, kLanes - (at + column) % kLanes);
      cell(gates + column, apart, at + column, int(head));
      column += head;
    }
    for (; column + kLanes <= end; column += kLanes)
      cell(gates + column, apart, at + column, kLanes);
    if (column < end) cell(gates + column, apart, at + column, int(end - column));
  }

  void operator()(const Executor& executor) { executor.run(executor.threads, body, this); }
};

PYWINO_INLINE bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % (4 * kLanes) == 0;
}

template <typename T>
void forward_as(const ForwardParams& p, const Executor& executor) {
  const Shape& s = p.shape;
  const bool past_caches = sizeof(T) == 4 && s.n * s.c * s.pixels * 4 > kStreamBytes &&
                           is_aligned(p.hidden) && is_aligned(p.next_cell);
  const Forward<T> cell{static_cast<const T*>(p.gates), static_cast<const T*>(p.cell),
                        static_cast<T*>(p.hidden), static_cast<T*>(p.next_cell), past_caches};
  Run<Forward<T>>(s, cell, past_caches)(executor);
}

template <typename T>
void backward_as(const BackwardParams& p, const Executor& executor) {
  const Backward<T> cell{
      static_cast<const T*>(p.grad_hidden), static_cast<const T*>(p.grad_next_cell),
      static_cast<const T*>(p.gates),       static_cast<const T*>(p.cell),
      static_cast<T*>(p.grad_gates),        static_cast<T*>(p.grad_cell)};
  Run<Backward<T>>(p.shape, cell, false)(executor);
}

void run_forward(const ForwardParams& params, const Executor& executor) {
  with_dtype(params.shape.dtype,
             [&](auto element) { forward_as<decltype(element)>(params, executor); });
}

void run_backward(const BackwardParams& params, const Executor& executor) {
  with_dtype(params.shape.dtype,
             [&](auto element) { backward_as<decltype(element)>(params, executor); });
}

}  // namespace

extern const Kernels PYWINO_ISA_NAME(kernels_);
const Kernels PYWINO_ISA_NAME(kernels_) = {run_forward, run_backward};

}  // namespace pywino::conv_lstm
