# SPDX-License-Identifier: BSD-3-Clause
"""Convolution with a weight W of the Winograd domain, and what skips its zeros.

    pywino::winograd_domain_conv2d                   act(A^T [ sum_c W . (B^T d B) ] A + bias
                                                     + residual)
    pywino::winograd_domain_conv2d_backward_input    its gradients. It is linear in input and
    pywino::winograd_domain_conv2d_backward_weight   weight, so the three are closed under
                                                     differentiation

W is (K, C, tile + 2, tile + 2). The CPU's kernels get W whole or without its zeros, whichever is
the less work (_winograd_zeros.py); those of "cuda" leave zeros out where that backend was asked for
(_winograd_cuda.py). PyTorch has no kernel of these ops: what is not covered is a composition.
"""

import torch

from pywino import backends
from pywino.backends import Call
from pywino.ops import _layout
from pywino.ops._kernels import kernel_in_domain
from pywino.ops._library import autocast, define, differentiable
from pywino.reference import winograd as reference

_ops = torch.ops.pywino


def dense_call(input, weight, bias, padding, dilation, winograd_relu):
    """A function that computes with all zeros of W, packed once, for comparison; None where there
    is no kernel for the call."""
    tile, op = weight.shape[-1] - 2, "winograd_domain_conv2d"
    if isinstance(padding, str):
        padding = dilation if padding == "same" else (0, 0)
    if input.dim() != 4:
        return None
    kernel = _kernel(op, input, input.shape, len(weight), padding, dilation, tile, "auto")
    if kernel is None:
        return None
    kernel = kernel._replace(winograd_relu=winograd_relu)
    filter = kernel.whole_filter(weight)
    arguments = (filter, bias, None, len(weight), padding, dilation, False)
    return lambda: kernel.forward(input, *arguments)


# --- the op ---


def output_size(input, weight, padding, dilation):
    height, width = (s + 2 * p - 2 * d for s, p, d in zip(input.shape[2:], padding, dilation))
    return input.shape[0], weight.shape[0], height, width


def _input_size(grad, weight, padding, dilation):
    height, width = (s - 2 * p + 2 * d for s, p, d in zip(grad.shape[2:], padding, dilation))
    return grad.shape[0], weight.shape[1], height, width


def _check(input, weight, padding, dilation, tile):
    torch._check(
        input.dim() == 4
        and weight.dim() == 4
        and tuple(weight.shape[1:]) == (input.shape[1], tile + 2, tile + 2)
        and input.dtype == weight.dtype
        and min(padding) >= 0
        and min(dilation) >= 1
        and min(output_size(input, weight, padding, dilation)[2:]) > 0,
        lambda: (
            "pywino::winograd_domain_conv2d: input must be (N, C, H, W) and weight (K, C, tile + 2,"
            f" tile + 2) of one dtype, with an output, got {tuple(input.shape)} and "
            f"{tuple(weight.shape)} for tile={tile}, padding={padding}, dilation={dilation}; "
            "pywino.WinogradConv2d says more"
        ),
    )


def _kernel(op, like, size, k, padding, dilation, tile, backend):
    geometry = tuple(padding), tuple(dilation)
    tf32 = backends.allows_tf32(like)
    call = Call(op, *size, k, *geometry, like.dtype, device=like.device.type, tf32=tf32)
    return kernel_in_domain(call, tile, backend)


def _forward(input, weight, bias, residual, padding, dilation, activation, tile, backend):
    _check(input, weight, padding, dilation, tile)
    op, k, relu = "winograd_domain_conv2d", weight.shape[0], activation == "relu"
    kernel = _kernel(op, input, input.shape, k, padding, dilation, tile, backend)
    if kernel:
        return kernel.convolve(input, weight, bias, residual, padding, dilation, relu)
    output = reference.winograd_domain_conv2d(input, weight, bias, padding, dilation, tile)
    if residual is not None:
        output = output.add_(residual)
    return _layout.laid_as(output.relu_() if relu else output, input)


def _forward_fake(input, weight, bias, residual, padding, dilation, activation, tile, backend):
    _check(input, weight, padding, dilation, tile)
    return _layout.empty(output_size(input, weight, padding, dilation), input)


