# SPDX-License-Identifier: BSD-3-Clause
"""The numbers of the Triton channel attention kernels, against the reference in float64.
test_rooms_triton.py runs this file in a process of its own."""

import pytest
import torch

from pywino import backends
from pywino.kernels import channel_attention
from pywino.reference import channel_attention as reference

pytest.importorskip("triton")
from interpreted import DEVICE, prepare

prepare(channel_attention)

# One rounding to the tensors' dtype; in fp32 sums of a few thousand numbers and a sigmoid.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SUMS = 2e-6  # of the largest number
# n, c, h, w, r: in one program; in several blocks of pixels and of channels
SHAPES = [(2, 6, 5, 7, 2), (1, 1, 1, 1, 1), (3, 34, 9, 13, 5), (2, 70, 41, 29, 18)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Whatever the kernels read must have been written: empty tensors are full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def tensor(*shape, dtype, channels_last=False):
    x = torch.randn(shape).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def layers(c, r, dtype, has_w3, has_bias):
    w1, w2 = tensor(r, c, dtype=dtype), tensor(c, r, dtype=dtype)
    w3 = tensor(c, c, dtype=dtype) / 4 if has_w3 else None
    b1, b2 = (tensor(m, dtype=dtype) if has_bias else None for m in (r, c))
    return w1, w2, w3, b1, b2


def doubles(*tensors):
    return [t if t is None else t.double().cpu() for t in tensors]


def assert_close(actual, expected, dtype=torch.float32):
    error = (actual.double().cpu() - expected).abs() - ROUNDING[dtype] * expected.abs()
    assert error.max() <= SUMS * expected.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["se", "cra"])
def test_forward_and_backward(shape, kind, last, dtype):
    n, c, h, w, r = shape
    cra = kind == "cra"
    x = tensor(n, c, h, w, dtype=dtype, channels_last=last) + 0.2
    w1, w2, w3, b1, b2 = layers(c, r, dtype, cra, not cra)
    residual = tensor(n, c, h, w, dtype=dtype, channels_last=last) if cra else None
    y, mean, gate = channel_attention.forward(x, w1, b1, w2, b2, w3, residual, cra, cra)
    assert (y.dtype, y.stride()) == (dtype, x.stride())
    assert mean.dtype == gate.dtype == torch.float32
    exact = doubles(x, w1, w2, w3, b1, b2, residual)
    activation = "relu" if cra else None
    expected = reference.channel_residual_attention(*exact, activation, activation)
    assert_close(y, expected, dtype)
    assert_close(mean, exact[0].mean((2, 3)))
    assert_close(gate, reference.gate(exact[0].mean((2, 3)), *exact[1:6]))

    grad = tensor(n, c, h, w, dtype=dtype, channels_last=last)
    dx, du = channel_attention.backward(grad, x, mean, gate, w1, b1, w2, w3, cra)
    assert (dx.dtype, dx.stride()) == (dtype, x.stride())
    x, w1, w2, w3, b1, *_ = exact
    arguments = (*doubles(grad), x, *doubles(mean, gate), w1, w2, w3, b1, activation)
    expected_dx, expected_du = reference.gradients(*arguments)
    assert_close(dx, expected_dx, dtype)
    assert_close(du, expected_du)


def test_one_program_and_several_agree(monkeypatch):
    x, dtype = tensor(2, 12, 9, 8, dtype=torch.float32, channels_last=True), torch.float32
    w1, w2, w3, b1, b2 = layers(12, 3, dtype, True, True)
    assert channel_attention.fits(12, 72, 3, True)
    whole = channel_attention.forward(x, w1, b1, w2, b2, w3, None, True, False)
    whole += channel_attention.backward(x, x, *whole[1:], w1, b1, w2, w3, True)
    monkeypatch.setattr(channel_attention, "ELEMENTS", 0)
    monkeypatch.setattr(channel_attention, "BLOCK", 64)
    parts = channel_attention.forward(x, w1, b1, w2, b2, w3, None, True, False)
    parts += channel_attention.backward(x, x, *parts[1:], w1, b1, w2, w3, True)
    for one, several in zip(whole, parts):
        assert_close(one, several.double().cpu())


def test_nan_and_infinity_stay_in_their_image():
    x = tensor(3, 4, 6, 5, dtype=torch.float32)
    x[1, 2, 3, 4] = float("nan")
    w1, w2, w3, *_ = layers(4, 2, torch.float32, True, False)
    y, _, gate = channel_attention.forward(x, w1, None, w2, None, w3, None, True, False)
    assert y[1].isnan().any()
    assert gate[1].isnan().all()
    assert y[::2].isfinite().all()


def test_the_op_and_its_gradient_run_them(monkeypatch):
    runs = lambda call, algorithm: None  # noqa: E731
    monkeypatch.setitem(backends._CHECKS, ("triton", "channel_residual_attention"), runs)
    ran = []
    for name in ("forward", "backward"):
        kernel = getattr(channel_attention, name)
        recorded = lambda *a, n=name, k=kernel: ran.append(n) or k(*a)  # noqa: E731
        monkeypatch.setattr(channel_attention, name, recorded)
    x = tensor(2, 6, 5, 7, dtype=torch.float32, channels_last=True).transpose(2, 3)  # neither
    w1, w2, w3, b1, b2 = layers(6, 2, torch.float32, True, True)
    leaves = [t.requires_grad_() for t in (x, w1, w2, w3, b1, b2)]
    y, _, _ = torch.ops.pywino.channel_residual_attention(
        *leaves, None, "relu", None, backend="triton"
    )
    grads = torch.autograd.grad(y.square().sum(), leaves)
    exact = [t.requires_grad_() for t in doubles(*(t.detach() for t in leaves))]
    expected = reference.channel_residual_attention(*exact, None, "relu")
    assert_close(y.detach(), expected.detach())
    for actual, right in zip(grads, torch.autograd.grad(expected.square().sum(), exact)):
        assert_close(actual, right)
    assert ran == ["forward", "backward"]
