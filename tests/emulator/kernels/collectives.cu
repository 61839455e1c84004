// SPDX-License-Identifier: BSD-3-Clause
// What CUDA C++ has built in: indices, barriers, warp collectives, atomics, static shared memory, half and bf16.
#include "common/launch.cuh"

namespace {

constexpr unsigned kAll = 0xffffffffu;

// out[linear thread of the grid] = its indices and sizes, packed.
__global__ void identity(int* out) {
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int* mine = out + (block * threads + thread) * 6;
  mine[0] = threadIdx.x, mine[1] = threadIdx.y, mine[2] = threadIdx.z;
  mine[3] = blockIdx.x, mine[4] = blockIdx.y, mine[5] = blockIdx.z;
}

template <class T>
__global__ void shuffle(const T* x, const int* source, T* out, int width) {
  const int lane = threadIdx.x;
  const T mine = x[lane];
  out[lane] = __shfl_sync(kAll, mine, source[lane], width);
  out[32 + lane] = __shfl_up_sync(kAll, mine, source[0] & 7, width);
  out[64 + lane] = __shfl_down_sync(kAll, mine, source[0] & 7, width);
  out[96 + lane] = __shfl_xor_sync(kAll, mine, 5, width);
}

// Every warp splits in two halves that vote and reduce by themselves.
__global__ void votes(const int* x, unsigned* out) {
  const int lane = threadIdx.x % 32;
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  const int mine = x[threadIdx.x];
  unsigned* row = out + threadIdx.x * 9;
  if (lane < 16) {
    row[0] = __ballot_sync(mask, mine > 0);
    row[1] = __any_sync(mask, mine > 90);
  } else {
    row[0] = __ballot_sync(mask, mine > 0);
    row[1] = __any_sync(mask, mine > 90);
  }
  __syncwarp();
  row[2] = __all_sync(mask, mine > -90);
  row[3] = __reduce_add_sync(mask, mine);
  row[4] = __reduce_min_sync(mask, mine);
  row[5] = __reduce_max_sync(mask, static_cast<unsigned>(mine));
  row[6] = __reduce_and_sync(mask, static_cast<unsigned>(mine));
  row[7] = __reduce_or_sync(mask, static_cast<unsigned>(mine));
  row[8] = __reduce_xor_sync(mask, static_cast<unsigned>(mine));
}

__global__ void block_votes(const int* x, int* out) {
  const int mine = x[blockIdx.x * blockDim.x + threadIdx.x];
  int* row = out + (blockIdx.x * blockDim.x + threadIdx.x) * 3;
  row[0] = __syncthreads_or(mine > 90);
  row[1] = __syncthreads_and(mine > -90);
  row[2] = __syncthreads_count(mine > 0);
}

// Sums and counts with static shared memory of a template, a last warp that is not full, and atomics between blocks.
template <int kThreads>
__global__ void block_sum(const float* x, float* sum, int* positive, int n) {
  __shared__ float parts[(kThreads + 31) / 32];
  __shared__ int count;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const int width = min(32, kThreads - static_cast<int>(threadIdx.x) / 32 * 32);  // a power of two
  const unsigned lanes = width == 32 ? kAll : (1u << width) - 1;
  float v = i < n ? x[i] : 0.f;
  if (threadIdx.x == 0) count = 0;
  const unsigned votes = __ballot_sync(lanes, v > 0.f);
  for (int step = width / 2; step; step /= 2) v += __shfl_down_sync(lanes, v, step, width);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    parts[threadIdx.x / 32] = v;
    atomicAdd(&count, __popc(votes));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < (kThreads + 31) / 32; ++w) v += parts[w];
    atomicAdd(sum, v);
    atomicAdd(positive, count);
  }
}

__global__ void atomics(const int* x, int* out, float* largest, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  atomicAdd(&out[0], x[i]);
  atomicSub(&out[1], x[i]);
  atomicMin(&out[2], x[i]);
  atomicMax(&out[3], x[i]);
  atomicAnd(&out[4], x[i]);
  atomicOr(&out[5], x[i]);
  atomicXor(&out[6], x[i]);
  atomicExch(&out[7], 7);
  // The largest float by compare-and-swap on its bits.
  int* bits = reinterpret_cast<int*>(largest);
  int seen = atomicAdd(bits, 0);
  while (__int_as_float(seen) < static_cast<float>(x[i])) {
    const int before = atomicCAS(bits, seen, __float_as_int(static_cast<float>(x[i])));
    if (before == seen) break;
    seen = before;
  }
}

