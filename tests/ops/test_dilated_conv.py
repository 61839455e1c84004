# SPDX-License-Identifier: BSD-3-Clause
"""Dilated convolution: the reference by hand, every dilation against float64, the layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck

import pywino
from pywino import backends
from pywino.reference import dilated_conv as reference
from pywino.testing import assert_close_to_reference

ops = torch.ops.pywino
# (dilation, size): also where the dilation exceeds the image, by a little and by far.
CASES = [
    (1, (11, 14)),
    (2, (11, 14)),
    (3, (11, 14)),
    (4, (13, 9)),
    (8, (19, 17)),
    (16, (37, 21)),
    (16, (16, 9)),
    (16, (3, 2)),
    (50, (7, 5)),
    ((2, 5), (9, 12)),
    # Rows of several blocks of tiles, the last one cut: small blocks, then wide ones.
    (2, (7, 141)),
    (5, (6, 133)),
    ((1, 9), (4, 150)),
    ((2, 20), (5, 171)),
]
# Those of tests/ops/test_winograd.py: the kernels are the same.
K = {2: 8, 4: 36, 6: 200}


def tensors(size, c=19, k=17, dtype=torch.float32, channels_last=False):
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, c, *size).to(dtype).contiguous(memory_format=format)
    return x, torch.randn(k, c, 3, 3).to(dtype), torch.randn(k).to(dtype)


def test_reference_by_hand():
    x = torch.arange(25.0).view(1, 1, 5, 5)
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 0, 0], weight[0, 0, 2, 1] = 1, 10
    # Top left is two rows and two columns away; bottom centre two rows down.
    y = reference.dilated_conv2d(x, weight, torch.ones(1), (2, 2), (2, 2))
    assert y.shape == (1, 1, 5, 5)
    assert y[0, 0, 2, 2] == x[0, 0, 0, 0] + 10 * x[0, 0, 4, 2] + 1
    assert y[0, 0, 4, 4] == x[0, 0, 2, 2] + 1
    assert y[0, 0, 0, 1] == 10 * x[0, 0, 2, 1] + 1


@pytest.mark.parametrize(("dilation", "size"), CASES, ids=str)
def test_reference_is_pytorchs_and_one_convolution_a_grid(dilation, size):
    x, weight, bias = tensors(size, 3, 4, torch.float64)
    pair = (dilation, dilation) if isinstance(dilation, int) else dilation
    y = reference.dilated_conv2d(x, weight, bias, pair, pair)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, 1, pair, pair))
    for grid, output in zip(reference.grids(x, pair), reference.grids(y, pair), strict=True):
        if grid.numel():
            torch.testing.assert_close(output, F.conv2d(grid, weight, bias, padding=1))


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dilation", "size"), CASES, ids=str)
def test_forward_and_backward(isa, dilation, size, channels_last):
    made = tensors(size, channels_last=channels_last)
    residual, grad = torch.randn(2, 17, *size), torch.randn(2, 17, *size)

    def run(function, dtype):
        wanted = [t.to(dtype).requires_grad_() for t in (*made, residual)]
        y = function(*wanted)
        return y, *torch.autograd.grad(y, wanted, grad.to(dtype))

    def plain(x, weight, bias, residual):
        return (F.conv2d(x, weight, bias, 1, dilation, dilation) + residual).relu()

    exact, peer = run(plain, torch.float64), run(plain, torch.float32)
    for tile, k in K.items():

        def ours(x, weight, bias, residual, tile=tile):
            choice = {"algorithm": f"f{tile}", "residual": residual, "activation": "relu"}
            return pywino.dilated_conv2d(x, weight, bias, dilation=dilation, **choice)

        actual = run(ours, torch.float32)
        for a, e, p in zip(actual, exact, peer, strict=True):
            assert_close_to_reference(a, e, p, k, f"f{tile}")
        assert backends.is_channels_last(actual[0]) == backends.is_channels_last(made[0])


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dilation", [2, 16])
def test_16_bit_floats_are_rounded_once(isa, dilation, dtype):
    for channels_last in (False, True):
        x, weight, bias = tensors((21, 18), dtype=dtype, channels_last=channels_last)
        actual = pywino.dilated_conv2d(x, weight, bias, dilation=dilation, algorithm="f2")
        exact = F.conv2d(*(t.double() for t in (x, weight, bias)), 1, dilation, dilation)
        assert_close_to_reference(actual, exact, exact.to(dtype), 1.02)


@pytest.mark.native
def test_any_number_of_threads_gives_the_same_bits():
    made, before = [t.requires_grad_() for t in tensors((45, 38))], torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = pywino.dilated_conv2d(*made, dilation=8, algorithm="f4")
            results.append([y, torch.autograd.grad(y.square().sum(), made[0])[0]])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_what_pads_too_much_goes_to_pytorch():
    """Where a grid is one pixel, a tile of four by four would be fifteen sixteenths air."""
    from pywino import planner

    x, weight, _ = tensors((16, 16), 32, 32)
    call = planner.describe("winograd_conv2d", x, weight, 16, 16)
    assert planner.choose(call).backend == "aten"
    assert planner.operation_count(call, 4) > planner.operation_count(call, 0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    made = [t.requires_grad_() for t in tensors((9, 8), 3, 4, channels_last=channels_last)]
    for algorithm in ("auto", "f4"):
        arguments = (*made, None, (2, 2), (2, 2), "relu", algorithm, "auto", "default")
        opcheck(ops.dilated_conv2d.default, arguments)


def test_op_is_the_function():
    made = tensors((9, 8), 3, 4)
    choice = (None, "auto", "auto", "default")
    expected = pywino.dilated_conv2d(*made, padding=4, dilation=3)
    torch.testing.assert_close(ops.dilated_conv2d(*made, None, 4, 3, *choice), expected)


def test_gradcheck_twice():
    x, weight, bias = (t.requires_grad_() for t in tensors((5, 4), 2, 3, torch.float64))

    def run(x, weight, bias):
        return ops.dilated_conv2d(x, weight, bias, None, 3, 3, None, "auto", "auto", "default")

    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias))


def test_compile():
    made = [t.requires_grad_() for t in tensors((9, 8), 3, 4)]

    def loss(*made):
        return pywino.dilated_conv2d(*made, dilation=4, activation="relu").square().sum()

    eager = torch.autograd.grad(loss(*made), made)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*made), made), eager)


def test_other_kernels_paddings_and_unbatched():
    x, weight, bias = tensors((12, 10), 3, 4)
    for padding in ("same", "valid", 1, (0, 5)):
        actual = pywino.dilated_conv2d(x, weight, bias, padding, 3)
        torch.testing.assert_close(actual, F.conv2d(x, weight, bias, 1, padding, 3))
    five = torch.randn(4, 3, 5, 5)
    actual = pywino.dilated_conv2d(x, five)
    torch.testing.assert_close(actual, F.conv2d(x, five, None, 1, "same", 2))
    actual = pywino.dilated_conv2d(x[0], weight)
    torch.testing.assert_close(actual, F.conv2d(x[0], weight, None, 1, "same", 2))


def test_refuses():
    x, weight, _ = tensors((12, 10), 3, 4)
    with pytest.raises(RuntimeError, match="dilation must be >= 1, got 0"):
        pywino.dilated_conv2d(x, weight, dilation=0)
    with pytest.raises(RuntimeError, match="input must be of padded height >= the kernel's 41"):
        pywino.dilated_conv2d(x, weight, padding=0, dilation=20)
    with pytest.raises(RuntimeError, match="cannot run this call"):
        pywino.dilated_conv2d(x, torch.randn(4, 3, 5, 5), backend="cpu")


def test_layer():
    torch.manual_seed(0)
    layer = pywino.DilatedConv2d(6, 5, 3, padding=4, dilation=4)
    x = torch.randn(2, 6, 11, 9)
    dense = layer.to_dense()
    assert type(dense) is nn.Conv2d
    assert dense.weight is layer.weight
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    assert list(layer.state_dict()) == ["weight", "bias"]
    model = nn.Sequential(layer)
    assert type(pywino.restore_(model, strict=True)[0]) is nn.Conv2d
