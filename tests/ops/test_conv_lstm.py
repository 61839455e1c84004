# SPDX-License-Identifier: BSD-3-Clause
"""The convolutional LSTM cell: the reference by hand, the kernels against float64, the layer."""

import copy

import pytest
import torch
from torch.library import opcheck

import pywino
from pywino import backends
from pywino.nn.conv_lstm import TorchConvLSTMCell
from pywino.reference import conv_lstm as reference
from pywino.testing import assert_close_to_reference

ops = torch.ops.pywino
# (N, C, H, W) of the states: channels that fill no vector and several, rows longer than a block.
SHAPES = [(2, 3, 5, 7), (1, 16, 6, 5), (3, 35, 4, 4), (1, 1, 3, 5), (1, 2, 97, 101), (2, 5, 1, 1)]


def tensors(shape, dtype=torch.float32, channels_last=False):
    """gates and c, with arguments of the gates from nearly linear to nearly flat."""
    n, c, h, w = shape
    format = torch.channels_last if channels_last else torch.contiguous_format
    made = (3 * torch.randn(n, 4 * c, h, w), torch.randn(shape))
    return [t.to(dtype).contiguous(memory_format=format) for t in made]


# --- the reference ---


def test_reference_by_hand():
    # One pixel, one channel, centre taps only: a_i = x + h = 0, a_f = ln 3, a_g = artanh(1/2) x,
    # a_o = -ln 3; so i = 1/2, f = 3/4, g = 1/2, o = 1/4.
    log3 = float(torch.tensor(3.0).log())
    weight = torch.zeros(4, 2, 3, 3)
    weight[0, :, 1, 1] = torch.tensor([1.0, 1.0])
    weight[2, 0, 1, 1] = float(torch.tensor(0.5).atanh())
    bias = torch.tensor([0.0, log3, 0.0, -log3])
    one = torch.ones(1, 1, 1, 1)
    h, c = reference.conv_lstm_cell(one, (-one, 2 * one), weight, bias)
    torch.testing.assert_close(c, torch.tensor(0.75 * 2 + 0.5 * 0.5).view(1, 1, 1, 1))
    torch.testing.assert_close(h, 0.25 * c.tanh())
    zeros = reference.conv_lstm_cell(one, (0 * one, 0 * one), weight, bias)
    torch.testing.assert_close(reference.conv_lstm_cell(one, None, weight, bias), zeros)


@pytest.mark.parametrize("with_cell", [True, False])
def test_reference_gradients_are_autograds(with_cell):
    gates, cell = (t.requires_grad_() for t in tensors((2, 3, 4, 5), torch.float64))
    states = reference.pointwise(gates, cell if with_cell else None)
    grads = [torch.randn_like(state) for state in states]
    wanted = (gates, cell) if with_cell else (gates,)
    expected = torch.autograd.grad(states, wanted, grads)
    actual = reference.pointwise_gradients(*grads, gates, cell if with_cell else None)
    torch.testing.assert_close(actual[: len(wanted)], expected)


# --- the kernels ---


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(isa, shape, channels_last):
    for with_cell in (True, False):
        made = tensors(shape, channels_last=channels_last)
        grads = [torch.randn(shape) for _ in range(2)]

        def run(function, dtype, made=made, grads=grads, with_cell=with_cell):
            gates, cell = (t.to(dtype).requires_grad_() for t in made)
            states = function(gates, cell if with_cell else None)
            wanted = (gates, cell) if with_cell else (gates,)
            return *states, *torch.autograd.grad(states, wanted, [g.to(dtype) for g in grads])

        actual = run(lambda *t: ops.conv_lstm_cell(*t, "cpu"), torch.float32)
        exact, peer = (run(reference.pointwise, d) for d in (torch.float64, torch.float32))
        for a, e, p in zip(actual, exact, peer, strict=True):
            # Our exponential is good to one unit in the last place, PyTorch's to half a one, and
            # 1 - g^2 has the errors of both twice where g is near 1.
            assert_close_to_reference(a, e, p, 8)
        assert backends.is_channels_last(actual[2]) == backends.is_channels_last(made[0])


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_16_bit_floats_are_rounded_once(isa, channels_last, dtype):
    gates, cell = tensors((2, 19, 7, 9), dtype, channels_last)
    grads = [torch.randn(2, 19, 7, 9).to(dtype) for _ in range(2)]
    actual = ops._conv_lstm_forward(gates, cell)
    exact = reference.pointwise(gates.double(), cell.double())
    format = torch.channels_last if channels_last else torch.contiguous_format
    grads = [g.contiguous(memory_format=format) for g in grads]
    actual += ops._conv_lstm_backward(*grads, gates, cell)
    exact += reference.pointwise_gradients(*(t.double() for t in (*grads, gates, cell)))
    for a, e in zip(actual, exact, strict=True):
        assert_close_to_reference(a, e, e.to(dtype), 1.02)


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_states(isa, channels_last):
    """They are written past the caches, also where rows of pixels start inside a vector."""
    made = tensors((1, 33, 190, 181), channels_last=channels_last)
    actual, peer = ops.conv_lstm_cell(*made, "cpu"), reference.pointwise(*made)
    exact = reference.pointwise(*(t.double() for t in made))
    for a, e, p in zip(actual, exact, peer, strict=True):
        assert_close_to_reference(a, e, p, 4)


