# SPDX-License-Identifier: BSD-3-Clause
"""The GPU backends on a GPU: numbers, gradients, layouts, streams, graphs, compile. Without a GPU
tests/emulator and tests/kernels run the same kernels."""

import pytest
import torch
import torch.nn.functional as F

import pywino
from pywino import backends, planner
from pywino.backends import Call
from pywino.reference import winograd as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
    pytest.mark.usefixtures("ieee"),
]
BACKENDS = ("cuda", "triton")
ALGORITHMS = ("direct", "f2", "f4", "f6")
# Relative L2 error against float64 (docs/winograd.md), by dtype and algorithm; fp32 is strict.
BOUNDS = {
    (torch.float32, "direct"): 3e-7,
    (torch.float32, "f2"): 7e-7,
    (torch.float32, "f4"): 2.5e-6,
    (torch.float32, "f6"): 7e-6,
    (torch.float16, "direct"): 3e-4,
    (torch.float16, "f2"): 8e-4,
    (torch.float16, "f4"): 2e-3,
    (torch.float16, "f6"): 8e-3,
    (torch.bfloat16, "direct"): 2.5e-3,
    (torch.bfloat16, "f2"): 2.6e-3,
    (torch.bfloat16, "f4"): 3e-3,
    (torch.bfloat16, "f6"): 8e-3,
}
# n, c, h, w, k, padding, dilation
SHAPES = [
    (2, 64, 28, 28, 64, 1, 1),
    (3, 24, 17, 13, 40, 0, 1),
    (1, 136, 31, 33, 72, 2, 2),
    (5, 5, 7, 1, 3, 4, 4),
    (1, 256, 14, 14, 512, 1, 1),
]


def tensors(shape, dtype, channels_last, device="cuda"):
    n, c, h, w, k, *_ = shape
    x = torch.randn(n, c, h, w, device=device).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(k, c, 3, 3, device=device) / (9 * c) ** 0.5).to(dtype)
    return x, weight, torch.randn(k, device=device).to(dtype)


