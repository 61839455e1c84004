# SPDX-License-Identifier: BSD-3-Clause
"""Dilated convolution on a GPU, by the kernels of the winograd room. Without a GPU tests/emulator
and tests/kernels run the same ones."""

import pytest
import torch
import torch.nn.functional as F

import pywino
from pywino import backends, planner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
]
# Relative L2 error against float64 (docs/winograd.md).
BOUNDS = {
    (torch.float32, "direct"): 3e-7,
    (torch.float32, "f2"): 7e-7,
    (torch.float32, "f4"): 2.5e-6,
    (torch.bfloat16, "direct"): 2.5e-3,
    (torch.bfloat16, "f2"): 2.6e-3,
    (torch.bfloat16, "f4"): 3e-3,
}


@pytest.fixture(autouse=True)
def ieee():
    """fp32 means fp32, in PyTorch's kernels and ours."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dilation", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize(("dtype", "algorithm"), BOUNDS, ids=str)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_forward_and_gradients(backend, algorithm, dtype, dilation):
    x = torch.randn(2, 32, 41, 13, device="cuda").to(dtype)  # 16 exceeds the width
    x = x.contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(40, 32, 3, 3, device="cuda") / 17).to(dtype)
    call = planner.describe("winograd_conv2d", x, weight, dilation, dilation)
    if (reason := backends.can_run(backend, call, algorithm)) is not None:
        pytest.skip(reason)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    choice = {"backend": backend, "algorithm": algorithm}
    y = pywino.dilated_conv2d(*leaves, dilation=dilation, **choice)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = F.conv2d(*doubles, padding=dilation, dilation=dilation)
    assert error(y, expected) <= BOUNDS[dtype, algorithm]
    assert torch.equal(y, pywino.dilated_conv2d(*leaves, dilation=dilation, **choice))
    grad = torch.randn_like(y)
    gradients = torch.autograd.grad(y, leaves, grad)
    for actual, right in zip(gradients, torch.autograd.grad(expected, doubles, grad.double())):
        assert error(actual, right) <= BOUNDS[dtype, "f4"]  # whichever algorithm has the gradient
