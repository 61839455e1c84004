// SPDX-License-Identifier: BSD-3-Clause
// One launcher an instruction of sm_90a: TMA loads and stores, wgmma. As instructions.cu, for tests here and on a GPU.
#include "common/tensor_maps.h"
#include "common/wgmma.cuh"

using namespace pywino;

namespace {

// A tensor and a box in it, innermost dimension first. Everything int, so that ctypes has the same struct.
struct Box {
  void* tensor;
  int rank, item_bytes, swizzle;
  int extent[5], pitch_bytes[4], box[5], at[5];
};

bool map_of(const Box& b, CUtensorMap* map) {
  cuuint64_t extent[5], pitch[4];
  cuuint32_t box[5];
  for (int d = 0; d < b.rank; ++d) {
    extent[d] = b.extent[d];
    box[d] = b.box[d];
    if (d) pitch[d - 1] = b.pitch_bytes[d - 1];
  }
  const auto type = b.item_bytes == 2   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                    : b.item_bytes == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                        : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  return encode(map, type, b.rank, b.tensor, extent, pitch, box,
                static_cast<CUtensorMapSwizzle>(b.swizzle));
}

int box_bytes(const Box& b) {
  int bytes = b.item_bytes;
  for (int d = 0; d < b.rank; ++d) bytes *= b.box[d];
  return bytes;
}

struct Coordinates {
  int at[5];
};

template <int kRank>
__device__ void load_box(uint32_t tile, const CUtensorMap* map, const int* at, uint32_t barrier) {
  if constexpr (kRank == 2) ptx::tma_load_2d(tile, map, at[0], at[1], barrier);
  if constexpr (kRank == 3) ptx::tma_load_3d(tile, map, at[0], at[1], at[2], barrier);
  if constexpr (kRank == 4) ptx::tma_load_4d(tile, map, at[0], at[1], at[2], at[3], barrier);
  if constexpr (kRank == 5) ptx::tma_load_5d(tile, map, at[0], at[1], at[2], at[3], at[4], barrier);
}

// The tile as it lies in shared memory.
template <int kRank>
__global__ void tma_load(const __grid_constant__ CUtensorMap map, Coordinates c, uint32_t* out,
                         int bytes) {
  PYWINO_DYNAMIC_SHARED(uint32_t, tile);
  __shared__ uint64_t full;
  const uint32_t barrier = ptx::shared_address(&full);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier, bytes);
    load_box<kRank>(ptx::shared_address(tile), &map, c.at, barrier);
  }
  ptx::mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) out[i] = tile[i];
}

template <int kRank>
__global__ void tma_store(const __grid_constant__ CUtensorMap map, Coordinates c,
                          const uint32_t* data, int bytes) {
  PYWINO_DYNAMIC_SHARED(uint32_t, tile);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) tile[i] = data[i];
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t address = ptx::shared_address(tile);
    if constexpr (kRank == 2) ptx::tma_store_2d(&map, address, c.at[0], c.at[1]);
    if constexpr (kRank == 3) ptx::tma_store_3d(&map, address, c.at[0], c.at[1], c.at[2]);
    if constexpr (kRank == 4) ptx::tma_store_4d(&map, address, c.at[0], c.at[1], c.at[2], c.at[3]);
    ptx::tma_store_commit_group();
    ptx::tma_store_wait_group<0>();
  }
}

enum Type { kF16, kBf16, kTf32 };

template <Type kType, int kColumns, class A>
__device__ void multiply(float (&d)[kColumns / 2], const A& a, uint64_t b, int scale_d) {
#define PYWINO_CASE(type, n, instruction) \
  if constexpr (kType == type && kColumns == n) ptx::instruction(d, a, b, scale_d)
  PYWINO_CASE(kF16, 64, wgmma_m64n64k16_f16);
  PYWINO_CASE(kF16, 128, wgmma_m64n128k16_f16);
  PYWINO_CASE(kF16, 256, wgmma_m64n256k16_f16);
  PYWINO_CASE(kBf16, 64, wgmma_m64n64k16_bf16);
  PYWINO_CASE(kBf16, 128, wgmma_m64n128k16_bf16);
  PYWINO_CASE(kBf16, 256, wgmma_m64n256k16_bf16);
  PYWINO_CASE(kTf32, 64, wgmma_m64n64k8_tf32);
  PYWINO_CASE(kTf32, 128, wgmma_m64n128k8_tf32);
  PYWINO_CASE(kTf32, 256, wgmma_m64n256k8_tf32);
#undef PYWINO_CASE
}

