// SPDX-License-Identifier: BSD-3-Clause
// Channel (residual) attention: one launch each way where a block's shared memory has an image, else three.
//
// Bytes of an element of e bytes: in one launch forward 2 e (x, y) and e of a residual, backward 3 e (x, dY, dX). In three 3 e
// (x twice) and 5 e (x and dY twice); the second reading of a tensor that the second-level cache holds costs little, so the
// last pixels are read first. One multiplication each: the limit is memory.
#include "cuda.h"

#include <algorithm>

#include "../common/channels.cuh"
#include "../common/launch.cuh"

namespace pywino::channel_attention::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kUnits = 4;      // of a thread in `apply`
constexpr int kChannels = 64;  // of a block in `gate`

// A unit is V numbers side by side: V channels of a pixel (channels_last) or V pixels of a channel. Units of an image lie in
// a grid of `c` by `p`, and so do a block's threads, the faster index along what is contiguous.
struct Grid {
  int64_t c, p, step_c, step_p;  // units, and elements from one to the next
  int lanes_c, lanes_p;          // threads of a block: powers of two
};

__host__ __device__ inline Grid grid_of(const Shape& s, int width) {
  Grid g;
  if (s.channels_last)
    g = {s.c / width, s.pixels, width, s.c, 0, 0};
  else
    g = {s.c, s.pixels / width, s.pixels, width, 0, 0};
  const int64_t along = s.channels_last ? g.c : g.p;
  int lanes = 1;
  while (lanes < kThreads && lanes < along) lanes *= 2;
  g.lanes_c = s.channels_last ? lanes : kThreads / lanes;
  g.lanes_p = kThreads / g.lanes_c;
  return g;
}

// The place of a thread in its block.
struct Lane {
  int c, p;
  __device__ Lane(const Grid& g, bool channels_last) {
    const int t = int(threadIdx.x), fast = channels_last ? g.lanes_c : g.lanes_p;
    c = channels_last ? t % fast : t / fast;
    p = channels_last ? t / fast : t % fast;
  }
};

// Numbers that belong to the channels of a unit: V of them, or one for all.
template <int V, bool kLast>
struct OfChannels {
  static constexpr int kCount = kLast ? V : 1;
  float x[kCount];

  __device__ static OfChannels load(const float* of_image, int64_t unit) {
    OfChannels channels;
#pragma unroll
    for (int e = 0; e < kCount; ++e) channels.x[e] = of_image[unit * kCount + e];
    return channels;
  }
  __device__ float at(int e) const { return x[kLast ? e : 0]; }
};

__device__ inline float relu(float x) { return x < 0.f ? 0.f : x; }  // NaN stays

__device__ inline int lane_of() { return int(threadIdx.x) % 32; }
__device__ inline int warp_of() { return int(threadIdx.x) / 32; }
__device__ inline int warps() { return int(blockDim.x) / 32; }

// The same in all lanes.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The gradient of x g, of that of act(x g).
__device__ inline float behind_relu(float grad, float x, float gate, bool masked) {
  return !masked || x * gate > 0.f ? grad : 0.f;
}

// --- sums over a part of an image's pixels; with a gradient, of D x

