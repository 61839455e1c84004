# SPDX-License-Identifier: BSD-3-Clause
"""The convolutional LSTM cell: ours against four convolutions, and one, in PyTorch."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import pywino
from pywino.reference.conv_lstm import conv_lstm_cell, pointwise

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Cell(NamedTuple):
    name: str
    n: int
    channels: int  # of the input and of the states
    h: int
    w: int

    def __str__(self):
        return self.name

    def tensors(self, memory_format=torch.contiguous_format, dtype=torch.float32):
        """input, h, c, weight, bias."""
        g, c = torch.Generator().manual_seed(0), self.channels
        size = (self.n, c, self.h, self.w)
        images = [torch.randn(size, generator=g) for _ in range(3)]
        weight = torch.randn((4 * c, 2 * c, 3, 3), generator=g) / (18 * c) ** 0.5
        bias = torch.randn(4 * c, generator=g)
        made = [*(t.contiguous(memory_format=memory_format) for t in images), weight, bias]
        return [t.to(dtype) for t in made]


# SAPNet's cell on its paper's two sizes and in training; one of a video model.
LAYERS = (
    Cell("sap-32x481x321", 1, 32, 481, 321),
    Cell("sap-32x512x512", 1, 32, 512, 512),
    Cell("sap-32x100x100-b12", 12, 32, 100, 100),
    Cell("video-64x64x64-b4", 4, 64, 64, 64),
)
QUICK = (LAYERS[0], LAYERS[2])


def _ours(x, h, c, weight, bias):
    return pywino.conv_lstm_cell(x, (h, c), weight, bias)


def _one_convolution(x, h, c, weight, bias):
    return conv_lstm_cell(x, (h, c), weight, bias)


def _four_convolutions(x, h, c, weight, bias):
    xh = torch.cat((x, h), 1)
    gates = (F.conv2d(xh, w, b, padding=1) for w, b in zip(weight.chunk(4), bias.chunk(4)))
    return pointwise(torch.cat(tuple(gates), 1), c)


def _calls(function, layer, suffix=""):
    calls = {}
    for name, memory_format in FORMATS.items():
        tensors = layer.tensors(memory_format)
        calls[name + suffix] = lambda tensors=tensors: function(*tensors)
    return calls


@pytest.mark.benchmark(group="conv_lstm")
@pytest.mark.layers(full=LAYERS, default=QUICK)
@torch.inference_mode()
def test_conv_lstm(compare, native, layer):
    """one step, forward, fp32, the better of two layouts, against one convolution and the cell in
    PyTorch"""
    one = _calls(_one_convolution, layer)
    four = _calls(_four_convolutions, layer, " 4 convolutions")
    compare(
        _calls(_ours, layer),
        one | four,
        reference=lambda: _one_convolution(*layer.tensors(dtype=torch.float64))[0],
        limit=1e-5,
        view=lambda states: states if torch.is_tensor(states) else states[0],
        denominator=tuple(one),
        note="The weight is transformed in every call.",
    )


@pytest.mark.benchmark(group="conv_lstm_training")
@pytest.mark.layers(full=LAYERS, default=QUICK[1:])
def test_conv_lstm_training(compare, native, layer):
    """one step, forward and backward, fp32, against one convolution and the cell in PyTorch"""

    def step(function, memory_format, dtype=torch.float32):
        wanted = [t.requires_grad_() for t in layer.tensors(memory_format, dtype)]

        def run():
            h, c = function(*wanted)
            return torch.autograd.grad((h, c), wanted, (wanted[1].detach(), wanted[2].detach()))

        return run

    def steps(function):
        return {name: step(function, format) for name, format in FORMATS.items()}

    compare(
        steps(_ours),
        steps(_one_convolution),
        reference=lambda: step(_one_convolution, torch.contiguous_format, torch.float64)()[0],
        limit=1e-5,
        view=lambda gradients: gradients if torch.is_tensor(gradients) else gradients[0],
    )
