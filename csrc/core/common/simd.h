// SPDX-License-Identifier: BSD-3-Clause
// One vector type for every instruction set: `vec` holds kLanes floats, and a + b, a * b, x * v (x a float) are the
// compiler's own vector arithmetic, contracted to FMA. Only what has no operator stands here.
//
// Everything lies in an unnamed namespace: this header is compiled once per instruction set, and the linker must not keep
// one copy (the AVX-512 one, say) for all.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "dtype.h"
#include "inline.h"

#define PYWINO_UNROLL _Pragma("GCC unroll 64")
#define PYWINO_ROLLED _Pragma("GCC unroll 1")

namespace pywino {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t uvec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t hvec __attribute__((vector_size(kLanes * 2)));
typedef float vec_unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t hvec_unaligned __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// use(T{}), T being the type of a tensor's numbers.
template <typename Use>
auto with_dtype(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::bf16: return use(bf16{});
    case DType::f16: return use(f16{});
    default: return use(float{});
  }
}

// --- small arithmetic, here because std::min is an inline function with external linkage ------------------------------------
template <typename I>
PYWINO_INLINE I min(I a, I b) {
  return a < b ? a : b;
}
template <typename I>
PYWINO_INLINE I max(I a, I b) {
  return a < b ? b : a;
}
template <typename I>
PYWINO_INLINE I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}
template <typename I>
PYWINO_INLINE I round_up(I a, I b) {
  return ceil_div(a, b) * b;
}

// --- whole vectors ------------------------------------------------------------------------------------------------------------
PYWINO_INLINE vec zero() { return vec{}; }
PYWINO_INLINE vec load(const float* p) { return *reinterpret_cast<const vec_unaligned*>(p); }
PYWINO_INLINE void store(float* p, vec v) { *reinterpret_cast<vec_unaligned*>(p) = v; }

// ReLU as torch has it: NaN stays NaN (max returns its second operand when one is NaN).
PYWINO_INLINE vec relu(vec v) {
#if defined(__AVX512F__)
  return _mm512_max_ps(_mm512_setzero_ps(), v);
#elif defined(__AVX2__)
  return _mm256_max_ps(_mm256_setzero_ps(), v);
#else
  return v < zero() ? zero() : v;
#endif
}

// Past the caches: for outputs that are larger than what the caches keep. `p` is aligned to the vector. Whole lines of 64 bytes
// only, one vector after the other: a half that leaves the core by itself is merged with its line in memory.
constexpr int kVectorsOfLine = kLanes == 8 ? 2 : 1;
// An output of more is written past the caches: little of it would still be in the second-level cache when the next layer reads
// it, and lines that are written whole need not be read before.
constexpr int64_t kStreamBytes = int64_t(1) << 20;
PYWINO_INLINE void stream(float* p, vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}

// Vector n of a row, at `to`, where many lines are written by turns: of two vectors the first waits, as number `line` of those
// that do, for the second.
PYWINO_INLINE void stream_line(float* to, vec v, int64_t n, float* waiting, int64_t line) {
  if (kVectorsOfLine == 2 && n % 2 == 0) return store(waiting + line * kLanes, v);
  if (kVectorsOfLine == 2) stream(to - kLanes, load(waiting + line * kLanes));
  stream(to, v);
}
constexpr int waiting_floats(int lines) { return kVectorsOfLine == 2 ? lines * kLanes : 1; }

PYWINO_INLINE vec multiply_add(vec sum, vec a, vec b, float) { return sum + a * b; }

PYWINO_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// --- 16-bit floats -----------------------------------------------------------------------------------------------
PYWINO_INLINE vec from_bf16(hvec h) { return (vec)(__builtin_convertvector(h, uvec) << 16); }

// Round to nearest even; a NaN keeps its upper bits and becomes quiet.
PYWINO_INLINE hvec to_bf16(vec v) {
  const uvec u = (uvec)v;
  const uvec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uvec quiet = (u >> 16) | 0x40u;
  const uvec is_nan = (uvec)(v != v);
  return __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), hvec);
}

PYWINO_INLINE vec from_f16(hvec h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)h);
#else
  vec v;
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = h[i], magnitude = bits & 0x7fffu;
    float f;
    if (magnitude >= 0x7c00u) {  // inf, NaN
      const uint32_t u = 0x7f800000u | (magnitude & 0x3ffu) << 13;
      std::memcpy(&f, &u, 4);
    } else if (magnitude >= 0x400u) {  // exponent bias 15 -> 127
      const uint32_t u = (magnitude << 13) + (112u << 23);
      std::memcpy(&f, &u, 4);
    } else {
      f = float(magnitude) * 0x1p-24f;
    }
    v[i] = bits >> 15 ? -f : f;
  }
  return v;
