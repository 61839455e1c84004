# SPDX-License-Identifier: BSD-3-Clause
"""The convolutional LSTM cell."""

import math

import torch
from torch import nn

from pywino.functional.conv_lstm import run_conv_lstm_cell
from pywino.nn.winograd import Cached, FilterCache
from pywino.reference import conv_lstm as reference


class TorchConvLSTMCell(nn.Module):
    """A convolutional LSTM cell by PyTorch's own operations: what `pywino.restore_` puts where a
    `ConvLSTMCell` was.

    Args: those of `ConvLSTMCell`, without its choices."""

    def __init__(
        self, in_channels, hidden_channels, kernel_size=3, bias=True, *, device=None, dtype=None
    ):
        super().__init__()
        kernel_size = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
        if not all(k % 2 for k in kernel_size):
            raise RuntimeError(
                f"pywino.ConvLSTMCell: kernel_size must be odd, got {kernel_size}; use 3"
            )
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.kernel_size = kernel_size
        size = (4 * hidden_channels, in_channels + hidden_channels, *kernel_size)
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(size[0], device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        """Those of nn.Conv2d: uniform within 1 / sqrt(inputs of a gate)."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input, state=None):
        return reference.conv_lstm_cell(input, state, self.weight, self.bias)

    def extra_repr(self):
        text = f"{self.in_channels}, {self.hidden_channels}, kernel_size={self.kernel_size}"
        return text + f", bias={self.bias is not None}"


class ConvLSTMCell(Cached, TorchConvLSTMCell):
    """One step of a convolutional LSTM (Shi et al., NIPS 2015, without peepholes), its four gates
    by one convolution and everything else in one pass.

    Args:
        in_channels, hidden_channels: I and C.
        kernel_size: odd; H and W are kept.
        bias: with one number a gate and channel.
        algorithm, backend, precision: of the convolution, as in `pywino.WinogradConv2d`.

    The weight is (4 C, I + C, k, k), the gates in the order i, f, g, o, the input's channels first.
    `forward(input, state=None)` takes (h, c) or None for zeros, and returns (h', c'). Without
    gradients, transformed filters are kept until the weight changes."""

    def __init__(
        self,
        in_channels,
        hidden_channels,
        kernel_size=3,
        bias=True,
        *,
        algorithm="auto",
        backend="auto",
        precision="default",
        device=None,
        dtype=None,
    ):
        super().__init__(
            in_channels, hidden_channels, kernel_size, bias, device=device, dtype=dtype
        )
        self.algorithm = algorithm
        self.backend = backend
        self.precision = precision
        self._filters = FilterCache()

    def to_dense(self):
        """The cell of PyTorch's own operations that shares this one's Parameters and hooks."""
        dense = TorchConvLSTMCell.__new__(TorchConvLSTMCell)
        own = ("algorithm", "backend", "precision", "_filters")
        dense.__dict__.update({k: v for k, v in self.__dict__.items() if k not in own})
        return dense

    def forward(self, input, state=None):
        return run_conv_lstm_cell(
            input,
            state,
            self.weight,
            self.bias,
            self.backend,
            self.algorithm,
            self.precision,
            self._filters,
            self.backend != "auto",
        )
