// SPDX-License-Identifier: BSD-3-Clause
// Kernels with one fault each, and their neighbours without. What the emulator must say stands behind the line at fault:
//   // expect: KIND           in check mode, at this line
//   // expect fast: KIND      in fast mode too
// A case without such a line is a control: nothing must be reported in it. Cases run with 128 threads, `g` has n floats.
#include "common/wgmma.cuh"

using namespace pywino;

namespace {

constexpr unsigned kAll = 0xffffffffu;

template <int kCase>
__global__ void fault(float* g, const float* input, int n) {
  PYWINO_DYNAMIC_SHARED(float, dynamic);
  __shared__ __align__(128) float s[128];
  const int t = threadIdx.x;
  const int lane = t % 32;
  const uint32_t address = ptx::shared_address(dynamic);

  // --- Races
  if constexpr (kCase == 0) {  // two threads write one word
    s[t / 2] = t;              // expect: RACE
    __syncthreads();
    g[t] = s[t / 2];
  }
  if constexpr (kCase == 1) {  // read without a barrier
    s[t] = t;
    g[t] = s[127 - t];  // expect: RACE
  }
  if constexpr (kCase == 2) {  // control
    s[t] = t;
    __syncthreads();
    g[t] = s[127 - t];
  }
  if constexpr (kCase == 3) {  // written again before all have read
    s[t] = t;
    __syncthreads();
    g[t] = s[127 - t];
    s[t] = 0;  // expect: RACE
  }
  if constexpr (kCase == 4) {  // in one warp: no __syncwarp
    s[t] = t;
    g[t] = s[t ^ 1];  // expect: RACE
  }
  if constexpr (kCase == 5) {  // control
    s[t] = t;
    __syncwarp();
    g[t] = s[t ^ 1];
  }
  if constexpr (kCase == 6) {  // __syncwarp does not reach the next warp
    s[t] = t;
    __syncwarp();
    g[t] = s[t ^ 32];  // expect: RACE
  }
  if constexpr (kCase == 7) {  // two blocks write one word
    g[t + blockIdx.x] = t;     // expect: RACE
  }
  if constexpr (kCase == 8) {  // control: they add to it
    atomicAdd(&g[0], 1.f);
  }
  if constexpr (kCase == 9) {  // one reads what the others add to
    if (t > 0) atomicAdd(&g[0], 1.f);
    if (t == 0) g[1] = g[0];  // expect: RACE
  }
  if constexpr (kCase == 10) {  // a named barrier that half of the block does not wait at
    s[t] = t;
    if (t < 64) ptx::named_barrier_sync(1, 64);
    g[t] = s[t ^ 64];  // expect: RACE
  }

  // --- Memory that was not written, or is not there
  if constexpr (kCase == 11) {  // shared memory
    if (t > 0) s[t] = t;
    __syncthreads();
    g[t] = s[127 - t];  // expect: UNINITIALISED
  }
  if constexpr (kCase == 12) {  // an output
    g[t] = g[t] + 1;            // expect: UNINITIALISED
  }
  if constexpr (kCase == 13) {  // one behind the end of a buffer
    if (t == 0) g[n] = 1;       // expect: OUT-OF-BOUNDS
  }
  if constexpr (kCase == 14) {  // far behind it
    g[n + 4096 + t] = 1;        // expect fast: OUT-OF-BOUNDS
  }
  if constexpr (kCase == 15) {      // before the beginning of the input
    g[t] = input[t == 0 ? -1 : t];  // expect: OUT-OF-BOUNDS
  }
  if constexpr (kCase == 16) {  // dynamic shared memory: 512 bytes
    dynamic[t + 1] = t;         // expect: OUT-OF-BOUNDS
  }
  if constexpr (kCase == 17) {                       // the input is not to be written
    if (t == 0) const_cast<float*>(input)[0] = 1.f;  // expect: READ-ONLY
  }
  if constexpr (kCase == 18) {                         // a vector where there is none
    if (t == 0) ptx::store(g + 1, make_float2(1, 2));  // expect fast: MISALIGNED
  }
  if constexpr (kCase == 19) {  // a pointer to another thread's variable
    float mine = static_cast<float>(t);
    __shared__ float* shared_pointer;
    if (t == 0) shared_pointer = &mine;
    __syncthreads();
    g[t] = *shared_pointer;  // expect: STACK
    __syncthreads();
  }

  if constexpr (kCase == 54) {  // behind a local array
    float mine[4] = {};
    for (int i = 0; i < n; ++i) mine[i] += input[i];  // expect: UNDEFINED
    g[t] = mine[0] + mine[1] + mine[2] + mine[3];
  }
  if constexpr (kCase == 55) {  // behind a shared one, in the next variable
    __shared__ float left[4], right[4];
    if (t < 4) left[t] = right[t] = 0;
    __syncthreads();
    g[t] = t < 5 ? left[t] : right[t % 4];  // expect: UNDEFINED
  }
  if constexpr (kCase == 56) {           // a tensor of 2^31 elements, counted in int
    const int elements = n * (1 << 23);  // expect: UNDEFINED
    g[t] = static_cast<float>(elements - t);
  }

  // --- Warps and barriers
  if constexpr (kCase == 20) {  // lanes that are named and do not come
    if (lane < 16) g[t] = __shfl_sync(kAll, static_cast<float>(t), 0);  // expect fast: DEADLOCK
    __syncthreads();
  }
  if constexpr (kCase == 21) {  // lanes that have exited
    if (lane >= 16) return;
    g[t] = __shfl_sync(kAll, static_cast<float>(t), 0);  // expect fast: WARP MASK
  }
  if constexpr (kCase == 22) {                              // a caller that is not in its mask
    g[t] = __shfl_sync(0xffffu, static_cast<float>(t), 0);  // expect fast: WARP MASK
  }
  if constexpr (kCase == 23) {  // a lane that is not in the mask is read
    if (lane < 16) g[t] = __shfl_sync(0xffffu, static_cast<float>(t), 16);  // expect fast: SHUFFLE
  }
  if constexpr (kCase == 24) {  // two collectives at once
    if (lane < 16) {
      g[t] = __shfl_sync(kAll, static_cast<float>(t), 0);
    } else {
      g[t] = __ballot_sync(kAll, t);  // expect fast: WARP DIVERGENCE
    }
  }
  if constexpr (kCase == 25) {    // one thread waits for the block, the others for it
    if (t == 0) __syncthreads();  // expect fast: DEADLOCK
    __syncwarp();
    __syncthreads();
  }
  if constexpr (kCase == 26) {  // control: those who are not at the barrier have exited
    if (t >= 64) return;
    s[t] = t;
    __syncthreads();
    g[t] = s[63 - t];
  }
  if constexpr (kCase == 27) {        // named barrier, wrong count
    ptx::named_barrier_sync(1, 160);  // expect fast: DEADLOCK
  }
  if constexpr (kCase == 28) {  // never ends
    volatile int go = 1;
    while (go) {  // expect fast: HANG
    }
  }

  // --- cp.async and ldmatrix
  if constexpr (kCase == 29) {  // read before the wait
    if (t < 32) ptx::cp_async_16(address + 16 * t, input + 4 * t, 16);
    ptx::cp_async_commit_group();
    __syncthreads();
    g[t] = dynamic[t];  // expect: IN FLIGHT
    ptx::cp_async_wait_group<0>();
  }
  if constexpr (kCase == 30) {  // waited for, by the copying thread only
    if (t < 32) ptx::cp_async_16(address + 16 * t, input + 4 * t, 16);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    g[t] = dynamic[127 - t];  // expect: RACE
  }
  if constexpr (kCase == 31) {  // control
    if (t < 32) ptx::cp_async_16(address + 16 * t, input + 4 * t, 16);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    g[t] = dynamic[127 - t];
  }
  if constexpr (kCase == 32) {  // one group too few is waited for
    if (t < 32) ptx::cp_async_16(address + 16 * t, input + 4 * t, 16);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<1>();
    __syncthreads();
    g[t] = dynamic[127 - t];  // expect: IN FLIGHT
    ptx::cp_async_wait_group<0>();
  }
  if constexpr (kCase == 33) {  // never waited for
    if (t < 32)
      ptx::cp_async_16(address + 16 * t, input + 4 * t, 16);  // expect fast: NOT WAITED FOR
    ptx::cp_async_commit_group();
  }
  if constexpr (kCase == 34) {  // source
    if (t < 32)
      ptx::cp_async_16(address + 16 * t, input + 4 * t + 1, 12);  // expect fast: MISALIGNED
  }
  if constexpr (kCase == 35) {  // source reaches over the end: 4 floats of 3
    if (t == 0) ptx::cp_async_16(address, input + n - 4, 16);
    if (t == 1) ptx::cp_async_16(address + 16, input + n, 16);  // expect: OUT-OF-BOUNDS
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
  }
  if constexpr (kCase == 36) {                      // destination
    ptx::cp_async_16(address + 16 * t, input, 16);  // expect fast: OUT-OF-BOUNDS
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
  }
  if constexpr (kCase == 37) {  // copied over what a warp may still read
    if (t >= 96) s[t] = t;
    __syncthreads();
    g[t] = t >= 96 ? s[t ^ 1] : 0;
    if (t == 0) ptx::cp_async_16(ptx::shared_address(s + 96), input, 16);  // expect: RACE
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
  }
  if constexpr (kCase == 38) {  // a row that nobody wrote
    uint32_t r[4];
    if (t < 127) dynamic[t] = t;
    __syncthreads();
    ptx::ldmatrix_x4(r, address + 16 * lane);  // expect: UNINITIALISED
    g[t] = r[0];
  }
  if constexpr (kCase == 39) {  // a row that begins anywhere
    uint32_t r[4];
    ptx::ldmatrix_x4(r, address + 4 * lane);  // expect fast: MISALIGNED
  }
  if constexpr (kCase == 40) {  // metadata that does not ascend
    const uint32_t a[4] = {}, b[4] = {};
    float d[4] = {};
    ptx::mma_sp_m16n8k32_f16<0>(d, a, b, 0x44444441);  // expect fast: MMA.SP
    g[t] = d[0];
  }

  // --- mbarrier, TMA and wgmma
  if constexpr (kCase == 41) {                  // not initialised
    if (t == 0) ptx::mbarrier_arrive(address);  // expect fast: MBARRIER
  }
  if constexpr (kCase == 42) {  // initialised, and used by others without a barrier
    if (t == 0) ptx::mbarrier_init(address, 128);
    ptx::mbarrier_arrive(address);  // expect: RACE
    ptx::mbarrier_wait(address, 0);
  }
  if constexpr (kCase == 43) {  // more arrivals than its count
    if (t == 0) ptx::mbarrier_init(address, 2);
    __syncthreads();
    if (t < 3) ptx::mbarrier_arrive_expect_tx(address, 16);  // expect fast: MBARRIER
  }
  if constexpr (kCase == 44) {  // a phase that nobody completes
    if (t == 0) ptx::mbarrier_init(address, 2);
    __syncthreads();
    if (t == 0) ptx::mbarrier_arrive(address);
    ptx::mbarrier_wait(address, 0);  // expect fast: DEADLOCK
  }
  if constexpr (kCase == 45) {  // control: what comes before the arrival is there after the wait
    if (t == 0) ptx::mbarrier_init(address, 128);
    s[t] = t;
    __syncthreads();
    s[t] += 1;
    ptx::mbarrier_arrive(address);
    ptx::mbarrier_wait(address, 0);
    g[t] = s[127 - t];
  }
  if constexpr (kCase == 46) {  // written after the arrival
    if (t == 0) ptx::mbarrier_init(address, 128);
    __syncthreads();
    ptx::mbarrier_arrive(address);
    s[t] = t;
    ptx::mbarrier_wait(address, 0);
    g[t] = s[127 - t];  // expect: RACE
  }
  if constexpr (kCase >= 47 && kCase <= 53) {
    // 64 x 64 bytes of a, swizzled or not is all one for zeros, and as much of b.
    float d[32] = {};
    for (int i = t; i < 64 * 32 * 2; i += 128) dynamic[i] = 0;
    if constexpr (kCase != 47) ptx::fence_proxy_async();
    __syncthreads();
    const uint64_t a = ptx::matrix_descriptor_128b(address);
    const uint64_t b = ptx::matrix_descriptor_128b(address + 64 * 128);
    if constexpr (kCase != 48) ptx::wgmma_fence();
    if constexpr (kCase == 47) {                    // written, and not fenced
      ptx::wgmma_m64n64k16_f16(d, a, b, 1);         // expect: PROXY
    } else if constexpr (kCase == 48) {             // not fenced
      ptx::wgmma_m64n64k16_f16(d, a, b, 1);         // expect fast: WGMMA
    } else if constexpr (kCase == 49) {             // lanes that do not agree
      ptx::wgmma_m64n64k16_f16(d, a + lane, b, 1);  // expect fast: WGMMA
    } else if constexpr (kCase == 50) {             // never waited for
      ptx::wgmma_m64n64k16_f16(d, a, b, 1);         // expect fast: NOT WAITED FOR
    } else {
      ptx::wgmma_m64n64k16_f16(d, a, b, 1);
    }
    ptx::wgmma_commit_group();
    if constexpr (kCase == 50) return;
    if constexpr (kCase == 51) dynamic[t] = 1;  // expect: RACE
    if constexpr (kCase == 52) d[1] = 1;
    ptx::wgmma_wait_group<0>();
    g[t] = d[0];  // 53 is a control
  }
}

}  // namespace

template <int kCase>
int start(int which, float* g, const float* input, int n, int blocks, size_t shared_bytes) {
  if constexpr (kCase >= 0) {
    if (which != kCase) return start<kCase - 1>(which, g, input, n, blocks, shared_bytes);
    PYWINO_LAUNCH((fault<kCase>), dim3(blocks), dim3(128), shared_bytes, cudaStream_t(nullptr), g,
                  input, n);
    return cudaGetLastError();
  }
  return cudaErrorInvalidValue;
}

constexpr int kCases = 57;

extern "C" int cases() { return kCases; }

extern "C" int fault_launch(int which, float* g, const float* input, int n) {
  const bool two_blocks = which == 7 || which == 8;
  const size_t shared_bytes = which >= 47 && which <= 53 ? 16384 : 512;
  return start<kCases - 1>(which, g, input, n, two_blocks ? 2 : 1, shared_bytes);
}