// Lanes leave one after another; those that stay go on meeting.
__global__ void early_exit(int* out) {
  __shared__ int turn[2];
  for (int i = 0; i < 32; ++i) {
    if (threadIdx.x % 32 == i) return;
    if (threadIdx.x % 32 == 31) turn[threadIdx.x / 32] = i;
    __syncwarp();
    out[threadIdx.x] = turn[threadIdx.x / 32];
    __syncwarp();
  }
}

__global__ void halves(const __half2* x, const __nv_bfloat162* y, __half2* a, __nv_bfloat162* b) {
  const int i = threadIdx.x;
  a[3 * i] = __hfma2(x[i], x[i], x[i]);
  a[3 * i + 1] = __hmax2(x[i] + x[i], __float2half2_rn(0.f));
  a[3 * i + 2] = __floats2half2_rn(__low2float(x[i]) * 3.f, __high2float(x[i]) / 3.f);
  b[3 * i] = __hfma2(y[i], y[i], y[i]);
  b[3 * i + 1] = __hmax2(y[i] + y[i], __float2bfloat162_rn(0.f));
  b[3 * i + 2] = __floats2bfloat162_rn(__low2float(y[i]) * 3.f, __high2float(y[i]) / 3.f);
}

// Each warp waits for the one behind it, which may not have begun.
__global__ void spin(int* out) {
  __shared__ int turn;
  const int warp = threadIdx.x / 32, last = blockDim.x / 32 - 1;
  if (threadIdx.x == 0) turn = last;
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    while (atomicAdd(&turn, 0) != warp) {
    }
    atomicAdd(&out[warp], last - warp);
    atomicSub(&turn, 1);
  }
}

__global__ void nothing() {}

cudaStream_t of(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

extern "C" int identity_launch(int* out, void* stream) {
  PYWINO_LAUNCH((identity), dim3(2, 3, 4), dim3(5, 3, 2), 0, of(stream), out);
  return cudaGetLastError();
}

extern "C" int shuffle_float_launch(const float* x, const int* source, float* out, int width,
                                    void* stream) {
  PYWINO_LAUNCH((shuffle<float>), dim3(1), dim3(32), 0, of(stream), x, source, out, width);
  return cudaGetLastError();
}

extern "C" int shuffle_double_launch(const double* x, const int* source, double* out, int width,
                                     void* stream) {
  PYWINO_LAUNCH((shuffle<double>), dim3(1), dim3(32), 0, of(stream), x, source, out, width);
  return cudaGetLastError();
}

extern "C" int votes_launch(const int* x, unsigned* out, int threads, void* stream) {
  PYWINO_LAUNCH((votes), dim3(1), dim3(threads), 0, of(stream), x, out);
  return cudaGetLastError();
}

extern "C" int block_votes_launch(const int* x, int* out, int blocks, int threads, void* stream) {
  PYWINO_LAUNCH((block_votes), dim3(blocks), dim3(threads), 0, of(stream), x, out);
  return cudaGetLastError();
}

extern "C" int block_sum_launch(const float* x, float* sum, int* positive, int n, int full,
                                void* stream) {
  if (full) {
    PYWINO_LAUNCH((block_sum<256>), dim3((n + 255) / 256), dim3(256), 0, of(stream), x, sum,
                  positive, n);
  } else {
    PYWINO_LAUNCH((block_sum<100>), dim3((n + 99) / 100), dim3(100), 0, of(stream), x, sum,
                  positive, n);
  }
  return cudaGetLastError();
}

extern "C" int atomics_launch(const int* x, int* out, float* largest, int n, void* stream) {
  PYWINO_LAUNCH((atomics), dim3((n + 63) / 64), dim3(64), 0, of(stream), x, out, largest, n);
  return cudaGetLastError();
}

extern "C" int early_exit_launch(int* out, void* stream) {
  PYWINO_LAUNCH((early_exit), dim3(1), dim3(64), 0, of(stream), out);
  return cudaGetLastError();
}

extern "C" int spin_launch(int* out, int warps, void* stream) {
  PYWINO_LAUNCH((spin), dim3(1), dim3(32 * warps), 0, of(stream), out);
  return cudaGetLastError();
}

extern "C" int nothing_launch(int blocks, int threads, int shared_bytes, int allowed_bytes,
                              void* stream) {
  const auto status =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(nothing),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, allowed_bytes);
  if (status != cudaSuccess) return status;
  PYWINO_LAUNCH((nothing), dim3(blocks), dim3(threads), shared_bytes, of(stream));
  return cudaGetLastError();
}

extern "C" int halves_launch(const __half2* x, const __nv_bfloat162* y, __half2* a,
                             __nv_bfloat162* b, void* stream) {
  PYWINO_LAUNCH((halves), dim3(1), dim3(32), 0, of(stream), x, y, a, b);
  return cudaGetLastError();
}
