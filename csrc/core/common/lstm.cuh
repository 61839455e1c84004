// SPDX-License-Identifier: BSD-3-Clause
// The LSTM cell of one number.
#pragma once

#include "launch.cuh"

namespace pywino {

// From the convolution's a_i, a_f, a_g, a_o.
struct LstmNumber {
  float i, f, g, o;

  __device__ LstmNumber(float ai, float af, float ag, float ao)
      : i(sigmoid(ai)), f(sigmoid(af)), g(tanhf(ag)), o(sigmoid(ao)) {}

  __device__ static float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
  __device__ float next_cell(float c) const { return f * c + i * g; }
  __device__ float hidden(float next) const { return o * tanhf(next); }
};

}  // namespace pywino
