# SPDX-License-Identifier: BSD-3-Clause
"""SAPNet's deraining network (Zheng, Lu and Narasimhan, WACV 2022).

Six stages share one set of weights. A stage sees the rainy image y and the last estimate x:

    a = ReLU(conv0([y, x]))
    i, f, o = sigmoid, g = tanh of four convolutions of [a, h];  c = f c + i g;  h = o tanh(c)
    s = h, then five residual blocks with dilation 1, 2, 4, 8, 16:  s = ReLU(block(s) + s)
    x = conv(s) + y

A block is conv, attention, ReLU, conv, attention, ReLU. Parameter names are those of the authors'
file.

Built on pywino's layers, a stage is computed as

    a = ReLU(conv0's x part of x + Y)     Y = conv0's y part of y, once for all stages
    h, c = conv_lstm_cell(a, (h, c))      one convolution for the four gates, the cell behind it
    s = block(s)                          the first gate where the second convolution reads, the
                                          second in one pass with the ReLU and the sum behind it
    x = conv(s) + y                       the sum inside the convolution's kernel

`pywino.restore_` puts PyTorch's layers there; then the equations above run as they stand.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.nn import functional as F

from pywino import backends
from pywino.functional.conv_lstm import conv_lstm_cell
from pywino.functional.winograd import run_conv2d
from pywino.models.weights import load_weights, weights_metadata
from pywino.nn.channel_attention import ChannelResidualAttention, GatePaths
from pywino.nn.dilated_conv import DilatedConv2d
from pywino.nn.winograd import WinogradConv2d, has_hooks

_CHANNELS = 32
_REDUCTION = 16


class _SqueezeExcitation(nn.Module):
    """x sigmoid(W2 ReLU(W1 z)), z the spatial mean of x, with linear layers (Hu et al., CVPR
    2018)."""

    def __init__(self, channels: int, reduction: int = _REDUCTION):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels, bias=False),
        )

    def forward(self, input: Tensor) -> Tensor:
        return input * torch.sigmoid(self.fc(input.mean((2, 3))))[:, :, None, None]


def _squeeze_excitation() -> ChannelResidualAttention:
    paths = GatePaths("fc.0", "fc.2", None)
    return ChannelResidualAttention.from_dense(_SqueezeExcitation(_CHANNELS), paths)


_ATTENTION = {
    "cra": lambda: ChannelResidualAttention(_CHANNELS, _REDUCTION),
    "ca": lambda: ChannelResidualAttention(_CHANNELS, _REDUCTION, residual=False),
    "se": _squeeze_excitation,
    None: None,
}


def _conv(in_channels: int, out_channels: int) -> WinogradConv2d:
    return WinogradConv2d(in_channels, out_channels, 3, padding=1)


class _Block(nn.Sequential):
    """ReLU(u + s) with u the result of conv, attention, ReLU, conv, attention, ReLU on s."""

    def __init__(self, attention: str | None, dilation: int):
        layers: list[nn.Module] = []
        for _ in range(2):
            layers.append(
                DilatedConv2d(_CHANNELS, _CHANNELS, 3, padding=dilation, dilation=dilation)
            )
            if attention is not None:
                layers.append(_ATTENTION[attention]())
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)

    def forward(self, s: Tensor, spare: list[Tensor] | None = None) -> Tensor:
        """spare: tensors like s that nobody reads any more, to be written and to be added to:
        memory that has been written before costs no page faults."""
        if not isinstance(self[1], ChannelResidualAttention):
            # In place on the sum, which nobody else holds.
            return F.relu(super().forward(s) + s, inplace=True)
        conv1, gate1, _, conv2, gate2, _ = self
        if not isinstance(conv1, WinogradConv2d) or not isinstance(conv2, WinogradConv2d):
            return gate2(conv2(gate1(conv1(s), "relu")), "relu", s, "relu")
        u, mean = conv1.with_mean(s, out=spare.pop() if spare else None)
        if mean is None:
            v, mean = conv2.with_mean(gate1(u, "relu"))
        else:
            v, mean = conv2.with_mean(u, gate1.gate(mean), spare.pop() if spare else None)
            if spare is not None:
                spare.append(u)
        return gate2(v, "relu", s, "relu", mean, inplace=True)


class SAPNet(nn.Module):
    """The deraining network. Input and output (N, 3, H, W), RGB in 0..1 (the output may leave that
    range a little).

    `forward(y, return_stages=True)` returns the estimates of all stages; the last one is the
    result. On pywino's layers `conv0` and the four gates are not called as modules (hooks on them
    are silent): their weights are, in other groups.
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
            self.add_module(f"res_conv{block}", _Block(attention, d))
        self.conv_i = nn.Sequential(_conv(2 * channels, channels), nn.Sigmoid())
        self.conv_f = nn.Sequential(_conv(2 * channels, channels), nn.Sigmoid())
        self.conv_g = nn.Sequential(_conv(2 * channels, channels), nn.Tanh())
        self.conv_o = nn.Sequential(_conv(2 * channels, channels), nn.Sigmoid())
        self.conv = nn.Sequential(_conv(channels, 3))

    def forward(self, input: Tensor, return_stages: bool = False) -> Tensor | list[Tensor]:
        fused = isinstance(self.conv0[0], WinogradConv2d)
        last = backends.is_channels_last(input)
        if fused and not is_batchedtensor(input):  # vmap knows one memory format
            # Dilated convolutions read whole lines there; three channels are quickly turned.
            input = input.contiguous(memory_format=torch.channels_last)
        recurrence = self._fused_recurrence(input) if fused else self._recurrence(input)
        x, state, estimates = input, None, []
        # A hook may keep what it sees.
        alone = not torch.compiler.is_compiling() and not any(map(has_hooks, self.modules()))
        # PyTorch's allocator for GPUs keeps memory itself.
        spare: list[Tensor] | None = [] if fused and alone and input.is_cpu else None
        for _ in range(self.stages):
            state = recurrence(x, state)
            s = state[0]
            for block in (
                self.res_conv1, self.res_conv2, self.res_conv3, self.res_conv4, self.res_conv5
            ):  # fmt: skip
                before, s = s, block(s, spare)
                if spare and before is not state[0]:
                    spare.append(before)
            x = self.conv[0](s, input) if fused else self.conv(s) + input
            if spare:
                spare.append(s)
            estimates.append(x)
        if fused and not last:
            estimates = [x.contiguous() for x in estimates]
        return estimates if return_stages else estimates[-1]

    def _recurrence(self, input: Tensor):
        """A function (x, (h, c) or None) -> (h, c): conv0 and the LSTM as the paper has them."""

        def step(x, state):
            a = self.conv0(torch.cat((input, x), 1))
            # Like a: the memory format of the input stays all the way.
            h, c = (torch.zeros_like(a),) * 2 if state is None else state
            ah = torch.cat((a, h), 1)
            c = torch.addcmul(self.conv_f(ah) * c, self.conv_i(ah), self.conv_g(ah))
            return self.conv_o(ah) * torch.tanh(c), c

        return step

    def _fused_recurrence(self, input: Tensor):
        """The same by pywino's functions. conv0 is linear before its ReLU: its part of the input
        is computed here, once for all stages."""
        conv0 = self.conv0[0]
        of_input = _run(conv0, input, conv0.weight[:, :3], conv0.bias)
        of_estimate = conv0.weight[:, 3:]
        gates = [gate[0] for gate in (self.conv_i, self.conv_f, self.conv_g, self.conv_o)]
        weight, bias = (torch.cat([getattr(g, name) for g in gates]) for name in ("weight", "bias"))

        def step(x, state):
            a = _run(conv0, x, of_estimate, None, of_input, "relu")
            return conv_lstm_cell(a, state, weight, bias)

        return step


def _run(conv, x, weight, bias, residual=None, activation=None):
    """A layer's convolution with a part of its weight."""
    return run_conv2d(
        x, weight, bias, residual, 1, 1, 1, 1, activation, conv.backend, conv.algorithm,
        conv.precision, None, False,
    )  # fmt: skip


def sapnet(
    attention: str | None = "cra",
    dilation: Sequence[int] = (1, 2, 4, 8, 16),
    stages: int | None = None,
    weights: str | os.PathLike | None = None,
) -> SAPNet:
    """SAPNet's deraining network, with random weights or those of a file.

    attention: "cra" (180,483 parameters, the published network), "ca" or "se" (170,243), None
    (168,963: PReNet). dilation: one a residual block; (1, 1, 1, 1, 1) is the first version of the
    paper. stages: how often the weights are used; None for as often as in their training, where
    their file says so, else 6. weights: "pywino-rain", pywino's own (`docs/sapnet.md`); or a
    `.safetensors` or a `torch.save` file with the authors' names, `module.` in front of them or
    not.
    """
    if stages is None:
        stages = 6 if weights is None else int(weights_metadata(weights).get("stages", 6))
    model = SAPNet(attention, dilation, stages)
    return model if weights is None else load_weights(model, weights)
