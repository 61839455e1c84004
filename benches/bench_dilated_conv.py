# SPDX-License-Identifier: BSD-3-Clause
"""Dilated 3x3 convolutions of SAPNet's blocks, d = 1 … 16: forward, and with backward."""

import pytest
import torch
import torch.nn.functional as F
from layers import Layer

import pywino

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DILATIONS = (1, 2, 3, 4, 8, 16)


def _layer(h, w, d):
    return Layer(f"sap-32x{h}x{w}-d{d}", 1, 32, h, w, 32, d)


LAYERS = tuple(_layer(h, w, d) for h, w in ((481, 321), (512, 512)) for d in DILATIONS)
QUICK = tuple(_layer(481, 321, d) for d in (1, 2, 4, 8, 16))
_ALGORITHMS = ("auto", "f2", "f4", "f6")


def _view(result):
    return result if torch.is_tensor(result) else result[0]


@pytest.mark.benchmark(group="dilated_conv")
@pytest.mark.layers(full=LAYERS, default=QUICK)
@torch.inference_mode()
def test_dilated_conv(compare, native, layer):
    """dilated_conv2d, forward, fp32, channels_last, best algorithm, against F.conv2d in the better
    of two layouts"""
    d = layer.dilation
    with torch.inference_mode(False):
        modules = {
            name: pywino.DilatedConv2d(
                layer.c, layer.k, 3, padding=d, dilation=d, algorithm=name
            ).eval()
            for name in _ALGORITHMS
        }
    x, weight, bias = layer.tensors(memory_format=torch.channels_last)
    for module in modules.values():
        module.weight.data.copy_(weight)
        module.bias.data.copy_(bias)
    peers = {}
    for name, memory_format in FORMATS.items():
        tensors = layer.tensors(memory_format=memory_format)
        peers[name] = lambda tensors=tensors: F.conv2d(*tensors, padding=d, dilation=d)
    compare(
        {name: lambda module=module: module(x) for name, module in modules.items()},
        peers,
        reference=lambda: F.conv2d(
            x.double(), weight.double(), bias.double(), padding=d, dilation=d
        ),
        limit=7e-6,
        note="Transformed filters are kept, as in a layer that does not train.",
    )


@pytest.mark.benchmark(group="dilated_conv_training")
@pytest.mark.layers(full=LAYERS, default=QUICK)
def test_dilated_conv_training(compare, native, layer):
    """dilated_conv2d, forward and backward, fp32, channels_last, against F.conv2d in the better of
    two layouts"""
    d = layer.dilation

    def step(function, memory_format, dtype=torch.float32):
        wanted = [t.to(dtype).requires_grad_() for t in layer.tensors(memory_format=memory_format)]
        grad = wanted[0].detach()  # of the output's size

        def run():
            return torch.autograd.grad(function(*wanted), wanted, grad)

        return run

    def plain(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=d, dilation=d)

    compare(
        {
            name: step(
                lambda *t, name=name: pywino.dilated_conv2d(*t, dilation=d, algorithm=name),
                torch.channels_last,
            )
            for name in _ALGORITHMS
        },
        {name: step(plain, memory_format) for name, memory_format in FORMATS.items()},
        reference=lambda: step(plain, torch.contiguous_format, torch.float64)()[0],
        limit=7e-6,
        view=_view,
    )
