// SPDX-License-Identifier: BSD-3-Clause
// wgmma (sm_90a): the matrix instruction of a warpgroup, four warps whose first is a multiple of 4. d (64 x N, fp32, in
// registers) = a b + scale_d d, with scale_d 0 or 1. a: 64 rows of k items, in shared memory through a descriptor, or in
// registers as for mma.sync, 16 rows a warp; b: N rows of k items ("K-major" both), in shared memory. k is 32 bytes: 16 items
// of 16 bits or 8 of TF32, of which the tensor core drops the low 13 bits.
//
//   wgmma_fence();                  before the first, and after registers of d or a were touched
//   wgmma_m64n128k16_f16(d, a, b, 1);  ... several
//   wgmma_commit_group();
//   wgmma_wait_group<0>();          not before may d be read, or a and b be written
#pragma once

#include "ptx.cuh"

namespace pywino::ptx {

// The descriptor of a tile in shared memory whose rows are 128 bytes, swizzled as TMA does it. The tile begins at a multiple
// of 1024 bytes, groups of 8 rows follow each other; for the next k add 32 bytes to the address.
PYWINO_PTX uint64_t matrix_descriptor_128b(uint32_t address) {
  const uint64_t start = (address & 0x3ffff) >> 4;
  const uint64_t leading = 1;  // not used with a swizzle
  const uint64_t stride = 1024 >> 4;
  const uint64_t swizzle = 1;  // 128 bytes
  return start | leading << 16 | stride << 32 | swizzle << 62;
}

PYWINO_PTX void wgmma_fence() {
#ifdef PYWINO_EMULATOR
  emu::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

PYWINO_PTX void wgmma_commit_group() {
#ifdef PYWINO_EMULATOR
  emu::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int N>
PYWINO_PTX void wgmma_wait_group() {
#ifdef PYWINO_EMULATOR
  emu::wgmma_wait(N);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

// The accumulators as operands, eight at a time, and as text: an instruction names each of its 32, 64 or 128.
#define PYWINO_D8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define PYWINO_D32(i) PYWINO_D8(i), PYWINO_D8(i + 8), PYWINO_D8(i + 16), PYWINO_D8(i + 24)
#define PYWINO_D64(i) PYWINO_D32(i), PYWINO_D32(i + 32)
#define PYWINO_D128(i) PYWINO_D64(i), PYWINO_D64(i + 64)
#define PYWINO_TEXT_0                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, "         \
  "%8, %9, %10, %11, %12, %13, %14, %15, "   \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define PYWINO_TEXT_32                       \
  "%32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define PYWINO_TEXT_64                       \
  "%64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, " \
  "%88, %89, %90, %91, %92, %93, %94, %95"
#define PYWINO_TEXT_96                               \
  "%96, %97, %98, %99, %100, %101, %102, %103, "     \
  "%104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"
#define PYWINO_TEXT_D32 "{" PYWINO_TEXT_0 "}"
#define PYWINO_TEXT_D64 "{" PYWINO_TEXT_0 ", " PYWINO_TEXT_32 "}"
#define PYWINO_TEXT_D128 \
  "{" PYWINO_TEXT_0 ", " PYWINO_TEXT_32 ", " PYWINO_TEXT_64 ", " PYWINO_TEXT_96 "}"

// One instruction with both kinds of a. accumulators: N / 2. o0 ... o5: the numbers of the operands behind the accumulators.
// trans_ss, trans_rs: K-major a and b, which only the 16-bit types have a choice in.
#ifdef PYWINO_EMULATOR
#define PYWINO_WGMMA(name, instruction, type, n, accumulators, o0, o1, o2, o3, o4, o5, trans_ss, \
                     trans_rs)                                                                   \
  PYWINO_PTX void name(float (&d)[accumulators], uint64_t a, uint64_t b, int scale_d) {          \
    emu::wgmma(type, n, d, nullptr, a, b, scale_d);                                              \
  }                                                                                              \
  PYWINO_PTX void name(float (&d)[accumulators], const uint32_t (&a)[4], uint64_t b,             \
                       int scale_d) {                                                            \
    emu::wgmma(type, n, d, a, 0, b, scale_d);                                                    \
  }
#else
#define PYWINO_WGMMA(name, instruction, type, n, accumulators, o0, o1, o2, o3, o4, o5, trans_ss, \
                     trans_rs)                                                                   \
  PYWINO_PTX void name(float (&d)[accumulators], uint64_t a, uint64_t b, int scale_d) {          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2                                        \
                 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned." instruction " " PYWINO_TEXT_D##accumulators     \
                 ", %" #o0 ", %" #o1 ", p, 1, 1" trans_ss ";\n}"                                 \
                 : PYWINO_D##accumulators(0)                                                     \
                 : "l"(a), "l"(b), "r"(scale_d));                                                \
  }                                                                                              \
  PYWINO_PTX void name(float (&d)[accumulators], const uint32_t (&a)[4], uint64_t b,             \
                       int scale_d) {                                                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o5                                        \
                 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned." instruction " " PYWINO_TEXT_D##accumulators     \
                 ", {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1" trans_rs ";\n}" \
                 : PYWINO_D##accumulators(0)                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d));            \
  }
#endif

#define PYWINO_WGMMA_TYPES(n, accumulators, o0, o1, o2, o3, o4, o5)                                \
  PYWINO_WGMMA(wgmma_m64n##n##k16_f16, "m64n" #n "k16.f32.f16.f16", emu::F16, n, accumulators, o0, \
               o1, o2, o3, o4, o5, ", 0, 0", ", 0")                                                \
  PYWINO_WGMMA(wgmma_m64n##n##k16_bf16, "m64n" #n "k16.f32.bf16.bf16", emu::BF16, n, accumulators, \
               o0, o1, o2, o3, o4, o5, ", 0, 0", ", 0")                                            \
  PYWINO_WGMMA(wgmma_m64n##n##k8_tf32, "m64n" #n "k8.f32.tf32.tf32", emu::TF32, n, accumulators,   \
               o0, o1, o2, o3, o4, o5, "", "")

PYWINO_WGMMA_TYPES(64, 32, 32, 33, 34, 35, 36, 37)
PYWINO_WGMMA_TYPES(128, 64, 64, 65, 66, 67, 68, 69)
PYWINO_WGMMA_TYPES(256, 128, 128, 129, 130, 131, 132, 133)

}  // namespace pywino::ptx
