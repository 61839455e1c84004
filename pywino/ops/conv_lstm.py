# SPDX-License-Identifier: BSD-3-Clause
"""The pointwise part of a convolutional LSTM cell; its convolution is another room's.

    pywino::conv_lstm_cell            c' = sigma(a_f) c + sigma(a_i) tanh(a_g),
                                      h' = sigma(a_o) tanh(c')
    pywino::conv_lstm_cell_backward   the gradients of a and c
    pywino::_conv_lstm_…              the native kernels

`gates` is a = (a_i, a_f, a_g, a_o), (N, 4 C, H, W); without `cell` c is 0. `backend` is resolved
inside the kernels. Outputs are channels_last iff the gates are (`backends.is_channels_last`),
whatever runs. Differentiable once.
"""

import importlib

import torch

from pywino import backends, planner
from pywino.backends import Call
from pywino.ops import _layout
from pywino.ops._kernels import backend_of
from pywino.ops._library import autocast, define, differentiable, once_differentiable
from pywino.reference import conv_lstm as reference

_ops = torch.ops.pywino


def _check(op, gates, cell):
    n, c, h, w = gates.shape if gates.dim() == 4 else (0, -1, 0, 0)
    torch._check(
        c % 4 == 0 and (cell is None or tuple(cell.shape) == (n, c // 4, h, w)),
        lambda: (
            f"pywino::{op}: gates must be (N, 4 C, H, W) and cell (N, C, H, W), got "
            f"{tuple(gates.shape)} and {None if cell is None else tuple(cell.shape)}; reshape them"
        ),
    )
    torch._check(
        cell is None or cell.dtype == gates.dtype,
        lambda: (
            f"pywino::{op}: cell must be of gates' dtype {gates.dtype}, got {cell.dtype}; convert "
            "it: cell.to(gates.dtype)"
        ),
    )


def describe(gates):
    """The `Call` of the op on these gates."""
    n, k, h, w = gates.shape
    return Call(
        "conv_lstm_cell", n, k // 4, h, w, k // 4, (0, 0), (1, 1), gates.dtype,
        backends.is_channels_last(gates), gates.device.type, kernel=(1, 1),
    )  # fmt: skip


def _triton():
    return importlib.import_module("pywino.kernels.conv_lstm")


def _like(gates, *tensors):
    """In the layout of the gates."""
    format = _layout.memory_format(gates)
    return [t if t is None else t.contiguous(memory_format=format) for t in tensors]


def _empty_state(gates):
    n, k, h, w = gates.shape
    return _layout.empty((n, k // 4, h, w), gates)


# --- forward ---


def native_forward(gates, cell, name="cpu"):
    """The kernel of a backend on tensors as they come."""
    run = _triton().forward if name == "triton" else _ops._conv_lstm_forward.default
    return run(*_like(gates, gates, cell))


def _forward(gates, cell, backend):
    _check("conv_lstm_cell", gates, cell)
    if name := backend_of(describe(gates), backend):
        return native_forward(gates, cell, name)
    # 16-bit floats are rounded once, at the end, as the kernels do it.
    exact = torch.float64 if gates.dtype == torch.float64 else torch.float32
    states = reference.pointwise(gates.to(exact), None if cell is None else cell.to(exact))
    return tuple(_like(gates, *(state.to(gates.dtype) for state in states)))


def _forward_fake(gates, cell, backend):
    _check("conv_lstm_cell", gates, cell)
    return _empty_state(gates), _empty_state(gates)


# --- backward ---


def _backward(grad_hidden, grad_cell, gates, cell, backend):
    _check("conv_lstm_cell_backward", gates, cell)
    if name := backend_of(describe(gates), backend):
        run = _triton().backward if name == "triton" else _ops._conv_lstm_backward.default
        return run(*_like(gates, grad_hidden, grad_cell, gates, cell))
    exact = torch.float64 if gates.dtype == torch.float64 else torch.float32
    inputs = (t if t is None else t.to(exact) for t in (grad_hidden, grad_cell, gates, cell))
    grads = reference.pointwise_gradients(*inputs)
    return tuple(_like(gates, *(grad.to(gates.dtype) for grad in grads)))


def _backward_fake(grad_hidden, grad_cell, gates, cell, backend):
    return _layout.empty(gates.shape, gates), _empty_state(gates)


define(
    "conv_lstm_cell(Tensor gates, Tensor? cell, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "conv_lstm_cell_backward(Tensor grad_hidden, Tensor grad_cell, Tensor gates, Tensor? cell, "
    "str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _save(ctx, inputs, output):
    gates, cell, ctx.backend = inputs
    ctx.save_for_backward(gates, cell)


def _gradients(ctx, grad_hidden, grad_cell):
    gates, cell = ctx.saved_tensors
    grads = _ops.conv_lstm_cell_backward(grad_hidden, grad_cell, gates, cell, ctx.backend)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad)), None


differentiable("conv_lstm_cell", _gradients, _save)
once_differentiable(
    "conv_lstm_cell_backward", "pywino.reference.conv_lstm.pointwise is, and computes the same"
)
autocast("conv_lstm_cell")


# --- what the planner measures ---


def _runs(call):
    format = torch.channels_last if call.channels_last else torch.contiguous_format
    like = {"dtype": call.dtype, "device": call.device, "memory_format": format}
    gates = torch.empty((call.n, 4 * call.c, call.h, call.w), **like).fill_(2.0**-8)
    cell = torch.empty((call.n, call.c, call.h, call.w), **like).fill_(2.0**-8)

    def run(name):
        backend = "aten" if name is None else planner.kernel_plan(name).backend
        return lambda: _forward(gates, cell, backend)

    return run


planner.register("conv_lstm_cell", _runs)


# --- the native kernels: csrc/torch/conv_lstm.cpp registers them on the CPU key ---


def _native_forward_fake(gates, cell):
    return _empty_state(gates), _empty_state(gates)


def _native_backward_fake(grad_hidden, grad_cell, gates, cell):
    return _backward_fake(grad_hidden, grad_cell, gates, cell, "cpu")


define(
    "_conv_lstm_forward(Tensor gates, Tensor? cell) -> (Tensor, Tensor)", None, _native_forward_fake
)
define(
    "_conv_lstm_backward(Tensor grad_hidden, Tensor grad_cell, Tensor gates, Tensor? cell) "
    "-> (Tensor, Tensor)",
    None,
    _native_backward_fake,
)