def needs(backend, algorithm, x, weight, padding, dilation):
    call = planner.describe("winograd_conv2d", x, weight, padding, dilation)
    reason = backends.can_run(backend, call, algorithm)
    if reason is not None:
        pytest.skip(reason)


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv2d(backend, algorithm, dtype, channels_last, shape):
    *_, padding, dilation = shape
    x, weight, bias = tensors(shape, dtype, channels_last)
    needs(backend, algorithm, x, weight, padding, dilation)
    choice = {"backend": backend, "algorithm": algorithm}
    y = pywino.conv2d(x, weight, bias, 1, padding, dilation, activation="relu", **choice)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), 1, padding, dilation).relu()
    assert error(y, expected) <= BOUNDS[dtype, algorithm]
    assert y.dtype == dtype
    assert backends.is_channels_last(y) == backends.is_channels_last(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ["f2", "f4"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_gradients(backend, algorithm, dtype, shape):
    *_, padding, dilation = shape
    x, weight, bias = tensors(shape, dtype, True)
    needs(backend, algorithm, x, weight, padding, dilation)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = pywino.conv2d(*leaves, 1, padding, dilation, backend=backend, algorithm=algorithm)
    grad = torch.randn_like(y)
    gradients = torch.autograd.grad(y, leaves, grad)
    doubles = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(F.conv2d(*doubles, 1, padding, dilation), doubles, grad.double())
    for actual, right in zip(gradients, expected):
        assert error(actual, right) <= BOUNDS[dtype, algorithm]


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_winograd_relu(backend, tile):
    x, _, bias = tensors((2, 24, 17, 13, 40, 1, 1), torch.float32, True)
    weight = torch.randn(40, 24, tile + 2, tile + 2, device="cuda") / 12
    call = planner.describe("winograd_relu_conv2d", x, weight, 1, 1)
    if (reason := backends.can_run(backend, call, f"f{tile}")) is not None:
        pytest.skip(reason)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = pywino.winograd_relu_conv2d(*leaves, tile=tile, backend=backend)
    doubles = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = reference.winograd_relu_conv2d(*doubles, tile=tile)
    assert error(y, expected) <= BOUNDS[torch.float32, f"f{tile}"]
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, leaves, grad)
    for mine, right in zip(actual, torch.autograd.grad(expected, doubles, grad.double())):
        assert error(mine, right) <= 2 * BOUNDS[torch.float32, f"f{tile}"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zeros", ["none", "blocks", "2:4"])
def test_weights_of_the_domain(zeros, dtype):
    """Zeros are left out where the layer keeps its filter, also in a graph; not with gradients."""
    layer = pywino.WinogradConv2d(96, 192, 3, padding=1, domain="winograd", backend="cuda")
    weight = layer.winograd_weight
    with torch.no_grad():
        if zeros == "blocks":
            weight[:, 32:, :, 1:] = 0
        elif zeros == "2:4":
            weight[:, 1::4] = weight[:, 2::4] = 0
    layer = layer.to("cuda", dtype)
    x = torch.randn(2, 96, 33, 31, device="cuda").to(dtype).requires_grad_()
    call = planner.describe("winograd_domain_conv2d", x, layer.winograd_weight, 1, 1)
    if (reason := backends.can_run("cuda", call, "f4")) is not None:
        pytest.skip(reason)
    leaves = [x, layer.winograd_weight, layer.bias]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    exact = reference.winograd_domain_conv2d(*doubles, 1, 1, 4)
    bound = BOUNDS[dtype, "f4"]
    with torch.no_grad():
        assert error(layer(x), exact) <= bound
        ((_, _, filter),) = layer._filters.filters.values()
        dims = {"none": None, "blocks": 1, "2:4": None if dtype == torch.float32 else 4}[zeros]
        assert dims == (None if filter.places is None else filter.places.dim())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        assert error(y, exact) <= bound
    grad = torch.randn_like(exact)
    actual = torch.autograd.grad(layer(x), leaves, grad.to(dtype))
    for mine, right in zip(actual, torch.autograd.grad(exact, doubles, grad)):
        assert error(mine, right) <= 2 * bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_tf32_mode(backend):
    """Where PyTorch may round to TF32, F2 computes as accurately as that, not better."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    x, weight, _ = tensors(SHAPES[0], torch.float32, True)
    needs(backend, "f2", x, weight, 1, 1)
    y = pywino.conv2d(x, weight, None, 1, 1, backend=backend, algorithm="f2")
    assert 1e-5 < error(y, F.conv2d(x.double(), weight.double(), None, 1, 1)) <= 7e-4


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gate_and_mean(algorithm, dtype, channels_last):
    shape = (1, 64, 61, 53, 32, 2, 2)
    x, weight, bias = tensors(shape, dtype, channels_last)
    needs("cuda", algorithm, x, weight, 2, 2)
    gate = torch.rand(1, 64, device="cuda")
    layer = pywino.DilatedConv2d(
        64, 32, 3, padding=2, dilation=2, backend="cuda", algorithm=algorithm
    )
    layer = layer.to("cuda", dtype).eval()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        for g in (None, gate):
            y, mean = layer.with_mean(x, g)
            gated = x.double() if g is None else (x * g[:, :, None, None].double()).relu()
            expected = F.conv2d(gated, weight.double(), bias.double(), 1, 2, 2)
            bound = 2 * BOUNDS[dtype, algorithm] + torch.finfo(dtype).eps
            assert error(y, expected) <= bound
            assert error(mean, expected.mean((2, 3))) <= 10 * bound
            assert y.stride() == layer(x).stride()
            assert torch.equal(mean, layer.with_mean(x, g)[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    x, weight, _ = tensors(SHAPES[4], torch.float16, True)
    needs(backend, "f4", x, weight, 1, 1)
    run = lambda: pywino.conv2d(x, weight, None, 1, 1, backend=backend, algorithm="f4")  # noqa: E731
    first = run()
    assert all(torch.equal(first, run()) for _ in range(20))


@pytest.mark.parametrize("backend", BACKENDS)
def test_side_stream_and_graph(backend):
    x, weight, bias = tensors(SHAPES[0], torch.float16, True)
    needs(backend, "f2", x, weight, 1, 1)
    choice = {"backend": backend, "algorithm": "f2"}
    expected = pywino.conv2d(x, weight, bias, 1, 1, **choice)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = pywino.conv2d(x, weight, bias, 1, 1, **choice)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(aside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pywino.conv2d(x, weight, bias, 1, 1, **choice)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, pywino.conv2d(x, weight, bias, 1, 1, **choice))


def test_nothing_is_measured_during_capture(monkeypatch):
    monkeypatch.setenv("PYWINO_PLAN", "measure")
    planner.reset()
    x, weight, _ = tensors((1, 64, 20, 20, 64, 1, 1), torch.float16, True)
    torch.conv2d(x, weight, None, 1, 1)  # cuDNN starts outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pywino.conv2d(x, weight, None, 1, 1)
    assert not planner._plans.plans


def test_auto_measures_cudnn_and_ours(monkeypatch):
    monkeypatch.setenv("PYWINO_PLAN", "measure")
    planner.reset()
    x, weight, _ = tensors((4, 256, 28, 28, 256, 1, 1), torch.float16, True)
    y = pywino.conv2d(x, weight, None, 1, 1)
    assert error(y, F.conv2d(x.double(), weight.double(), None, 1, 1)) <= 8e-4
    call = planner.describe("winograd_conv2d", x, weight, 1, 1)
    seconds = planner.choose(call).seconds
    assert "aten" in seconds
    assert all(t > 0 for t in seconds.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend):
    x, weight, _ = tensors(SHAPES[0], torch.float16, True)
    needs(backend, "f2", x, weight, 1, 1)
    layer = pywino.WinogradConv2d(64, 64, 3, padding=1, algorithm="f2", backend=backend)
    layer = layer.to(device="cuda", dtype=torch.float16)
    compiled = torch.compile(layer, fullgraph=True)
    assert error(compiled(x), layer(x).double()) <= 1e-3
    compiled(x).float().sum().backward()
    assert layer.weight.grad is not None


def test_autocast():
    layer = pywino.WinogradConv2d(32, 32, 3, padding=1).cuda()
    x = torch.randn(2, 32, 16, 16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", BACKENDS)
def test_another_device(backend):
    x, weight, _ = tensors(SHAPES[0], torch.float16, True, device="cuda:1")
    needs(backend, "f2", x, weight, 1, 1)
    y = pywino.conv2d(x, weight, None, 1, 1, backend=backend, algorithm="f2")
    assert y.device == x.device
    assert error(y, F.conv2d(x.double(), weight.double(), None, 1, 1)) <= 8e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ["direct", "f4"])
def test_more_than_2_to_the_31_elements(backend, algorithm):
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    x = torch.empty(33, 64, 1024, 1024, dtype=torch.float16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last).normal_()
    weight = torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.float16) / 24
    needs(backend, algorithm, x, weight, 1, 1)
    y = pywino.conv2d(x, weight, None, 1, 1, backend=backend, algorithm=algorithm)
    last = F.conv2d(x[-1:, :, -66:].double(), weight.double(), None, 1, 1)
    assert error(y[-1:, :, -64:], last[:, :, 2:]) <= BOUNDS[torch.float16, algorithm]


def test_auto_goes_to_pytorch_where_nothing_runs():
    x = torch.randn(1, 8, 9, 9, device="cuda", dtype=torch.float64)
    weight = torch.randn(4, 8, 5, 5, device="cuda", dtype=torch.float64)
    assert torch.equal(pywino.conv2d(x, weight), F.conv2d(x, weight))
    call = Call("winograd_conv2d", 1, 8, 9, 9, 4, (0, 0), (1, 1), torch.float64, device="cuda")
    assert planner.choose(call).backend == "aten"
