# SPDX-License-Identifier: BSD-3-Clause
"""`masked_conv2d`: a convolution of the pixels of a mask."""

import torch
from torch import get_autocast_dtype
from torch._C._functorch import is_batchedtensor
from torch.overrides import is_tensor_like

from pywino.functional._checks import (
    _refuse,
    autocasts,
    check_choice,
    check_geometry,
    check_tensors,
)
from pywino.functional._eager import is_plain, wants_gradients
from pywino.ops import _layout
from pywino.ops import masked_conv as ops
from pywino.reference import masked_conv as reference


def masked_conv2d(input, mask, weight, bias=None, padding="same", dilation=1, *, backend="auto"):
    """A convolution that reads and writes the pixels of a mask alone: m (conv(m input) + bias), the
    mask-guided sparse convolution of SPAIR (Purohit et al., ICCV 2021).

    Args:
        input: (N, C, H, W) or (C, H, W); float32, bfloat16 or float16 have kernels (on the CPU
            computed in float32), everything else is a dense convolution of the masked input.
        mask: bool, (N, 1, H, W), or (1, 1, H, W) for all images; any mask, also an empty one. For a
            (C, H, W) input also (1, H, W).
        weight: (K, C, height, width), any size.
        bias: (K,) or None; outside the mask the output is 0, not the bias.
        padding: "same", or the numbers that mean the same.
        dilation: an integer or two.
        backend: "auto" | "aten" | "cpu" (the mask's pixels, or for 3x3 kernels the Winograd tiles
            that it meets) | "cuda" | "triton" (the mask's pixels, however many). On a GPU "auto"
            counts the mask's pixels, which the host waits for, only where that is small beside the
            dense convolution; else it is the dense one.

    Returns:
        (N, K, H, W) or (K, H, W) in input's dtype, channels_last iff input or weight is. NaN
        outside the mask does not spread. Differentiable twice, but for the mask.

    Raises:
        RuntimeError, TypeError: whatever F.conv2d refuses, a mask of another shape or dtype, and an
            explicit backend that cannot run.

    The cost follows the number of pixels in the mask, or of 4x4 tiles with a pixel of it; there a
    NaN of the mask spreads to the mask's pixels of its tile. `pywino.MaskedConv2d` keeps the packed
    weight.
    """
    return run_masked_conv2d(input, mask, weight, bias, padding, dilation, backend)


def run_masked_conv2d(input, mask, weight, bias, padding, dilation, backend, cache=None):
    """`masked_conv2d`, with the packed filter kept in a layer's `FilterCache`."""
    op = "masked_conv2d"
    check_choice(op, backend)
    check_tensors(op, input, weight, bias)
    _check_mask(op, input, mask)
    given = padding
    _, pads, dilation = check_geometry(op, input, weight, 1, padding, dilation, 1)
    size = tuple(weight.shape[2:])
    same = ops.front(size, dilation)
    odd = all(d * (r - 1) % 2 == 0 for r, d in zip(size, dilation))
    if given != "same" and (isinstance(given, str) or not odd or tuple(pads) != same):
        numbers = f" or {same}" if odd else ""
        _refuse(
            op,
            f"padding must be 'same'{numbers}, so that the output has the mask's size, got "
            f"{given!r}; use 'same'",
        )
    if input.dim() == 3:
        batch, masks = input.unsqueeze(0), mask if mask.dim() == 4 else mask.unsqueeze(0)
        output = run_masked_conv2d(batch, masks, weight, bias, "same", dilation, backend, cache)
        return output.squeeze(0)
    where = (same, dilation)
    if torch.compiler.is_dynamo_compiling():
        if not (is_batchedtensor(input) or is_batchedtensor(weight)):
            input = _layout.following(input, weight)
        return torch.ops.pywino.masked_conv2d(input, mask, weight, bias, *where, backend)
    if not is_plain(input, mask, weight, bias):
        return reference.masked_conv2d(input, mask, weight, bias, *where)
    input = _layout.following(input, weight)
    if wants_gradients(input, weight, bias) or cache is None:
        return torch.ops.pywino.masked_conv2d.default(input, mask, weight, bias, *where, backend)
    if autocasts(input):
        dtype = get_autocast_dtype(input.device.type)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    dtype = input.dtype

    def filter_of(backend):
        if backend in ("cpu", "tiles"):  # float32, whatever the call's dtype is
            return cache.derived(backend, weight, lambda weight: ops.pack(weight, backend))
        make = lambda weight: ops.pack(weight.to(dtype), backend)  # noqa: E731
        return cache.derived((backend, dtype), weight, make)

    return ops.run(input, mask, weight.to(dtype), bias, *where, backend, filter_of)


def _check_mask(op, input, mask):
    if not is_tensor_like(mask):
        got = type(mask).__name__
        _refuse(op, f"mask must be a tensor, got {got}; pass a torch.Tensor", TypeError)
    if mask.dtype != torch.bool:
        _refuse(op, f"mask must be bool, got {mask.dtype}; compare it: mask > 0.5")
    n = input.shape[0] if input.dim() == 4 else 1
    size = tuple(input.shape[-2:])
    shapes = {(1, 1, *size), (n, 1, *size)} | ({(1, *size)} if input.dim() == 3 else set())
    if tuple(mask.shape) not in shapes:
        must = f"({n} or 1, 1, {size[0]}, {size[1]})" if n > 1 else f"(1, 1, {size[0]}, {size[1]})"
        _refuse(op, f"mask must be {must}, got {tuple(mask.shape)}; reshape it")
    if mask.device != input.device:
        got = f"got {mask.device}; move it: mask.to(input.device)"
        _refuse(op, f"mask must be on input's device {input.device}, {got}")
