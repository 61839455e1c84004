# SPDX-License-Identifier: BSD-3-Clause
"""The channel attention ops.

    pywino::channel_residual_attention            act(x g) + residual, then a ReLU, with
                                                  g = sigmoid(W2 relu(W1 z + b1) + W3 z + b2)
    pywino::channel_residual_attention_backward   the gradients of x and of the sigmoid's argument,
                                                  of which those of the weights are made here
    pywino::_channel_attention_…                  the native kernels

The forward op also returns z and g, (N, C) in float32 (float64 for float64): its gradient needs
them. `backend` is resolved inside the kernels. Output and gradient are channels_last iff the input
is (`backends.is_channels_last`), whatever runs. Differentiable once.
"""

import importlib

import torch

from pywino import _native as native
from pywino import backends, planner
from pywino.backends import Call
from pywino.ops import _layout
from pywino.ops._kernels import backend_of
from pywino.ops._library import autocast, define, differentiable, once_differentiable
from pywino.reference import channel_attention as reference

_ops = torch.ops.pywino


def _check(op, input, w1, w2, w3):
    c = input.shape[1] if input.dim() == 4 else None
    torch._check(
        input.dim() == 4
        and w1.dim() == 2
        and w1.shape[1] == c
        and tuple(w2.shape) == tuple(w1.shape)[::-1]
        and (w3 is None or tuple(w3.shape) == (c, c)),
        lambda: (
            f"pywino::{op}: input must be (N, C, H, W), w1 (R, C), w2 (C, R) and w3 (C, C), got "
            f"{', '.join(str(tuple(t.shape)) for t in (input, w1, w2, w3) if t is not None)}; "
            "reshape them"
        ),
    )


def _sums_dtype(input):
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def describe(input):
    """The `Call` of the op on this input."""
    n, c, h, w = input.shape
    return Call(
        "channel_residual_attention", n, c, h, w, c, (0, 0), (1, 1), input.dtype,
        backends.is_channels_last(input), input.device.type, kernel=(1, 1),
    )  # fmt: skip


def _triton():
    return importlib.import_module("pywino.kernels.channel_attention")


def _exact(tensors, dtype):
    return [t if t is None else t.to(dtype) for t in tensors]


# --- forward ---


def native_forward(
    input, w1, w2, w3, b1, b2, residual, activation, residual_activation, name="cpu"
):
    """The kernel of a backend on tensors as they come."""
    format = _layout.memory_format(input)
    if residual is not None:
        residual = residual.contiguous(memory_format=format)
    input = input.contiguous(memory_format=format)
    relus = (activation == "relu", residual_activation == "relu")
    run = _triton().forward if name == "triton" else _ops._channel_attention_forward.default
    return run(input, w1, b1, w2, b2, w3, residual, *relus)


def apply(
    input, mean, w1, w2, w3, b1, b2, residual, activation, residual_activation, in_place=False
):
    """The CPU's or the CUDA kernel where the mean is known."""
    format = _layout.memory_format(input)
    if residual is not None:
        residual = residual.contiguous(memory_format=format)
    input = input.contiguous(memory_format=format)
    relus = (activation == "relu", residual_activation == "relu")
    arguments = (input, mean, w1, b1, w2, b2, w3, residual, *relus)
    if in_place:
        _ops._channel_attention_apply_.default(*arguments)
        return input
    return _ops._channel_attention_apply.default(*arguments)


def gate(mean, w1, w2, w3, b1, b2):
    """g of the means (N, C), in their dtype; by one kernel on a GPU that has it."""
    native_types = mean.dtype == torch.float32 and w1.dtype != torch.float64
    if mean.is_cuda and native_types and native.why_no_cuda() is None:
        return _ops._channel_attention_gate.default(mean.contiguous(), w1, b1, w2, b2, w3)
    return reference.gate(mean, *_exact((w1, w2, w3, b1, b2), mean.dtype))


def _forward(input, w1, w2, w3, b1, b2, residual, activation, residual_activation, backend):
    _check("channel_residual_attention", input, w1, w2, w3)
    if name := backend_of(describe(input), backend):
        relus = (activation, residual_activation)
        return native_forward(input, w1, w2, w3, b1, b2, residual, *relus, name)
    dtype = _sums_dtype(input)
    mean = (
        input.mean((2, 3), dtype=dtype)
        if input.numel()
        else input.new_zeros(input.shape[:2], dtype=dtype)
    )
    gate = reference.gate(mean, *_exact((w1, w2, w3, b1, b2), dtype))
    # 16-bit floats are rounded once, at the end, as the kernels do it.
    output = input * gate[:, :, None, None]
    if activation == "relu":
        output = output.relu_()
    if residual is not None:
        output = output.add_(residual)
        if residual_activation == "relu":
            output = output.relu_()
    return _layout.laid_as(output.to(input.dtype), input), mean, gate


def _forward_fake(input, w1, w2, w3, b1, b2, residual, activation, residual_activation, backend):
    _check("channel_residual_attention", input, w1, w2, w3)
    output = _layout.empty(input.shape, input)
    sums = input.new_empty(input.shape[:2], dtype=_sums_dtype(input))
    return output, sums, torch.empty_like(sums)


# --- backward ---


