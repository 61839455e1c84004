# SPDX-License-Identifier: BSD-3-Clause
"""Convolution with a weight W of the Winograd domain, and what skips its zeros.

    pywino::winograd_domain_conv2d                   act(A^T [ sum_c W . (B^T d B) ] A + bias
                                                     + residual)
    pywino::winograd_domain_conv2d_backward_input    its gradients. It is linear in input and
    pywino::winograd_domain_conv2d_backward_weight   weight, so the three are closed under
                                                     differentiation

W is (K, C, tile + 2, tile + 2). `pack` gives the native kernel W dense or without its zeros,
whichever is the less work; Winograd-ReLU (pywino.ops.winograd) uses it too.
"""

import torch
from torch.nn import functional as F

from pywino import backends, planner
from pywino.backends import Call
from pywino.ops._library import autocast, define, differentiable
from pywino.reference import winograd as reference

_ops = torch.ops.pywino

# --- dense or sparse ---

# A vector of the block kernel holds 16 output channels at most; blocks of 16 are whole vectors in
# every instruction set.
BLOCK = 16
# The work of a product without zeros in units of the dense one, by the part of the weights (of
# blocks) that is not zero: slope and what it costs in any case (transposed tiles). Break-even at
# 91 and 45 %, about the worst of VGG's layers on Zen 4 (benches/bench_sparse_conv.py measures it).
_BLOCKS = (1.0, 0.04)
_UNSTRUCTURED = (1.8, 0.14)
# Below this part of the dense work the sparse kernel wins for certain.
_GAIN = 0.95


def densities(weight):
    """(part of the weights, part of the 16 x 1 blocks of a position) that are not zero."""
    kept = weight != 0
    blocks = F.pad(kept, (0, 0, 0, 0, 0, 0, 0, -len(kept) % BLOCK)).unflatten(0, (-1, BLOCK))
    return kept.float().mean().item(), blocks.any(1).float().mean().item()


