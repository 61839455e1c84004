// SPDX-License-Identifier: BSD-3-Clause
// Convolution with a spatial weight that has zeros, on the CPU. Raw pointers, no torch.
//
//   Y[k, y, x] = b[k] + sum over the kept (c, i, j) of W[k, c, i, j] X[c, y s + i d - p, x s + j d - p]
#pragma once

#include <cstdint>

#include "../common/copies.h"
#include "../common/dtype.h"
#include "../common/executor.h"
#include "../common/isa.h"

namespace pywino::sparse_conv {

enum class Status : int { ok, out_of_memory, unsupported };

// How a filter is packed: without each zero, or without the (16 output x 1 input channel) kernels that are zero.
enum class Pattern : int { unstructured, blocks };

struct Geometry {
  int64_t n, c, h, w;          // of the input
  int64_t out_channels;        // K
  int64_t kernel_h, kernel_w;  // >= 1
  int64_t stride_h, stride_w;  // >= 1
  int64_t pad_h, pad_w;        // >= 0
  int64_t dil_h, dil_w;        // >= 1
  bool channels_last;          // of input and output
  DType dtype;                 // of input and output; the arithmetic is fp32

  constexpr int64_t out_h() const {
    return (h + 2 * pad_h - dil_h * (kernel_h - 1) - 1) / stride_h + 1;
  }
  constexpr int64_t out_w() const {
    return (w + 2 * pad_w - dil_w * (kernel_w - 1) - 1) / stride_w + 1;
  }
};

struct ForwardParams {
  Geometry geometry;
  const void* input;
  const int32_t* filter;  // from pack, by the same instruction set
  const float* bias;      // K floats or nullptr
  void* output;           // (n, K, out_h, out_w)
};

// The gradient of what is not zero in the weight.
struct GradientParams {
  Geometry geometry;
  const void* input;
  const void* grad;  // like the output, in the input's memory format
  const void*
      weight;      // (K, c, kernel_h, kernel_w) like the gradient: contiguous, in the input's dtype
  void* gradient;  // all zero before
};

// K x C kernels, any strides in elements.
struct FilterParams {
  const void* weight;
  DType dtype;
  int64_t out_channels, in_channels, kernel_h, kernel_w;
  int64_t stride_k, stride_c, stride_h, stride_w;
  // The filter of the input gradient: K and C change places, kernels turn by 180 degrees.
  bool rotate;
};

// One set of these for each instruction set (common/isa.h), defined in cpu.cpp.
struct Kernels {
  Status (*forward)(const ForwardParams&, const Executor&);
  int64_t (*size)(const FilterParams&, Pattern);
  Status (*pack)(const FilterParams&, Pattern, int32_t* packed);
  bool (*fits)(const int32_t* packed, int64_t words, const Geometry&);
};

using GradientKernel = Status (*)(const GradientParams&, const Executor&);  // of cpu_gradient.cpp

PYWINO_API Status forward(const ForwardParams&, const Executor&);
PYWINO_API Status kept_gradient(const GradientParams&, const Executor&);
// A filter without its zeros: its size in 32-bit words (-1: too many), its packing, and whether an array is such a filter for
// this geometry and the instruction set in force.
PYWINO_API int64_t filter_size(const FilterParams&, Pattern);
PYWINO_API Status pack(const FilterParams&, Pattern, int32_t* packed);
PYWINO_API bool filter_fits(const int32_t* packed, int64_t words, const Geometry&);

}  // namespace pywino::sparse_conv
