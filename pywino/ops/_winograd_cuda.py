# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels as ops, and the one way in which `winograd_conv2d` runs them.

    pywino::_winograd_cuda_filter    weight -> U [tap][K'][C'] and a power of two for each filter
    pywino::_winograd_cuda_forward   the three stages of F(m x m, 3 x 3)
    pywino::_winograd_cuda_direct    the direct convolution: tile 1

`strict`: V, U and M in fp32, products by 3xTF32 (TF32 where `direct` is not strict). Else they are
fp16 with a power of two for each tile and filter, summed in fp32. C' and K' are C and K rounded up
to multiples of eight. The kernels are csrc/core/winograd/cuda_*.cu.
"""

import torch

from pywino import backends
from pywino.ops._library import define

_ops = torch.ops.pywino
WORKSPACE_LIMIT = 256 << 20  # bytes; a larger call runs in several parts


def _padded(channels):
    return -(-channels // 8) * 8


def _filter_fake(weight, tile, strict, rotate, spatial):
    k, c = weight.shape[:2] if not rotate else (weight.shape[1], weight.shape[0])
    scale = weight.new_empty((k,), dtype=torch.float32)
    if tile == 1:
        return weight.new_empty((9, _padded(k), c)), scale
    dtype = torch.float32 if strict else torch.float16
    return weight.new_empty(((tile + 2) ** 2, _padded(k), _padded(c)), dtype=dtype), scale


def _output(input, out_channels, padding, dilation):
    height, width = (s + 2 * p - 2 * d for s, p, d in zip(input.shape[2:], padding, dilation))
    channels_last = backends.is_channels_last(input)
    return torch.empty(
        (input.shape[0], out_channels, height, width),
        dtype=input.dtype,
        device=input.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _forward_fake(
    input,
    filter,
    scale,
    bias,
    residual,
    out_channels,
    tile,
    padding,
    dilation,
    relu,
    winograd_relu,
    strict,
    workspace_limit,
):
    return _output(input, out_channels, padding, dilation)


def _direct_fake(input, filter, bias, residual, out_channels, padding, dilation, relu, strict):
    return _output(input, out_channels, padding, dilation)


_GEOMETRY = "int[2] padding, int[2] dilation"
define(
    "_winograd_cuda_filter(Tensor weight, int tile, bool strict, bool rotate, bool spatial) -> "
    "(Tensor, Tensor)",
    None,
    _filter_fake,
)
define(
    "_winograd_cuda_forward(Tensor input, Tensor filter, Tensor scale, Tensor? bias, "
    f"Tensor? residual, int out_channels, int tile, {_GEOMETRY}, bool relu, bool winograd_relu, "
    "bool strict, int workspace_limit) -> Tensor",
    None,
    _forward_fake,
)
define(
    "_winograd_cuda_direct(Tensor input, Tensor filter, Tensor? bias, Tensor? residual, "
    f"int out_channels, {_GEOMETRY}, bool relu, bool strict) -> Tensor",
    None,
    _direct_fake,
)


def transform_filter(weight, tile, strict, rotate=False, spatial=True):
    """(U, scale) of a weight, for `forward`; tile 1: for the direct kernel."""
    return _ops._winograd_cuda_filter.default(weight, tile, strict, rotate, spatial)


def forward(
    input,
    filter,
    bias,
    residual,
    out_channels,
    tile,
    padding,
    dilation,
    relu,
    strict,
    winograd_relu=False,
    workspace_limit=WORKSPACE_LIMIT,
):
    """act(conv + bias + residual) with a filter from `transform_filter` of the same tile and
    `strict`; `input` is dense."""
    u, scale = filter
    if tile == 1:
        return _ops._winograd_cuda_direct.default(
            input, u, bias, residual, out_channels, padding, dilation, relu, strict
        )
    return _ops._winograd_cuda_forward.default(
        input,
        u,
        scale,
        bias,
        residual,
        out_channels,
        tile,
        padding,
        dilation,
        relu,
        winograd_relu,
        strict,
        workspace_limit,
    )
