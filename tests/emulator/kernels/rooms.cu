// SPDX-License-Identifier: BSD-3-Clause
// The project's kernels and the host code that runs them in order, as one library for the tests.
#ifdef PYWINO_EMULATOR
#define PYWINO_HAVE_SM90A 1  // on a GPU, gpu.py says so
#endif
#include "core/channel_attention/cuda.cu"
#include "core/conv_lstm/cuda.cu"
#include "core/masked_conv/cuda.cu"
#include "core/sparse_conv/cuda.cu"
#include "core/sparse_conv/cuda_csr.cu"
#include "core/sparse_conv/cuda_two_of_four.cu"
#include "core/winograd/cuda.cpp"
#include "core/winograd/cuda_direct.cu"
#include "core/winograd/cuda_gradients.cu"
#include "core/winograd/cuda_nchw.cu"
#include "core/winograd/cuda_product.cu"
#include "core/winograd/cuda_sparse_product.cu"
#include "core/winograd/cuda_transforms.cu"
#ifdef PYWINO_HAVE_SM90A
#include "core/winograd/cuda_product_sm90.cu"
#endif

#include "winograd_launchers.cu"

extern "C" int attention_whole(const pywino::channel_attention::Shape* shape, int64_t hidden,
                               int tensors, int64_t* answer) {
  answer[0] = pywino::channel_attention::cuda::has_whole(*shape, hidden, tensors);
  return 0;
}
