// SPDX-License-Identifier: BSD-3-Clause
// Channel attention, compiled once per instruction set: three steps, each a parallel loop.
//
//   sum    blocks of pixels -> partial sums over each block, one a channel
//   gate   an image's partial sums, added in their order -> z, the two small layers, the sigmoid
//   apply  blocks of pixels again, in reverse: the last ones are still in the caches
//
// A block's size depends on the tensor's shape alone and its sums are added in a fixed order, so that the result is the
// same for any number of threads. In channels_last the lanes of a vector are channels, else pixels of one channel.
#include <math.h>

#include "../common/scratch.h"
#include "../common/simd.h"
#include "channel_attention.h"

namespace pywino::channel_attention {
namespace {

// Numbers of a block: in the second-level cache, where vectors of channels are summed one after the other.
constexpr int64_t kBlock = 32 * 1024;

template <typename T>
PYWINO_INLINE vec load_lanes(const T* p, int lanes) {
  return lanes == kLanes ? load(p) : load_part(p, 0, lanes);
}

template <typename T>
PYWINO_INLINE void store_lanes(T* p, vec v, int lanes) {
  lanes == kLanes ? store(p, v) : store_part(p, v, 0, lanes);
}

PYWINO_INLINE vec broadcast(float x) { return x - zero(); }

PYWINO_INLINE float sum_of_lanes(vec v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// --- what is summed, and what is written ------------------------------------------------------------------------------
template <typename T>
struct Input {
  const T* input;
  PYWINO_INLINE vec operator()(int64_t at, vec, int lanes) const {
    return load_lanes(input + at, lanes);
  }
};

// The gradient of x g, from that of act(x g).
template <typename T>
PYWINO_INLINE vec behind_relu(vec grad, vec x, vec gate, bool masked) {
  return masked ? (x * gate > zero() ? grad : zero()) : grad;
}

template <typename T>
struct GradTimesInput {
  const T *grad, *input;
  bool relu;
  PYWINO_INLINE vec operator()(int64_t at, vec gate, int lanes) const {
    const vec x = load_lanes(input + at, lanes);
    return behind_relu<T>(load_lanes(grad + at, lanes), x, gate, relu) * x;
  }
};

template <typename T>
struct Output {
  const T *input, *residual;
  bool relu_gate, relu_sum;
  PYWINO_INLINE vec operator()(int64_t at, vec gate, vec, int lanes) const {
    vec y = load_lanes(input + at, lanes) * gate;
    if (relu_gate) y = relu(y);
    if (residual) {
      y += load_lanes(residual + at, lanes);
      if (relu_sum) y = relu(y);
    }
    return y;
  }
};

template <typename T>
struct InputGradient {
  const T *grad, *input;
  bool relu;
  PYWINO_INLINE vec operator()(int64_t at, vec gate, vec shift, int lanes) const {
    const vec x = load_lanes(input + at, lanes);
    return behind_relu<T>(load_lanes(grad + at, lanes), x, gate, relu) * gate + shift;
  }
};

// --- blocks -----------------------------------------------------------------------------------------------------------
// Pixels [p0, p1) of channels [c0, c1) of one image; `at` is the first number in the tensor.
struct Block {
  int64_t image, c0, c1, p0, p1, at;
};

struct Blocks {
  const Shape& shape;
  int64_t pixels;    // of a block
  int64_t channels;  // of a block
  int64_t along, across;

  explicit Blocks(const Shape& s)
      : shape(s),
        pixels(s.channels_last ? max<int64_t>(4, kBlock / s.c) : kBlock),
        channels(s.channels_last ? s.c : min(s.c, max<int64_t>(1, kBlock / s.pixels))),
        along(ceil_div(s.pixels, pixels)),
        across(ceil_div(s.c, channels)) {}

  int64_t count() const { return shape.n * across * along; }

  Block operator[](int64_t index) const {
    Block b;
    b.image = index / (across * along);
    b.c0 = index / along % across * channels;
    b.c1 = min(b.c0 + channels, shape.c);
    b.p0 = index % along * pixels;
    b.p1 = min(b.p0 + pixels, shape.pixels);
    b.at = b.image * shape.c * shape.pixels +
           (shape.channels_last ? b.p0 * shape.c : b.c0 * shape.pixels + b.p0);
    return b;
  }
};

// Calls column(c, width, vectors) for the channels of a channels_last block: `vectors` (a compile-time 4, 2 or 1) whole
// vectors at a time, so that what belongs to a channel stays in registers, then the lanes that are left.
template <typename Column>
PYWINO_INLINE void for_columns(int64_t channels, const Column& column) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) column.template operator()<4>(c, kLanes);
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) column.template operator()<2>(c, kLanes);
  for (; c + kLanes <= channels; c += kLanes) column.template operator()<1>(c, kLanes);
  if (c < channels) column.template operator()<1>(c, int(channels - c));
}