template <class T, int V, bool kLast>
__global__ void __launch_bounds__(kThreads)
    sums(Shape shape, const T* grad, const T* input, const float* gate, bool masked, float* partial,
         int64_t parts) {
  using Sums = OfChannels<V, kLast>;
  __shared__ float shared[kThreads * Sums::kCount];
  const Grid grid = grid_of(shape, V);
  const Lane lane(grid, kLast);
  const int64_t across = (grid.c + grid.lanes_c - 1) / grid.lanes_c;
  const int64_t part = blockIdx.x % parts, image = blockIdx.x / parts / across;
  const int64_t c = int64_t(blockIdx.x) / parts % across * grid.lanes_c + lane.c;
  const int64_t steps = (grid.p + grid.lanes_p - 1) / grid.lanes_p;
  const int64_t begin = part * steps / parts, end = (part + 1) * steps / parts;

  Sums sum = {};
  if (c < grid.c) {
    const int64_t first = image * shape.c * shape.pixels + c * grid.step_c;
    const Sums g = gate ? Sums::load(gate + image * shape.c, c) : Sums{};
#pragma unroll 4
    for (int64_t step = begin; step < end; ++step) {
      const int64_t p = step * grid.lanes_p + lane.p;
      if (p >= grid.p) break;
      const int64_t at = first + p * grid.step_p;
      const Channels<V> x = load_channels<T, V>(input + at);
      const Channels<V> d = grad ? load_channels<T, V>(grad + at) : x;
#pragma unroll
      for (int e = 0; e < V; ++e)
        sum.x[kLast ? e : 0] +=
            grad ? behind_relu(d.x[e], x.x[e], g.at(e), masked) * x.x[e] : x.x[e];
    }
  }
  // Threads of the same channels, halved again and again: one order.
  float* own = shared + (lane.p * grid.lanes_c + lane.c) * Sums::kCount;
#pragma unroll
  for (int e = 0; e < Sums::kCount; ++e) own[e] = sum.x[e];
  for (int half = grid.lanes_p / 2; half; half /= 2) {
    __syncthreads();
    if (lane.p < half)
#pragma unroll
      for (int e = 0; e < Sums::kCount; ++e) own[e] += own[half * grid.lanes_c * Sums::kCount + e];
  }
  if (lane.p == 0 && c < grid.c)
#pragma unroll
    for (int e = 0; e < Sums::kCount; ++e)
      partial[(image * parts + part) * shape.c + c * Sums::kCount + e] = own[e];
}

// --- the two small layers: a block has kChannels channels of an image

// The sum of a channel, from those of its parts.
__device__ inline float total(const float* partial, int64_t image, int64_t c, int64_t channels,
                              int64_t parts) {
  float sum = 0.f;
  for (int64_t part = 0; part < parts; ++part)
    sum += partial[(image * parts + part) * channels + c];
  return sum;
}

// The same in all lanes of a warp: sum of a[i] x[i].
template <class T>
__device__ float dot(const T* a, const float* x, int64_t count) {
  float sum = 0.f;
  for (int64_t i = lane_of(); i < count; i += 32) sum += to_float(a[i]) * x[i];
  return warp_sum(sum);
}

template <class T>
__device__ float bias_of(const void* bias, int64_t i) {
  return bias ? to_float(static_cast<const T*>(bias)[i]) : 0.f;
}

// relu(W1 z + b1), by the warps of a block; they meet at its end.
template <class T>
__device__ void hidden_layer(const Layers& layers, int64_t channels, const float* z, float* h) {
  const T* w1 = static_cast<const T*>(layers.w1);
  for (int64_t r = warp_of(); r < layers.hidden; r += warps()) {
    const float x = dot(w1 + r * channels, z, channels);
    if (lane_of() == 0) h[r] = relu(x + bias_of<T>(layers.b1, r));
  }
  __syncthreads();
}

