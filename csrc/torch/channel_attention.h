// SPDX-License-Identifier: BSD-3-Clause
// What the CPU's and the CUDA binding of channel attention check.
#pragma once

#include "core/channel_attention/channel_attention.h"
#include "tensor.h"

namespace pywino {
namespace {  // other rooms have functions of the same names

channel_attention::Shape shape_of(const Tensor& input, const char* op) {
  check_dense(input, op, "input");
  STD_TORCH_CHECK(input.numel() > 0, op, ": input must not be empty");
  return {input.size(0), input.size(1), input.size(2) * input.size(3), is_channels_last(input),
          dtype_of(input, op, "input")};
}

void check_like(const Tensor& t, const Tensor& input, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == input.scalar_type() && t.dim() == 4, op, ": ", name,
                  " must be like input");
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(
        t.size(d) == input.size(d) && (input.size(d) == 1 || t.stride(d) == input.stride(d)), op,
        ": ", name, " must have input's size and strides");
}

}  // namespace
}  // namespace pywino
