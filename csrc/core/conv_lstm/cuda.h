// SPDX-License-Identifier: BSD-3-Clause
// The pointwise part of a convolutional LSTM cell on NVIDIA GPUs, with the params of the CPU's: device pointers and a stream,
// no torch; a C++ compiler without CUDA can read this file. The maths is in docs/conv_lstm.md.
#pragma once

#include "conv_lstm.h"

namespace pywino::conv_lstm::cuda {

// Each returns a cudaError_t, 0 where the launch went well.
extern "C" {
PYWINO_API int pywino_conv_lstm_forward(const ForwardParams*, void* stream);
PYWINO_API int pywino_conv_lstm_backward(const BackwardParams*, void* stream);
PYWINO_API const char* pywino_conv_lstm_cuda_error(int error);
}

}  // namespace pywino::conv_lstm::cuda
