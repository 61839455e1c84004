// SPDX-License-Identifier: BSD-3-Clause
#include "channel_attention.h"

namespace pywino::channel_attention {

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

#define PYWINO_DECLARE(name) extern const Kernels kernels_##name;
PYWINO_EACH_ISA(PYWINO_DECLARE)

namespace {

#define PYWINO_CASE(name) \
  case Isa::name: return kernels_##name;
const Kernels& kernels() {
  switch (isa()) {
    PYWINO_EACH_ISA(PYWINO_CASE)
    default: return kernels_portable;
  }
}

}  // namespace

Status forward(const ForwardParams& params, const Executor& executor) {
  return kernels().forward(params, executor);
}
Status backward(const BackwardParams& params, const Executor& executor) {
  return kernels().backward(params, executor);
}

}  // namespace pywino::channel_attention
