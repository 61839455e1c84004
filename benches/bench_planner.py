# SPDX-License-Identifier: BSD-3-Clause
"""What looking a plan up costs a call, shown on a tensor so small that nothing else counts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pywino


@pytest.mark.benchmark(group="planner")
@torch.inference_mode()
def test_function(compare):
    """price of the choice: one call on a (1, 1, 4, 4) tensor, its plan made before"""
    x, w, b = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 3, 3), torch.randn(1)
    compare(
        lambda: pywino.conv2d(x, w, b, padding=1),
        {"F.conv2d": lambda: F.conv2d(x, w, b, padding=1)},
        reference=lambda: F.conv2d(x.double(), w.double(), b.double(), padding=1),
        limit=1e-5,
        calls=1000,
        overhead=True,
    )


@pytest.mark.benchmark(group="planner")
@torch.inference_mode()
def test_layer(compare):
    """price of the choice: one call on a (1, 1, 4, 4) tensor, its plan made before"""
    x = torch.randn(1, 1, 4, 4)
    conv = nn.Conv2d(1, 1, 3, padding=1).eval()
    layer = pywino.WinogradConv2d.from_dense(conv)
    plain = nn.Conv2d(1, 1, 3, padding=1).eval()
    plain.load_state_dict(conv.state_dict())
    compare(
        lambda: layer(x),
        {"nn.Conv2d": lambda: plain(x)},
        reference=lambda: F.conv2d(
            x.double(), plain.weight.double(), plain.bias.double(), padding=1
        ),
        limit=1e-5,
        calls=1000,
        overhead=True,
    )
