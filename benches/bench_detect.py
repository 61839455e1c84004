# SPDX-License-Identifier: BSD-3-Clause
"""Detectors, one line swapped, against the same on PyTorch's layers: the network alone, without
suppression."""

import copy

import pytest
import torch

import pywino
from pywino import models

MODELS = {
    "small 320": (models.small_yolo, (1, 3, 320, 320)),
    "yolov3 416": (models.yolov3, (1, 3, 416, 416)),
}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def _built(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with torch.no_grad():
        model.train()(torch.rand(2, 3, 64, 64))  # statistics that are not 0 and 1
    return model.eval()


def _contenders(model: torch.nn.Module, x: torch.Tensor):
    """One in each memory format; the finest scale's map, which goes through all layers."""

    def contender(memory_format):
        own = copy.deepcopy(model).to(memory_format=memory_format)
        y = x.contiguous(memory_format=memory_format)
        return lambda: own(y)[-1]

    return {name: contender(memory_format) for name, memory_format in FORMATS.items()}


@pytest.mark.benchmark(group="detect")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "fused",
    [
        pytest.param(False, marks=pytest.mark.full_only, id="swapped"),
        pytest.param(True, id="swapped and fused"),
    ],
)
@torch.no_grad()
def test_detect(compare, native, name, fused):
    """detectors, fp32, batch 1, `pywino.swap_(model)`, alone and with `pywino.fuse_`, against eager
    PyTorch, the better of two memory formats on both sides"""
    x = torch.rand(MODELS[name][1], generator=torch.Generator().manual_seed(0))
    plain = _built(name)
    swapped = pywino.swap_(_built(name))
    exact = _built(name).double()
    compare(
        _contenders(pywino.fuse_(swapped) if fused else swapped, x),
        _contenders(plain, x),
        reference=lambda: exact(x.double())[-1],
        # The errors of 50 to 75 layers in a row; PyTorch's own stand beside ours in the table.
        limit=1e-4,
        note="Random weights. Convolutions other than 3x3 of stride 1 and one group are PyTorch's.",
    )
