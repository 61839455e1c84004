// SPDX-License-Identifier: BSD-3-Clause
#include "conv_lstm.h"

namespace pywino::conv_lstm {

PYWINO_CHOOSE_COPY(Kernels, kernels)

Status forward(const ForwardParams& params, const Executor& executor) {
  return kernels().forward(params, executor);
}
Status backward(const BackwardParams& params, const Executor& executor) {
  return kernels().backward(params, executor);
}

}  // namespace pywino::conv_lstm
