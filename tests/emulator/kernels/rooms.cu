// SPDX-License-Identifier: BSD-3-Clause
// The project's kernels and the host code that runs them in order, as one library for the tests.
#include "core/channel_attention/cuda.cu"
#include "core/conv_lstm/cuda.cu"
#include "core/masked_conv/cuda.cu"
#include "core/sparse_conv/cuda.cu"
#include "core/sparse_conv/cuda_two_of_four.cu"
#include "core/winograd/cuda.cpp"
#include "core/winograd/cuda_direct.cu"
#include "core/winograd/cuda_gradients.cu"
#include "core/winograd/cuda_product.cu"
#include "core/winograd/cuda_transforms.cu"

namespace cuda = pywino::winograd::cuda;
using pywino::winograd::Geometry;

extern "C" int attention_whole(const pywino::channel_attention::Shape* shape, int64_t hidden,
                               int tensors, int64_t* answer) {
  answer[0] = pywino::channel_attention::cuda::has_whole(*shape, hidden, tensors);
  return 0;
}

extern "C" int winograd_forward(const cuda::Forward* p, void* stream) {
  return cuda::forward(*p, stream);
}

extern "C" int winograd_mean_floats(const Geometry* g, int64_t chunk, int64_t* floats) {
  floats[0] = cuda::mean_floats(*g, chunk);
  return 0;
}

extern "C" int winograd_weight_gradient(const cuda::WeightGradient* p, void* stream) {
  return cuda::weight_gradient(*p, stream);
}

extern "C" int winograd_relu_input_gradient(const cuda::ReluInputGradient* p, void* stream) {
  return cuda::relu_input_gradient(*p, stream);
}

// numbers[0]: the parts of the weight gradient's sum, numbers[1]: the floats of their sums.
extern "C" int winograd_sums(const Geometry* g, int domain, int64_t* numbers) {
  numbers[0] = cuda::splits_of(*g, cuda::Domain(domain));
  numbers[1] = cuda::sum_floats(*g, cuda::Domain(domain));
  return 0;
}

// bytes[0]: the workspace of a launch of tiles[0] tiles, which is what `limit` bytes allow.
extern "C" int winograd_workspace(const Geometry* g, int domain, int64_t limit, int64_t* tiles,
                                  int64_t* bytes) {
  tiles[0] = cuda::tiles_within(*g, cuda::Domain(domain), limit);
  bytes[0] = cuda::workspace_bytes(*g, cuda::Domain(domain), tiles[0]);
  return 0;
}
