// SPDX-License-Identifier: BSD-3-Clause
// One launcher an instruction of ptx.cuh: what each lane brings comes in, what each lane gets goes out, so that a test can
// hold the layout against a table, in the emulator and on a GPU.
#include "common/ptx.cuh"

using namespace pywino;

namespace {

// a, b: [lane][register]. d: [lane][4], in and out.
template <int kARegisters, int kBRegisters, class Instruction>
__device__ void run_mma(const uint32_t* a, const uint32_t* b, float* d, Instruction instruction) {
  const int lane = threadIdx.x;
  uint32_t a_registers[kARegisters], b_registers[kBRegisters];
  float d_registers[4];
  for (int r = 0; r < kARegisters; ++r) a_registers[r] = a[lane * kARegisters + r];
  for (int r = 0; r < kBRegisters; ++r) b_registers[r] = b[lane * kBRegisters + r];
  for (int i = 0; i < 4; ++i) d_registers[i] = d[lane * 4 + i];
  instruction(d_registers, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = d_registers[i];
}

enum Mma { kF16, kBf16, kTf32 };

template <Mma kType>
__global__ void mma(const uint32_t* a, const uint32_t* b, float* d) {
  run_mma<4, 2>(a, b, d, [](float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (kType == kF16) ptx::mma_m16n8k16_f16(d, a, b);
    if constexpr (kType == kBf16) ptx::mma_m16n8k16_bf16(d, a, b);
    if constexpr (kType == kTf32) ptx::mma_m16n8k8_tf32(d, a, b);
  });
}

template <Mma kType, int kSelector>
__global__ void mma_sp(const uint32_t* a, const uint32_t* b, const uint32_t* metadata, float* d) {
  const uint32_t own = metadata[threadIdx.x];
  run_mma<4, 4>(a, b, d, [own](float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    if constexpr (kType == kF16) ptx::mma_sp_m16n8k32_f16<kSelector>(d, a, b, own);
    if constexpr (kType == kBf16) ptx::mma_sp_m16n8k32_bf16<kSelector>(d, a, b, own);
  });
}

// data: 512 bytes to shared memory. rows[lane]: where in them the row of this lane begins.
template <bool kTrans>
__global__ void ldmatrix(const uint32_t* data, const int* rows, uint32_t* out) {
  __shared__ __align__(16) uint32_t tile[128];
  const int lane = threadIdx.x;
  for (int i = lane; i < 128; i += 32) tile[i] = data[i];
  __syncthreads();
  uint32_t r[4];
  const uint32_t address = ptx::shared_address(tile) + rows[lane];
  if constexpr (kTrans) {
    ptx::ldmatrix_x4_trans(r, address);
  } else {
    ptx::ldmatrix_x4(r, address);
  }
  for (int m = 0; m < 4; ++m) out[lane * 4 + m] = r[m];
}

// Lane l copies bytes[l] bytes of source row order[l] to row l, in two groups; the rows are read after the first group has
// come, and after the second.
__global__ void cp_async(const uint4* source, const int* bytes, const int* order, uint4* first,
                         uint4* both) {
  __shared__ __align__(16) uint4 tile[64];
  const int lane = threadIdx.x;
  ptx::cp_async_16(ptx::shared_address(&tile[lane]), &source[order[lane]], bytes[lane]);
  ptx::cp_async_commit_group();
  ptx::cp_async_16(ptx::shared_address(&tile[32 + lane]), &source[lane], 16);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<1>();
  __syncthreads();
  ptx::store(&first[lane], ptx::load<uint4>(&tile[31 - lane]));
  ptx::cp_async_wait_group<0>();
  __syncthreads();
  ptx::store(&both[lane], ptx::load<uint4>(&tile[32 + 31 - lane]));
}

__global__ void to_tf32(const float* x, uint32_t* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = ptx::to_tf32(x[i]);
}

// Warps 0 and 1 hand numbers over to warps 2 and 3, which add them up: a full and an empty named barrier.
__global__ void named_barriers(const int* x, int* sums, int rounds) {
  __shared__ int box[64];
  const int t = threadIdx.x % 64;
  const bool produces = threadIdx.x < 64;
  constexpr int kFull = 1, kEmpty = 2;
  int sum = 0;
  for (int i = 0; i < rounds; ++i) {
    if (produces) {
      if (i > 0) ptx::named_barrier_sync(kEmpty, 128);
      box[t] = x[i * 64 + t];
      ptx::named_barrier_arrive(kFull, 128);
    } else {
      ptx::named_barrier_sync(kFull, 128);
      sum += box[63 - t];
      if (i + 1 < rounds) ptx::named_barrier_arrive(kEmpty, 128);
    }
  }
  if (!produces) sums[t] = sum;
}

}  // namespace

extern "C" int mma_launch(int type, const uint32_t* a, const uint32_t* b, float* d, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (type) {
    case kF16: PYWINO_LAUNCH((mma<kF16>), dim3(1), dim3(32), 0, s, a, b, d); break;
    case kBf16: PYWINO_LAUNCH((mma<kBf16>), dim3(1), dim3(32), 0, s, a, b, d); break;
    case kTf32: PYWINO_LAUNCH((mma<kTf32>), dim3(1), dim3(32), 0, s, a, b, d); break;
  }
  return cudaGetLastError();
}

extern "C" int mma_sp_launch(int type, int selector, const uint32_t* a, const uint32_t* b,
                             const uint32_t* metadata, float* d, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (type == kF16 && selector == 0) {
    PYWINO_LAUNCH((mma_sp<kF16, 0>), dim3(1), dim3(32), 0, s, a, b, metadata, d);
  } else if (type == kF16) {
    PYWINO_LAUNCH((mma_sp<kF16, 1>), dim3(1), dim3(32), 0, s, a, b, metadata, d);
  } else if (selector == 0) {
    PYWINO_LAUNCH((mma_sp<kBf16, 0>), dim3(1), dim3(32), 0, s, a, b, metadata, d);
  } else {
    PYWINO_LAUNCH((mma_sp<kBf16, 1>), dim3(1), dim3(32), 0, s, a, b, metadata, d);
  }
  return cudaGetLastError();
}

extern "C" int ldmatrix_launch(int trans, const uint32_t* data, const int* rows, uint32_t* out,
                               void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (trans) {
    PYWINO_LAUNCH((ldmatrix<true>), dim3(1), dim3(32), 0, s, data, rows, out);
  } else {
    PYWINO_LAUNCH((ldmatrix<false>), dim3(1), dim3(32), 0, s, data, rows, out);
  }
  return cudaGetLastError();
}

extern "C" int cp_async_launch(const uint4* source, const int* bytes, const int* order,
                               uint4* first, uint4* both, void* stream) {
  PYWINO_LAUNCH((cp_async), dim3(1), dim3(32), 0, static_cast<cudaStream_t>(stream), source, bytes,
                order, first, both);
  return cudaGetLastError();
}

extern "C" int to_tf32_launch(const float* x, uint32_t* y, int n, void* stream) {
  PYWINO_LAUNCH((to_tf32), dim3((n + 127) / 128), dim3(128), 0, static_cast<cudaStream_t>(stream),
                x, y, n);
  return cudaGetLastError();
}

extern "C" int named_barriers_launch(const int* x, int* sums, int rounds, void* stream) {
  PYWINO_LAUNCH((named_barriers), dim3(1), dim3(128), 0, static_cast<cudaStream_t>(stream), x, sums,
                rounds);
  return cudaGetLastError();
}