def _backward(grad, input, mean, gate, w1, w2, w3, b1, activation, backend):
    _check("channel_residual_attention_backward", input, w1, w2, w3)
    if name := backend_of(describe(input), backend):
        format = _layout.memory_format(input)
        grad = grad.to(input.dtype).contiguous(memory_format=format)
        input = input.contiguous(memory_format=format)
        run = _triton().backward if name == "triton" else _ops._channel_attention_backward.default
        return run(grad, input, mean, gate, w1, b1, w2, w3, activation == "relu")
    dtype = _sums_dtype(input)
    weights = _exact((w1, w2, w3, b1), dtype)
    grad_input, grad_logit = reference.gradients(
        grad.to(dtype), input.to(dtype), mean, gate, *weights, activation
    )
    return _layout.laid_as(grad_input.to(input.dtype), input), grad_logit


def _backward_fake(grad, input, mean, gate, w1, w2, w3, b1, activation, backend):
    return _layout.empty(input.shape, input), torch.empty_like(mean)


define(
    "channel_residual_attention(Tensor input, Tensor w1, Tensor w2, Tensor? w3, Tensor? b1, "
    "Tensor? b2, Tensor? residual, str? activation, str? residual_activation, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "channel_residual_attention_backward(Tensor grad, Tensor input, Tensor mean, Tensor gate, "
    "Tensor w1, Tensor w2, Tensor? w3, Tensor? b1, str? activation, str backend) "
    "-> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _save(ctx, inputs, output):
    input, w1, w2, w3, b1, _, residual, activation, residual_activation, backend = inputs
    y, mean, gate = output
    masked = residual is not None and residual_activation == "relu"
    ctx.save_for_backward(input, w1, w2, w3, b1, mean, gate, y if masked else None)
    ctx.choice = activation, backend
    ctx.mark_non_differentiable(mean, gate)


def _gradients(ctx, grad, *_):
    input, w1, w2, w3, b1, mean, gate, output = ctx.saved_tensors
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    needs = ctx.needs_input_grad
    grads = [None] * 10
    grads[6] = grad if needs[6] else None
    if not any(needs[:6]):
        return tuple(grads)
    grads[0], du = _ops.channel_residual_attention_backward(
        grad, input, mean, gate, w1, w2, w3, b1, *ctx.choice
    )
    # u = W2 relu(W1 z + b1) + W3 z + b2, in tensors of (N, C) and (N, R)
    hidden = mean @ w1.to(mean.dtype).T
    if b1 is not None:
        hidden = hidden + b1.to(mean.dtype)
    dh = (du @ w2.to(mean.dtype)) * (hidden > 0)
    of_weights = (
        lambda: dh.T @ mean,
        lambda: du.T @ hidden.relu(),
        lambda: du.T @ mean,
        lambda: dh.sum(0),
        lambda: du.sum(0),
    )
    for i, gradient in enumerate(of_weights, start=1):
        if needs[i]:
            grads[i] = gradient().to(w1.dtype)
    return tuple(grads)


differentiable("channel_residual_attention", _gradients, _save)
once_differentiable(
    "channel_residual_attention_backward",
    "pywino.reference.channel_attention.channel_residual_attention is, and computes the same",
)
autocast("channel_residual_attention")


# --- what the planner measures ---


def _runs(call):
    """Squeeze-and-excitation: what the gate is made of takes no time beside the tensor."""
    format = torch.channels_last if call.channels_last else torch.contiguous_format
    size, like = (call.n, call.c, call.h, call.w), {"dtype": call.dtype, "device": call.device}
    input = torch.empty(size, memory_format=format, **like).fill_(2.0**-8)
    w1 = torch.full((-(-call.c // 16), call.c), 2.0**-8, **like)
    arguments = (input, w1, w1.T.contiguous(), None, None, None, None, None, None)

    def run(name):
        backend = "aten" if name is None else planner.kernel_plan(name).backend
        return lambda: _forward(*arguments, backend)

    return run


planner.register("channel_residual_attention", _runs)


# --- the native kernels: csrc/torch/channel_attention.cpp registers them on the CPU key ---


def _native_forward_fake(input, w1, b1, w2, b2, w3, residual, relu, residual_relu):
    return _forward_fake(input, w1, w2, w3, b1, b2, residual, None, None, "cpu")


def _native_backward_fake(grad, input, mean, gate, w1, b1, w2, w3, relu):
    return _backward_fake(grad, input, mean, gate, w1, w2, w3, b1, None, "cpu")


define(
    "_channel_attention_apply(Tensor input, Tensor mean, Tensor w1, Tensor? b1, Tensor w2, "
    "Tensor? b2, Tensor? w3, Tensor? residual, bool relu, bool residual_relu) -> Tensor",
    None,
    lambda input, *_: _layout.empty(input.shape, input),
)
define(
    "_channel_attention_apply_(Tensor(a!) input, Tensor mean, Tensor w1, Tensor? b1, Tensor w2, "
    "Tensor? b2, Tensor? w3, Tensor? residual, bool relu, bool residual_relu) -> ()",
    None,
    lambda *_: None,
)
define(
    "_channel_attention_gate(Tensor mean, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "Tensor? w3) -> Tensor",
    None,
    lambda mean, *_: torch.empty_like(mean),
)
define(
    "_channel_attention_forward(Tensor input, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "Tensor? w3, Tensor? residual, bool relu, bool residual_relu) -> (Tensor, Tensor, Tensor)",
    None,
    _native_forward_fake,
)
define(
    "_channel_attention_backward(Tensor grad, Tensor input, Tensor mean, Tensor gate, Tensor w1, "
    "Tensor? b1, Tensor w2, Tensor? w3, bool relu) -> (Tensor, Tensor)",
    None,
    _native_backward_fake,
)
