// SPDX-License-Identifier: BSD-3-Clause
// Tensor maps for the test kernels, from the driver's function, which is looked up at run time: nothing links libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

inline bool encode(CUtensorMap* map, CUtensorMapDataType type, int rank, const void* base,
                   const cuuint64_t* extent, const cuuint64_t* stride_bytes, const cuuint32_t* box,
                   CUtensorMapSwizzle swizzle) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                       cudaEnableDefault, &found) != cudaSuccess ||
      !function) {
    return false;
  }
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
             map, type, rank, const_cast<void*>(base), extent, stride_bytes, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
