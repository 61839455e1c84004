# SPDX-License-Identifier: BSD-3-Clause
"""Whole models, one line swapped, with the default allocator: what a user's program gets."""

import copy

import pytest
import torch
from layers import MODELS

import pywino
from pywino import models

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