@pytest.mark.native
def test_sigmoid_and_tanh_over_their_range(isa):
    x = torch.cat([torch.linspace(-90, 90, 4001), 10.0 ** torch.linspace(-30, 0, 200)])
    gates = torch.zeros(1, 4, 1, len(x))
    gates[:, 0], gates[:, 2] = x, 100  # c' = sigma(x)
    _, sigmoid = ops._conv_lstm_forward(gates, None)
    gates[:, 0], gates[:, 2] = 100, x  # c' = tanh(x)
    _, tanh = ops._conv_lstm_forward(gates, None)
    exact = x.double()
    inside = x > -87  # below, sigma is a subnormal number
    torch.testing.assert_close(
        sigmoid.flatten()[inside].double(), exact.sigmoid()[inside], rtol=3e-7, atol=0
    )
    assert sigmoid.flatten()[~inside].max() < 2e-38
    torch.testing.assert_close(tanh.flatten().double(), exact.tanh(), rtol=4e-7, atol=0)


@pytest.mark.native
def test_nan_and_infinity(isa):
    gates, cell = tensors((1, 4, 5, 5))
    values = torch.tensor([float("nan"), float("inf"), -float("inf")])
    gates[0, ::2, 0, :3] = values
    cell[0, 1, 1, :3] = values
    actual = ops._conv_lstm_forward(gates, cell)
    # sigma(-inf) is 0 in PyTorch and 5e-39 here.
    expected = reference.pointwise(gates, cell)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.native
