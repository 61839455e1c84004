# SPDX-License-Identifier: BSD-3-Clause
"""Whole models, one line swapped, with the default allocator: what a user's program gets."""

import copy

import pytest
import torch
from layers import MODELS

import pywino
from pywino import models
from pywino.pruning import Block

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def _build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(models, name)().eval()


def _run(model: torch.nn.Module, x: torch.Tensor, memory_format: torch.memory_format):
    model = model.to(memory_format=memory_format)
    x = x.contiguous(memory_format=memory_format)
    return lambda: model(x)


@pytest.mark.benchmark(group="models")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_models(compare, native, name):
    """whole models, fp32, batch 1, `pywino.swap_(model)`, the better of two memory formats on both
    sides"""
    x = torch.rand(MODELS[name], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(False):  # parameters of a module must be ordinary tensors
        swapped = {key: _build(name) for key in FORMATS}
        # SAPNet is built on pywino's layers.
        plain = {key: pywino.restore_(copy.deepcopy(model)) for key, model in swapped.items()}
        ours = {key: _run(model, x, FORMATS[key]) for key, model in swapped.items()}
        peers = {key: _run(model, x, FORMATS[key]) for key, model in plain.items()}
        for key, model in swapped.items():
            pywino.swap_(model, example=x.contiguous(memory_format=FORMATS[key]))
        exact = pywino.restore_(_build(name)).double()
    compare(
        ours,
        peers,
        reference=lambda: exact(x.double()),
        # The errors of 13 to 100 layers in a row; PyTorch's own stand beside ours in the table.
        limit=1e-4,
        note="Random weights. Other layers than 3x3 convolutions are PyTorch's, and in both times.",
    )


# Tile of the Winograd-ReLU layers, and the part of their blocks of 16 output channels that is zero.
VARIANTS = {"tile2": (2, 0.0), "tile4": (4, 0.0), "tile4-blocks80": (4, 0.8)}


def _small_vgg16(conv: str = "dense", tile: int = 2, sparsity: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    model = models.vgg16(10, 3, conv, tile=tile, image_size=32).eval()
    if sparsity:
        pywino.prune_(model, Block(sparsity), domain="winograd")
    return model


@pytest.mark.benchmark(group="winograd_relu_vgg16")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_winograd_relu_vgg16(compare, native, variant):
    """inference of a VGG-16 for 32 x 32 images with Winograd-ReLU layers but the first, fp32, batch
    128, channels_last, against the dense one in the better of two memory formats"""
    x = torch.rand(128, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tile, sparsity = VARIANTS[variant]
    with torch.inference_mode(False):
        model = _small_vgg16("winograd_relu", tile, sparsity)
        ours = {"channels_last": _run(model, x, torch.channels_last)}
        peers = {
            key: _run(_small_vgg16(), x, memory_format) for key, memory_format in FORMATS.items()
        }
        exact = copy.deepcopy(model).double()
    ends = [0, -1]  # images are independent
    compare(
        ours,
        peers,
        reference=lambda: exact(x[ends].double()),
        view=lambda y: y[ends],
        same=False,
        limit=1e-4,
        note="Random weights; the two are other functions, of as many layers.",
    )
