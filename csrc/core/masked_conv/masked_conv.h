// SPDX-License-Identifier: BSD-3-Clause
// Convolution of the pixels of a mask, on the CPU. Raw pointers, no torch.
//
//   Y[k, p] = m[p] (b[k] + sum over (c, i, j) of W[k, c, i, j] m[q] X[c, q]),   q = p + (i d - pad_h, j d - pad_w)
#pragma once

#include <cstdint>

#include "../common/copies.h"
#include "../common/dtype.h"
#include "../common/executor.h"
#include "../common/isa.h"

namespace pywino::masked_conv {

enum class Status : int { ok, out_of_memory };

struct Geometry {
  int64_t n, c, h, w;          // of the input; the output is (n, K, h, w)
  int64_t out_channels;        // K
  int64_t kernel_h, kernel_w;  // >= 1
  int64_t pad_h, pad_w;        // zeros before the first row and column
  int64_t dil_h, dil_w;        // >= 1
  bool channels_last;          // of input and output
  DType dtype;                 // of input and output; the arithmetic is fp32
};

// The pixels of a mask: where they are, and which is which.
struct Pixels {
  const int32_t* list;   // their numbers (image h + y) w + x, rising
  const int32_t* place;  // n h w: the place of a pixel in `list`, or -1
  int64_t count;
};

struct ForwardParams {
  Geometry geometry;
  Pixels pixels;
  const void* input;
  const float* filter;  // from pack, by the same instruction set
  const float* bias;    // K floats or nullptr
  float* rows;          // count * c floats of workspace; not read where channels_last
  void* output;
};

// K x C kernels, any strides in elements.
struct FilterParams {
  const void* weight;
  DType dtype;
  int64_t out_channels, in_channels, kernel_h, kernel_w;
  int64_t stride_k, stride_c, stride_h, stride_w;
};

// One set of these for each instruction set (common/isa.h), defined in cpu.cpp.
struct Kernels {
  Status (*forward)(const ForwardParams&, const Executor&);
  int64_t (*size)(const FilterParams&);
  void (*pack)(const FilterParams&, float* packed);
};

PYWINO_API Status forward(const ForwardParams&, const Executor&);
// The packed filter: its size in floats, and its packing.
PYWINO_API int64_t filter_size(const FilterParams&);
PYWINO_API void pack(const FilterParams&, float* packed);

// Of a mask of `size` bytes, 0 or 1: how many are 1, and the two tables of Pixels.
PYWINO_API int64_t count(const uint8_t* mask, int64_t size);
PYWINO_API void list_pixels(const uint8_t* mask, int64_t size, int32_t* list, int32_t* place);

}  // namespace pywino::masked_conv