def test_any_number_of_threads_gives_the_same_bits():
    made, before = tensors((2, 24, 61, 57)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops._conv_lstm_forward(*made)
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(one, ops._conv_lstm_forward(*made)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("with_cell", [True, False])
def test_gradcheck(with_cell):
    gates, cell = (t.requires_grad_() for t in tensors((2, 2, 3, 2), torch.float64))
    arguments = (gates, cell if with_cell else None)
    assert torch.autograd.gradcheck(lambda g, c: ops.conv_lstm_cell(g, c, "auto"), arguments)


def test_double_backward_says_that_it_is_not_there():
    gates, cell = (t.requires_grad_() for t in tensors((1, 2, 3, 3)))
    h, _ = ops.conv_lstm_cell(gates, cell, "auto")
    (grad,) = torch.autograd.grad(h.sum(), gates, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    gates, cell = (t.requires_grad_() for t in tensors((2, 3, 5, 4), channels_last=channels_last))
    for backend in ("auto", "aten"):
        opcheck(ops.conv_lstm_cell.default, (gates, cell, backend))
        opcheck(ops.conv_lstm_cell.default, (gates, None, backend))
    grads = [torch.randn_like(cell) for _ in range(2)]
    arguments = (*grads, gates.detach(), cell.detach())
    opcheck(ops.conv_lstm_cell_backward.default, (*arguments, "auto"))


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_of_the_native_kernels(channels_last):
    gates, cell = tensors((2, 3, 5, 4), channels_last=channels_last)
    tests = ("test_schema", "test_faketensor")
    opcheck(ops._conv_lstm_forward.default, (gates, cell), test_utils=tests)
    arguments = (torch.randn_like(cell), torch.randn_like(cell), gates, cell)
    opcheck(ops._conv_lstm_backward.default, arguments, test_utils=tests)


# --- the cell with its convolution ---


def step(shape=(2, 5, 9, 7), c=6, dtype=torch.float32, channels_last=False):
    """input, h, c, weight, bias."""
    n, i, h, w = shape
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape).to(dtype).contiguous(memory_format=format)
    states = [torch.randn(n, c, h, w).to(dtype) for _ in range(2)]
    return x, *states, torch.randn(4 * c, i + c, 3, 3).to(dtype) / 8, torch.randn(4 * c).to(dtype)


@pytest.mark.parametrize("algorithm", ["auto", "f4"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize(("inputs", "c"), [(5, 6), (16, 32)])  # the latter in one kernel
def test_cell_is_its_reference(inputs, c, algorithm, channels_last, with_state):
    made = step((2, inputs, 9, 7), c, channels_last=channels_last)
    made = [t.requires_grad_() for t in made]

    def run(function, *tensors):
        x, h, c, weight, bias = tensors
        return function(x, (h, c) if with_state else None, weight, bias)

    if algorithm == "f4" and not pywino._native.loaded:
        pytest.skip("needs the native library")
    actual = run(lambda *t: pywino.conv_lstm_cell(*t, algorithm=algorithm), *made)
    exact = run(reference.conv_lstm_cell, *(t.double() for t in made))
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
        assert backends.is_channels_last(a) == channels_last
    wanted = made if with_state else [made[0], *made[3:]]
    grads = [
        torch.autograd.grad(sum(s.square().sum() for s in states), wanted)
        for states in (actual, exact)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        direct = run(lambda *t: pywino.conv_lstm_cell(*t, algorithm=algorithm), *made)
    torch.testing.assert_close(direct, actual, rtol=1e-5, atol=1e-6)


def test_compile():
    x, h, c, weight, bias = (t.requires_grad_() for t in step())

    def loss(x, h, c, weight, bias):
        h, c = pywino.conv_lstm_cell(x, (h, c), weight, bias)
        return (h * c).sum()

    wanted = (x, h, c, weight, bias)
    eager = torch.autograd.grad(loss(*wanted), wanted)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*wanted), wanted), eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_the_dtype_that_was_asked_for(dtype):
    x, h, c, weight, bias = step()
    cell = pywino.ConvLSTMCell(5, 6)
    with torch.autocast("cpu", dtype):
        states = pywino.conv_lstm_cell(x, (h, c), weight, bias)
        again = cell(*[x, cell(x)])
    assert all(s.dtype == dtype for s in (*states, *again))


def test_layer_is_its_torch_counterpart():
    layer = pywino.ConvLSTMCell(5, 6)
    dense = layer.to_dense()
    assert type(dense) is TorchConvLSTMCell
    assert dense.weight is layer.weight
    assert dense.bias is layer.bias
    assert "_filters" not in vars(dense)
    x = torch.randn(2, 5, 9, 7)
    state = other = None
    with torch.no_grad():
        for _ in range(3):
            state, other = layer(x, state), dense(x, other)
            torch.testing.assert_close(state, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(layer)(x, state), layer(x, state))
    assert sum(p.numel() for p in pywino.ConvLSTMCell(32, 32).parameters()) == 4 * 18_464
    assert "bias=False" in repr(pywino.ConvLSTMCell(2, 3, bias=False))


@pytest.mark.native
def test_layer_follows_its_weight():
    layer = pywino.ConvLSTMCell(16, 16, algorithm="f4", backend="cpu")
    x = torch.randn(1, 16, 9, 7)
    with torch.no_grad():
        state = layer(x)
        layer(x, state)
        assert layer._filters.filters
        layer.weight.mul_(0.5)
        torch.testing.assert_close(
            layer(x, state), layer.to_dense()(x, state), rtol=1e-5, atol=1e-5
        )


REFUSED = {
    "state must be": ({"state": torch.ones(1)}, TypeError),
    "state must be .*got 1 of them": ({"state": (torch.ones(1),)}, TypeError),
    r"h must be \(1, 2, 4, 4\)": (
        {"state": (torch.ones(1, 3, 4, 4), torch.ones(1, 2, 4, 4))},
        RuntimeError,
    ),
    "c must be a tensor": ({"state": (torch.ones(1, 2, 4, 4), None)}, TypeError),
    "weight must be of 3 \\+ 2": ({"weight": torch.ones(8, 4, 3, 3)}, RuntimeError),
    "weight must be .4 C": ({"weight": torch.ones(8, 5, 2, 2)}, RuntimeError),
    "input must be": ({"input": torch.ones(3, 4, 4)}, RuntimeError),
    r"bias must be \(8,\)": ({"bias": torch.ones(2)}, RuntimeError),
    "bias must be of input's dtype": ({"bias": torch.ones(8).double()}, RuntimeError),
    "backend must be": ({"backend": "gpu"}, RuntimeError),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message):
    options = {"input": torch.ones(1, 3, 4, 4), "state": None, "weight": torch.ones(8, 5, 3, 3)}
    change, error = REFUSED[message]
    with pytest.raises(error, match=message):
        pywino.conv_lstm_cell(**options | change)
    with pytest.raises(RuntimeError, match="kernel_size must be odd"):
        pywino.ConvLSTMCell(2, 3, 4)