#endif
}

PYWINO_INLINE hvec to_f16(vec v) {
#if defined(__AVX512F__)
  return (hvec)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (hvec)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#else
  hvec h;
  for (int i = 0; i < kLanes; ++i) {
    uint32_t u;
    const float f = v[i];
    std::memcpy(&u, &f, 4);
    const uint32_t sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
    uint32_t r;
    if (magnitude > 0x7f800000u) {
      r = 0x7e00u | (magnitude >> 13 & 0x3ffu);  // NaN
    } else if (magnitude >= 0x477ff000u) {
      r = 0x7c00u;  // 65520 and above round to infinity
    } else if (magnitude < 0x38800000u) {
      // Subnormal: adding 2^-1 (ulp 2^-24) lets the adder round to a multiple of 2^-24.
      float m;
      std::memcpy(&m, &magnitude, 4);
      volatile float shifted = m + 0.5f;
      const float s = shifted;
      std::memcpy(&r, &s, 4);
      r -= 0x3f000000u;
    } else {
      r = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
    }
    h[i] = uint16_t(sign | r);
  }
  return h;
#endif
}

#if defined(__AVX512BF16__)
// An operand of multiply_add: stored by the instruction that flushes subnormals, unlike a tensor's bfloat16.
struct bf16_operand {
  uint16_t bits;
};
PYWINO_INLINE void store(bf16_operand* p, vec v) {
  *reinterpret_cast<hvec_unaligned*>(p) = (hvec)_mm512_cvtneps_pbh(v);
}
PYWINO_INLINE vec multiply_add(vec sum, vec a, vec b, bf16_operand) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);  // two pairs' products in each lane
}
#endif

PYWINO_INLINE vec load(const bf16* p) {
  return from_bf16(*reinterpret_cast<const hvec_unaligned*>(p));
}
PYWINO_INLINE vec load(const f16* p) {
  return from_f16(*reinterpret_cast<const hvec_unaligned*>(p));
}
PYWINO_INLINE void store(bf16* p, vec v) { *reinterpret_cast<hvec_unaligned*>(p) = to_bf16(v); }
PYWINO_INLINE void store(f16* p, vec v) { *reinterpret_cast<hvec_unaligned*>(p) = to_f16(v); }

// --- parts of a vector: lanes [lo, hi), the others read as zero and are not written ------------------------------------
#if defined(__AVX512F__)
PYWINO_INLINE uint32_t lane_mask(int lo, int hi) { return (1u << hi) - (1u << lo); }
PYWINO_INLINE vec load_part(const float* p, int lo, int hi) {
  return _mm512_maskz_loadu_ps(__mmask16(lane_mask(lo, hi)), p);
}
PYWINO_INLINE void store_part(float* p, vec v, int lo, int hi) {
  _mm512_mask_storeu_ps(p, __mmask16(lane_mask(lo, hi)), v);
}
PYWINO_INLINE hvec load_half_part(const void* p, int lo, int hi) {
  return (hvec)_mm256_maskz_loadu_epi16(__mmask16(lane_mask(lo, hi)), p);
}
PYWINO_INLINE void store_half_part(void* p, hvec h, int lo, int hi) {
  _mm256_mask_storeu_epi16(p, __mmask16(lane_mask(lo, hi)), (__m256i)h);
}
#else
PYWINO_INLINE hvec load_half_part(const void* p, int lo, int hi) {
  hvec h{};
  for (int i = lo; i < hi; ++i) h[i] = static_cast<const uint16_t*>(p)[i];
  return h;
}
PYWINO_INLINE void store_half_part(void* p, hvec h, int lo, int hi) {
  for (int i = lo; i < hi; ++i) static_cast<uint16_t*>(p)[i] = h[i];
}
#if defined(__AVX2__)
PYWINO_INLINE __m256i lane_mask(int lo, int hi) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(lo), lane),
                             _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), lane));
}
PYWINO_INLINE vec load_part(const float* p, int lo, int hi) {
  return _mm256_maskload_ps(p, lane_mask(lo, hi));
}
PYWINO_INLINE void store_part(float* p, vec v, int lo, int hi) {
  _mm256_maskstore_ps(p, lane_mask(lo, hi), v);
}
#else
PYWINO_INLINE vec load_part(const float* p, int lo, int hi) {
  vec v{};
  for (int i = lo; i < hi; ++i) v[i] = p[i];
  return v;
}
PYWINO_INLINE void store_part(float* p, vec v, int lo, int hi) {
  for (int i = lo; i < hi; ++i) p[i] = v[i];
}
#endif
#endif
PYWINO_INLINE vec load_part(const bf16* p, int lo, int hi) {
  return from_bf16(load_half_part(p, lo, hi));
}
PYWINO_INLINE vec load_part(const f16* p, int lo, int hi) {
  return from_f16(load_half_part(p, lo, hi));
}
// Columns x, x + 1, ... of a row of `width`; zero where there are none.
template <typename T>
PYWINO_INLINE vec load_columns(const T* row, int64_t x, int64_t width) {
  if (x >= 0 && x + kLanes <= width) return load(row + x);
  const int lo = int(max<int64_t>(0, min<int64_t>(kLanes, -x)));
  const int hi = int(max<int64_t>(0, min<int64_t>(kLanes, width - x)));
  return lo < hi ? load_part(row + x, lo, hi) : zero();
}
PYWINO_INLINE void store_part(bf16* p, vec v, int lo, int hi) {
  store_half_part(p, to_bf16(v), lo, hi);
}
PYWINO_INLINE void store_part(f16* p, vec v, int lo, int hi) {
  store_half_part(p, to_f16(v), lo, hi);
}

