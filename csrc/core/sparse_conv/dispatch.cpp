// SPDX-License-Identifier: BSD-3-Clause
#include "sparse_conv.h"

namespace pywino::sparse_conv {

#define PYWINO_DECLARE(name)                       \
  extern const Kernels sparse_conv_kernels_##name; \
  extern const GradientKernel sparse_conv_gradient_##name;
PYWINO_EACH_ISA(PYWINO_DECLARE)

namespace {

#define PYWINO_KERNELS(name) \
  case Isa::name: return sparse_conv_kernels_##name;
const Kernels& kernels() {
  switch (isa()) {
    PYWINO_EACH_ISA(PYWINO_KERNELS)
    default: return sparse_conv_kernels_portable;
  }
}

#define PYWINO_GRADIENT(name) \
  case Isa::name: return sparse_conv_gradient_##name;
GradientKernel gradient_kernel() {
  switch (isa()) {
    PYWINO_EACH_ISA(PYWINO_GRADIENT)
    default: return sparse_conv_gradient_portable;
  }
}

}  // namespace

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
