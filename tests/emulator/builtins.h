// SPDX-License-Identifier: BSD-3-Clause
// The functions and variables that CUDA C++ has without an #include, for emulator.h. What is missing here does not
// compile: add it with its semantics from the CUDA programming guide, and a line in test_collectives.py.
#pragma once

#define threadIdx (emu::identity(emu::kThreadIndex))
#define blockIdx (emu::identity(emu::kBlockIndex))
#define blockDim (emu::identity(emu::kBlockSize))
#define gridDim (emu::identity(emu::kGridSize))
#define warpSize 32

using std::max;
using std::min;

// --- Barriers and fences. Memory is sequentially consistent here: a fence has nothing to do.

inline void __syncthreads() { emu::syncthreads(); }
inline int __syncthreads_or(int p) { return emu::syncthreads_reduce(emu::kOr, p); }
inline int __syncthreads_and(int p) { return emu::syncthreads_reduce(emu::kAnd, p); }
inline int __syncthreads_count(int p) { return emu::syncthreads_reduce(emu::kCount, p); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::syncwarp(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { emu::yield(); }

// --- Warp collectives

namespace emu {

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle(int kind, unsigned mask, T value, int source, int width) {
  return from_bits<T>(shuffle(kind, mask, to_bits(value), source, width));
}

}  // namespace emu

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emu::shuffle<T>(emu::kIndex, mask, value, source, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emu::shuffle<T>(emu::kUp, mask, value, static_cast<int>(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emu::shuffle<T>(emu::kDown, mask, value, static_cast<int>(delta), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return emu::shuffle<T>(emu::kXor, mask, value, lanes, width);
}
inline unsigned __ballot_sync(unsigned mask, int p) { return emu::ballot(mask, p); }
inline int __any_sync(unsigned mask, int p) { return emu::ballot(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return emu::ballot(mask, p) == mask; }
inline unsigned __activemask() { return emu::active_mask(); }

#define PYWINO_WARP_REDUCE(name, reduction, type, is_signed)                    \
  inline type name(unsigned mask, type value) {                                 \
    return static_cast<type>(                                                   \
        emu::reduce(reduction, is_signed, mask, static_cast<unsigned>(value))); \
  }
PYWINO_WARP_REDUCE(__reduce_add_sync, emu::kAdd, unsigned, false)
PYWINO_WARP_REDUCE(__reduce_add_sync, emu::kAdd, int, true)
PYWINO_WARP_REDUCE(__reduce_min_sync, emu::kMin, unsigned, false)
PYWINO_WARP_REDUCE(__reduce_min_sync, emu::kMin, int, true)
PYWINO_WARP_REDUCE(__reduce_max_sync, emu::kMax, unsigned, false)
PYWINO_WARP_REDUCE(__reduce_max_sync, emu::kMax, int, true)
PYWINO_WARP_REDUCE(__reduce_and_sync, emu::kBitAnd, unsigned, false)
PYWINO_WARP_REDUCE(__reduce_or_sync, emu::kBitOr, unsigned, false)
PYWINO_WARP_REDUCE(__reduce_xor_sync, emu::kBitXor, unsigned, false)
#undef PYWINO_WARP_REDUCE

// --- Atomics: fibers switch only inside the runtime, so a plain read-modify-write is atomic. It is written without
// instrumentation; atomic_access checks it, as an atomic.

namespace emu {

template <class T, class Update>
__attribute__((no_sanitize("thread"))) T atomic(T* p, Update update) {
  atomic_access(p, sizeof(T));
  const T old = *p;
  *p = update(old);
  return old;
}

}  // namespace emu

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return emu::atomic(p, [v](T x) { return static_cast<T>(x + v); });
}
template <class T>
T atomicSub(T* p, std::type_identity_t<T> v) {
  return emu::atomic(p, [v](T x) { return static_cast<T>(x - v); });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  return emu::atomic(p, [v](T x) { return std::min(x, v); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  return emu::atomic(p, [v](T x) { return std::max(x, v); });
}
template <class T>
T atomicAnd(T* p, std::type_identity_t<T> v) {
  return emu::atomic(p, [v](T x) { return static_cast<T>(x & v); });
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v) {
  return emu::atomic(p, [v](T x) { return static_cast<T>(x | v); });
}
template <class T>
T atomicXor(T* p, std::type_identity_t<T> v) {
  return emu::atomic(p, [v](T x) { return static_cast<T>(x ^ v); });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return emu::atomic(p, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return emu::atomic(p, [=](T x) { return x == expected ? v : x; });
}

// --- Loads and stores with a cache hint, addresses

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> v) {
  *p = v;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> v) {
  *p = v;
}
inline size_t __cvta_generic_to_shared(const void* p) { return emu::to_shared(p); }
inline size_t __cvta_generic_to_global(const void* p) { return reinterpret_cast<size_t>(p); }

// --- Bits and numbers

inline unsigned __float_as_uint(float x) { return emu::from_bits<unsigned>(emu::to_bits(x)); }
inline int __float_as_int(float x) { return emu::from_bits<int>(emu::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return emu::from_bits<float>(emu::to_bits(x)); }
inline float __int_as_float(int x) { return emu::from_bits<float>(emu::to_bits(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
#define __expf expf
#define __logf logf
#define __sinf sinf
#define __cosf cosf

// Fused multiply-add of half and bf16, which NVIDIA's headers have for nvcc alone. In double the product is exact, and the
// sum is rounded once before the last rounding, which matters only within 2^-53 of a tie.
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(static_cast<double>(__bfloat162float(a)) * __bfloat162float(b) +
                           __bfloat162float(c));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}

// cuda_runtime.h takes a kernel's own type under nvcc alone.
template <class Function>
cudaError_t cudaFuncSetAttribute(Function* function, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(function), attribute, value);
}
template <class Function>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* function,
                                                          int threads, size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      blocks, reinterpret_cast<const void*>(function), threads, shared_bytes);
}
