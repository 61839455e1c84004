// SPDX-License-Identifier: BSD-3-Clause
// The host code of the Winograd kernels, as launchers that tests can call.
#include "core/winograd/cuda.h"

namespace cuda = pywino::winograd::cuda;
using pywino::winograd::Geometry;

// The product by the kernel that is chosen, or by mma.sync.
extern "C" int winograd_product(const cuda::Product* p, int wgmma, void* stream) {
  cuda::pywino_winograd_allow_wgmma(wgmma);
  const int error = cuda::pywino_winograd_product(p, stream);
  cuda::pywino_winograd_allow_wgmma(true);
  return error;
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

extern "C" int winograd_domain_input_gradient(const cuda::DomainInputGradient* p, void* stream) {
  return cuda::domain_input_gradient(*p, stream);
}

// A transform as if its tensor were the last of a batch with so many images before it, of which no memory is there: its own
// begins where that image would.
extern "C" int winograd_far_input_transform(const cuda::InputTransform* given, int64_t images,
                                            void* stream) {
  cuda::InputTransform p = *given;
  const int64_t size = p.dtype == pywino::DType::f32 ? 4 : 2;
  p.input = static_cast<const char*>(p.input) - images * p.map.stride_n * size;
  p.first += images * p.tiles.count;
  return cuda::pywino_winograd_input_transform(&p, stream);
}

extern "C" int winograd_far_output_transform(const cuda::OutputTransform* given, int64_t images,
                                             void* stream) {
  cuda::OutputTransform p = *given;
  const int64_t bytes = images * p.map.stride_n * (p.dtype == pywino::DType::f32 ? 4 : 2);
  p.output = static_cast<char*>(p.output) - bytes;
  p.residual = static_cast<const char*>(p.residual) - bytes;
  p.first += images * p.tiles.count;
  return cuda::pywino_winograd_output_transform(&p, stream);
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
