// SPDX-License-Identifier: BSD-3-Clause
// Convolution with a weight that has blocks of zeros on NVIDIA GPUs. Raw device pointers and a stream, no torch; a C++
// compiler without CUDA can read this file. The maths is in docs/sparse_conv.md.
//
// A block is one tap, kChannels input channels and a group of output channels. 2:4 is at most two of four neighbouring input
// channels, of every output channel and tap.
#pragma once

#include "sparse_conv.h"

namespace pywino::sparse_conv::cuda {

constexpr int kChannels = 32;

constexpr int64_t chunks_of(int64_t channels) { return (channels + kChannels - 1) / kChannels; }

struct Forward {
  Geometry
      geometry;  // channels_last; a pixel's channels are whole 16-byte chunks, and pixels are less than 2^31
  int group;    // 64 or 128 output channels of a block
  bool strict;  // fp32: 3xTF32 instead of TF32
  const void* input;
  const void*
      values;  // [block][group][kChannels], in the dtype of the input; zeros in what sticks out
  const int32_t* entries;  // of each block: tap * chunks_of(c) + which channels
  const int32_t*
      starts;  // ceil(K / group) + 1: where the blocks of each group begin, and how many there are
  const float* bias;  // K floats or nullptr
  void* output;
};

constexpr int kStep = 64;          // input channels that a step of the 2:4 product takes
constexpr int kOutChannels = 128;  // output channels of a block of it

// fp16 or bf16. A step is one tap and kStep input channels; K' is K rounded up to kOutChannels.
struct TwoOfFour {
  Geometry geometry;  // as above
  const void* input;
  const void* values;       // [step][K'][kStep / 2], the two of each four
  const int32_t* metadata;  // [step][K' / 16][32], their places (../common/sparse_gemm.cuh)
  const float* bias;        // K floats or nullptr
  void* output;
};

// fp32, zeros anywhere. The input is contiguous and has its zeros of padding: h and w count them, and pad_h = pad_w = 0. An
// image has less than 2^31 numbers.
struct Csr {
  Geometry geometry;
  const float* input;
  const float* values;     // of each output channel, those that are kept
  const int32_t* entries;  // of each value: (c * kernel_h + i) * kernel_w + j
  const int32_t* starts;   // K + 1: where each output channel begins, and how many there are
  const float* bias;       // K floats or nullptr
  float* output;           // contiguous
};

// Each returns a cudaError_t, 0 where the launch went well.
extern "C" {
PYWINO_API int pywino_sparse_conv_forward(const Forward*, void* stream);
PYWINO_API int pywino_sparse_conv_two_of_four(const TwoOfFour*, void* stream);
PYWINO_API int pywino_sparse_conv_csr(const Csr*, void* stream);
PYWINO_API const char* pywino_sparse_conv_cuda_error(int error);
}

}  // namespace pywino::sparse_conv::cuda
