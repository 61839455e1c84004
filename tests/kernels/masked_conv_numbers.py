# SPDX-License-Identifier: BSD-3-Clause
"""The numbers of the Triton masked convolution, against the reference in float64.
test_rooms_triton.py runs this file in a process of its own."""

import pytest
import torch

import pywino
from pywino import backends
from pywino.kernels import masked_conv
from pywino.ops import masked_conv as ops
from pywino.reference import masked_conv as reference

pytest.importorskip("triton")
from convolutions import ROUNDING, assert_close, poisoned_memory, tensor  # noqa: F401
from interpreted import DEVICE, prepare

prepare(masked_conv)

GEOMETRIES = [((3, 3), (1, 1)), ((3, 3), (2, 3)), ((1, 1), (1, 1)), ((5, 2), (1, 1))]
MASKS = ("empty", "full", "one", "random", "streaks", "different", "shared")


def mask_of(name, n, h, w):
    mask = torch.zeros(1 if name == "shared" else n, 1, h, w, dtype=torch.bool)
    if name == "full":
        mask[:] = True
    elif name == "one":
        mask[-1, 0, h // 2, w - 1] = True
    elif name in ("random", "shared"):
        mask = torch.rand(mask.shape) < 0.3
    elif name == "streaks":
        for y in range(h):
            mask[:, 0, y, 3 * y % w] = True
    elif name == "different":  # none, all, a cluster
        mask[1 % n] = True
        mask[2 % n, 0, : h // 2, w // 3 :] = True
    return mask.to(DEVICE)


def convolved(x, mask, weight, bias, dilation, strict=True):
    padding = ops.front(weight.shape[2:], dilation)
    mask = mask.expand(len(x), -1, -1, -1).contiguous()
    filter = ops.pack(weight, "triton")
    return masked_conv.forward(x, mask, filter, bias, padding, dilation, strict)


def exact(x, mask, weight, bias, dilation):
    bias = None if bias is None else bias.double().cpu()
    return reference.masked_conv2d(
        x.double().cpu(), mask.cpu(), weight.double().cpu(), bias, dilation=dilation
    )


@pytest.mark.parametrize("density", [0, 0.01, 0.5, 1])
@pytest.mark.parametrize("pixels", [1, 1023, 1024, 1025, 5000])
def test_list(pixels, density):
    mask = torch.rand(pixels, device=DEVICE) < density
    list, count = masked_conv.list_pixels(mask)
    assert list[: count.item()].tolist() == mask.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, last, dtype):
    x = tensor(3, 19, 9, 14, dtype=dtype, last=last)
    weight, bias = tensor(21, 19, 3, 3, dtype=dtype), tensor(21)
    mask = mask_of(name, 3, 9, 14)
    y = convolved(x, mask, weight, bias, (1, 1))
    assert not y.masked_select(~mask).any()
    assert_close(y, exact(x, mask, weight, bias, (1, 1)), x)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("kernel", "dilation"), GEOMETRIES, ids=str)
def test_geometries(kernel, dilation, last):
    x, weight = tensor(2, 5, 11, 8, last=last), tensor(3, 5, *kernel)
    mask = mask_of("random", 2, 11, 8)
    y = convolved(x, mask, weight, None, dilation)
    assert_close(y, exact(x, mask, weight, None, dilation), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_blocks_of_the_rules(dtype):
    # 130 channels are several blocks of k and c, 300 pixels several of pixels.
    x, weight = tensor(1, 130, 15, 20, dtype=dtype, last=True), tensor(130, 130, 3, 3, dtype=dtype)
    mask = mask_of("full", 1, 15, 20)
    y = convolved(x, mask, weight, None, (1, 1))
    assert_close(y, exact(x, mask, weight, None, (1, 1)), x)


def test_what_lies_outside_is_not_read():
    x, weight, mask = tensor(2, 8, 9, 7), tensor(4, 8, 3, 3), mask_of("random", 2, 9, 7)
    expected = convolved(x, mask, weight, None, (1, 1))
    spoilt = torch.where(mask, x, float("nan"))
    assert torch.equal(convolved(spoilt, mask, weight, None, (1, 1)), expected)


def test_strided_input():
    x = tensor(2, 9, 24, 12)[:, 1:7, ::2, 1::3]
    weight, mask = tensor(5, 6, 3, 3), mask_of("random", 2, 12, 4)
    assert_close(convolved(x, mask, weight, None, (1, 1)), exact(x, mask, weight, None, (1, 1)), x)


def test_more_than_two_to_the_31_elements():
    # Rows 2^29 elements apart: of the memory, only what is read becomes real.
    torch.use_deterministic_algorithms(False)
    try:
        memory = torch.empty(7 * 2**29 + 64, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"this machine lends no 7 GB: {error}")
    x = memory.as_strided((1, 4, 8, 5), (4, 1, 2**29, 4))
    x.copy_(tensor(1, 4, 8, 5))
    weight, mask = tensor(3, 4, 3, 3, dtype=torch.float16), mask_of("random", 1, 8, 5)
    y = convolved(x, mask, weight, None, (1, 1))
    assert_close(y, exact(x, mask, weight, None, (1, 1)), x.contiguous())


@pytest.mark.parametrize("last", [False, True])
def test_the_op_and_its_gradient_run_them(monkeypatch, last):
    runs = lambda call, algorithm: None  # noqa: E731
    monkeypatch.setitem(backends._CHECKS, ("triton", "masked_conv2d"), runs)
    ran, kernel = [], masked_conv.forward
    monkeypatch.setattr(masked_conv, "forward", lambda *a: ran.append(a[0].shape[1]) or kernel(*a))
    x, weight = tensor(2, 6, 9, 7, last=last).requires_grad_(), tensor(5, 6, 3, 3).requires_grad_()
    bias, mask = tensor(5).requires_grad_(), mask_of("random", 2, 9, 7)
    y = torch.ops.pywino.masked_conv2d(x, mask, weight, bias, (1, 1), (1, 1), "triton")
    grads = torch.autograd.grad(y.square().sum(), (x, weight, bias))
    doubles = [t.detach().double().cpu().requires_grad_() for t in (x, weight, bias)]
    expected = reference.masked_conv2d(doubles[0], mask.cpu(), *doubles[1:])
    right = torch.autograd.grad(expected.square().sum(), doubles)
    for a, e in zip((y, *grads), (expected, *right)):
        torch.testing.assert_close(a.double().cpu(), e, rtol=1e-5, atol=1e-4)
    assert ran == [6, 5]  # forward, and the gradient by the input
    assert backends.is_channels_last(grads[0]) == last


def test_the_layer_keeps_its_filter(monkeypatch):
    runs = lambda call, algorithm: None  # noqa: E731
    monkeypatch.setitem(backends._CHECKS, ("triton", "masked_conv2d"), runs)
    layer = pywino.MaskedConv2d(6, 5, 3, backend="triton").to(DEVICE)
    x, mask = tensor(2, 6, 9, 7), mask_of("random", 2, 9, 7)
    packed, pack = [], ops.pack
    monkeypatch.setattr(ops, "pack", lambda *a: packed.append(a[1]) or pack(*a))
    with torch.no_grad():
        for factor in (1, 2):
            layer.weight *= factor
            for _ in range(2):
                y = layer(x, mask)
                assert_close(y, exact(x, mask, layer.weight, layer.bias, (1, 1)), x)
    assert packed == ["triton"] * 2
