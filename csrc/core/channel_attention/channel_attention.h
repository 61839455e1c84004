// SPDX-License-Identifier: BSD-3-Clause
// Channel (residual) attention on the CPU. Raw pointers, no torch. The maths is in docs/channel_attention.md.
//
//   y = act(x g),  g = sigmoid(W2 relu(W1 z + b1) + W3 z + b2),  z = mean of x over the pixels;  y + residual, ReLU
#pragma once

#include <cstdint>

#include "../common/copies.h"
#include "../common/dtype.h"
#include "../common/executor.h"
#include "../common/isa.h"

namespace pywino::channel_attention {

enum class Status : int { ok, out_of_memory };

// A dense tensor of n images: pixels x c numbers each (channels_last) or c x pixels. None of the three is 0.
struct Shape {
  int64_t n, c, pixels;
  bool channels_last;
  DType dtype;  // of the tensors; the arithmetic is fp32
};

// The two layers that make the gate of z, row-major.
struct Layers {
  int64_t hidden;
  const float* w1;  // (hidden, c)
  const float* b1;  // (hidden) or nullptr
  const float* w2;  // (c, hidden)
  const float* b2;  // (c) or nullptr
  const float* w3;  // (c, c) or nullptr
};

struct ForwardParams {
  Shape shape;
  Layers layers;
  const void* input;
  const void* residual;  // like input, or nullptr: added behind the ReLU of the gate
  void* output;
  float* mean;         // (n, c): z
  float* gate;         // (n, c): g
  bool knows_mean;     // z is there already: input is not read for it
  bool relu;           // on x g
  bool residual_relu;  // on the sum with the residual
};

// With D the gradient of x g (that of y where the ReLU let it through) and u the sigmoid's argument:
//   du = g (1 - g) sum over pixels D x,   dx = D g + dz / pixels,   dz = W3^T du + W1^T ((W2^T du) . (W1 z + b1 > 0))
struct BackwardParams {
  Shape shape;
  Layers layers;
  const void* grad;  // of y
  const void* input;
  const float* mean;
  const float* gate;
  bool relu;
  void* input_gradient;
  float* logit_gradient;  // (n, c): du
};

// One set for each instruction set (common/isa.h), defined in cpu.cpp.
struct Kernels {
  Status (*forward)(const ForwardParams&, const Executor&);
  Status (*backward)(const BackwardParams&, const Executor&);
};

PYWINO_API Status forward(const ForwardParams&, const Executor&);
PYWINO_API Status backward(const BackwardParams&, const Executor&);

}  // namespace pywino::channel_attention