def _is_full(weight):
    """Whether no zero is in a sample of at most 128 x 128 kernels: to count those of a weight in
    training would take longer than to pack it."""
    k, c = (max(1, size // 64) for size in weight.shape[:2])
    sample = weight[::k, ::c]
    return sample.count_nonzero().item() == sample.numel()


def pattern(weight):
    """How to pack a weight of the Winograd domain: "dense", "blocks" or "unstructured"."""
    if _is_full(weight):
        return "dense"
    single, blocks = densities(weight)
    work = {
        "dense": _GAIN,
        "blocks": _BLOCKS[0] * blocks + _BLOCKS[1],
        "unstructured": _UNSTRUCTURED[0] * single + _UNSTRUCTURED[1],
    }
    return min(work, key=work.get)


def pack(weight, tile):
    """What `_winograd_forward` takes for W: a float tensor, or an int32 one without the zeros."""
    how = pattern(weight)
    if how == "dense":
        return _ops._winograd_pack.default(weight, tile, False)
    return _ops._winograd_sparse_pack.default(weight, tile, False, how == "blocks")


def pack_turned(weight, tile):
    """What `_winograd_domain_backward_input` takes for W: a float tensor, or an int32 one without
    the zeros. Blocks of output channels are none of the turned weight, so zeros are skipped one by
    one."""
    if not _is_full(weight) and _UNSTRUCTURED[0] * densities(weight)[0] + _UNSTRUCTURED[1] < _GAIN:
        return _ops._winograd_sparse_pack.default(weight, tile, True, False)
    return _ops._winograd_pack.default(weight, tile, True)


def dense_call(input, weight, bias, padding, dilation, winograd_relu):
    """A function that computes with all zeros of W, packed once, for comparison; None where there
    is no kernel for the call."""
    tile, op = weight.shape[-1] - 2, "winograd_domain_conv2d"
    if isinstance(padding, str):
        padding = dilation if padding == "same" else (0, 0)
    if input.dim() != 4 or not _runs_native(
        op, input, input.shape, len(weight), padding, dilation, tile, "auto"
    ):
        return None
    filter = _ops._winograd_pack.default(weight, tile, False)
    bias = None if bias is None else bias.float()
    arguments = (filter, bias, None, len(weight), tile, padding, dilation, False, winograd_relu)
    return lambda: _ops._winograd_forward.default(_dense(input), *arguments, False)


# --- the op ---


def _format(like):
    return torch.channels_last if backends.is_channels_last(like) else torch.contiguous_format


def _dense(tensor):
    return tensor if backends.is_channels_last(tensor) else tensor.contiguous()


def output_size(input, weight, padding, dilation):
    height, width = (s + 2 * p - 2 * d for s, p, d in zip(input.shape[2:], padding, dilation))
    return input.shape[0], weight.shape[0], height, width


def _input_size(grad, weight, padding, dilation):
    height, width = (s - 2 * p + 2 * d for s, p, d in zip(grad.shape[2:], padding, dilation))
    return grad.shape[0], weight.shape[1], height, width


def _empty(size, like):
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=_format(like))


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


def _runs_native(op, like, size, k, padding, dilation, tile, backend):
    """PyTorch has no kernel of this op: the native one runs wherever it can."""
    if backend == "aten":
        return False
    geometry = tuple(padding), tuple(dilation)
    call = Call(op, *size, k, *geometry, like.dtype, device=like.device.type)
    if backend != "auto":
        planner.require(backend, call, f"f{tile}")
    return backends.can_run("cpu", call, f"f{tile}") is None


def native_forward(input, filter, bias, residual, out_channels, tile, padding, dilation, relu):
    """`_winograd_forward` on tensors as they come; `filter` is from `pack`."""
    input = _dense(input)
    if bias is not None:
        bias = bias.float().contiguous()
    if residual is not None:
        residual = residual.to(input.dtype).contiguous(memory_format=_format(input))
    return _ops._winograd_forward.default(
        input, filter, bias, residual, out_channels, tile, padding, dilation, relu, False, False
    )


def _forward(input, weight, bias, residual, padding, dilation, activation, tile, backend):
    _check(input, weight, padding, dilation, tile)
    op, k, relu = "winograd_domain_conv2d", weight.shape[0], activation == "relu"
    if _runs_native(op, input, input.shape, k, padding, dilation, tile, backend):
        filter = pack(weight, tile)
        return native_forward(input, filter, bias, residual, k, tile, padding, dilation, relu)
    output = reference.winograd_domain_conv2d(input, weight, bias, padding, dilation, tile)
    if residual is not None:
        output = output.add_(residual)
    return (output.relu_() if relu else output).contiguous(memory_format=_format(input))


def _forward_fake(input, weight, bias, residual, padding, dilation, activation, tile, backend):
    _check(input, weight, padding, dilation, tile)
    return _empty(output_size(input, weight, padding, dilation), input)


def _backward_input(grad, weight, padding, dilation, tile, backend):
    op, size = "winograd_domain_conv2d_backward_input", _input_size(grad, weight, padding, dilation)
    if _runs_native(op, grad, size, weight.shape[0], padding, dilation, tile, backend):
        filter = pack_turned(weight, tile)
        input = _empty(size, grad)  # its shape and layout are read, no element
        return _ops._winograd_domain_backward_input.default(
            _dense(grad), input, filter, tile, padding, dilation, False
        )
    return reference.winograd_domain_backward_input(
        grad, weight, padding, dilation, tile
    ).contiguous(memory_format=_format(grad))


def _backward_input_fake(grad, weight, padding, dilation, tile, backend):
    return _empty(_input_size(grad, weight, padding, dilation), grad)


def _backward_weight(grad, input, padding, dilation, tile, backend):
    op = "winograd_domain_conv2d_backward_weight"
    grad = grad.contiguous(memory_format=_format(input))
    if _runs_native(op, input, input.shape, grad.shape[1], padding, dilation, tile, backend):
        return _ops._winograd_backward_weight.default(
            grad, _dense(input), tile, padding, dilation, False, False
        )
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
    dense = grad.contiguous(memory_format=_format(input)) if needs[0] or needs[1] else grad
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
