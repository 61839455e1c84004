# SPDX-License-Identifier: BSD-3-Clause
"""Channel attention on a GPU. Without one tests/emulator and tests/kernels run the same kernels."""

import pytest
import torch

import pywino
from pywino import backends, planner
from pywino.ops import channel_attention as ops
from pywino.reference import channel_attention as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
]
BACKENDS = ("cuda", "triton")
# One rounding to the tensors' dtype; in fp32 sums of up to 150,000 numbers and a sigmoid.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SUMS = 3e-6  # of the largest number
# The second is too large for a block's shared memory.
SHAPES = [(4, 64, 8, 8), (2, 32, 321, 481), (3, 5, 7, 3), (2, 300, 14, 14)]


def needs(backend, x):
    if (reason := backends.can_run(backend, ops.describe(x))) is not None:
        pytest.skip(reason)


def tensors(shape, dtype, last):
    c, r = shape[1], -(-shape[1] // 16)
    made = [torch.randn(s, device="cuda").to(dtype) for s in (shape, (r, c), (c, r), (c, c), shape)]
    made[3] /= c**0.5
    if last:
        made[0] = made[0].contiguous(memory_format=torch.channels_last)
    return made


def assert_close(actual, expected):
    error = (actual.double() - expected).abs() - 1.01 * ROUNDING[actual.dtype] * expected.abs()
    assert error.max() <= SUMS * expected.abs().max()


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_kernels_of_the_gradient(backend, shape, dtype, last):
    x, w1, w2, w3, residual = tensors(shape, dtype, last)
    needs(backend, x)
    relus = {"activation": "relu", "residual": residual, "residual_activation": "relu"}
    y = pywino.channel_residual_attention(x, w1, w2, w3, backend=backend, **relus)
    doubles = [t.double() for t in (x, w1, w2, w3)]
    expected = reference.channel_residual_attention(
        *doubles, residual=residual.double(), activation="relu", residual_activation="relu"
    )
    assert_close(y, expected)
    assert y.stride() == x.stride()

    mean = doubles[0].mean((2, 3)).float()
    gate = reference.gate(mean.double(), *doubles[1:]).float()
    grad = torch.randn_like(x)
    dx, du = torch.ops.pywino.channel_residual_attention_backward(
        grad, x, mean, gate, w1, w2, w3, None, "relu", backend
    )
    saved = mean.double(), gate.double()
    by_input, by_logit = reference.gradients(
        grad.double(), doubles[0], *saved, *doubles[1:], None, "relu"
    )
    assert_close(dx, by_input)
    assert_close(du, by_logit)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_known_mean(dtype):
    """What a convolution has summed spares a reading; the gate alone is one kernel."""
    x, w1, w2, w3, residual = tensors((1, 32, 121, 81), dtype, True)
    needs("cuda", x)
    mean = x.float().mean((2, 3))
    with torch.no_grad():
        y = pywino.channel_residual_attention(
            x, w1, w2, w3, activation="relu", residual=residual, residual_activation="relu",
            mean=mean,
        )  # fmt: skip
    doubles = [t.double() for t in (x, w1, w2, w3)]
    assert_close(
        y,
        reference.channel_residual_attention(
            *doubles, residual=residual.double(), activation="relu", residual_activation="relu"
        ),
    )
    gate = ops.gate(mean, w1, w2, w3, None, None)
    assert_close(gate, reference.gate(mean.double(), *doubles[1:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_compiled_and_in_a_graph(backend):
    x, w1, w2, w3, _ = tensors(SHAPES[0], torch.float32, True)
    needs(backend, x)

    def attend(*arguments):
        return pywino.channel_residual_attention(*arguments, activation="relu", backend=backend)

    leaves = [t.requires_grad_() for t in (x, w1, w2, w3)]
    y = attend(*leaves)
    grads = torch.autograd.grad(y.square().mean(), leaves)
    compiled = torch.compile(attend, fullgraph=True)(*leaves)
    assert torch.equal(compiled, y)
    for actual, expected in zip(torch.autograd.grad(compiled.square().mean(), leaves), grads):
        torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attend(*leaves)
        graph.replay()
        assert torch.equal(captured, y)


def test_auto_measures(monkeypatch):
    monkeypatch.setenv("PYWINO_PLAN", "measure")
    planner.reset()
    x, w1, w2, *_ = tensors(SHAPES[1], torch.float16, True)
    pywino.channel_residual_attention(x, w1, w2)
    seconds = planner.choose(ops.describe(x)).seconds
    assert "aten" in seconds
    assert all(t > 0 for t in seconds.values())
