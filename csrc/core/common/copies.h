// SPDX-License-Identifier: BSD-3-Clause
// Names of the copies of a kernel table, one for each instruction set that was built.
#pragma once

#define PYWINO_JOIN_(a, b) a##b
#define PYWINO_JOIN(a, b) PYWINO_JOIN_(a, b)
// In a cpu*.cpp: the name of this copy.
#define PYWINO_ISA_NAME(name) PYWINO_JOIN(name, PYWINO_ISA)

// what(isa) for each of them.
#ifdef PYWINO_HAVE_AVX512BF16
#define PYWINO_AVX512BF16(what) what(avx512bf16)
#else
#define PYWINO_AVX512BF16(what)
#endif
#ifdef PYWINO_HAVE_AVX512
#define PYWINO_AVX512(what) what(avx512)
#else
#define PYWINO_AVX512(what)
#endif
#ifdef PYWINO_HAVE_AVX2
#define PYWINO_AVX2(what) what(avx2)
#else
#define PYWINO_AVX2(what)
#endif
#define PYWINO_EACH_ISA(what) \
  what(portable) PYWINO_AVX2(what) PYWINO_AVX512(what) PYWINO_AVX512BF16(what)
