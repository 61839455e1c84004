// SPDX-License-Identifier: BSD-3-Clause
// Channel (residual) attention: three launches each way.
//
// Bytes of an element of e bytes: forward 3 e (x twice, y) and e of a residual, backward 5 e (x and dY twice, dX); the second
// reading of a tensor that the second-level cache holds costs little, so the last pixels are read first. One multiplication
// each: the limit is memory.
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
  for (int64_t i = threadIdx.x % 32; i < count; i += 32) sum += to_float(a[i]) * x[i];
#pragma unroll
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

template <class T>
__device__ float bias_of(const void* bias, int64_t i) {
  return bias ? to_float(static_cast<const T*>(bias)[i]) : 0.f;
}

template <class T>
__global__ void __launch_bounds__(kThreads) gate(Shape shape, Layers layers, const float* partial,
                                                 int64_t parts, float* mean, float* gates) {
  PYWINO_DYNAMIC_SHARED(float, z);
  float* h = z + shape.c;
  const int64_t blocks = (shape.c + kChannels - 1) / kChannels;
  const int64_t image = blockIdx.x / blocks, first = blockIdx.x % blocks * kChannels;
  const int64_t end = first + kChannels < shape.c ? first + kChannels : shape.c;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;

  for (int64_t c = threadIdx.x; c < shape.c; c += kThreads)
    z[c] = total(partial, image, c, shape.c, parts) / float(shape.pixels);
  __syncthreads();
  for (int64_t r = warp; r < layers.hidden; r += kWarps) {
    const float x = dot(static_cast<const T*>(layers.w1) + r * shape.c, z, shape.c);
    if (lane == 0) h[r] = relu(x + bias_of<T>(layers.b1, r));
  }
  __syncthreads();
  for (int64_t c = first + warp; c < end; c += kWarps) {
    float u = dot(static_cast<const T*>(layers.w2) + c * layers.hidden, h, layers.hidden);
    if (layers.w3) u += dot(static_cast<const T*>(layers.w3) + c * shape.c, z, shape.c);
    u += bias_of<T>(layers.b2, c);
    if (lane == 0) {
      mean[image * shape.c + c] = z[c];
      gates[image * shape.c + c] = 1.f / (1.f + expf(-u));
    }
  }
}

// du = g (1 - g) (sum of D x), dz = W3^T du + W1^T ((W2^T du) . (W1 z + b1 > 0))
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
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const T* w1 = static_cast<const T*>(layers.w1);
  const T* w2 = static_cast<const T*>(layers.w2);
  const T* w3 = static_cast<const T*>(layers.w3);
  const float* z = mean + image * shape.c;

  for (int64_t c = threadIdx.x; c < shape.c; c += kThreads) {
    const float g = gates[image * shape.c + c];
    du[c] = g * (1.f - g) * total(partial, image, c, shape.c, parts);
  }
  __syncthreads();
  for (int64_t r = warp; r < layers.hidden; r += kWarps) {
    const float x = dot(w1 + r * shape.c, z, shape.c) + bias_of<T>(layers.b1, r);
    float sum = 0.f;
    for (int64_t c = lane; c < shape.c; c += 32) sum += to_float(w2[c * layers.hidden + r]) * du[c];
#pragma unroll
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) dh[r] = x > 0.f ? sum : 0.f;
  }
  __syncthreads();
  const int64_t c = first + threadIdx.x % kChannels;
  const int64_t of_share = threadIdx.x / kChannels;
  float dz = 0.f;
  if (c < shape.c) {
    for (int64_t r = of_share; r < layers.hidden; r += kShares)
      dz += to_float(w1[r * shape.c + c]) * dh[r];
    if (w3)
      for (int64_t k = of_share; k < shape.c; k += kShares)
        dz += to_float(w3[k * shape.c + c]) * du[k];
  }
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

