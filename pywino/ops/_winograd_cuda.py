# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels as ops, and the one way in which `winograd_conv2d` runs them.

    pywino::_winograd_cuda_filter    weight -> U [tap][K'][C'] and a power of two for each filter
    pywino::_winograd_cuda_forward   the three stages of F(m x m, 3 x 3)
    pywino::_winograd_cuda_direct    the direct convolution: tile 1
    pywino::_winograd_cuda_forward_mean           both, of one image: the input is relu(gate input),
                                                  and the output comes with its channels' means
    pywino::_winograd_cuda_conv_lstm              a step of a convolutional LSTM, by the direct one
    pywino::_winograd_cuda_backward_weight        dW, also of a weight in the Winograd domain
    pywino::_winograd_cuda_domain_backward_input  dX of a weight in the Winograd domain

`strict`: V, U and M in fp32, products by 3xTF32 (TF32 where `direct` is not strict). Else they are
fp16 with a power of two for each tile and filter, summed in fp32. C' and K' are C and K rounded up
to multiples of eight. The kernels are csrc/core/winograd/cuda_*.cu.

A weight of the Winograd domain with zeros has a U without them, and `places` that say where its
numbers lie (`pack`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pywino.backends import WORKSPACE_LIMIT
from pywino.ops import _layout, _packed
from pywino.ops._library import define

_ops = torch.ops.pywino


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
    return _layout.empty((input.shape[0], out_channels, height, width), input)


def _forward_fake(
    input,
    filter,
    scale,
    places,
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


def _forward_mean_fake(
    input,
    gate,
    filter,
    scale,
    bias,
    out_channels,
    tile,
    padding,
    dilation,
    strict,
    workspace_limit,
):
    output = _output(input, out_channels, padding, dilation)
    return output, input.new_empty(output.shape[:2], dtype=torch.float32)


def _conv_lstm_fake(input, hidden, cell, filter, bias, channels, strict):
    size = (input.shape[0], channels, *input.shape[2:])
    return _layout.empty(size, input), _layout.empty(size, input)


def _backward_weight_fake(
    grad,
    input,
    grad_peaks,
    input_peaks,
    tile,
    padding,
    dilation,
    spatial,
    winograd_relu,
    strict,
    workspace_limit,
):
    size = 3 if spatial else tile + 2
    return input.new_empty((grad.shape[1], input.shape[1], size, size))


def _domain_backward_input_fake(
    grad, input, filter, scale, tile, padding, dilation, winograd_relu, strict, workspace_limit
):
    return _layout.empty(input.shape, input)


_GEOMETRY = "int[2] padding, int[2] dilation"
define(
    "_winograd_cuda_filter(Tensor weight, int tile, bool strict, bool rotate, bool spatial) -> "
    "(Tensor, Tensor)",
    None,
    _filter_fake,
)
define(
    "_winograd_cuda_forward(Tensor input, Tensor filter, Tensor scale, Tensor? places, "
    f"Tensor? bias, Tensor? residual, int out_channels, int tile, {_GEOMETRY}, bool relu, "
    "bool winograd_relu, bool strict, int workspace_limit) -> Tensor",
    None,
    _forward_fake,
)
define(
    "_winograd_cuda_direct(Tensor input, Tensor filter, Tensor? bias, Tensor? residual, "
    f"int out_channels, {_GEOMETRY}, bool relu, bool strict) -> Tensor",
    None,
    _direct_fake,
)
define(
    "_winograd_cuda_forward_mean(Tensor input, Tensor? gate, Tensor filter, Tensor scale, "
    f"Tensor? bias, int out_channels, int tile, {_GEOMETRY}, bool strict, int workspace_limit) -> "
    "(Tensor, Tensor)",
    None,
    _forward_mean_fake,
)
define(
    "_winograd_cuda_conv_lstm(Tensor input, Tensor? hidden, Tensor? cell, Tensor filter, "
    "Tensor? bias, int channels, bool strict) -> (Tensor, Tensor)",
    None,
    _conv_lstm_fake,
)

define(
    "_winograd_cuda_backward_weight(Tensor grad, Tensor input, Tensor? grad_peaks, "
    f"Tensor? input_peaks, int tile, {_GEOMETRY}, bool spatial, bool winograd_relu, bool strict, "
    "int workspace_limit) -> Tensor",
    None,
    _backward_weight_fake,
)
define(
    "_winograd_cuda_domain_backward_input(Tensor grad, Tensor input, Tensor filter, Tensor scale, "
    f"int tile, {_GEOMETRY}, bool winograd_relu, bool strict, int workspace_limit) -> Tensor",
    None,
    _domain_backward_input_fake,
)


class Filter(NamedTuple):
    """A transformed weight."""

    u: Tensor
    scale: Tensor
    # int32, of a U without zeros: in blocks (`_packed.Blocks` by tap) their `starts` and `entries`,
    # of 2:4 the metadata, (taps, steps, K' / 16, 32).
    places: Tensor | None = None


# Blocks are left out where less than this part is kept: the lists cost something, too.
_MOST = 0.9


def transform_filter(weight, tile, strict, rotate=False, spatial=True):
    """The `Filter` of a weight, for `forward`; tile 1: for the direct kernel."""
    return Filter(*_ops._winograd_cuda_filter.default(weight, tile, strict, rotate, spatial))


def pack(weight, tile, strict):
    """The `Filter` of a weight in the Winograd domain, without its blocks of zeros or in 2:4 where
    it has them. Waits for the device; with all zeros where a CUDA graph is being captured."""
    u, scale, _ = whole = transform_filter(weight, tile, strict, spatial=False)
    if u.is_cuda and torch.cuda.is_current_stream_capturing():
        return whole
    packed, part = _packed.pack(u.permute(1, 2, 0).unsqueeze(3), by_tap=True)
    if isinstance(packed, _packed.TwoOfFour):
        return Filter(packed.values, scale, packed.metadata.unflatten(0, (len(u), -1)))
    if part > _MOST:
        return whole
    return Filter(packed.values, scale, torch.cat([packed.starts, packed.entries]))


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
    """act(conv + bias + residual) with a filter from `transform_filter` or `pack` of the same tile
    and `strict`; `input` is dense."""
    u, scale, places = filter
    if tile == 1:
        return _ops._winograd_cuda_direct.default(
            input, u, bias, residual, out_channels, padding, dilation, relu, strict
        )
    return _ops._winograd_cuda_forward.default(
        input,
        u,
        scale,
        places,
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


def forward_mean(
    input,
    gate,
    filter,
    bias,
    out_channels,
    tile,
    padding,
    dilation,
    strict,
    workspace_limit=WORKSPACE_LIMIT,
):
    """(conv + bias, the means of its channels) of one image, or of relu(gate input)."""
    return _ops._winograd_cuda_forward_mean.default(
        input,
        gate,
        filter.u,
        filter.scale,
        bias,
        out_channels,
        tile,
        padding,
        dilation,
        strict,
        workspace_limit,
    )


def _by_gates(tensor, channels):
    """Rows i, f, g, o of all channels, as those of the first channel, of the second, ..."""
    return tensor.unflatten(0, (4, channels)).transpose(0, 1).flatten(0, 1)


def lstm_filter(weight, strict):
    """The filter of `conv_lstm`, of a weight (4 C, I + C, 3, 3)."""
    return transform_filter(_by_gates(weight, len(weight) // 4), 1, strict)


def conv_lstm(input, hidden, cell, filter, bias, channels, strict):
    """(h', c') of dense channels_last tensors; hidden and cell may be None: zeros."""
    if bias is not None:
        bias = _by_gates(bias.float(), channels)
    return _ops._winograd_cuda_conv_lstm.default(
        input, hidden, cell, filter.u, bias, channels, strict
    )


def weight_gradient(
    grad,
    input,
    tile,
    padding,
    dilation,
    spatial,
    winograd_relu,
    strict,
    workspace_limit=WORKSPACE_LIMIT,
):
    """dW of dense tensors in one memory format, contiguous; that of the weight in the Winograd
    domain where it is not `spatial`. Sums over tiles in a fixed order."""
    peaks = (None, None) if strict else (_peaks(grad), _peaks(input))
    arguments = (grad, input, *peaks, tile, padding, dilation, spatial, winograd_relu, strict)
    return _ops._winograd_cuda_backward_weight.default(*arguments, workspace_limit)


def _peaks(tensor):
    """max |x| of each channel: the fp16 domain's powers of two, where the sum runs over tiles."""
    return torch.linalg.vector_norm(tensor, math.inf, (0, 2, 3)).float()


def domain_input_gradient(
    grad,
    input,
    filter,
    tile,
    padding,
    dilation,
    winograd_relu,
    strict,
    workspace_limit=WORKSPACE_LIMIT,
):
    """dX of a weight in the Winograd domain, of dense tensors in one memory format; `filter` is
    from `transform_filter` with rotate=True, spatial=False."""
    arguments = (grad, input, filter.u, filter.scale, tile, padding, dilation)
    return _ops._winograd_cuda_domain_backward_input.default(
        *arguments, winograd_relu, strict, workspace_limit
    )