// Sums of a block's channels into sums[0 .. c1 - c0), several accumulators each: a chain of additions would wait for
// itself, and its rounding errors grow with its length.
template <typename Term>
void sum_block(const Shape& s, const Block& b, const Term& term, const float* gate, float* sums) {
  const int64_t pixels = b.p1 - b.p0;
  if (s.channels_last) {
    for_columns(s.c, [&]<int V>(int64_t c, int lanes) __attribute__((always_inline)) {
      constexpr int kChains = 8 / V;
      vec g[V], sum[V][kChains] = {};
      for (int v = 0; v < V; ++v) g[v] = gate ? load_part(gate + c + v * kLanes, 0, lanes) : zero();
      auto add = [&](int width) __attribute__((always_inline)) {
        int64_t p = 0, at = b.at + c;
        for (; p + kChains <= pixels; p += kChains)
          PYWINO_UNROLL for (int j = 0; j < kChains; ++j, at += s.c)
              PYWINO_UNROLL for (int v = 0; v < V; ++v) sum[v][j] +=
              term(at + v * kLanes, g[v], width);
        for (; p < pixels; ++p, at += s.c)
          PYWINO_UNROLL for (int v = 0; v < V; ++v) sum[v][0] += term(at + v * kLanes, g[v], width);
      };
      lanes == kLanes ? add(kLanes) : add(lanes);
      for (int v = 0; v < V; ++v) {
        vec all = zero();
        for (int j = 0; j < kChains; ++j) all += sum[v][j];
        store_part(sums + c + v * kLanes, all, 0, lanes);
      }
    });
    return;
  }
  for (int64_t c = b.c0; c < b.c1; ++c) {
    const int64_t at = b.at + (c - b.c0) * s.pixels;
    const vec g = broadcast(gate ? gate[c] : 0.f);
    vec sum[4] = {};
    int64_t p = 0;
    for (; p + 4 * kLanes <= pixels; p += 4 * kLanes)
      PYWINO_UNROLL for (int j = 0; j < 4; ++j) sum[j] += term(at + p + j * kLanes, g, kLanes);
    for (; p < pixels; p += kLanes)
      sum[0] += term(at + p, g, int(min<int64_t>(kLanes, pixels - p)));
    sums[c - b.c0] = sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

template <typename T, typename Value>
void write_block(const Shape& s, const Block& b, const Value& value, const float* gate,
                 const float* shift, T* out, bool past_caches) {
  auto write = [&](int64_t at, vec v, int lanes) __attribute__((always_inline)) {
    if (sizeof(T) == 4 && past_caches && lanes == kLanes)
      stream(reinterpret_cast<float*>(out + at), v);
    else
      store_lanes(out + at, v, lanes);
  };
  if (s.channels_last) {
    for_columns(s.c, [&]<int V>(int64_t c, int lanes) __attribute__((always_inline)) {
      vec g[V], d[V];
      for (int v = 0; v < V; ++v) {
        g[v] = load_part(gate + c + v * kLanes, 0, lanes);
        d[v] = shift ? load_part(shift + c + v * kLanes, 0, lanes) : zero();
      }
      auto rows = [&](int width) __attribute__((always_inline)) {
        for (int64_t at = b.at + c, end = at + (b.p1 - b.p0) * s.c; at < end; at += s.c)
          PYWINO_UNROLL for (int v = 0; v < V; ++v)
              write(at + v * kLanes, value(at + v * kLanes, g[v], d[v], width), width);
      };
      lanes == kLanes ? rows(kLanes) : rows(lanes);
    });
    return;
  }
  for (int64_t c = b.c0; c < b.c1; ++c) {
    const vec g = broadcast(gate[c]), d = broadcast(shift ? shift[c] : 0.f);
    int64_t at = b.at + (c - b.c0) * s.pixels;
    const int64_t end = at + b.p1 - b.p0;
    if (past_caches) {  // only whole vectors between aligned addresses
      const uintptr_t over = reinterpret_cast<uintptr_t>(out + at) / sizeof(T) % kLanes;
      const int head = int(min<int64_t>(end - at, over ? kLanes - int64_t(over) : 0));
      if (head) write(at, value(at, g, d, head), head);
      at += head;
    }
    for (; at + kLanes <= end; at += kLanes) write(at, value(at, g, d, kLanes), kLanes);
    if (at < end) write(at, value(at, g, d, int(end - at)), int(end - at));
  }
}

// --- the layers of the gate -------------------------------------------------------------------------------------------
PYWINO_INLINE float dot(const float* a, const float* b, int64_t n) {
  vec sum = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = int(min<int64_t>(kLanes, n - i));
    sum += load_lanes(a + i, lanes) * load_lanes(b + i, lanes);
  }
  return sum_of_lanes(sum);
}

// y += x a
PYWINO_INLINE void add_scaled(float* y, const float* a, float x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = int(min<int64_t>(kLanes, n - i));
    store_lanes(y + i, load_lanes(y + i, lanes) + load_lanes(a + i, lanes) * x, lanes);
  }
}

