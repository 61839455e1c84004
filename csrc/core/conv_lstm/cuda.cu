// SPDX-License-Identifier: BSD-3-Clause
// The LSTM cell: one pass over the tensors, a thread for V neighbouring numbers of a state and those of the four gates.
//
// Bytes of a number of a state, elements of e bytes: forward 7 e (4 gates, c; h', c'), backward 12 e (4 gates, c, dh', dc';
// 4 gates, dc). Five exponentials and about 40 other operations: the limit is memory.
#include "cuda.h"

#include <initializer_list>

#include "../common/channels.cuh"
#include "../common/launch.cuh"
#include "../common/lstm.cuh"

namespace pywino::conv_lstm::cuda {
namespace {

constexpr int kThreads = 256;

// `inner` numbers of a gate lie side by side: C of a pixel in channels_last, else C x pixels of an image.
__host__ __device__ inline int64_t inner_of(const Shape& s) {
  return s.channels_last ? s.c : s.c * s.pixels;
}

// a_i, a_f, a_g, a_o of V numbers; a_i begins at `gates`.
template <int V>
struct Gates {
  Channels<V> i, f, g, o;

  template <class T>
  __device__ Gates(const T* gates, int64_t inner)
      : i(load_channels<T, V>(gates)),
        f(load_channels<T, V>(gates + inner)),
        g(load_channels<T, V>(gates + 2 * inner)),
        o(load_channels<T, V>(gates + 3 * inner)) {}
  __device__ LstmNumber at(int e) const { return {i.x[e], f.x[e], g.x[e], o.x[e]}; }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) cell(ForwardParams p) {
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (at >= p.shape.n * p.shape.c * p.shape.pixels) return;
  const int64_t inner = inner_of(p.shape);
  const int64_t gate = at / inner * 4 * inner + at % inner;
  const Gates<V> a(static_cast<const T*>(p.gates) + gate, inner);
  Channels<V> c = {}, h;
  if (p.cell) c = load_channels<T, V>(static_cast<const T*>(p.cell) + at);
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const LstmNumber number = a.at(e);
    c.x[e] = number.next_cell(c.x[e]);
    h.x[e] = number.hidden(c.x[e]);
  }
  store_channels(static_cast<T*>(p.next_cell) + at, c);
  store_channels(static_cast<T*>(p.hidden) + at, h);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) cell_gradient(BackwardParams p) {
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (at >= p.shape.n * p.shape.c * p.shape.pixels) return;
  const int64_t inner = inner_of(p.shape);
  const int64_t gate = at / inner * 4 * inner + at % inner;
  const Gates<V> a(static_cast<const T*>(p.gates) + gate, inner);
  const Channels<V> dh = load_channels<T, V>(static_cast<const T*>(p.grad_hidden) + at);
  const Channels<V> dc = load_channels<T, V>(static_cast<const T*>(p.grad_next_cell) + at);
  Channels<V> c = {}, di, df, dg, dout, before;
  if (p.cell) c = load_channels<T, V>(static_cast<const T*>(p.cell) + at);
#pragma unroll
  for (int n = 0; n < V; ++n) {
    const LstmNumber number = a.at(n);
    const auto [i, f, g, o] = number;
    const float t = tanhf(number.next_cell(c.x[n]));
    const float e = dc.x[n] + dh.x[n] * o * (1.f - t * t);
    di.x[n] = e * g * i * (1.f - i);
    df.x[n] = e * c.x[n] * f * (1.f - f);
    dg.x[n] = e * i * (1.f - g * g);
    dout.x[n] = dh.x[n] * t * o * (1.f - o);
    before.x[n] = e * f;
  }
  T* to = static_cast<T*>(p.grad_gates) + gate;
  store_channels(to, di);
  store_channels(to + inner, df);
  store_channels(to + 2 * inner, dg);
  store_channels(to + 3 * inner, dout);
  store_channels(static_cast<T*>(p.grad_cell) + at, before);
}

// --- launches

template <class E>
struct Type {
  using type = E;
};

// f(element type, V, blocks): 16 bytes at a time where they are aligned everywhere.
template <class Function>
void with_width(const Shape& s, std::initializer_list<const void*> tensors, Function f) {
  const auto as = [&](auto element) {
    constexpr int kWide = 16 / int(sizeof(typename decltype(element)::type));
    bool wide = inner_of(s) % kWide == 0;
    for (const void* t : tensors) wide &= reinterpret_cast<uintptr_t>(t) % 16 == 0;
    const auto of_width = [&](auto width) {
      constexpr int64_t kNumbers = int64_t(kThreads) * decltype(width)::value;
      f(element, width, dim3(unsigned((s.n * s.c * s.pixels + kNumbers - 1) / kNumbers)));
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

}  // namespace

extern "C" int pywino_conv_lstm_forward(const ForwardParams* p, void* stream) {
  with_width(p->shape, {p->gates, p->cell, p->hidden, p->next_cell},
             [&](auto element, auto width, dim3 blocks) {
               using T = typename decltype(element)::type;
               PYWINO_LAUNCH((cell<T, decltype(width)::value>), blocks, dim3(kThreads), 0,
                             static_cast<cudaStream_t>(stream), *p);
             });
  return int(cudaGetLastError());
}

extern "C" int pywino_conv_lstm_backward(const BackwardParams* p, void* stream) {
  with_width(p->shape,
             {p->grad_hidden, p->grad_next_cell, p->gates, p->cell, p->grad_gates, p->grad_cell},
             [&](auto element, auto width, dim3 blocks) {
               using T = typename decltype(element)::type;
               PYWINO_LAUNCH((cell_gradient<T, decltype(width)::value>), blocks, dim3(kThreads), 0,
                             static_cast<cudaStream_t>(stream), *p);
             });
  return int(cudaGetLastError());
}

extern "C" const char* pywino_conv_lstm_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace pywino::conv_lstm::cuda
