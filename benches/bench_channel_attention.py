# SPDX-License-Identifier: BSD-3-Clause
"""Channel attention on its own: the op against its composition in PyTorch, eager and compiled."""

from typing import NamedTuple

import pytest
import torch

import pywino
from pywino.reference.channel_attention import channel_residual_attention as composed

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
_INSIDE = "W1: C -> max(C / 16, 2)."


class Gated(NamedTuple):
    name: str
    shape: tuple[int, int, int, int]

    def __str__(self):
        return self.name

    def tensors(self, memory_format=torch.contiguous_format, dtype=torch.float32):
        """input, w1, w2, w3, residual."""
        g = torch.Generator().manual_seed(0)
        c = self.shape[1]
        r = max(c // 16, 2)
        weights = (torch.randn(size, generator=g) / c**0.5 for size in ((r, c), (c, r), (c, c)))
        images = (torch.randn(self.shape, generator=g) for _ in range(2))
        x, residual = (t.contiguous(memory_format=memory_format) for t in images)
        return [t.to(dtype) for t in (x, *weights, residual)]


# SAPNet on its paper's two sizes and in training; SE-ResNet-50's blocks.
LAYERS = (
    Gated("sap-32x481x321", (1, 32, 481, 321)),
    Gated("sap-32x512x512", (1, 32, 512, 512)),
    Gated("sap-32x100x100-b12", (12, 32, 100, 100)),
    Gated("se-256x56-b8", (8, 256, 56, 56)),
    Gated("se-512x28-b8", (8, 512, 28, 28)),
    Gated("se-2048x7-b8", (8, 2048, 7, 7)),
)
QUICK = (LAYERS[0], LAYERS[2], LAYERS[4])


def _ours(x, w1, w2, w3, residual):
    return pywino.channel_residual_attention(
        x, w1, w2, w3, activation="relu", residual=residual, residual_activation="relu"
    )


def _eager(x, w1, w2, w3, residual):
    return composed(x, w1, w2, w3, None, None, residual, "relu", "relu")


def _calls(layer, function, suffix=""):
    calls = {}
    for name, memory_format in FORMATS.items():
        tensors = layer.tensors(memory_format)
        calls[name + suffix] = lambda tensors=tensors: function(*tensors)
    return calls


@pytest.mark.benchmark(group="channel_attention")
@pytest.mark.layers(full=LAYERS, default=QUICK)
@torch.inference_mode()
def test_channel_attention(compare, native, layer):
    """relu(relu(x g) + residual), forward, fp32, the better of two layouts, against its composition
    in PyTorch"""
    compiled = torch.compile(_eager, dynamic=False)
    peers = _calls(layer, _eager) | _calls(layer, compiled, " compiled")
    compare(
        _calls(layer, _ours),
        peers,
        reference=lambda: _eager(*(t.double() for t in layer.tensors())),
        limit=1e-6,
        denominator=tuple(FORMATS),
        note=_INSIDE,
    )


@pytest.mark.benchmark(group="channel_attention_training")
@pytest.mark.layers(full=LAYERS, default=QUICK)
def test_channel_attention_training(compare, native, layer):
    """relu(relu(x g) + residual), forward and backward, fp32, against its composition in PyTorch"""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(layer.shape, generator=generator)

    def step(function, memory_format, dtype=torch.float32):
        wanted = [t.requires_grad_() for t in layer.tensors(memory_format, dtype)]
        g = grad.to(dtype).contiguous(memory_format=memory_format)
        return lambda: torch.autograd.grad(function(*wanted), wanted, g)

    def steps(function):
        return {name: step(function, format) for name, format in FORMATS.items()}

    compare(
        steps(_ours),
        steps(_eager),
        reference=lambda: step(_eager, torch.contiguous_format, torch.float64)()[0],
        limit=1e-6,
        view=lambda gradients: gradients if torch.is_tensor(gradients) else gradients[0],
        note=_INSIDE,
    )
