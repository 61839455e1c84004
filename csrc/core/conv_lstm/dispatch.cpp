// SPDX-License-Identifier: BSD-3-Clause
#include "conv_lstm.h"

namespace pywino::conv_lstm {

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

}  // namespace pywino::conv_lstm
