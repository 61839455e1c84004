# SPDX-License-Identifier: BSD-3-Clause
"""The numbers of the Triton LSTM cell, against the reference in float64. test_rooms_triton.py
runs this file in a process of its own."""

import pytest
import torch

from pywino import backends
from pywino.kernels import conv_lstm
from pywino.reference import conv_lstm as reference

pytest.importorskip("triton")
from interpreted import DEVICE, prepare

prepare(conv_lstm)

# One rounding to the tensors' dtype. Before it, fp32: 1 - sigma and 1 - tanh^2 cancel where a gate
# is open, so the error of a gradient is one of the largest number.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
OF_LARGEST = 5e-7


def tensor(*shape, dtype, last):
    x = 2 * torch.randn(shape).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def assert_close(actual, expected, like):
    assert actual.dtype == like.dtype
    assert actual.is_contiguous() == like.is_contiguous()
    error = (actual.double().cpu() - expected).abs()
    limit = 1.01 * ROUNDING[like.dtype] * expected.abs() + OF_LARGEST * expected.abs().max()
    assert (error <= limit).all(), (error - limit).max()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 32, 11, 13), (3, 5, 1, 2)], ids=str)
@pytest.mark.parametrize("has_cell", [False, True])
def test_forward_and_backward(shape, has_cell, last, dtype):
    n, c, h, w = shape
    gates = tensor(n, 4 * c, h, w, dtype=dtype, last=last)
    cell, grad_hidden, grad_cell = (tensor(*shape, dtype=dtype, last=last) for _ in range(3))
    cell = cell if has_cell else None
    exact = [t if t is None else t.double().cpu() for t in (grad_hidden, grad_cell, gates, cell)]
    states = conv_lstm.forward(gates, cell)
    for actual, expected in zip(states, reference.pointwise(*exact[2:])):
        assert_close(actual, expected, gates)
    grads = conv_lstm.backward(grad_hidden, grad_cell, gates, cell)
    for actual, expected in zip(grads, reference.pointwise_gradients(*exact)):
        assert_close(actual, expected, gates)


def test_the_whole_range():
    """No infinity minus infinity, and small numbers keep their accuracy."""
    a = torch.tensor([0, 1e-30, -1e-5, 1e-3, 0.3, -0.624, 0.626, 5, -30, 88, -200, 1e30])
    gates = a.repeat(4).reshape(1, 4, 1, len(a)).to(DEVICE)
    for actual, expected in zip(
        conv_lstm.forward(gates, None), reference.pointwise(gates.double().cpu(), None)
    ):
        torch.testing.assert_close(actual.double().cpu(), expected, rtol=1e-6, atol=1e-37)


def test_the_op_and_its_gradient_run_them(monkeypatch):
    runs = lambda call, algorithm: None  # noqa: E731
    monkeypatch.setitem(backends._CHECKS, ("triton", "conv_lstm_cell"), runs)
    ran = []
    for name in ("forward", "backward"):
        kernel = getattr(conv_lstm, name)
        recorded = lambda *a, n=name, k=kernel: ran.append(n) or k(*a)  # noqa: E731
        monkeypatch.setattr(conv_lstm, name, recorded)
    gates = tensor(2, 12, 4, 5, dtype=torch.float32, last=True).requires_grad_()
    cell = tensor(2, 3, 4, 5, dtype=torch.float32, last=False).requires_grad_()  # another layout
    states = torch.ops.pywino.conv_lstm_cell(gates, cell, "triton")
    grads = torch.autograd.grad(sum(s.square().sum() for s in states), (gates, cell))
    exact = [t.detach().double().cpu().requires_grad_() for t in (gates, cell)]
    expected = reference.pointwise(*exact)
    right = torch.autograd.grad(sum(s.square().sum() for s in expected), exact)
    for a, e in zip((*states, *grads), (*expected, *right)):
        torch.testing.assert_close(a.double().cpu(), e, rtol=1e-5, atol=1e-5)
    assert ran == ["forward", "backward"]
