// SPDX-License-Identifier: BSD-3-Clause
#include "conv_lstm.h"

namespace pywino::conv_lstm {

PYWINO_CHOOSE_COPY(Kernels, kernels)

void forward(const ForwardParams& params, const Executor& executor) {
  kernels().forward(params, executor);
}
void backward(const BackwardParams& params, const Executor& executor) {
  kernels().backward(params, executor);
}

}  // namespace pywino::conv_lstm
