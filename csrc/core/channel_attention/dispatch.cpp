// SPDX-License-Identifier: BSD-3-Clause
#include "channel_attention.h"

namespace pywino::channel_attention {

PYWINO_CHOOSE_COPY(Kernels, kernels)

Status forward(const ForwardParams& params, const Executor& executor) {
  return kernels().forward(params, executor);
}
Status backward(const BackwardParams& params, const Executor& executor) {
  return kernels().backward(params, executor);
}

}  // namespace pywino::channel_attention
