// SPDX-License-Identifier: BSD-3-Clause
#include "masked_conv.h"

namespace pywino::masked_conv {

PYWINO_CHOOSE_COPY(Kernels, kernels)

Status forward(const ForwardParams& params, const Executor& executor) {
  return kernels().forward(params, executor);
}
int64_t filter_size(const FilterParams& params) { return kernels().size(params); }
void pack(const FilterParams& params, float* packed) { kernels().pack(params, packed); }

int64_t count(const uint8_t* mask, int64_t size) {
  int64_t pixels = 0;
  for (int64_t q = 0; q < size; ++q) pixels += mask[q] != 0;
  return pixels;
}

void list_pixels(const uint8_t* mask, int64_t size, int32_t* list, int32_t* place) {
  int32_t pixels = 0;
  for (int64_t q = 0; q < size; ++q) {
    place[q] = mask[q] ? pixels : -1;
    if (mask[q]) list[pixels++] = int32_t(q);
  }
}

}  // namespace pywino::masked_conv