// W1 z + b1
PYWINO_INLINE float hidden_of(const Layers& l, const float* z, int64_t c, int64_t j) {
  return dot(l.w1 + j * c, z, c) + (l.b1 ? l.b1[j] : 0.f);
}

void make_gate(const Layers& l, int64_t c, const float* z, float* hidden, float* gate) {
  for (int64_t j = 0; j < l.hidden; ++j) {
    const float h = hidden_of(l, z, c, j);
    hidden[j] = h < 0.f ? 0.f : h;  // NaN stays NaN
  }
  for (int64_t k = 0; k < c; ++k) {
    float u = dot(l.w2 + k * l.hidden, hidden, l.hidden);
    if (l.w3) u += dot(l.w3 + k * c, z, c);
    if (l.b2) u += l.b2[k];
    gate[k] = 1.f / (1.f + expf(-u));
  }
}

// du -> dz
void gate_gradient(const Layers& l, int64_t c, const float* z, const float* du, float* dz) {
  for (int64_t k = 0; k < c; ++k) dz[k] = 0.f;
  if (l.w3)
    for (int64_t k = 0; k < c; ++k) add_scaled(dz, l.w3 + k * c, du[k], c);
  for (int64_t j = 0; j < l.hidden; ++j) {
    if (!(hidden_of(l, z, c, j) > 0.f)) continue;
    float dh = 0.f;
    for (int64_t k = 0; k < c; ++k) dh += du[k] * l.w2[k * l.hidden + j];
    add_scaled(dz, l.w1 + j * c, dh, c);
  }
}

// --- one call ---------------------------------------------------------------------------------------------------------
// A derived struct has step(index), which may run at the same time for several indices.
template <typename Derived>
struct Loop {
  int64_t next = 0, count = 0;

  static void body(void* arg) {
    Derived& d = *static_cast<Derived*>(arg);
    for (;;) {
      const int64_t i = take(&d.next);
      if (i >= d.count) return;
      d.step(i);
    }
  }

  void run(int64_t steps, const Executor& executor) {
    next = 0, count = steps;
    executor.run(int(min<int64_t>(executor.threads, steps)), body, static_cast<Derived*>(this));
  }
};

template <typename Term>
struct SumLoop : Loop<SumLoop<Term>> {
  const Blocks& blocks;
  const Term& term;
  const float* gate;
  float* partial;

  SumLoop(const Blocks& b, const Term& t, const float* g, float* p)
      : blocks(b), term(t), gate(g), partial(p) {}
  void step(int64_t i) const {
    const Block b = blocks[i];
    sum_block(blocks.shape, b, term, gate ? gate + b.image * blocks.shape.c : nullptr,
              partial + i * blocks.channels);
  }
};

// Channel c of an image, from the partial sums of its blocks.
PYWINO_INLINE double total(const Blocks& blocks, const float* partial, int64_t image, int64_t c) {
  const int64_t first = (image * blocks.across + c / blocks.channels) * blocks.along;
  double sum = 0;
  for (int64_t i = first; i < first + blocks.along; ++i)
    sum += double(partial[i * blocks.channels + c % blocks.channels]);
  return sum;
}

template <typename Step>
struct ImageLoop : Loop<ImageLoop<Step>> {
  const Step& image;
  explicit ImageLoop(const Step& s) : image(s) {}
  void step(int64_t i) const { image(i); }
};

template <typename T, typename Value>
struct WriteLoop : Loop<WriteLoop<T, Value>> {
  const Blocks& blocks;
  const Value& value;
  const float *gate, *shift;
  T* out;
  bool past_caches;

