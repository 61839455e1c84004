# SPDX-License-Identifier: BSD-3-Clause
"""Deblur-YOLO's generator on pywino's layers and fused, against the same on PyTorch's layers, eager
and compiled."""

import copy

import pytest
import torch

import pywino
from pywino.models import deblur_yolo

SIZES = {"256x256": (256, 256), "720x1280": (720, 1280)}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def _built(fused: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = deblur_yolo(trim=True)
    with torch.no_grad():
        model.train()(torch.rand(2, 3, 64, 64))  # statistics that are not 0 and 1
    return pywino.fuse_(model.eval()) if fused else model.eval()


def _contenders(model, x):
    """One in each memory format."""

    def contender(memory_format):
        own = copy.deepcopy(model).to(memory_format=memory_format)
        y = x.contiguous(memory_format=memory_format)
        return lambda: own(y)

    return {name: contender(memory_format) for name, memory_format in FORMATS.items()}


def _measure(compare, size, dtype, fused, compiled):
    x = torch.rand(1, 3, *SIZES[size], generator=torch.Generator().manual_seed(0)).to(dtype)
    model = _built(fused).to(dtype)
    plain = pywino.restore_(_built(False))
    exact = copy.deepcopy(plain).double()
    plain = plain.to(dtype)
    if compiled:
        plain = torch.compile(plain, fullgraph=True)
    peers = _contenders(plain, x) if not compiled else {"compiled": lambda: plain(x)}
    compare(
        _contenders(model, x),
        peers,
        reference=lambda: exact(x.double()),
        # The output is an image in 0..1; PyTorch's own error stands beside ours in the table.
        limit=1e-4 if dtype is torch.float32 else 3e-2,
        note="Random weights. Convolutions other than 3x3 of stride 1 and one group are PyTorch's.",
    )


@pytest.mark.benchmark(group="deblur")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fused", [False, True], ids=["as built", "fused"])
@torch.no_grad()
def test_deblur(compare, native, size, fused):
    """Deblur-YOLO's generator, fp32, batch 1, as built and after `pywino.fuse_`, against eager
    PyTorch, the better of two memory formats on both sides"""
    _measure(compare, size, torch.float32, fused, compiled=False)


@pytest.mark.benchmark(group="deblur, bf16")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.full_only
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_deblur_bf16(compare, native, size):
    """Deblur-YOLO's generator, bf16, batch 1, fused, against eager PyTorch"""
    _measure(compare, size, torch.bfloat16, fused=True, compiled=False)


@pytest.mark.benchmark(group="deblur, compiled")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.full_only
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_deblur_compiled(compare, native, size):
    """Deblur-YOLO's generator, fp32, batch 1, fused, against compiled PyTorch"""
    _measure(compare, size, torch.float32, fused=True, compiled=True)