// g of a channel, the same in all lanes of a warp.
template <class T>
__device__ float gate_of(const Layers& layers, int64_t channels, const float* z, const float* h,
                         int64_t c) {
  float u = dot(static_cast<const T*>(layers.w2) + c * layers.hidden, h, layers.hidden);
  if (layers.w3) u += dot(static_cast<const T*>(layers.w3) + c * channels, z, channels);
  return 1.f / (1.f + expf(-u - bias_of<T>(layers.b2, c)));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gate(Shape shape, Layers layers, const float* partial, int64_t parts, float pixels, float* mean,
         float* gates) {
  PYWINO_DYNAMIC_SHARED(float, z);
  float* h = z + shape.c;
  const unsigned blocks = unsigned(shape.c + kChannels - 1) / kChannels;
  const int64_t image = blockIdx.x / blocks, first = int64_t(blockIdx.x % blocks) * kChannels;
  const int64_t end = first + kChannels < shape.c ? first + kChannels : shape.c;

  for (int64_t c = threadIdx.x; c < shape.c; c += kThreads)
    z[c] = total(partial, image, c, shape.c, parts) / pixels;
  __syncthreads();
  hidden_layer<T>(layers, shape.c, z, h);
  for (int64_t c = first + warp_of(); c < end; c += kWarps) {
    const float g = gate_of<T>(layers, shape.c, z, h, c);
    if (lane_of() == 0) {
      if (mean) mean[image * shape.c + c] = z[c];
      gates[image * shape.c + c] = g;
    }
  }
}

// (W2^T du) . (W1 z + b1 > 0), by the warps of a block; they meet at its end.
template <class T>
__device__ void hidden_gradient(const Layers& layers, int64_t channels, const float* z,
                                const float* du, float* dh) {
  const T* w1 = static_cast<const T*>(layers.w1);
  const T* w2 = static_cast<const T*>(layers.w2);
  for (int64_t r = warp_of(); r < layers.hidden; r += warps()) {
    const float x = dot(w1 + r * channels, z, channels) + bias_of<T>(layers.b1, r);
    float sum = 0.f;
    for (int64_t c = lane_of(); c < channels; c += 32)
      sum += to_float(w2[c * layers.hidden + r]) * du[c];
    sum = warp_sum(sum);
    if (lane_of() == 0) dh[r] = x > 0.f ? sum : 0.f;
  }
  __syncthreads();
}

// A share of a channel's dz = W3^T du + W1^T dh: every `shares`-th product.
template <class T>
__device__ float mean_gradient(const Layers& layers, int64_t channels, const float* du,
                               const float* dh, int64_t c, int64_t share, int64_t shares) {
  const T* w1 = static_cast<const T*>(layers.w1);
  const T* w3 = static_cast<const T*>(layers.w3);
  float dz = 0.f;
  for (int64_t r = share; r < layers.hidden; r += shares)
    dz += to_float(w1[r * channels + c]) * dh[r];
  if (w3)
    for (int64_t k = share; k < channels; k += shares) dz += to_float(w3[k * channels + c]) * du[k];
  return dz;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gate_gradient(Shape shape, Layers layers, const float* partial, int64_t parts,
                  const float* mean, const float* gates, float* logit_gradient, float* shift) {
  constexpr int kShares = kThreads / kChannels;  // threads that share a channel's sum
  PYWINO_DYNAMIC_SHARED(float, du);
  float* dh = du + shape.c;
  __shared__ float share[kThreads];
  const int64_t blocks = (shape.c + kChannels - 1) / kChannels;
  const int64_t image = blockIdx.x / blocks, first = blockIdx.x % blocks * kChannels;

  for (int64_t c = threadIdx.x; c < shape.c; c += kThreads) {
    const float g = gates[image * shape.c + c];
    du[c] = g * (1.f - g) * total(partial, image, c, shape.c, parts);
  }
  __syncthreads();
  hidden_gradient<T>(layers, shape.c, mean + image * shape.c, du, dh);
  const int64_t c = first + threadIdx.x % kChannels;
  const int64_t of_share = threadIdx.x / kChannels;
  float dz = 0.f;
  if (c < shape.c) dz = mean_gradient<T>(layers, shape.c, du, dh, c, of_share, kShares);
  share[threadIdx.x] = dz;
  __syncthreads();
  if (of_share == 0 && c < shape.c) {
#pragma unroll
    for (int s = 1; s < kShares; ++s) dz += share[threadIdx.x + s * kChannels];
    logit_gradient[image * shape.c + c] = du[c];
    shift[image * shape.c + c] = dz / float(shape.pixels);
  }
}

// --- what is written; blocks go through the images from the end

// value(unit's place, its channels, which image) for the kUnits units of a thread.
template <int V, bool kLast, class Value>
__device__ void for_units(const Shape& shape, Value&& value) {
  const Grid grid = grid_of(shape, V);
  const Lane lane(grid, kLast);
  const int64_t across = (grid.c + grid.lanes_c - 1) / grid.lanes_c;
  const int64_t along = (grid.p + grid.lanes_p * kUnits - 1) / (grid.lanes_p * kUnits);
  const int64_t block = int64_t(gridDim.x) - 1 - blockIdx.x;
  const int64_t image = block / along / across;
  const int64_t c = block % across * grid.lanes_c + lane.c;
  if (c >= grid.c) return;
  const int64_t first = image * shape.c * shape.pixels + c * grid.step_c;
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int64_t p = block / across % along * grid.lanes_p * kUnits + i * grid.lanes_p + lane.p;
    if (p < grid.p) value(first + p * grid.step_p, c, image);
  }
}

// y at a place, of x g.
template <class T, int V>
__device__ void write_output(const Forward& p, int64_t at, Channels<V> y) {
  if (p.relu)
#pragma unroll
    for (int e = 0; e < V; ++e) y.x[e] = relu(y.x[e]);
  if (p.residual) {
    y = y + load_channels<T, V>(static_cast<const T*>(p.residual) + at);
    if (p.residual_relu)
#pragma unroll
      for (int e = 0; e < V; ++e) y.x[e] = relu(y.x[e]);
  }
  store_channels(static_cast<T*>(p.output) + at, y);
}

template <class T, int V, bool kLast>
__global__ void __launch_bounds__(kThreads) apply(Forward p) {
  for_units<V, kLast>(p.shape, [&](int64_t at, int64_t c, int64_t image) {
    const auto g = OfChannels<V, kLast>::load(p.gate + image * p.shape.c, c);
    Channels<V> y = load_channels<T, V>(static_cast<const T*>(p.input) + at);
#pragma unroll
    for (int e = 0; e < V; ++e) y.x[e] *= g.at(e);
    write_output<T, V>(p, at, y);
  });
}

template <class T, int V, bool kLast>
__global__ void __launch_bounds__(kThreads) apply_gradient(Backward p) {
  const T* input = static_cast<const T*>(p.input);
  const T* grad = static_cast<const T*>(p.grad);
  for_units<V, kLast>(p.shape, [&](int64_t at, int64_t c, int64_t image) {
    const auto g = OfChannels<V, kLast>::load(p.gate + image * p.shape.c, c);
    const auto shift = OfChannels<V, kLast>::load(p.shift + image * p.shape.c, c);
    const Channels<V> x = load_channels<T, V>(input + at);
    Channels<V> d = load_channels<T, V>(grad + at);
#pragma unroll
    for (int e = 0; e < V; ++e)
      d.x[e] = behind_relu(d.x[e], x.x[e], g.at(e), p.relu) * g.at(e) + shift.at(e);
    store_channels(static_cast<T*>(p.input_gradient) + at, d);
  });
}

// --- one launch: a block has an image in its shared memory
//
//   | x | dY, backward | z or du: c | h or dh: hidden | g, or g and dz / pixels: c or 2 c | sums of shares |
//
// The image is copied as it lies, 16 bytes at a time whatever its layout, and so it is written.

constexpr int kWholeThreads = 1024;  // at most

// Numbers of a tensor in shared memory, rounded up to whole 16 bytes.
template <class T>
__host__ __device__ int64_t kept_numbers(const Shape& s) {
  constexpr int64_t kWide = 16 / sizeof(T);
  return (s.c * s.pixels + kWide - 1) / kWide * kWide;
}

// Floats of the shares of channel_sums: of all channels, or of a warp's 32 for each warp.
__host__ __device__ inline int64_t share_floats(const Shape& s) {
  return s.c > kWholeThreads ? s.c : kWholeThreads;
}

// The channels of V numbers that lie side by side in an image, one after the other.
template <bool kLast>
struct Walk {
  int c, rest, length;
  __device__ Walk(const Shape& s, int at)
      : c(kLast ? at % int(s.c) : at / int(s.pixels)),
        rest(kLast ? 0 : at % int(s.pixels)),
        length(kLast ? int(s.c) : int(s.pixels)) {}
  __device__ int next() {
    const int channel = c;
    if constexpr (kLast) {
      c = c + 1 == length ? 0 : c + 1;
    } else if (++rest == length) {
      rest = 0;
      ++c;
    }
    return channel;
  }
};

// f(place in an image) for every V numbers.
template <int V, class Function>
__device__ void for_image(const Shape& s, Function&& f) {
  const int numbers = int(s.c * s.pixels);
  for (int at = int(threadIdx.x) * V; at < numbers; at += int(blockDim.x) * V) f(at);
}

template <class T, int V>
__device__ void fetch(const Shape& s, const void* tensor, T* kept) {
  const T* image = static_cast<const T*>(tensor) + int64_t(blockIdx.x) * s.c * s.pixels;
  for_image<V>(s, [&](int at) {
    if constexpr (V == 1)
      kept[at] = image[at];
    else
      ptx::cp_async_16(ptx::shared_address(kept + at), image + at, 16);
  });
}

__device__ inline void wait_for_fetched() {
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  __syncthreads();
}

// sums[c] of value(place, c) over the pixels. channels_last: a lane has a channel, and warps share the pixels of 32 channels;
// their sums are added in one order. Else a warp has a channel.
template <bool kLast, class Value>
__device__ void channel_sums(const Shape& s, float* shares, float* sums, Value&& value) {
  const int channels = int(s.c), pixels = int(s.pixels);
  if constexpr (kLast) {
    const int groups = (channels + 31) / 32, count = warps() > groups ? warps() / groups : 1;
    for (int task = warp_of(); task < groups * count; task += warps()) {
      const int c = task % groups * 32 + lane_of(), share = task / groups;
      if (c >= channels) continue;
      float sum = 0.f;
      for (int p = share; p < pixels; p += count) sum += value(p * channels + c, c);
      shares[share * channels + c] = sum;
    }
    __syncthreads();
    for (int c = int(threadIdx.x); c < channels; c += int(blockDim.x)) {
      float sum = 0.f;
      for (int share = 0; share < count; ++share) sum += shares[share * channels + c];
      sums[c] = sum;
    }
  } else {
    for (int c = warp_of(); c < channels; c += warps()) {
      float sum = 0.f;
      for (int p = lane_of(); p < pixels; p += 32) sum += value(c * pixels + p, c);
      sum = warp_sum(sum);
      if (lane_of() == 0) sums[c] = sum;
    }
  }
  __syncthreads();
}

template <class T, int V, bool kLast>
__global__ void __launch_bounds__(kWholeThreads, 1) whole(Forward p) {
  PYWINO_DYNAMIC_SHARED(T, x);
  const Shape& s = p.shape;
  float* z = reinterpret_cast<float*>(x + kept_numbers<T>(s));
  float* h = z + s.c;
  float* g = h + p.layers.hidden;
  const int64_t image = blockIdx.x;

  fetch<T, V>(s, p.input, x);
  wait_for_fetched();
  channel_sums<kLast>(s, g + s.c, z, [&](int at, int) { return to_float(x[at]); });
  for (int64_t c = threadIdx.x; c < s.c; c += blockDim.x)
    p.mean[image * s.c + c] = z[c] = z[c] / float(s.pixels);
  __syncthreads();
  hidden_layer<T>(p.layers, s.c, z, h);
  for (int64_t c = warp_of(); c < s.c; c += warps()) {
    const float gate = gate_of<T>(p.layers, s.c, z, h, c);
    if (lane_of() == 0) p.gate[image * s.c + c] = g[c] = gate;
  }
  __syncthreads();
  for_image<V>(s, [&](int at) {
    Walk<kLast> channel(s, at);
    Channels<V> y = load_channels<T, V>(x + at);
#pragma unroll
    for (int e = 0; e < V; ++e) y.x[e] *= g[channel.next()];
    write_output<T, V>(p, image * s.c * s.pixels + at, y);
  });
}

template <class T, int V, bool kLast>
__global__ void __launch_bounds__(kWholeThreads, 1) whole_gradient(Backward p) {
  PYWINO_DYNAMIC_SHARED(T, x);
  const Shape& s = p.shape;
  T* grad = x + kept_numbers<T>(s);
  float* du = reinterpret_cast<float*>(grad + kept_numbers<T>(s));
  float* dh = du + s.c;
  float* g = dh + p.layers.hidden;
  float* shift = g + s.c;
  const int64_t image = blockIdx.x;

  fetch<T, V>(s, p.input, x);
  fetch<T, V>(s, p.grad, grad);
  for (int64_t c = threadIdx.x; c < s.c; c += blockDim.x) g[c] = p.gate[image * s.c + c];
  wait_for_fetched();
  channel_sums<kLast>(s, shift + s.c, du, [&](int at, int c) {
    const float number = to_float(x[at]);
    return behind_relu(to_float(grad[at]), number, g[c], p.relu) * number;
  });
  for (int64_t c = threadIdx.x; c < s.c; c += blockDim.x)
    p.logit_gradient[image * s.c + c] = du[c] = g[c] * (1.f - g[c]) * du[c];
  __syncthreads();
  hidden_gradient<T>(p.layers, s.c, p.mean + image * s.c, du, dh);
  for (int64_t c = threadIdx.x; c < s.c; c += blockDim.x)
    shift[c] = mean_gradient<T>(p.layers, s.c, du, dh, c, 0, 1) / float(s.pixels);
  __syncthreads();
  for_image<V>(s, [&](int at) {
    Walk<kLast> channel(s, at);
    const Channels<V> number = load_channels<T, V>(x + at);
    Channels<V> d = load_channels<T, V>(grad + at);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const int c = channel.next();
      d.x[e] = behind_relu(d.x[e], number.x[e], g[c], p.relu) * g[c] + shift[c];
    }
    store_channels(static_cast<T*>(p.input_gradient) + image * s.c * s.pixels + at, d);
  });
}

