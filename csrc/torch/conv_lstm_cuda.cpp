// SPDX-License-Identifier: BSD-3-Clause
// The CUDA kernels under the names of the CPU's: unpack, check, allocate, launch on the current stream of the tensors' device.
#include "core/conv_lstm/cuda.h"

#include <tuple>

#include "conv_lstm.h"
#include "launch.h"

namespace pywino {
namespace {

namespace cuda = conv_lstm::cuda;

Tensor empty_state(const Tensor& gates) {
  return empty_like(gates, {gates.size(0), gates.size(1) / 4, gates.size(2), gates.size(3)},
                    gates.scalar_type(), is_channels_last(gates));
}

std::tuple<Tensor, Tensor> forward(const Tensor& gates, const std::optional<Tensor>& cell) {
  constexpr const char* op = "pywino::_conv_lstm_forward";
  conv_lstm::ForwardParams p{};
  p.shape = shape_of(gates, op);
  const Launch launch(gates, op, cuda::pywino_conv_lstm_cuda_error);
  Tensor hidden = empty_state(gates), next_cell = empty_state(gates);
  if (cell) check_state(*cell, gates, op, "cell");
  if (cell) check_same_device(gates, *cell, op, "cell");
  p.gates = gates.const_data_ptr();
  p.cell = cell ? cell->const_data_ptr() : nullptr;
  p.hidden = hidden.mutable_data_ptr();
  p.next_cell = next_cell.mutable_data_ptr();
  launch.check(cuda::pywino_conv_lstm_forward(&p, launch.stream()));
  return {hidden, next_cell};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_hidden, const Tensor& grad_cell,
                                    const Tensor& gates, const std::optional<Tensor>& cell) {
  constexpr const char* op = "pywino::_conv_lstm_backward";
  conv_lstm::BackwardParams p{};
  p.shape = shape_of(gates, op);
  const Launch launch(gates, op, cuda::pywino_conv_lstm_cuda_error);
  Tensor by_cell = empty_state(gates);
  check_state(grad_hidden, gates, op, "grad_hidden");
  check_same_device(gates, grad_hidden, op, "grad_hidden");
  check_state(grad_cell, gates, op, "grad_cell");
  check_same_device(gates, grad_cell, op, "grad_cell");
  if (cell) check_state(*cell, gates, op, "cell");
  if (cell) check_same_device(gates, *cell, op, "cell");
  Tensor by_gates = empty_like(gates, {gates.size(0), gates.size(1), gates.size(2), gates.size(3)},
                               gates.scalar_type(), is_channels_last(gates));
  p.grad_hidden = grad_hidden.const_data_ptr();
  p.grad_next_cell = grad_cell.const_data_ptr();
  p.gates = gates.const_data_ptr();
  p.cell = cell ? cell->const_data_ptr() : nullptr;
  p.grad_gates = by_gates.mutable_data_ptr();
  p.grad_cell = by_cell.mutable_data_ptr();
  launch.check(cuda::pywino_conv_lstm_backward(&p, launch.stream()));
  return {by_gates, by_cell};
}

}  // namespace
}  // namespace pywino

STABLE_TORCH_LIBRARY_IMPL(pywino, PYWINO_CUDA_KEY, m) {
  m.impl("_conv_lstm_forward", TORCH_BOX(&pywino::forward));
  m.impl("_conv_lstm_backward", TORCH_BOX(&pywino::backward));
}
