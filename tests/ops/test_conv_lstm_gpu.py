# SPDX-License-Identifier: BSD-3-Clause
"""The LSTM cell on a GPU. Without one tests/emulator and tests/kernels run the same kernels."""

import pytest
import torch

import pywino
from pywino import backends
from pywino.ops import conv_lstm as ops
from pywino.reference import conv_lstm as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
]
BACKENDS = ("cuda", "triton")
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
OF_LARGEST = 1e-6  # 1 - sigma and 1 - tanh^2 cancel where a gate is open


def needs(backend, gates):
    if (reason := backends.can_run(backend, ops.describe(gates))) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", [(2, 32, 33, 31), (3, 5, 7, 1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, shape, dtype, last):
    n, c, h, w = shape
    sizes = ((n, 4 * c, h, w), shape, shape, shape)
    made = [2 * torch.randn(size, device="cuda").to(dtype) for size in sizes]
    if last:
        made = [t.contiguous(memory_format=torch.channels_last) for t in made]
    gates, cell, grad_hidden, grad_cell = made
    needs(backend, gates)
    doubles = [t.double() for t in made]
    states = torch.ops.pywino.conv_lstm_cell(gates, cell, backend)
    grads = torch.ops.pywino.conv_lstm_cell_backward(grad_hidden, grad_cell, gates, cell, backend)
    expected = reference.pointwise(*doubles[:2])
    expected += reference.pointwise_gradients(*doubles[2:], *doubles[:2])
    for actual, right in zip((*states, *grads), expected):
        error = (actual.double() - right).abs() - 1.01 * ROUNDING[dtype] * right.abs()
        assert error.max() <= OF_LARGEST * right.abs().max()
        assert actual.dtype == dtype
        assert actual.is_contiguous() == gates.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend):
    layer = pywino.ConvLSTMCell(8, 8).cuda()
    layer.backend = backend
    x = torch.randn(2, 8, 16, 16, device="cuda")
    needs(backend, x)
    state = layer(x)
    compiled = torch.compile(layer, fullgraph=True)(x, state)
    for actual, expected in zip(compiled, layer(x, state)):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    sum(t.sum() for t in compiled).backward()
    assert layer.weight.grad is not None