// --- launches

template <class E>
struct Type {
  using type = E;
};

// f(element type, V, channels_last): 16 bytes at a time where every unit of so many numbers side by side is aligned and whole.
template <class Function>
void with_units(const Shape& s, int64_t contiguous, std::initializer_list<const void*> tensors,
                Function f) {
  const auto as = [&](auto element) {
    using T = typename decltype(element)::type;
    constexpr int kWide = 16 / int(sizeof(T));
    bool wide = contiguous % kWide == 0;
    for (const void* t : tensors) wide &= reinterpret_cast<uintptr_t>(t) % 16 == 0;
    const auto of_width = [&](auto width) {
      s.channels_last ? f(element, width, std::true_type{}) : f(element, width, std::false_type{});
    };
    wide ? of_width(std::integral_constant<int, kWide>{})
         : of_width(std::integral_constant<int, 1>{});
  };
  switch (s.dtype) {
    case DType::f32: as(Type<float>{}); break;
    case DType::bf16: as(Type<__nv_bfloat16>{}); break;
    case DType::f16: as(Type<__half>{}); break;
  }
}

int64_t blocks_across(const Grid& g) { return (g.c + g.lanes_c - 1) / g.lanes_c; }

dim3 apply_blocks(const Shape& s, int width) {
  const Grid g = grid_of(s, width);
  const int64_t units = int64_t(g.lanes_p) * kUnits;
  return dim3(unsigned(s.n * blocks_across(g) * ((g.p + units - 1) / units)));
}

