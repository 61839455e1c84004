// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels as torch ops: unpack, check, allocate, launch. Schemas, fakes and gradients are in
// pywino/ops/conv_lstm.py, which also words the errors that a user can cause; the checks here only keep memory safe.
#include "conv_lstm.h"

#include <tuple>

namespace pywino {
namespace {

Tensor empty_state(const Tensor& gates) {
  return empty_cpu({gates.size(0), gates.size(1) / 4, gates.size(2), gates.size(3)},
                   gates.scalar_type(), is_channels_last(gates));
}

std::tuple<Tensor, Tensor> conv_lstm_forward(const Tensor& gates,
                                             const std::optional<Tensor>& cell) {
  constexpr const char* op = "pywino::_conv_lstm_forward";
  conv_lstm::ForwardParams p{};
  p.shape = shape_of(gates, op);
  if (cell) check_state(*cell, gates, op, "cell");
  Tensor hidden = empty_state(gates), next_cell = empty_state(gates);
  p.gates = gates.const_data_ptr();
  p.cell = cell ? cell->const_data_ptr() : nullptr;
  p.hidden = hidden.mutable_data_ptr();
  p.next_cell = next_cell.mutable_data_ptr();
  conv_lstm::forward(p, torch_threads());
  return {hidden, next_cell};
}

std::tuple<Tensor, Tensor> conv_lstm_backward(const Tensor& grad_hidden,
                                              const Tensor& grad_next_cell, const Tensor& gates,
                                              const std::optional<Tensor>& cell) {
  constexpr const char* op = "pywino::_conv_lstm_backward";
  conv_lstm::BackwardParams p{};
  p.shape = shape_of(gates, op);
  check_state(grad_hidden, gates, op, "grad_hidden");
  check_state(grad_next_cell, gates, op, "grad_next_cell");
  if (cell) check_state(*cell, gates, op, "cell");
  Tensor grad_gates = empty_cpu({gates.size(0), gates.size(1), gates.size(2), gates.size(3)},
                                gates.scalar_type(), p.shape.channels_last);
  Tensor grad_cell = empty_state(gates);
  p.grad_hidden = grad_hidden.const_data_ptr();
  p.grad_next_cell = grad_next_cell.const_data_ptr();
  p.gates = gates.const_data_ptr();
  p.cell = cell ? cell->const_data_ptr() : nullptr;
  p.grad_gates = grad_gates.mutable_data_ptr();
  p.grad_cell = grad_cell.mutable_data_ptr();
  conv_lstm::backward(p, torch_threads());
  return {grad_gates, grad_cell};
}

}  // namespace
}  // namespace pywino

STABLE_TORCH_LIBRARY_IMPL(pywino, CPU, m) {
  m.impl("_conv_lstm_forward", TORCH_BOX(&pywino::conv_lstm_forward));
  m.impl("_conv_lstm_backward", TORCH_BOX(&pywino::conv_lstm_backward));
}
