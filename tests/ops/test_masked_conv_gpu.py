# SPDX-License-Identifier: BSD-3-Clause
"""Masked convolution on a GPU. Without one tests/emulator and tests/kernels run the same
kernels."""

import pytest
import torch
import torch.nn.functional as F

import pywino
from pywino import backends, planner
from pywino.ops import masked_conv as rules
from pywino.testing import assert_close_to_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
]
BACKENDS = ("cuda", "triton")
K = 4  # times PyTorch's own error, as on the CPU: another order of terms


def needs(backend, x, weight):
    call = planner.describe("masked_conv2d", x, weight)
    if (reason := backends.can_run(backend, call)) is not None:
        pytest.skip(reason)


def masks(n, h, w):
    random = torch.rand(n, 1, h, w, device="cuda") < 0.3
    one = torch.zeros_like(random)
    one[-1, 0, h // 2, w - 1] = True
    return [random, one, torch.zeros_like(random), torch.ones_like(random), random[:1]]


def between_masks(x, mask, weight, bias, dilation):
    return F.conv2d(x * mask, weight, bias, padding="same", dilation=dilation) * mask


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), 1), ((5, 2), 2), ((1, 1), 1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, kernel, dilation, dtype, last):
    x = torch.randn(2, 35, 33, 31, device="cuda").to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight = (torch.randn(70, 35, *kernel, device="cuda") / 20).to(dtype)
    needs(backend, x, weight)
    bias = torch.randn(70, device="cuda").to(dtype)
    grad = torch.randn(2, 70, 33, 31, device="cuda").to(dtype)
    for mask in masks(2, 33, 31):

        def run(function, dtype, mask=mask):
            wanted = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
            y = function(wanted[0], mask, *wanted[1:])
            return y, *torch.autograd.grad(y, wanted, grad.to(dtype))

        plain = lambda *t: between_masks(*t, dilation)  # noqa: E731
        exact, peer = run(plain, torch.float64), run(plain, dtype)
        ours = run(lambda *t: pywino.masked_conv2d(*t, dilation=dilation, backend=backend), dtype)
        for a, b, c in zip(ours, exact, peer, strict=True):
            if b.abs().max() == 0:
                assert not a.any()
            else:
                assert_close_to_reference(a, b, c, K)
        assert backends.is_channels_last(ours[0]) == last


@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_with_another_mask_at_each_replay(backend):
    x, weight = torch.randn(2, 16, 20, 24, device="cuda"), torch.randn(8, 16, 3, 3, device="cuda")
    needs(backend, x, weight)
    mask = torch.zeros(2, 1, 20, 24, dtype=torch.bool, device="cuda")
    filter = rules.pack(weight, backend)
    run = lambda: rules.gpu_forward(x, mask, filter, None, (1, 1), (1, 1), backend)  # noqa: E731
    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for given in masks(2, 20, 24):
        mask.copy_(given)
        graph.replay()
        expected = between_masks(x.double(), mask, weight.double(), None, 1)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend):
    layer = pywino.MaskedConv2d(8, 9, 3, backend=backend).cuda()
    x, mask = torch.randn(2, 8, 16, 16, device="cuda"), masks(2, 16, 16)[0]
    needs(backend, x, layer.weight)
    y = torch.compile(layer, fullgraph=True)(x, mask)
    torch.testing.assert_close(y, layer(x, mask), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert layer.weight.grad is not None


def test_auto_measures_and_waits_for_no_mask_in_a_graph(monkeypatch, tmp_path, ieee):
    monkeypatch.setenv("PYWINO_PLAN", str(tmp_path / "plans.json"))
    planner.reset()
    x = torch.randn(8, 64, 512, 512, device="cuda")
    weight = torch.randn(64, 64, 3, 3, device="cuda") / 24
    needs("cuda", x, weight)
    for mask in masks(8, 512, 512):
        expected = between_masks(x, mask, weight, None, 1)
        y = pywino.masked_conv2d(x, mask, weight)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = pywino.masked_conv2d(x, mask, weight)
        graph.replay()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert {*rules._choices.values()} <= {True, False, "dense", "cuda", "triton"}
    assert rules._choices
    planner.reset()
