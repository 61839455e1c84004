// SPDX-License-Identifier: BSD-3-Clause
// Convolution of the pixels of a mask on NVIDIA GPUs. Raw device pointers and a stream, no torch; a C++ compiler without CUDA
// can read this file. The maths is in docs/masked_conv.md.
//
// How many pixels the mask has is known to the device alone: nothing here waits for it.
#pragma once

#include "masked_conv.h"

namespace pywino::masked_conv::cuda {

// Pixels that a block of the compaction looks at, a thread each.
constexpr int kListed = 1024;

constexpr int64_t list_blocks(int64_t pixels) { return (pixels + kListed - 1) / kListed; }
// Channels of a row of the product, C': whole 16-byte chunks.
constexpr int64_t padded(int64_t channels, int64_t element_size) {
  const int64_t chunk = 16 / element_size;
  return (channels + chunk - 1) / chunk * chunk;
}

// The pixels of a mask, fewer than 2^31 of them.
struct List {
  int64_t pixels;       // n h w
  const uint8_t* mask;  // a byte each, 0 or 1
  // list_blocks(pixels) + 1 numbers: where the pixels of each block begin in `list`; the last one is how many there are.
  int32_t* starts;
  int32_t* list;   // the numbers (image h + y) w + x of those in the mask, rising
  int32_t* place;  // of each pixel in `list`, or -1
};

struct Forward {
  Geometry geometry;
  List list;
  bool strict;  // fp32: 3xTF32 instead of TF32
  const void* input;
  // The channels of the pixels in the mask, C' apart: n h w C' elements of workspace. nullptr: the input is channels_last, its
  // pixels are whole 16-byte chunks, and are read where they lie.
  void* rows;
  const void* filter;  // [K][kernel_h][kernel_w][C'], in the dtype of the input
  const float* bias;   // K floats or nullptr
  void* output;
};

// Each returns a cudaError_t, 0 where the launch went well.
extern "C" {
PYWINO_API int pywino_masked_conv_list(const List*, void* stream);
PYWINO_API int pywino_masked_conv_forward(const Forward*, void* stream);
PYWINO_API const char* pywino_masked_conv_cuda_error(int error);
}

}  // namespace pywino::masked_conv::cuda
