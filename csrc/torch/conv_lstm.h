// SPDX-License-Identifier: BSD-3-Clause
// What the CPU's and the CUDA binding of the LSTM cell check.
#pragma once

#include "core/conv_lstm/conv_lstm.h"
#include "tensor.h"

namespace pywino {
namespace {  // other rooms have functions of the same names

// Of the states; is_channels_last says how the gates lie, and the states lie like them.
conv_lstm::Shape shape_of(const Tensor& gates, const char* op) {
  check_dense(gates, op, "gates");
  STD_TORCH_CHECK(gates.numel() > 0 && gates.size(1) % 4 == 0, op,
                  ": gates must have 4 channels for each of the cell, and not be empty");
  return {gates.size(0), gates.size(1) / 4, gates.size(2) * gates.size(3), is_channels_last(gates),
          dtype_of(gates, op, "gates")};
}

void check_state(const Tensor& t, const Tensor& gates, const char* op, const char* name) {
  // A state of one channel is contiguous also where the gates are channels_last: both orders are one.
  const bool laid_out = is_channels_last(gates)
                            ? is_channels_last(t) || (t.is_contiguous() && t.size(1) == 1)
                            : t.is_contiguous();
  STD_TORCH_CHECK(t.scalar_type() == gates.scalar_type() && t.dim() == 4 &&
                      t.size(0) == gates.size(0) && 4 * t.size(1) == gates.size(1) &&
                      t.size(2) == gates.size(2) && t.size(3) == gates.size(3) && laid_out,
                  op, ": ", name, " must have a quarter of gates' channels, and its layout");
}

}  // namespace
}  // namespace pywino
