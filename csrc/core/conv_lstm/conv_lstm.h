// SPDX-License-Identifier: BSD-3-Clause
// The pointwise part of a convolutional LSTM cell on the CPU. Raw pointers, no torch. The maths is in docs/conv_lstm.md.
//
//   i, f, g, o = sigma(a_i), sigma(a_f), tanh(a_g), sigma(a_o);   c' = f c + i g;   h = o tanh(c')
#pragma once

#include <cstdint>

#include "../common/copies.h"
#include "../common/dtype.h"
#include "../common/executor.h"
#include "../common/isa.h"

namespace pywino::conv_lstm {

// n images of pixels x c numbers (channels_last) or c x pixels; those of the gates have 4 c channels: a_i, a_f, a_g, a_o.
struct Shape {
  int64_t n, c, pixels;
  bool channels_last;
  DType dtype;  // of the tensors; the arithmetic is fp32
};

struct ForwardParams {
  Shape shape;
  const void* gates;
  const void* cell;  // c, or nullptr for zeros
  void *hidden, *next_cell;
};

// With e = dc' + dh o (1 - tanh(c')^2):
//   da_i = e g i (1 - i),  da_f = e c f (1 - f),  da_g = e i (1 - g^2),  da_o = dh tanh(c') o (1 - o),  dc = e f
struct BackwardParams {
  Shape shape;
  const void *grad_hidden, *grad_next_cell;
  const void* gates;
  const void* cell;  // or nullptr for zeros
  void *grad_gates, *grad_cell;
};

// One set for each instruction set (common/isa.h), defined in cpu.cpp.
struct Kernels {
  void (*forward)(const ForwardParams&, const Executor&);
  void (*backward)(const BackwardParams&, const Executor&);
};

PYWINO_API void forward(const ForwardParams&, const Executor&);
PYWINO_API void backward(const BackwardParams&, const Executor&);

}  // namespace pywino::conv_lstm