def _backward_input(grad, weight, padding, dilation, tile, backend):
    op, size = "winograd_domain_conv2d_backward_input", _input_size(grad, weight, padding, dilation)
    kernel = _kernel(op, grad, size, weight.shape[0], padding, dilation, tile, backend)
    if kernel:
        input = _layout.empty(size, grad)  # its shape and layout are read, no element
        return kernel.domain_input_gradient(_layout.dense(grad), input, weight, padding, dilation)
    gradient = reference.winograd_domain_backward_input(grad, weight, padding, dilation, tile)
    return _layout.laid_as(gradient, grad)


def _backward_input_fake(grad, weight, padding, dilation, tile, backend):
    return _layout.empty(_input_size(grad, weight, padding, dilation), grad)


def _backward_weight(grad, input, padding, dilation, tile, backend):
    op = "winograd_domain_conv2d_backward_weight"
    grad = _layout.laid_as(grad, input)
    kernel = _kernel(op, input, input.shape, grad.shape[1], padding, dilation, tile, backend)
    if kernel:
        return kernel.weight_gradient(grad, _layout.dense(input), padding, dilation)
    gradient = reference.winograd_domain_backward_weight(grad, input, padding, dilation, tile)
    return gradient.contiguous()


def _backward_weight_fake(grad, input, padding, dilation, tile, backend):
    return input.new_empty((grad.shape[1], input.shape[1], tile + 2, tile + 2))


_GEOMETRY = "int[2] padding, int[2] dilation"
define(
    "winograd_domain_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, "
    f"{_GEOMETRY}, str? activation, int tile, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
define(
    f"winograd_domain_conv2d_backward_input(Tensor grad, Tensor weight, {_GEOMETRY}, int tile, "
    "str backend) -> Tensor",
    _backward_input,
    _backward_input_fake,
)
define(
    f"winograd_domain_conv2d_backward_weight(Tensor grad, Tensor input, {_GEOMETRY}, int tile, "
    "str backend) -> Tensor",
    _backward_weight,
    _backward_weight_fake,
)


def _save(ctx, inputs, output):
    input, weight, _, _, padding, dilation, activation, tile, backend = inputs
    ctx.save_for_backward(input, weight, output if activation == "relu" else None)
    ctx.arguments = (padding, dilation, tile, backend)


def _gradients(ctx, grad):
    input, weight, output = ctx.saved_tensors
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    needs, where = ctx.needs_input_grad, ctx.arguments
    dense = _layout.laid_as(grad, input) if needs[0] or needs[1] else grad
    return (
        _ops.winograd_domain_conv2d_backward_input(dense, weight, *where) if needs[0] else None,
        _ops.winograd_domain_conv2d_backward_weight(dense, input, *where) if needs[1] else None,
        grad.sum((0, 2, 3)) if needs[2] else None,
        grad if needs[3] else None,
        *[None] * 5,
    )


def _save_backward(ctx, inputs, output):
    first, second, *ctx.arguments = inputs
    ctx.save_for_backward(first, second)


def _conv(input, weight, padding, dilation, tile, backend):
    return _ops.winograd_domain_conv2d(
        input, weight, None, None, padding, dilation, None, tile, backend
    )


def _backward_input_gradients(ctx, g):  # g is like the input of the convolution
    grad, weight = ctx.saved_tensors
    needs, where = ctx.needs_input_grad, ctx.arguments
    return (
        _conv(g, weight, *where) if needs[0] else None,
        _ops.winograd_domain_conv2d_backward_weight(grad, g, *where) if needs[1] else None,
        *[None] * 4,
    )


def _backward_weight_gradients(ctx, g):  # g is like the weight
    grad, input = ctx.saved_tensors
    needs, where = ctx.needs_input_grad, ctx.arguments
    return (
        _conv(input, g, *where) if needs[0] else None,
        _ops.winograd_domain_conv2d_backward_input(grad, g, *where) if needs[1] else None,
        *[None] * 4,
    )


differentiable("winograd_domain_conv2d", _gradients, _save)
differentiable("winograd_domain_conv2d_backward_input", _backward_input_gradients, _save_backward)
differentiable("winograd_domain_conv2d_backward_weight", _backward_weight_gradients, _save_backward)
for _name in ("", "_backward_input", "_backward_weight"):
    autocast("winograd_domain_conv2d" + _name)