// d (64 x kColumns) = a b^T of rows of 128 bytes: four instructions of 32 bytes each. a and b come by TMA, and a as the
// fragments [step][thread][4] too. start[i]: what d holds before, added where `add` is.
template <Type kType, int kColumns, bool kRegisters>
__global__ void __launch_bounds__(128)
    wgmma(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
          const uint32_t* a_fragments, float* d_fragments, int add) {
  PYWINO_DYNAMIC_SHARED(unsigned char, tiles);
  __shared__ uint64_t full;
  const uint32_t barrier = ptx::shared_address(&full);
  const uint32_t a_tile = ptx::shared_address(tiles), b_tile = a_tile + 64 * 128;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier, (64 + kColumns) * 128);
    ptx::tma_load_2d(a_tile, &a_map, 0, 0, barrier);
    ptx::tma_load_2d(b_tile, &b_map, 0, 0, barrier);
  }
  float d[kColumns / 2];
  for (int i = 0; i < kColumns / 2; ++i) d[i] = d_fragments[threadIdx.x * (kColumns / 2) + i];
  uint32_t a[4][4];
  for (int step = 0; step < 4; ++step) {
    for (int r = 0; r < 4; ++r) a[step][r] = a_fragments[(step * 128 + threadIdx.x) * 4 + r];
  }
  ptx::mbarrier_wait(barrier, 0);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const uint64_t b = ptx::matrix_descriptor_128b(b_tile + 32 * step);
    if constexpr (kRegisters) {
      multiply<kType, kColumns>(d, a[step], b, step > 0 || add);
    } else {
      const uint64_t a_matrix = ptx::matrix_descriptor_128b(a_tile + 32 * step);
      multiply<kType, kColumns>(d, a_matrix, b, step > 0 || add);
    }
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  for (int i = 0; i < kColumns / 2; ++i) d_fragments[threadIdx.x * (kColumns / 2) + i] = d[i];
}

__global__ void descriptor(uint64_t* out) { *out = ptx::matrix_descriptor_128b(0); }

cudaStream_t of(void* stream) { return static_cast<cudaStream_t>(stream); }

template <Type kType, int kColumns, bool kRegisters>
int start_wgmma(const Box* a, const Box* b, const uint32_t* a_fragments, float* d, int add,
                void* stream) {
  CUtensorMap a_map, b_map;
  if (!map_of(*a, &a_map) || !map_of(*b, &b_map)) return cudaErrorInvalidValue;
  const size_t bytes = (64 + kColumns) * 128;
  cudaFuncSetAttribute(reinterpret_cast<const void*>(wgmma<kType, kColumns, kRegisters>),
                       cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  PYWINO_LAUNCH((wgmma<kType, kColumns, kRegisters>), dim3(1), dim3(128), bytes, of(stream), a_map,
                b_map, a_fragments, d, add);
  return cudaGetLastError();
}

template <Type kType, int kColumns>
int start_wgmma(int registers, const Box* a, const Box* b, const uint32_t* a_fragments, float* d,
                int add, void* stream) {
  return registers ? start_wgmma<kType, kColumns, true>(a, b, a_fragments, d, add, stream)
                   : start_wgmma<kType, kColumns, false>(a, b, a_fragments, d, add, stream);
}

template <Type kType>
int start_wgmma(int columns, int registers, const Box* a, const Box* b, const uint32_t* a_fragments,
                float* d, int add, void* stream) {
  switch (columns) {
    case 64: return start_wgmma<kType, 64>(registers, a, b, a_fragments, d, add, stream);
    case 128: return start_wgmma<kType, 128>(registers, a, b, a_fragments, d, add, stream);
    case 256: return start_wgmma<kType, 256>(registers, a, b, a_fragments, d, add, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

extern "C" int tma_load_launch(const Box* b, uint32_t* out, void* stream) {
  CUtensorMap map;
  if (!map_of(*b, &map)) return cudaErrorInvalidValue;
  Coordinates c;
  for (int d = 0; d < 5; ++d) c.at[d] = b->at[d];
  const int bytes = box_bytes(*b);
  const dim3 grid(1), block(64);
  switch (b->rank) {
    case 2: PYWINO_LAUNCH((tma_load<2>), grid, block, bytes, of(stream), map, c, out, bytes); break;
    case 3: PYWINO_LAUNCH((tma_load<3>), grid, block, bytes, of(stream), map, c, out, bytes); break;
    case 4: PYWINO_LAUNCH((tma_load<4>), grid, block, bytes, of(stream), map, c, out, bytes); break;
    case 5: PYWINO_LAUNCH((tma_load<5>), grid, block, bytes, of(stream), map, c, out, bytes); break;
  }
  return cudaGetLastError();
}

extern "C" int tma_store_launch(const Box* b, const uint32_t* data, void* stream) {
  CUtensorMap map;
  if (!map_of(*b, &map)) return cudaErrorInvalidValue;
  Coordinates c;
  for (int d = 0; d < 5; ++d) c.at[d] = b->at[d];
  const int bytes = box_bytes(*b);
  const dim3 grid(1), block(64);
  switch (b->rank) {
    case 2:
      PYWINO_LAUNCH((tma_store<2>), grid, block, bytes, of(stream), map, c, data, bytes);
      break;
    case 3:
      PYWINO_LAUNCH((tma_store<3>), grid, block, bytes, of(stream), map, c, data, bytes);
      break;
    case 4:
      PYWINO_LAUNCH((tma_store<4>), grid, block, bytes, of(stream), map, c, data, bytes);
      break;
  }
  return cudaGetLastError();
}

extern "C" int wgmma_launch(int type, int columns, int registers, const Box* a, const Box* b,
                            const uint32_t* a_fragments, float* d, int add, void* stream) {
  switch (type) {
    case kF16: return start_wgmma<kF16>(columns, registers, a, b, a_fragments, d, add, stream);
    case kBf16: return start_wgmma<kBf16>(columns, registers, a, b, a_fragments, d, add, stream);
    case kTf32: return start_wgmma<kTf32>(columns, registers, a, b, a_fragments, d, add, stream);
  }
  return cudaErrorInvalidValue;
}

extern "C" int descriptor_launch(uint64_t* out, void* stream) {
  PYWINO_LAUNCH((descriptor), dim3(1), dim3(1), 0, of(stream), out);
  return cudaGetLastError();
}
