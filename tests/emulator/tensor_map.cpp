// SPDX-License-Identifier: BSD-3-Clause
#include "tensor_map.h"

#include <cuda_runtime.h>

#include <cstring>

namespace {

int bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32: return 4;
    default: return 0;
  }
}

bool supported(CUtensorMapSwizzle swizzle) { return swizzle <= CU_TENSOR_MAP_SWIZZLE_128B; }

}  // namespace

// The driver's function, with the driver's refusals (CUDA driver API, "Tensor Map Object Management"). What this emulator
// has not (interleaving, steps in the box, NaN fill) is refused as well.
extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type,
                                           cuuint32_t rank, void* base, const cuuint64_t* extent,
                                           const cuuint64_t* stride, const cuuint32_t* box,
                                           const cuuint32_t* step, CUtensorMapInterleave interleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill fill) {
  const int item_bytes = bytes_of(type);
  if (!item_bytes || rank < 1 || rank > emu::kMaxRank || !supported(swizzle) ||
      interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE ||
      reinterpret_cast<uintptr_t>(map) % 64 || reinterpret_cast<uintptr_t>(base) % 16) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  emu::TensorMap encoded = {};
  encoded.magic = emu::kTensorMapMagic;
  encoded.rank = static_cast<uint8_t>(rank);
  encoded.item_bytes = static_cast<uint8_t>(item_bytes);
  encoded.swizzle = static_cast<emu::Swizzle>(swizzle);
  encoded.base = static_cast<char*>(base);
  for (cuuint32_t d = 0; d < rank; ++d) {
    if (extent[d] < 1 || extent[d] > 1ull << 32 || box[d] < 1 || box[d] > 256 || step[d] != 1) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    encoded.extent[d] = extent[d];
    encoded.box[d] = static_cast<uint16_t>(box[d]);
    if (d == 0) continue;
    if (stride[d - 1] % 16 || stride[d - 1] >= 1ull << 40) return CUDA_ERROR_INVALID_VALUE;
    encoded.stride[d - 1] = stride[d - 1];
  }
  const cuuint32_t row_bytes = box[0] * item_bytes;
  const cuuint32_t row_limit = 16u << static_cast<int>(swizzle);  // 32, 64, 128 bytes
  if (row_bytes % 16 || (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && row_bytes > row_limit)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::memset(static_cast<void*>(map), 0, sizeof *map);
  std::memcpy(static_cast<void*>(map), &encoded, sizeof encoded);
  return CUDA_SUCCESS;
}

// How a library that does not link the driver finds it.
extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function,
                                                        unsigned int, unsigned long long,
                                                        cudaDriverEntryPointQueryResult* result) {
  const bool found = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = found ? reinterpret_cast<void*>(cuTensorMapEncodeTiled) : nullptr;
  if (result) *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
