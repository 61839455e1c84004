# SPDX-License-Identifier: BSD-3-Clause
"""Sparse convolution on a GPU. Without one tests/emulator and tests/kernels run the same
kernels."""

import pytest
import torch
import torch.nn.functional as F

import pywino
from pywino import backends, planner
from pywino.ops import _packed
from pywino.ops import sparse_conv as rules
from pywino.testing import assert_close_to_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
]
BACKENDS = ("cuda", "triton")
K = 4  # times PyTorch's own error: another order of terms


def needs(backend, x, weight):
    call = planner.describe("sparse_conv2d", x, weight)
    if (reason := backends.can_run(backend, call)) is not None:
        pytest.skip(reason)


def pruned(k, c, density):
    conv = torch.nn.Conv2d(c, k, 3)
    pywino.prune_(conv, pywino.pruning.Block(1 - density, block=(64, 32)))
    return conv.weight.detach().cuda()


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("density", [0.25, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, density, stride, dilation, dtype, last):
    x = torch.randn(2, 100, 33, 31, device="cuda").to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight = pruned(200, 100, density).to(dtype)
    needs(backend, x, weight)
    bias = torch.randn(200, device="cuda").to(dtype)
    where = (stride, 1, dilation)
    grad = torch.randn_like(F.conv2d(x, weight, bias, *where))

    def run(function, dtype):
        wanted = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = function(*wanted, *where)
        return y, *torch.autograd.grad(y, wanted, grad.to(dtype))

    ours = run(lambda *t: pywino.sparse_conv2d(*t, backend=backend), dtype)
    exact, peer = run(F.conv2d, torch.float64), run(F.conv2d, dtype)
    for a, b, c in zip(ours, exact, peer, strict=True):
        assert_close_to_reference(a, b, c, K)
    assert backends.is_channels_last(ours[0]) == last


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_two_of_four(dtype):
    conv = torch.nn.Conv2d(200, 300, 3, padding=1)
    pywino.prune_(conv, pywino.pruning.NM(2, 4))
    x, conv = torch.randn(2, 200, 33, 31, device="cuda").to(dtype), conv.cuda().to(dtype)
    needs("cuda", x, conv.weight)
    layer = pywino.SparseConv2d.from_dense(conv, pywino.pruning.NM(2, 4))
    layer.backend = "cuda"
    assert isinstance(rules.pack(layer.weight.detach(), "cuda"), _packed.TwoOfFour)
    with torch.no_grad():
        y, peer = layer(x), conv(x)
        exact = conv.double()(x.double())
    assert_close_to_reference(y, exact, peer, K)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_in_a_graph_and_compiled(backend):
    layer = pywino.SparseConv2d(64, 64, 3, padding=1, backend=backend).cuda()
    x = torch.randn(2, 64, 16, 16, device="cuda")
    needs(backend, x, layer.weight)
    expected = F.conv2d(x, layer.weight, layer.bias, padding=1)
    with torch.no_grad():
        layer(x)  # packs and compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y = torch.compile(layer, fullgraph=True)(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert layer.weight.grad is not None


def test_auto_measures_a_layer_that_keeps_its_filter(monkeypatch, tmp_path, ieee):
    monkeypatch.setenv("PYWINO_PLAN", str(tmp_path / "plans.json"))
    planner.reset()
    conv = torch.nn.Conv2d(256, 256, 3, padding=1)
    pywino.prune_(conv, pywino.pruning.Block(0.9, block=(64, 32)))
    layer = pywino.SparseConv2d.from_dense(conv).cuda()
    x = torch.randn(4, 256, 56, 56, device="cuda")
    expected = F.conv2d(x, layer.weight, layer.bias, padding=1)
    needs("cuda", x, layer.weight)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            y = layer(x)  # nothing is packed or measured: PyTorch's
        graph.replay()
        assert not planner._plans.plans
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        (plan,) = planner._plans.plans.values()
        assert plan.seconds.keys() >= {"aten", "cuda direct"}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)  # what was chosen
        graph.replay()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    planner.reset()


def test_zeros_anywhere_in_float32(ieee):
    conv = torch.nn.Conv2d(64, 100, 3, stride=2, padding=1)
    pywino.prune_(conv, pywino.pruning.Magnitude(0.95))
    layer = pywino.SparseConv2d.from_dense(conv).cuda()
    layer.backend = "cuda"
    x = torch.randn(2, 64, 33, 31, device="cuda")
    needs("cuda", x, layer.weight)
    assert isinstance(rules.pack(layer.weight.detach(), "cuda"), _packed.Csr)
    with torch.no_grad():
        peer = F.conv2d(x, layer.weight, layer.bias, 2, 1)
        exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), 2, 1)
        for last in (x, x.contiguous(memory_format=torch.channels_last)):
            assert_close_to_reference(layer(last), exact, peer, K)
