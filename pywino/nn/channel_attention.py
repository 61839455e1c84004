# SPDX-License-Identifier: BSD-3-Clause
"""The gates: channel residual attention, and squeeze-and-excitation as the case without W3."""

from typing import NamedTuple

import torch
from torch import nn

from pywino.functional.channel_attention import channel_residual_attention
from pywino.ops import channel_attention as ops


class GatePaths(NamedTuple):
    """The names, inside of a module, of the layers with W1, W2 and (or None) W3."""

    squeeze: str = "conv_du.0"
    expand: str = "conv_du.2"
    shortcut: str | None = "conv_1_1"


class ChannelAttention(nn.Module):
    """x sigmoid(W2 relu(W1 z + b1) + W3 z + b2) by PyTorch's own operations, z the spatial mean of
    x: what `pywino.restore_` puts where a `ChannelResidualAttention` was.

    Args: those of `ChannelResidualAttention`."""

    def __init__(
        self,
        channels,
        reduction=16,
        *,
        residual=True,
        bias=False,
        rd_ratio=None,
        rd_channels=None,
        rd_divisor=1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        hidden = _hidden(channels, reduction, rd_ratio, rd_channels, rd_divisor)
        options = {"device": device, "dtype": dtype}
        self.conv_du = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=bias, **options),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=bias, **options),
        )
        if residual:
            self.conv_1_1 = nn.Conv2d(channels, channels, 1, bias=False, **options)
        self.paths = GatePaths(shortcut="conv_1_1" if residual else None)

    def forward(self, input):
        z = input.mean((-2, -1), keepdim=True)
        squeeze, expand, shortcut = self.layers()
        if isinstance(squeeze, nn.Linear):
            z = z.flatten(-3)
        u = expand(torch.relu(squeeze(z)))
        if shortcut is not None:
            u = u + shortcut(z)
        return input * torch.sigmoid(u).view(*input.shape[:-2], 1, 1)

    def layers(self):
        """The layers with W1, W2 and W3; None where there is no W3."""
        return [None if path is None else self.get_submodule(path) for path in self.paths]


class ChannelResidualAttention(ChannelAttention):
    """x g with g = sigmoid(W2 relu(W1 z + b1) + W3 z + b2), z the spatial mean of x: one pass over
    x for the mean, one for the gate.

    Args:
        channels: C.
        reduction: W1 has C / reduction rows, and at least one.
        residual: with W3 (SAPNet's channel residual attention; it has no bias); without, it is
            squeeze-and-excitation and RCAN's channel attention.
        bias: b1 and b2.
        rd_ratio, rd_channels, rd_divisor: timm's names for the rows of W1: C * rd_ratio rounded to
            a multiple of rd_divisor, or rd_channels itself; they go before `reduction`.

    `forward(input, activation=None, residual=None, residual_activation=None, mean=None,
    inplace=False)` fuses what comes after: a ReLU on x g, a tensor that is added to it, a ReLU on
    the sum. `mean` is z where the layer before has made it (`WinogradConv2d.with_mean`); with
    `inplace` the result may be written over x. Parameter names are those of SAPNet's published
    file."""

    def forward(
        self,
        input,
        activation=None,
        residual=None,
        residual_activation=None,
        mean=None,
        inplace=False,
    ):
        squeeze, expand, shortcut = self.layers()
        return channel_residual_attention(
            input,
            squeeze.weight,
            expand.weight,
            None if shortcut is None else shortcut.weight,
            squeeze.bias,
            expand.bias,
            activation=activation,
            residual=residual,
            residual_activation=residual_activation,
            mean=mean,
            inplace=inplace,
        )

    def gate(self, mean):
        """g (N, C) of the means z (N, C), where what reads x next applies it
        (`WinogradConv2d.with_mean`)."""
        squeeze, expand, shortcut = self.layers()
        w1, w2, w3 = (
            layer if layer is None else layer.weight.flatten(1)
            for layer in (squeeze, expand, shortcut)
        )
        return ops.gate(mean, w1, w2, w3, squeeze.bias, expand.bias)

    @classmethod
    def from_dense(cls, gate, paths):
        """A layer that shares the layers, names and hooks of another gate, such as an SE module;
        `paths` (GatePaths) names its layers with W1, W2 and W3."""
        layer = cls.__new__(cls)
        layer.__dict__.update(gate.__dict__)
        layer.paths = GatePaths(*paths)
        layer.dense_class = type(gate)
        return layer

    def to_dense(self):
        """The module of PyTorch's own operations that shares this one's layers and hooks: of the
        class that it was made from."""
        kind = self.__dict__.get("dense_class", ChannelAttention)
        own = ("dense_class",) if kind is ChannelAttention else ("dense_class", "paths")
        dense = kind.__new__(kind)
        dense.__dict__.update({k: v for k, v in self.__dict__.items() if k not in own})
        return dense


def _hidden(channels, reduction, rd_ratio, rd_channels, rd_divisor):
    if rd_channels is None and rd_ratio is not None:
        # To the nearest multiple, and one more where that would take away a tenth: as timm does it.
        wanted = channels * rd_ratio
        rd_channels = max(rd_divisor, int(wanted + rd_divisor / 2) // rd_divisor * rd_divisor)
        if rd_channels < 0.9 * wanted:
            rd_channels += rd_divisor
    hidden = max(1, channels // reduction) if rd_channels is None else rd_channels
    if channels < 1 or hidden < 1:
        raise RuntimeError(
            "pywino.ChannelResidualAttention: channels and the reduced channels must be >= 1, got "
            f"{channels} and {hidden}; change reduction"
        )
    return hidden