  WriteLoop(const Blocks& b, const Value& v, const float* g, const float* s, T* o)
      : blocks(b), value(v), gate(g), shift(s), out(o) {
    const Shape& shape = b.shape;
    past_caches = sizeof(T) == 4 && shape.n * shape.c * shape.pixels * 4 > kStreamBytes &&
                  (!shape.channels_last ||
                   (shape.c % kLanes == 0 && reinterpret_cast<uintptr_t>(o) % (4 * kLanes) == 0));
  }
  void step(int64_t i) const {
    const Block b = blocks[blocks.count() - 1 - i];
    const int64_t first = b.image * blocks.shape.c;
    write_block(blocks.shape, b, value, gate + first, shift ? shift + first : nullptr, out,
                past_caches);
  }
};

template <typename T>
Status forward_as(const ForwardParams& p, const Executor& executor) {
  const Blocks blocks(p.shape);
  const int64_t c = p.shape.c, sums = blocks.count() * blocks.channels, hidden = p.layers.hidden;
  auto* partial = static_cast<float*>(
      scratch((sums + p.shape.n * hidden) * sizeof(float), ScratchSlot::shared));
  if (!partial) return Status::out_of_memory;

  const Input<T> input{static_cast<const T*>(p.input)};
  if (!p.knows_mean)
    SumLoop<Input<T>>(blocks, input, nullptr, partial).run(blocks.count(), executor);

  auto image = [&](int64_t n) {
    float *z = p.mean + n * c, *gate = p.gate + n * c;
    for (int64_t k = 0; k < c && !p.knows_mean; ++k)
      z[k] = float(total(blocks, partial, n, k) / double(p.shape.pixels));
    make_gate(p.layers, c, z, partial + sums + n * hidden, gate);
  };
  ImageLoop<decltype(image)>(image).run(p.shape.n, executor);

  const Output<T> output{static_cast<const T*>(p.input), static_cast<const T*>(p.residual), p.relu,
                         p.residual_relu};
  WriteLoop<T, Output<T>>(blocks, output, p.gate, nullptr, static_cast<T*>(p.output))
      .run(blocks.count(), executor);
  return Status::ok;
}

template <typename T>
Status backward_as(const BackwardParams& p, const Executor& executor) {
  const Blocks blocks(p.shape);
  const int64_t c = p.shape.c, sums = blocks.count() * blocks.channels;
  auto* partial =
      static_cast<float*>(scratch((sums + p.shape.n * c) * sizeof(float), ScratchSlot::shared));
  if (!partial) return Status::out_of_memory;
  float* shift = partial + sums;  // dz / pixels

  const GradTimesInput<T> product{static_cast<const T*>(p.grad), static_cast<const T*>(p.input),
                                  p.relu};
  SumLoop<GradTimesInput<T>>(blocks, product, p.gate, partial).run(blocks.count(), executor);

  auto image = [&](int64_t n) {
    const float* gate = p.gate + n * c;
    float *du = p.logit_gradient + n * c, *dz = shift + n * c;
    for (int64_t k = 0; k < c; ++k)
      du[k] = float(total(blocks, partial, n, k)) * gate[k] * (1.f - gate[k]);
    gate_gradient(p.layers, c, p.mean + n * c, du, dz);
    for (int64_t k = 0; k < c; ++k) dz[k] /= float(p.shape.pixels);
  };
  ImageLoop<decltype(image)>(image).run(p.shape.n, executor);

  const InputGradient<T> gradient{static_cast<const T*>(p.grad), static_cast<const T*>(p.input),
                                  p.relu};
  WriteLoop<T, InputGradient<T>>(blocks, gradient, p.gate, shift, static_cast<T*>(p.input_gradient))
      .run(blocks.count(), executor);
  return Status::ok;
}

Status run_forward(const ForwardParams& params, const Executor& executor) {
  return with_dtype(params.shape.dtype,
                    [&](auto element) { return forward_as<decltype(element)>(params, executor); });
}

Status run_backward(const BackwardParams& params, const Executor& executor) {
  return with_dtype(params.shape.dtype,
                    [&](auto element) { return backward_as<decltype(element)>(params, executor); });
}

}  // namespace

extern const Kernels PYWINO_ISA_NAME(kernels_);
const Kernels PYWINO_ISA_NAME(kernels_) = {run_forward, run_backward};

}  // namespace pywino::channel_attention
