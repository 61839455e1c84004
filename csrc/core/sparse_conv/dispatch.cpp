// SPDX-License-Identifier: BSD-3-Clause
#include "sparse_conv.h"

namespace pywino::sparse_conv {

PYWINO_CHOOSE_COPY(Kernels, kernels)
PYWINO_CHOOSE_COPY(GradientKernel, gradient_kernel)

Status kept_gradient(const GradientParams& params, const Executor& executor) {
  return gradient_kernel()(params, executor);
}
Status forward(const ForwardParams& params, const Executor& executor) {
  return kernels().forward(params, executor);
}
int64_t filter_size(const FilterParams& params, Pattern pattern) {
  return kernels().size(params, pattern);
}
Status pack(const FilterParams& params, Pattern pattern, int32_t* packed) {
  return kernels().pack(params, pattern, packed);
}
bool filter_fits(const int32_t* packed, int64_t words, const Geometry& geometry) {
  return kernels().fits(packed, words, geometry);
}

}  // namespace pywino::sparse_conv