dim3 sums_blocks(const Shape& s, int width) {
  return dim3(unsigned(s.n * blocks_across(grid_of(s, width)) * parts_of(s)));
}

dim3 gate_blocks(const Shape& s) {
  return dim3(unsigned(s.n * ((s.c + kChannels - 1) / kChannels)));
}

// Numbers side by side: of a pixel or of a channel.
int64_t row_of(const Shape& s) { return s.channels_last ? s.c : s.pixels; }

template <class Kernel>
int allow_shared(Kernel kernel, int64_t bytes) {
  return int(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

// Of the two small layers: numbers of all channels and of the hidden layer.
int64_t gate_bytes(const Shape& s, const Layers& layers) {
  return (s.c + layers.hidden) * int64_t(sizeof(float));
}

int64_t whole_bytes(const Shape& s, int64_t hidden, int tensors) {
  const int64_t image =
      s.dtype == DType::f32 ? kept_numbers<float>(s) * 4 : kept_numbers<__half>(s) * 2;
  const int64_t floats = (1 + tensors) * s.c + hidden + share_floats(s);
  return tensors * image + floats * int64_t(sizeof(float));
}

// Four 16-byte pieces a thread, and no more threads than that takes.
int whole_threads(int64_t bytes) {
  int threads = 128;
  while (threads < kWholeThreads && threads * 64 < bytes) threads *= 2;
  return threads;
}

// g from partial sums of so many parts, over so many pixels.
int launch_gate(const Forward& p, const float* partial, int64_t parts, float pixels,
                cudaStream_t on) {
  int error = 0;
  with_units(p.shape, 1, {}, [&](auto element, auto, auto) {
    using T = typename decltype(element)::type;
    const int64_t bytes = gate_bytes(p.shape, p.layers);
    if ((error = allow_shared(gate<T>, bytes))) return;
    PYWINO_LAUNCH((gate<T>), gate_blocks(p.shape), dim3(kThreads), int(bytes), on, p.shape,
                  p.layers, partial, parts, pixels, p.mean, p.gate);
  });
  return error;
}

void launch_apply(const Forward& p, cudaStream_t on) {
  with_units(p.shape, row_of(p.shape), {p.input, p.residual, p.output},
             [&](auto element, auto width, auto last) {
               using T = typename decltype(element)::type;
               constexpr int V = decltype(width)::value;
               PYWINO_LAUNCH((apply<T, V, decltype(last)::value>), apply_blocks(p.shape, V),
                             dim3(kThreads), 0, on, p);
             });
}

// `whole` or `whole_gradient`, as instance(element type, V, channels_last) names it.
template <class Params, class Instance>
int launch_whole(const Params& p, int tensors, std::initializer_list<const void*> moved,
                 cudaStream_t on, Instance instance) {
  const Shape& s = p.shape;
  const int64_t bytes = whole_bytes(s, p.layers.hidden, tensors);
  int error = 0;
  with_units(s, s.c * s.pixels, moved, [&](auto element, auto width, auto last) {
    const auto kernel = instance(element, width, last);
    if ((error = allow_shared(kernel, bytes))) return;
    PYWINO_LAUNCH((kernel), dim3(unsigned(s.n)), dim3(whole_threads(bytes)), int(bytes), on, p);
  });
  return error ? error : int(cudaGetLastError());
}

}  // namespace

int64_t parts_of(const Shape& s) {
  constexpr int64_t kNumbers = 16 * 1024;  // of a part, about: enough to be read at full speed
  return std::clamp<int64_t>(s.c * s.pixels / kNumbers, 1, 64);
}

bool has_whole(const Shape& s, int64_t hidden, int tensors) {
  int device = 0, bytes = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
             cudaSuccess &&
         whole_bytes(s, hidden, tensors) <= bytes;
}

extern "C" int pywino_channel_attention_forward(const Forward* params, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const Forward p = *params;
  if (p.whole)
    return launch_whole(p, 1, {p.input, p.residual, p.output}, on,
                        [](auto element, auto width, auto last) {
                          using T = typename decltype(element)::type;
                          return whole<T, decltype(width)::value, decltype(last)::value>;
                        });
  const int64_t parts = parts_of(p.shape);
  with_units(p.shape, row_of(p.shape), {p.input}, [&](auto element, auto width, auto last) {
    using T = typename decltype(element)::type;
    constexpr int V = decltype(width)::value;
    const T *grad = nullptr, *input = static_cast<const T*>(p.input);
    const float* gates = nullptr;
    PYWINO_LAUNCH((sums<T, V, decltype(last)::value>), sums_blocks(p.shape, V), dim3(kThreads), 0,
                  on, p.shape, grad, input, gates, false, p.partial, parts);
  });
  if (const int error = launch_gate(p, p.partial, parts, float(p.shape.pixels), on)) return error;
  launch_apply(p, on);
  return int(cudaGetLastError());
}

extern "C" int pywino_channel_attention_gate(const Forward* p, void* stream) {
  if (const int error = launch_gate(*p, p->known, 1, 1.f, static_cast<cudaStream_t>(stream)))
    return error;
  return int(cudaGetLastError());
}

extern "C" int pywino_channel_attention_apply(const Forward* p, void* stream) {
  launch_apply(*p, static_cast<cudaStream_t>(stream));
  return int(cudaGetLastError());
}

extern "C" int pywino_channel_attention_backward(const Backward* params, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const Backward p = *params;
  const std::initializer_list<const void*> moved = {p.input, p.grad, p.input_gradient};
  if (p.whole)
    return launch_whole(p, 2, moved, on, [](auto element, auto width, auto last) {
      using T = typename decltype(element)::type;
      return whole_gradient<T, decltype(width)::value, decltype(last)::value>;
    });
  const int64_t parts = parts_of(p.shape);
  int error = 0;
  with_units(p.shape, row_of(p.shape), moved, [&](auto element, auto width, auto last) {
    using T = typename decltype(element)::type;
    constexpr int V = decltype(width)::value;
    constexpr bool kLast = decltype(last)::value;
    const T *grad = static_cast<const T*>(p.grad), *input = static_cast<const T*>(p.input);
    PYWINO_LAUNCH((sums<T, V, kLast>), sums_blocks(p.shape, V), dim3(kThreads), 0, on, p.shape,
                  grad, input, p.gate, p.relu, p.partial, parts);
    const int64_t bytes = gate_bytes(p.shape, p.layers);
    if ((error = allow_shared(gate_gradient<T>, bytes))) return;
    PYWINO_LAUNCH((gate_gradient<T>), gate_blocks(p.shape), dim3(kThreads), int(bytes), on, p.shape,
                  p.layers, p.partial, parts, p.mean, p.gate, p.logit_gradient, p.shift);
    PYWINO_LAUNCH((apply_gradient<T, V, kLast>), apply_blocks(p.shape, V), dim3(kThreads), 0, on,
                  p);
  });
  return error ? error : int(cudaGetLastError());
}

extern "C" const char* pywino_channel_attention_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace pywino::channel_attention::cuda
