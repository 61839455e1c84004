// SPDX-License-Identifier: BSD-3-Clause
// Channel (residual) attention on NVIDIA GPUs. Raw device pointers and a stream, no torch; a C++ compiler without CUDA can read
// this file. The maths is in docs/channel_attention.md. Where an image fits into the shared memory of a block, one launch each
// way, which reads and writes a tensor once; else three:
//
//   sums     partial[image][part][c] = sum over a part of the pixels, of x or of D x
//   gate     z and g of an image, or du and dz / pixels
//   apply    y = act(x g) + residual, or dx = D g + dz / pixels; the last pixels first
//
// Where z is known, since the convolution before has summed its output, the last two are enough, or, where the convolution behind
// applies g, `gate` alone.
#pragma once

#include <cstdint>

#include "channel_attention.h"

namespace pywino::channel_attention::cuda {

// Row-major, in the tensors' element type.
struct Layers {
  int64_t hidden;
  const void* w1;  // (hidden, c)
  const void* b1;  // (hidden) or nullptr
  const void* w2;  // (c, hidden)
  const void* b2;  // (c) or nullptr
  const void* w3;  // (c, c) or nullptr
};

struct Forward {
  Shape shape;
  Layers layers;
  const void* input;
  const void* residual;  // like input, or nullptr: added behind the ReLU of the gate
  void* output;
  float* mean;         // (n, c): z
  float* gate;         // (n, c): g
  const float* known;  // (n, c): z, for `gate`
  float* partial;      // (n, parts_of(shape), c); unused where `whole`
  bool relu;           // on x g
  bool residual_relu;  // on the sum with the residual
  bool whole;          // has_whole(shape, hidden, 1)
};

struct Backward {
  Shape shape;
  Layers layers;  // b2 is not read
  const void* grad;
  const void* input;
  const float* mean;
  const float* gate;
  bool relu;
  void* input_gradient;
  float* logit_gradient;  // (n, c): du
  float* partial;         // (n, parts_of(shape), c); it and shift are unused where `whole`
  float* shift;           // (n, c): dz / pixels
  bool whole;             // has_whole(shape, hidden, 2)
};

// Parts into which an image's pixels are cut: by the shape alone, so that sums have one order.
PYWINO_API int64_t parts_of(const Shape&);
// Whether a block of the current device has an image of so many tensors, and the small layers' numbers, in its shared memory.
PYWINO_API bool has_whole(const Shape&, int64_t hidden, int tensors);

// Each returns a cudaError_t, 0 where the launches went well.
extern "C" {
PYWINO_API int pywino_channel_attention_forward(const Forward*, void* stream);
PYWINO_API int pywino_channel_attention_gate(const Forward*, void* stream);   // g of `known`, alone
PYWINO_API int pywino_channel_attention_apply(const Forward*, void* stream);  // y of x and g, alone
PYWINO_API int pywino_channel_attention_backward(const Backward*, void* stream);
PYWINO_API const char* pywino_channel_attention_cuda_error(int error);
}

}  // namespace pywino::channel_attention::cuda