// The vector at p where flag is all ones, zero (and no access) where it is 0.
PYWINO_INLINE vec load_if(const float* p, uint32_t flag) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(__mmask16(flag), p);
#elif defined(__AVX2__)
  return _mm256_maskload_ps(p, _mm256_set1_epi32(int(flag)));
#else
  return flag ? load(p) : zero();
#endif
}
PYWINO_INLINE vec load_if(const bf16* p, uint32_t flag) { return flag ? load(p) : zero(); }
PYWINO_INLINE vec load_if(const f16* p, uint32_t flag) { return flag ? load(p) : zero(); }

// v where flag is all ones, zero where it is 0.
PYWINO_INLINE vec keep_if(vec v, uint32_t flag) {
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(__mmask16(flag), v);
#else
  return (vec)((uvec)v & flag);
#endif
}

// One element, for strided access.
PYWINO_INLINE float get(const float* p) { return *p; }
PYWINO_INLINE float get(const bf16* p) {
  const uint32_t u = uint32_t(p->bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
PYWINO_INLINE float get(const f16* p) {
  hvec h{};
  h[0] = p->bits;
  return from_f16(h)[0];
}
PYWINO_INLINE void put(float* p, float x) { *p = x; }
PYWINO_INLINE void put(bf16* p, float x) { p->bits = to_bf16(x - vec{})[0]; }
PYWINO_INLINE void put(f16* p, float x) { p->bits = to_f16(x - vec{})[0]; }

// --- four floats in every four lanes, and one of them in all ------------------------------------------------------------------
PYWINO_INLINE vec load_fours(const float* p) {
#if defined(__AVX512F__)
  return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif defined(__AVX2__)
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#else
  return load(p);
#endif
}
template <int I>
PYWINO_INLINE vec of_four(vec v) {
#if defined(__AVX512F__)
  return _mm512_permute_ps(v, I * 0x55);
#elif defined(__AVX2__)
  return _mm256_permute_ps(v, I * 0x55);
#else
  return __builtin_shuffle(v, uvec{I, I, I, I});
#endif
}

// The address in a register of its own, so that the multiply-adds that load from it do not each add two registers up: measured faster
// on Intel, as if such an instruction were two operations there.
template <typename X>
PYWINO_INLINE void own_register(X*& address) {
  asm("" : "+r"(address));
}

// --- transpose: lane j of r[i] becomes lane i of r[j] -------------------------------------------------------------------
PYWINO_INLINE void transpose(vec* r) {
#if defined(__AVX512F__)
  __m512 t[16];
  PYWINO_UNROLL for (int i = 0; i < 16; i += 4) {  // 4x4 blocks inside the 128-bit lanes
    const __m512 a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
    const __m512 c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]),
                 d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(c)));
    t[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(c)));
    t[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b), _mm512_castps_pd(d)));
    t[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b), _mm512_castps_pd(d)));
  }
  PYWINO_UNROLL for (int i = 0; i < 4;
                     ++i) {  // then the 128-bit lanes themselves: a 4x4 transpose of blocks
    const __m512 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88),
                 b = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd),
                 d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    r[i] = _mm512_shuffle_f32x4(a, b, 0x88);
    r[i + 4] = _mm512_shuffle_f32x4(c, d, 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(a, b, 0xdd);
    r[i + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
#elif defined(__AVX2__)
  __m256 t[8];
  PYWINO_UNROLL for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    const __m256 c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]),
                 d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  PYWINO_UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = i + 1; j < kLanes; ++j) {
      const float x = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = x;
    }
#endif
}

}  // namespace
}  // namespace pywino
