# SPDX-License-Identifier: BSD-3-Clause
"""SAPNet's deraining network (Zheng, Lu and Narasimhan, WACV 2022).

Six stages share one set of weights. A stage sees the rainy image y and the last estimate x:

    a = ReLU(conv0([y, x]))
    i, f, o = sigmoid, g = tanh of four convolutions of [a, h];  c = f c + i g;  h = o tanh(c)
    s = h, then five residual blocks with dilation 1, 2, 4, 8, 16:  s = ReLU(block(s) + s)
    x = conv(s) + y

A block is conv, attention, ReLU, conv, attention, ReLU. Parameter names are those of the authors'
file.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pywino.models.weights import load_weights

_CHANNELS = 32
_REDUCTION = 16


class _ChannelAttention(nn.Module):
    """x * sigmoid(W2 ReLU(W1 z)), with z the spatial mean of x; (N, C, H, W) -> the same."""

    def __init__(self, channels: int, reduction: int = _REDUCTION):
        super().__init__()
        self.conv_du = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // reduction, channels, 1, bias=False),
        )

    def gate(self, z: Tensor) -> Tensor:
        return self.conv_du(z)

    def forward(self, input: Tensor) -> Tensor:
        return input * torch.sigmoid(self.gate(input.mean((2, 3), keepdim=True)))


class _ChannelResidualAttention(_ChannelAttention):
    """x * sigmoid(W2 ReLU(W1 z) + W3 z): the residual is inside the gate, none is around it."""

    def __init__(self, channels: int, reduction: int = _REDUCTION):
        super().__init__(channels, reduction)
        self.conv_1_1 = nn.Conv2d(channels, channels, 1, bias=False)

    def gate(self, z: Tensor) -> Tensor:
        return self.conv_du(z) + self.conv_1_1(z)


class _SqueezeExcitation(nn.Module):
    """The same function as `_ChannelAttention`, with linear layers (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int, reduction: int = _REDUCTION):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels, bias=False),
        )

    def forward(self, input: Tensor) -> Tensor:
        return input * torch.sigmoid(self.fc(input.mean((2, 3))))[:, :, None, None]


_ATTENTION = {
    "cra": _ChannelResidualAttention,
    "ca": _ChannelAttention,
    "se": _SqueezeExcitation,
    None: None,
}


def _conv(in_channels: int, out_channels: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation)


class SAPNet(nn.Module):
    """The deraining network. Input and output (N, 3, H, W), RGB in 0..1 (the output may leave that
    range a little).

    `forward(y, return_stages=True)` returns the estimates of all stages; the last one is the
    result.
    """

    def __init__(
        self,
        attention: str | None = "cra",
        dilation: Sequence[int] = (1, 2, 4, 8, 16),
        stages: int = 6,
    ):
        super().__init__()
        if attention not in _ATTENTION:
            raise ValueError(
                f"sapnet: attention must be one of 'cra', 'ca', 'se' or None, got {attention!r}"
            )
        dilation = tuple(dilation)
        if len(dilation) != 5 or any(not isinstance(d, int) or d < 1 for d in dilation):
            raise ValueError(
                "sapnet: dilation must be five integers >= 1, one a residual block, "
                f"got {dilation!r}"
            )
        if not isinstance(stages, int) or stages < 1:
            raise ValueError(f"sapnet: stages must be an integer >= 1, got {stages!r}")
        self.stages = stages

        channels = _CHANNELS
        self.conv0 = nn.Sequential(_conv(6, channels), nn.ReLU(inplace=True))
        for block, d in enumerate(dilation, start=1):
            layers: list[nn.Module] = []
            for _ in range(2):
                layers.append(_conv(channels, channels, d))
                if attention is not None:
                    layers.append(_ATTENTION[attention](channels))
                layers.append(nn.ReLU(inplace=True))
            self.add_module(f"res_conv{block}", nn.Sequential(*layers))
        self.conv_i = nn.Sequential(_conv(2 * channels, channels), nn.Sigmoid())
        self.conv_f = nn.Sequential(_conv(2 * channels, channels), nn.Sigmoid())
        self.conv_g = nn.Sequential(_conv(2 * channels, channels), nn.Tanh())
        self.conv_o = nn.Sequential(_conv(2 * channels, channels), nn.Sigmoid())
        self.conv = nn.Sequential(_conv(channels, 3))

    def forward(self, input: Tensor, return_stages: bool = False) -> Tensor | list[Tensor]:
        blocks = (self.res_conv1, self.res_conv2, self.res_conv3, self.res_conv4, self.res_conv5)
        x, h, c, estimates = input, None, None, []
        for _ in range(self.stages):
            a = self.conv0(torch.cat((input, x), 1))
            if h is None:  # like a: the memory format of the input stays all the way
                h = c = torch.zeros_like(a)
            ah = torch.cat((a, h), 1)
            c = torch.addcmul(self.conv_f(ah) * c, self.conv_i(ah), self.conv_g(ah))
            h = self.conv_o(ah) * torch.tanh(c)
            s = h
            for block in blocks:
                s = F.relu(block(s) + s, inplace=True)  # of the sum, which nobody else holds
            x = self.conv(s) + input
            estimates.append(x)
        return estimates if return_stages else x


def sapnet(
    attention: str | None = "cra",
    dilation: Sequence[int] = (1, 2, 4, 8, 16),
    stages: int = 6,
    weights: str | os.PathLike | None = None,
) -> SAPNet:
    """SAPNet's deraining network, with random weights or those of a file.

    attention: "cra" (180,483 parameters, the published network), "ca" or "se" (170,243), None
    (168,963: PReNet). dilation: one a residual block; (1, 1, 1, 1, 1) is the first version of the
    paper. weights: a `.safetensors` or a `torch.save` file with the authors' names, `module.` in
    front of them or not.
    """
    model = SAPNet(attention, dilation, stages)
    return model if weights is None else load_weights(model, weights)
