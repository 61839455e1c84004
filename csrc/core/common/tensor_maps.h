// SPDX-License-Identifier: BSD-3-Clause
// Tensor maps for TMA, made on the host by the driver's function, which is looked up at run time: nothing links libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

namespace pywino {

// cuTensorMapEncodeTiled, or nullptr where the driver has none (it came with CUDA 12).
inline auto tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found) != cudaSuccess)
      function = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// Innermost dimension first; strides in bytes, from the second dimension on. False where the driver refuses.
inline bool encode(CUtensorMap* map, CUtensorMapDataType type, int rank, const void* base,
                   const cuuint64_t* extent, const cuuint64_t* stride_bytes, const cuuint32_t* box,
                   CUtensorMapSwizzle swizzle) {
  const auto encoder = tensor_map_encoder();
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  return encoder &&
         encoder(map, type, rank, const_cast<void*>(base), extent, stride_bytes, box, steps,
                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace pywino
