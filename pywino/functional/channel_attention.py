# SPDX-License-Identifier: BSD-3-Clause
"""`channel_residual_attention`: squeeze-and-excitation, channel attention and SAPNet's, in one."""

import torch
from torch.overrides import is_tensor_like

from pywino import backends
from pywino.functional._checks import _refuse, autocasts, check_choice
from pywino.functional._eager import is_plain, wants_gradients
from pywino.ops import channel_attention as ops
from pywino.reference import channel_attention as reference

_OP = "channel_residual_attention"


def channel_residual_attention(
    input,
    w1,
    w2,
    w3=None,
    b1=None,
    b2=None,
    *,
    activation=None,
    residual=None,
    residual_activation=None,
    mean=None,
    inplace=False,
    backend="auto",
):
    """x g with the gate g = sigmoid(W2 relu(W1 z + b1) + W3 z + b2), z the mean of x over its
    pixels.

    With w3 it is the channel residual attention of SAPNet (Zheng, Lu and Narasimhan, WACV 2022);
    without, squeeze-and-excitation (Hu et al., CVPR 2018) and RCAN's channel attention.

    Args:
        input: x, (N, C, H, W) or (C, H, W), float32, bfloat16, float16 (computed in float32) or
            float64.
        w1, w2, w3: (R, C), (C, R), and (C, C) or None; weights of 1 x 1 convolutions are taken too.
        b1, b2: (R,) and (C,), or None.
        activation: None or "relu", on x g.
        residual: like input, or None: added after that.
        residual_activation: None or "relu", on the sum with the residual.
        mean: z, (N, C) in float32, where what made x has summed it (`WinogradConv2d.with_mean`):
            the CPU's and the CUDA kernel then read x once less. Where a gradient is wanted it is
            made anew.
        inplace: the result may be written over x, where a kernel can and no gradient is wanted; use
            what is returned, and x no more.
        backend: "auto" | "cpu" | "aten" | "cuda" | "triton".

    Returns:
        A tensor like input; channels_last iff the input is. The sums are taken in the same order
        for any number of threads. Differentiable once.

    Raises:
        RuntimeError, TypeError: arguments that do not fit, and an explicit backend that cannot run.
    """
    for value in (activation, residual_activation):
        check_choice(_OP, backend, activation=value)
    tensors = {"input": input, "w1": w1, "w2": w2, "w3": w3, "b1": b1, "b2": b2}
    tensors["residual"] = residual
    _check_tensors(tensors)
    w1, w2, w3 = (_matrix(name, tensors[name]) for name in ("w1", "w2", "w3"))
    _check_shapes(input, w1, w2, w3, b1, b2, residual)
    if mean is not None and (
        mean.dtype != torch.float32 or mean.numel() != input[..., 0, 0].numel()
    ):
        must = f"({', '.join(str(s) for s in input.shape[:-2])}) in float32"
        _refuse(_OP, f"mean must be {must}, got {tuple(mean.shape)} in {mean.dtype}; leave it out")
    if input.dim() == 3:
        return channel_residual_attention(
            input.unsqueeze(0), w1, w2, w3, b1, b2,
            activation=activation,
            residual=None if residual is None else residual.unsqueeze(0),
            residual_activation=residual_activation,
            mean=mean,
            inplace=inplace,
            backend=backend,
        ).squeeze(0)  # fmt: skip

    arguments = (input, w1, w2, w3, b1, b2, residual, activation, residual_activation)
    if backend not in ("auto", "aten"):
        _require(backend, input)
    if torch.compiler.is_dynamo_compiling():
        return torch.ops.pywino.channel_residual_attention(*arguments, backend)[0]
    if not is_plain(*arguments[:7]):
        return reference.channel_residual_attention(*arguments)
    if backend != "aten" and not autocasts(input) and not wants_gradients(*arguments[:7]):
        name = "cpu" if input.is_cpu else "cuda"
        if backend in ("auto", name) and backends.can_run(name, ops.describe(input)) is None:
            if mean is not None:
                return ops.apply(input, mean, *arguments[1:], inplace)
            if name == "cpu":
                return ops.native_forward(*arguments)[0]
    return torch.ops.pywino.channel_residual_attention.default(*arguments, backend)[0]


def _require(backend, input):
    reason = backends.can_run(backend, ops.describe(input))
    if reason is not None:
        _refuse(_OP, f'backend={backend!r} cannot run this call: {reason}; use backend="auto"')


def _matrix(name, weight):
    if weight is None:
        return None
    if weight.dim() == 4 and tuple(weight.shape[2:]) == (1, 1):
        return weight.flatten(1)
    if weight.dim() != 2:
        got = f"got {tuple(weight.shape)}; reshape it"
        _refuse(_OP, f"{name} must be a matrix or the weight of a 1 x 1 convolution, {got}")
    return weight


def _check_tensors(tensors):
    input = tensors["input"]
    for name, tensor in tensors.items():
        if tensor is None and name in ("w3", "b1", "b2", "residual"):
            continue
        if not is_tensor_like(tensor):
            got = f"got {type(tensor).__name__}; pass a torch.Tensor"
            _refuse(_OP, f"{name} must be a tensor, {got}", TypeError)
        if not tensor.is_floating_point():
            got = f"got {tensor.dtype}; convert it: {name}.float()"
            _refuse(_OP, f"{name} must be of a floating point dtype, {got}")
        if tensor.device != input.device:
            got = f"got {tensor.device}; move it: {name}.to(input.device)"
            _refuse(_OP, f"{name} must be on input's device {input.device}, {got}")
        if tensor.dtype != input.dtype and not autocasts(input):
            got = f"got {tensor.dtype}; convert it: {name}.to(input.dtype)"
            _refuse(_OP, f"{name} must be of input's dtype {input.dtype}, {got}")


def _check_shapes(input, w1, w2, w3, b1, b2, residual):
    if input.dim() not in (3, 4):
        got = f"got {tuple(input.shape)}; reshape it"
        _refuse(_OP, f"input must be (N, C, H, W) or (C, H, W), {got}")
    c, r = input.shape[-3], w1.shape[0]
    if r == 0:
        _refuse(_OP, f"w1 must have at least one row, got {tuple(w1.shape)}; use a larger R")
    if 0 in input.shape[-3:]:
        got = f"got {tuple(input.shape)}; drop the call"
        _refuse(_OP, f"input must have at least one channel and pixel, {got}")
    for name, tensor, must in (
        ("w1", w1, (r, c)),
        ("w2", w2, (c, r)),
        ("w3", w3, (c, c)),
        ("b1", b1, (r,)),
        ("b2", b2, (c,)),
        ("residual", residual, tuple(input.shape)),
    ):
        if tensor is not None and tuple(tensor.shape) != must:
            got = f"got {tuple(tensor.shape)}; change one of them"
            _refuse(_OP, f"{name} must be {must} for input {tuple(input.shape)}, {got}")
