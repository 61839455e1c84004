// SPDX-License-Identifier: BSD-3-Clause
// Names of the copies of a kernel table, one for each instruction set that was built, and the choice between them.
#pragma once

#include "isa.h"

#define PYWINO_JOIN_(a, b) a##b
#define PYWINO_JOIN(a, b) PYWINO_JOIN_(a, b)
// In a cpu*.cpp: the name of this copy.
#define PYWINO_ISA_NAME(name) PYWINO_JOIN(name, PYWINO_ISA)

// what(isa, Type, name) for each of them.
#ifdef PYWINO_HAVE_AVX512
#define PYWINO_AVX512(what, Type, name) what(avx512, Type, name)
#else
#define PYWINO_AVX512(what, Type, name)
#endif
#ifdef PYWINO_HAVE_AVX2
#define PYWINO_AVX2(what, Type, name) what(avx2, Type, name)
#else
#define PYWINO_AVX2(what, Type, name)
#endif
#define PYWINO_EACH_ISA(what, Type, name) \
  what(portable, Type, name) PYWINO_AVX2(what, Type, name) PYWINO_AVX512(what, Type, name)

// The sets that have products of bfloat16, and nothing else beside AVX-512: what has no such products has no copy for them.
#ifdef PYWINO_HAVE_AVX512BF16
#define PYWINO_AVX512BF16(what, Type, name) what(avx512bf16, Type, name)
#else
#define PYWINO_AVX512BF16(what, Type, name)
#endif
#ifdef PYWINO_HAVE_AMX
#define PYWINO_AMX(what, Type, name) what(amx, Type, name)
#else
#define PYWINO_AMX(what, Type, name)
#endif
#define PYWINO_EACH_BF16_ISA(what, Type, name) \
  PYWINO_AVX512BF16(what, Type, name) PYWINO_AMX(what, Type, name)

#define PYWINO_DECLARE_COPY(set, Type, name) extern const Type name##_##set;
#define PYWINO_CASE_OF_COPY(set, Type, name) \
  case Isa::set: return name##_##set;
#define PYWINO_CASE_OF_AVX512(set, Type, name) \
  case Isa::set: return name##_avx512;

// In a dispatch.cpp: declares the copies of a table and defines name(), the one for the instruction set in force.
#define PYWINO_CHOOSE_COPY(Type, name) PYWINO_CHOOSE(Type, name, PYWINO_CASE_OF_AVX512)
// The same for a table with products of bfloat16.
#define PYWINO_CHOOSE_BF16_COPY(Type, name)             \
  PYWINO_EACH_BF16_ISA(PYWINO_DECLARE_COPY, Type, name) \
  PYWINO_CHOOSE(Type, name, PYWINO_CASE_OF_COPY)

#define PYWINO_CHOOSE(Type, name, case_of_bf16)        \
  PYWINO_EACH_ISA(PYWINO_DECLARE_COPY, Type, name)     \
  static const Type& name() {                          \
    switch (isa()) {                                   \
      PYWINO_EACH_ISA(PYWINO_CASE_OF_COPY, Type, name) \
      PYWINO_EACH_BF16_ISA(case_of_bf16, Type, name)   \
      default: return name##_portable;                 \
    }                                                  \
  }