template <class T, int V, bool kLast>
__global__ void __launch_bounds__(kThreads) apply(Forward p) {
  const T* input = static_cast<const T*>(p.input);
  const T* residual = static_cast<const T*>(p.residual);
  for_units<V, kLast>(p.shape, [&](int64_t at, int64_t c, int64_t image) {
    const auto g = OfChannels<V, kLast>::load(p.gate + image * p.shape.c, c);
    Channels<V> y = load_channels<T, V>(input + at);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      y.x[e] *= g.at(e);
      if (p.relu) y.x[e] = relu(y.x[e]);
    }
    if (residual) {
      y = y + load_channels<T, V>(residual + at);
      if (p.residual_relu)
#pragma unroll
        for (int e = 0; e < V; ++e) y.x[e] = relu(y.x[e]);
    }
    store_channels(static_cast<T*>(p.output) + at, y);
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

// --- launches

template <class E>
struct Type {
  using type = E;
};

// f(element type, V, channels_last): 16 bytes at a time where every unit is aligned and whole.
template <class Function>
void with_units(const Shape& s, std::initializer_list<const void*> tensors, Function f) {
  const int64_t contiguous = s.channels_last ? s.c : s.pixels;
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

// Numbers of all channels and of the hidden layer, in dynamic shared memory.
template <class Kernel>
int shared_bytes(Kernel kernel, const Shape& s, const Layers& layers, int& bytes) {
  bytes = int((s.c + layers.hidden) * int64_t(sizeof(float)));
  return int(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

}  // namespace

int64_t parts_of(const Shape& s) {
  constexpr int64_t kNumbers = 16 * 1024;  // of a part, about: enough to be read at full speed
  return std::clamp<int64_t>(s.c * s.pixels / kNumbers, 1, 64);
}

extern "C" int pywino_channel_attention_forward(const Forward* params, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const Forward p = *params;
  const int64_t parts = parts_of(p.shape);
  int error = 0;
  with_units(p.shape, {p.input, p.residual, p.output}, [&](auto element, auto width, auto last) {
    using T = typename decltype(element)::type;
    constexpr int V = decltype(width)::value;
    constexpr bool kLast = decltype(last)::value;
    const T *grad = nullptr, *input = static_cast<const T*>(p.input);
    const float* gates = nullptr;
    PYWINO_LAUNCH((sums<T, V, kLast>), sums_blocks(p.shape, V), dim3(kThreads), 0, on, p.shape,
                  grad, input, gates, false, p.partial, parts);
    int bytes;
    if ((error = shared_bytes(gate<T>, p.shape, p.layers, bytes))) return;
    PYWINO_LAUNCH((gate<T>), gate_blocks(p.shape), dim3(kThreads), bytes, on, p.shape, p.layers,
                  p.partial, parts, p.mean, p.gate);
    PYWINO_LAUNCH((apply<T, V, kLast>), apply_blocks(p.shape, V), dim3(kThreads), 0, on, p);
  });
  return error ? error : int(cudaGetLastError());
}

extern "C" int pywino_channel_attention_backward(const Backward* params, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const Backward p = *params;
  const int64_t parts = parts_of(p.shape);
  int error = 0;
  with_units(
      p.shape, {p.input, p.grad, p.input_gradient}, [&](auto element, auto width, auto last) {
        using T = typename decltype(element)::type;
        constexpr int V = decltype(width)::value;
        constexpr bool kLast = decltype(last)::value;
        const T *grad = static_cast<const T*>(p.grad), *input = static_cast<const T*>(p.input);
        PYWINO_LAUNCH((sums<T, V, kLast>), sums_blocks(p.shape, V), dim3(kThreads), 0, on, p.shape,
                      grad, input, p.gate, p.relu, p.partial, parts);
        int bytes;
        if ((error = shared_bytes(gate_gradient<T>, p.shape, p.layers, bytes))) return;
        PYWINO_LAUNCH((gate_gradient<T>), gate_blocks(p.shape), dim3(kThreads), bytes, on, p.shape,
                      p.layers, p.partial, parts, p.mean, p.gate, p.logit_gradient, p.shift);
        PYWINO_LAUNCH((apply_gradient<T, V, kLast>), apply_blocks(p.shape, V), dim3(kThreads), 0,
                      on, p);
      });
  return error ? error : int(cudaGetLastError());
}

extern "C" const char* pywino_channel_attention_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace pywino::channel_attention::cuda
