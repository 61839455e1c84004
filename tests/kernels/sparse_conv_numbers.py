# SPDX-License-Identifier: BSD-3-Clause
"""The numbers of the Triton sparse convolution, against the reference in float64.
test_rooms_triton.py runs this file in a process of its own."""

import pytest
import torch
import torch.nn.functional as F

import pywino
from pywino import backends
from pywino.kernels import sparse_conv
from pywino.ops import _packed
from pywino.reference import sparse_conv as reference

pytest.importorskip("triton")
from convolutions import ROUNDING, assert_close, poisoned_memory, tensor  # noqa: F401
from interpreted import DEVICE, prepare

prepare(sparse_conv)

GEOMETRIES = [  # kernel, stride, padding, dilation, (h, w)
    ((3, 3), (1, 1), (1, 1), (1, 1), (9, 11)),
    ((3, 3), (2, 1), (0, 2), (1, 2), (8, 9)),
    ((1, 1), (1, 1), (0, 0), (1, 1), (5, 7)),
    ((1, 1), (2, 2), (0, 0), (1, 1), (6, 5)),
    ((5, 2), (1, 3), (2, 1), (2, 1), (12, 10)),
]


def pruned(k, c, kernel, density, block=(64, 32), dtype=torch.float32):
    """Whole blocks of zeros, by tap."""
    kept = torch.rand(-(-k // block[0]), -(-c // block[1]), *kernel) < density
    kept = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:k, :c]
    return tensor(k, c, *kernel, dtype=dtype) * kept.to(DEVICE)


def exact(x, weight, bias, *where):
    bias = None if bias is None else bias.double().cpu()
    return reference.sparse_conv2d(x.double().cpu(), weight.double().cpu(), bias, *where)


def convolved(x, weight, bias, *where):
    blocks = _packed.pack_blocks(weight)
    return sparse_conv.forward(x, *blocks, bias, len(weight), weight.shape[2:], *where, True)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "size"), GEOMETRIES, ids=str)
def test_geometries(kernel, stride, padding, dilation, size, last):
    x, weight, bias = tensor(2, 70, *size, last=last), pruned(100, 70, kernel, 0.4), tensor(100)
    where = (stride, padding, dilation)
    assert_close(convolved(x, weight, bias, *where), exact(x, weight, bias, *where), x)


@pytest.mark.parametrize(
    ("dtype", "last"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.float16, False),
        (torch.bfloat16, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("density", [0, 0.2, 1])
def test_densities(density, dtype, last):
    # 200 channels are several groups, 13 x 12 pixels several blocks of pixels.
    x = tensor(1, 40, 13, 12, dtype=dtype, last=last)
    weight = pruned(200, 40, (3, 3), density, dtype=dtype)
    where = ((1, 1), (1, 1), (1, 1))
    assert_close(convolved(x, weight, None, *where), exact(x, weight, None, *where), x)


def test_what_a_block_of_zeros_would_multiply_is_not_read():
    x, weight = tensor(1, 64, 5, 6), tensor(64, 64, 3, 3)
    weight[:, :32] = 0
    x[:, 5] = float("nan")
    where = ((1, 1), (1, 1), (1, 1))
    assert_close(convolved(x, weight, None, *where), exact(x, weight, None, *where), x)


def test_strided_input():
    x = tensor(2, 45, 24, 12)[:, 1:41, ::2, 1::3]
    weight, where = pruned(64, 40, (3, 3), 0.5), ((1, 1), (1, 1), (1, 1))
    assert_close(convolved(x, weight, None, *where), exact(x, weight, None, *where), x)


def test_more_than_two_to_the_31_elements():
    # Rows 2^29 elements apart: of the memory, only what is read becomes real.
    torch.use_deterministic_algorithms(False)
    try:
        memory = torch.empty(7 * 2**29 + 64, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"this machine lends no 7 GB: {error}")
    x = memory.as_strided((1, 4, 8, 5), (4, 1, 2**29, 4))
    x.copy_(tensor(1, 4, 8, 5))
    weight, where = tensor(3, 4, 3, 3, dtype=torch.float16), ((1, 1), (1, 1), (1, 1))
    y = convolved(x, weight, None, *where)
    assert_close(y, exact(x, weight, None, *where), x.contiguous())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("last", [False, True])
def test_the_layer_and_its_gradients_run_it(monkeypatch, last, stride):
    runs = lambda call, algorithm: None  # noqa: E731
    monkeypatch.setitem(backends._CHECKS, ("triton", "sparse_conv2d"), runs)
    ran, kernel = [], sparse_conv.forward
    monkeypatch.setattr(sparse_conv, "forward", lambda *a: ran.append(a[0].shape[1]) or kernel(*a))
    layer = pywino.SparseConv2d(33, 70, 3, stride, padding=1, backend="triton").to(DEVICE)
    with torch.no_grad():
        layer.weight[:64, :32] = 0
    x = tensor(2, 33, 9, 7, last=last).requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))
    doubles = [t.detach().double().cpu().requires_grad_() for t in (x, layer.weight, layer.bias)]
    expected = F.conv2d(*doubles, stride, 1)  # zeros of the weight have gradients, too
    right = torch.autograd.grad(expected.square().sum(), doubles)
    for a, e in zip((y, *grads), (expected, *right)):
        torch.testing.assert_close(a.double().cpu(), e, rtol=1e-5, atol=1e-4)
    # Forward, and with stride 1 the gradient by the input.
    assert ran == ([33, 70] if stride == 1 else [33])
    assert backends.is_channels_last(grads[0]) == last
    with torch.no_grad():  # with the filter that the layer keeps
        for factor in (1, 2):
            layer.weight *= factor
            torch.testing.assert_close(
                layer(x).double().cpu(),
                exact(x, layer.weight, layer.bias, stride, 1, 1),
                rtol=1e-5, atol=1e-4,
            )  # fmt: skip
    assert ran[-2:] == [33, 33]
