# SPDX-License-Identifier: BSD-3-Clause
"""Masked convolution by the mask's density and shape, against a dense convolution of the masked
input."""

import pytest
import torch
from layers import Layer
from masks import clusters, scattered, streaks
from torch.nn import functional as F

import pywino
from pywino.reference import masked_conv as reference

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
LAYERS = (
    Layer("32x321x481", 1, 32, 321, 481, 32),
    Layer("64x224x224", 1, 64, 224, 224, 64),
    Layer("128x112x112", 1, 128, 112, 112, 128),
    Layer("256x56x56", 1, 256, 56, 56, 256),
    Layer("64x56x56-b8", 8, 64, 56, 56, 64),
)
# Relative L2 error against float64: thrice that of direct sums in fp32, or of F(4x4,3x3) here.
LIMIT = 1.5e-6
NOTE = (
    "F.conv2d computes every pixel of the masked input; the products with the masks are not in its "
    "time. Ours lists the mask's pixels, or the Winograd tiles that it meets, anew in every call."
)


def _compare(compare, layer, shape, density):
    generator = torch.Generator().manual_seed(0)
    masks = [shape(layer.h, layer.w, density, generator) for _ in range(layer.n)]
    mask = torch.stack(masks)[:, None]
    x, weight, bias = layer.tensors()
    with torch.inference_mode(False):
        module = pywino.MaskedConv2d(layer.c, layer.k, 3, backend="cpu").eval()
    module.weight.data.copy_(weight)
    module.bias.data.copy_(bias)
    ours, peers = {}, {}
    for name, memory_format in FORMATS.items():
        mine = x.contiguous(memory_format=memory_format)
        theirs = (x * mask).contiguous(memory_format=memory_format)
        w = weight.contiguous(memory_format=memory_format)
        ours[name] = lambda mine=mine: module(mine, mask)
        peers[name] = lambda theirs=theirs, w=w: F.conv2d(theirs, w, bias, padding=1)
    compare(
        ours,
        peers,
        reference=lambda: reference.masked_conv2d(x.double(), mask, weight.double(), bias.double()),
        limit=LIMIT,
        same=False,
        note=NOTE,
    )


@pytest.mark.benchmark(group="masked_conv_clusters_25")
@pytest.mark.layers(full=LAYERS, default=LAYERS)
@torch.inference_mode()
def test_masked_conv_clusters_25(compare, native, layer):
    """masked_conv2d, 25 % of the pixels in clusters, better of two layouts, against dense F.conv2d
    in the better of two"""
    _compare(compare, layer, clusters, 0.25)


@pytest.mark.benchmark(group="masked_conv_streaks_25")
@pytest.mark.layers(full=LAYERS, default=LAYERS)
@torch.inference_mode()
def test_masked_conv_streaks_25(compare, native, layer):
    """masked_conv2d, 25 % of the pixels as streaks of rain, better of two layouts, against dense
    F.conv2d in the better of two"""
    _compare(compare, layer, streaks, 0.25)


_DENSITIES = (1, 5, 10, 25, 50, 75, 100)
_BY_DENSITY = tuple(Layer(f"64x224x224-{percent}%", 1, 64, 224, 224, 64) for percent in _DENSITIES)


@pytest.mark.benchmark(group="masked_conv_density")
@pytest.mark.layers(full=_BY_DENSITY, default=_BY_DENSITY)
@torch.inference_mode()
def test_masked_conv_density(compare, native, layer):
    """masked_conv2d by the part of the pixels in a scattered mask, against dense F.conv2d"""
    percent = int(layer.name.rpartition("-")[2].rstrip("%"))
    _compare(compare, layer, scattered, percent / 100)
