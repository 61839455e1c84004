# SPDX-License-Identifier: BSD-3-Clause
"""Channel (residual) attention: the reference by hand, the kernels against float64, the layer."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.library import opcheck

import pywino
from pywino import backends
from pywino.nn.channel_attention import ChannelAttention
from pywino.reference import channel_attention as reference
from pywino.testing import assert_close_to_reference, relative_l2

ops = torch.ops.pywino
# Channels that fill no vector, one, several; pixels that end inside a vector; more than one block.
SHAPES = [(2, 3, 5, 7), (3, 16, 4, 4), (1, 70, 9, 8), (1, 35, 61, 53), (9, 7, 1, 1)]
FLAGS = list(itertools.product((None, "relu"), repeat=2))


def tensors(shape, hidden=2, dtype=torch.float32, channels_last=False):
    """input, w1, w2, w3, b1, b2, residual."""
    c = shape[1]
    x, residual = torch.randn(shape), torch.randn(shape)
    made = [x, torch.randn(hidden, c) / c**0.5, torch.randn(c, hidden), torch.randn(c, c) / c**0.5]
    made += [torch.randn(hidden), torch.randn(c), residual]
    format = torch.channels_last if channels_last else torch.contiguous_format
    return [
        t.to(dtype).contiguous(memory_format=format) if t.dim() == 4 else t.to(dtype) for t in made
    ]


def attention(arguments, activation=None, residual_activation=None, **choice):
    return pywino.channel_residual_attention(
        *arguments[:6],
        activation=activation,
        residual=arguments[6],
        residual_activation=residual_activation,
        **choice,
    )


def double(arguments):
    return [t if t is None else t.detach().double() for t in arguments]


# --- the reference ---


def test_reference_by_hand():
    # Means (2, -1): relu(W1 z) = 1, W2 of it (1, 0), W3 z = (-1, ln 3), so u = (0, ln 3).
    x = torch.tensor([[[[1.0, 3.0]], [[-4.0, 2.0]]]])
    w1, w2 = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]])
    w3 = torch.tensor([[0.0, 1.0], [0.0, -torch.tensor(3.0).log()]])
    y = reference.channel_residual_attention(x, w1, w2, w3)
    torch.testing.assert_close(y, torch.tensor([[[[0.5, 1.5]], [[-3.0, 1.5]]]]))
    y = reference.channel_residual_attention(x, w1, w2, w3, None, None, -x, "relu", "relu")
    torch.testing.assert_close(y, torch.tensor([[[[0.0, 0.0]], [[4.0, 0.0]]]]))
    without = reference.channel_residual_attention(x, w1, w2)
    torch.testing.assert_close(without[0, 0, 0] / x[0, 0, 0], torch.sigmoid(torch.ones(2)))


@pytest.mark.parametrize("w3", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_reference_gradients_are_autograds(w3, activation):
    arguments = tensors((2, 5, 4, 3), dtype=torch.float64)
    arguments[3] = arguments[3] if w3 else None
    x, w1, w2, w3, b1, b2, _ = (t if t is None else t.requires_grad_() for t in arguments)
    y = reference.channel_residual_attention(x, w1, w2, w3, b1, b2, None, activation)
    grad = torch.randn_like(y)
    grad_x, grad_b2 = torch.autograd.grad(y, (x, b2), grad)
    mean = x.mean((2, 3))
    gate = reference.gate(mean, w1, w2, w3, b1, b2)
    got, logit = reference.gradients(grad, x, mean, gate, w1, w2, w3, b1, activation)
    torch.testing.assert_close(got, grad_x)
    torch.testing.assert_close(logit.sum(0), grad_b2)


# --- the kernels ---


@pytest.mark.native
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(isa, shape, channels_last, flags):
    for left_out in ([], [3], [4, 5], [6]):  # W3, the biases, the residual
        arguments = tensors(shape, channels_last=channels_last)
        for i in left_out:
            arguments[i] = None
        actual = attention(arguments, *flags, backend="cpu")
        exact = reference.channel_residual_attention(*double(arguments), *flags)
        peer = reference.channel_residual_attention(*arguments, *flags)
        # The sums have other orders; both round each operation once.
        assert_close_to_reference(actual, exact, peer, 4)
        assert backends.is_channels_last(actual) == backends.is_channels_last(arguments[0])


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_16_bit_floats_are_rounded_once(isa, shape, channels_last, dtype):
    arguments = tensors(shape, dtype=dtype, channels_last=channels_last)
    actual = attention(arguments, "relu", "relu", backend="cpu")
    exact = reference.channel_residual_attention(*double(arguments), "relu", "relu")
    # float32 inside: a result near the middle of two neighbours may go to the other one.
    assert_close_to_reference(actual, exact, exact.to(dtype), 1.02)


@pytest.mark.native
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(isa, shape, channels_last, flags):
    for left_out in ([], [3], [4, 5], [6]):
        made = tensors(shape, channels_last=channels_last)
        for i in left_out:
            made[i] = None
        grad = torch.randn(shape)

        def gradients(function, arguments, grad=grad):
            arguments = [t if t is None else t.clone().requires_grad_() for t in arguments]
            wanted = [t for t in arguments if t is not None]
            y = function(arguments)
            return torch.autograd.grad(y, wanted, grad.to(y.dtype), allow_unused=True)

        def plain(arguments):
            return reference.channel_residual_attention(*arguments, *flags)

        actual = gradients(lambda a: attention(a, *flags), made)
        exact, peer = gradients(plain, double(made)), gradients(plain, made)
        for a, e, p in zip(actual, exact, peer, strict=True):
            if a.dim() == 4:
                assert_close_to_reference(a, e, p, 4)
            else:
                # A few sums over pixels and channels that cancel, some by a factor of 50: 1e-5 is
                # that times 1.2e-7 and the square root of the number of channels.
                assert relative_l2(a, e) < 1e-5


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_backward_of_16_bit_floats(isa, channels_last, dtype):
    made = tensors((2, 19, 11, 13), dtype=dtype, channels_last=channels_last)
    grad = torch.randn(2, 19, 11, 13).to(dtype)
    actual = [t.clone().requires_grad_() for t in made]
    attention(actual, "relu", "relu").backward(grad)
    exact = [t.double().requires_grad_() for t in made]
    reference.channel_residual_attention(*exact, "relu", "relu").backward(grad.double())
    for a, e in zip(actual, exact, strict=True):
        # The input's is rounded once; those of weights also see where a 16-bit sum with the
        # residual is 0 and the exact one is not.
        assert_close_to_reference(a.grad, e.grad, e.grad.to(dtype), 4)


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_outputs(isa, channels_last):
    """They are written past the caches, also where rows of pixels start inside a vector."""
    arguments = tensors((1, 32, 190, 181), channels_last=channels_last)
    actual = attention(arguments, "relu", "relu", backend="cpu")
    exact = reference.channel_residual_attention(*double(arguments), "relu", "relu")
    peer = reference.channel_residual_attention(*arguments, "relu", "relu")
    assert_close_to_reference(actual, exact, peer, 4)


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_number_of_threads_gives_the_same_bits(channels_last):
    arguments = tensors((2, 24, 101, 97), channels_last=channels_last)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            wanted = [t.clone().requires_grad_() for t in arguments]
            y = attention(wanted, "relu", "relu")
            y.square().sum().backward()
            results.append([y, *(t.grad for t in wanted)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.native
def test_nan_and_infinity(isa):
    arguments = tensors((1, 3, 4, 4), hidden=3)
    arguments[0][0, 1, 2, 3] = float("nan")
    assert attention(arguments, "relu", "relu").isnan().all()  # W3 mixes all channels
    arguments[1:4] = [torch.eye(3), torch.zeros(3, 3), None]
    actual = attention(arguments, "relu", "relu", backend="cpu")
    assert actual.isnan().all()  # 0 times NaN too, as in PyTorch
    arguments[0][0, 1, 2, 3] = float("inf")
    exact = reference.channel_residual_attention(*arguments, "relu", "relu")
    actual = attention(arguments, "relu", "relu", backend="cpu")
    torch.testing.assert_close(actual, exact, equal_nan=True)


@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_empty_batch_sliced_and_unbatched(backend):
    arguments = tensors((3, 6, 10, 11))
    whole = attention(arguments, "relu", "relu", backend=backend)
    empty = [t[:0] if t.dim() == 4 else t for t in arguments]
    empty[0].requires_grad_()
    output = attention(empty, backend=backend)
    assert output.shape == (0, 6, 10, 11)
    output.sum().backward()
    assert empty[0].grad.shape == empty[0].shape
    one = [t[1] if t.dim() == 4 else t for t in arguments]
    torch.testing.assert_close(attention(one, "relu", "relu", backend=backend), whole[1])
    strided = list(arguments)
    strided[0] = torch.empty(3, 6, 20, 11)[:, :, ::2].copy_(arguments[0])
    strided[6] = arguments[6].contiguous(memory_format=torch.channels_last)
    actual = attention(strided, "relu", "relu", backend=backend)
    torch.testing.assert_close(actual, whole)
    assert actual.is_contiguous()


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_gradcheck(flags):
    arguments = tensors((2, 4, 3, 2), dtype=torch.float64)
    for without in ([], [3, 4, 5]):
        wanted = [None if i in without else t.requires_grad_() for i, t in enumerate(arguments)]
        assert torch.autograd.gradcheck(lambda *a: attention(a, *flags), wanted)


def test_double_backward_says_that_it_is_not_there():
    arguments = [t.requires_grad_() for t in tensors((1, 4, 3, 3))]
    y = attention(arguments)
    (grad,) = torch.autograd.grad(y.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    x, w1, w2, w3, b1, b2, r = tensors((2, 6, 5, 4), channels_last=channels_last)
    for t in (x, w1, w2, w3, b1, b2, r):
        t.requires_grad_()
    op = ops.channel_residual_attention.default
    opcheck(op, (x, w1, w2, w3, b1, b2, r, "relu", "relu", "auto"))
    opcheck(op, (x, w1, w2, None, None, None, None, None, None, "aten"))
    _, mean, gate = op(x, w1, w2, w3, b1, b2, r, None, None, "auto")
    backward = ops.channel_residual_attention_backward.default
    detached = [t.detach() for t in (torch.randn_like(x), x, mean, gate, w1, w2, w3, b1)]
    opcheck(backward, (*detached, "relu", "auto"))


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_of_the_native_kernels(channels_last):
    x, w1, w2, w3, b1, b2, r = tensors((2, 6, 5, 4), channels_last=channels_last)
    arguments = (x, w1, b1, w2, b2, w3, r, True, True)
    tests = ("test_schema", "test_faketensor")
    opcheck(ops._channel_attention_forward.default, arguments, test_utils=tests)
    _, mean, gate = ops._channel_attention_forward.default(*arguments)
    backward = (torch.randn_like(x), x, mean, gate, w1, b1, w2, w3, True)
    opcheck(ops._channel_attention_backward.default, backward, test_utils=tests)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    arguments = [t.requires_grad_() for t in tensors((2, 6, 9, 8))]

    def step(*arguments):
        return attention(arguments, "relu", "relu").square().sum()

    eager = torch.autograd.grad(step(*arguments), arguments)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for a, b in zip(torch.autograd.grad(compiled(*arguments), arguments), eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_the_dtype_that_was_asked_for(dtype):
    arguments = [t.requires_grad_() for t in tensors((2, 6, 9, 8))]
    with torch.autocast("cpu", dtype):
        y = attention(arguments)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in arguments)


def test_transforms_and_subclasses_see_pytorchs_functions():
    x, w1, w2, w3, b1, b2, _ = tensors((2, 4, 3, 3))

    def gated(x):
        return pywino.channel_residual_attention(x, w1, w2, w3, b1, b2, activation="relu")

    expected = gated(x)
    torch.testing.assert_close(torch.vmap(lambda x: gated(x[None])[0])(x), expected)
    _, tangent = torch.func.jvp(gated, (x,), (torch.ones_like(x),))
    assert tangent.shape == x.shape

    class Subclass(torch.Tensor):
        pass

    assert type(gated(x.as_subclass(Subclass))) is Subclass


@pytest.mark.native
def test_a_default_device_changes_nothing():
    from pywino.functional import _eager

    tensor = torch.ones(1)
    with torch.device("cpu"):
        assert _eager.is_plain(tensor, None)
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert not _eager.is_plain(tensor)


REFUSED = {
    "w1 must be a matrix": {"w1": torch.ones(6)},
    r"w1 must be \(2, 4\)": {"w1": torch.ones(2, 5)},
    r"w2 must be \(4, 2\)": {"w2": torch.ones(2, 4)},
    r"w3 must be \(4, 4\)": {"w3": torch.ones(4, 5)},
    r"b1 must be \(2,\)": {"b1": torch.ones(4)},
    r"b2 must be \(4,\)": {"b2": torch.ones(2)},
    "w1 must have at least one row": {"w1": torch.ones(0, 4)},
    "input must be": {"input": torch.ones(4, 4)},
    "input must have at least one channel": {"input": torch.ones(1, 4, 0, 3)},
    "residual must be": {"residual": torch.ones(1, 4, 3, 1)},
    "w2 must be of input's dtype": {"w2": torch.ones(4, 2).double()},
    "input must be of a floating point dtype": {"input": torch.ones(1, 4, 3, 3).int()},
    "w3 must be on input's device": {"w3": torch.ones(4, 4, device="meta")},
    "activation must be one of": {"activation": "gelu"},
    "backend must be one of": {"backend": "gpu"},
    "backend='triton' cannot run this call": {"backend": "triton"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message):
    options = {"input": torch.ones(1, 4, 3, 3), "w1": torch.ones(2, 4), "w2": torch.ones(4, 2)}
    with pytest.raises(RuntimeError, match=message):
        pywino.channel_residual_attention(**options | REFUSED[message])
    with pytest.raises(TypeError, match="w1 must be a tensor, got int"):
        pywino.channel_residual_attention(**options | {"w1": 3})


# --- the layer ---


@pytest.mark.parametrize("options", [{}, {"residual": False}, {"bias": True}], ids=str)
def test_layer_is_its_torch_counterpart(options):
    layer = pywino.ChannelResidualAttention(32, **options)
    dense = layer.to_dense()
    assert type(dense) is ChannelAttention
    assert list(dense.state_dict()) == list(layer.state_dict())
    assert all(a is b for a, b in zip(dense.parameters(), layer.parameters(), strict=True))
    x, residual = torch.randn(2, 32, 7, 9), torch.randn(2, 32, 7, 9)
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer(x[0]), dense(x[0]))
    fused = layer(x, "relu", residual, "relu")
    torch.testing.assert_close(fused, (dense(x).relu() + residual).relu())
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


def test_layer_has_the_names_and_counts_of_the_papers():
    layer = pywino.ChannelResidualAttention(32)
    assert list(layer.state_dict()) == ["conv_du.0.weight", "conv_du.2.weight", "conv_1_1.weight"]
    assert sum(p.numel() for p in layer.parameters()) == 1152
    squeeze = pywino.ChannelResidualAttention(32, residual=False)
    assert sum(p.numel() for p in squeeze.parameters()) == 128


@pytest.mark.parametrize(
    ("channels", "options", "hidden"),
    [
        (64, {}, 4),
        (8, {}, 1),
        (64, {"reduction": 4}, 16),
        (64, {"rd_ratio": 0.25}, 16),
        (72, {"rd_ratio": 0.25, "rd_divisor": 8}, 24),  # 18 is nearest to 16, a tenth too few
        (80, {"rd_ratio": 0.25, "rd_divisor": 8}, 24),  # 20 rounds up
        (64, {"rd_channels": 5}, 5),
    ],
)
def test_reduced_channels(channels, options, hidden):
    layer = pywino.ChannelResidualAttention(channels, **options)
    assert isinstance(layer.conv_du[0], nn.Conv2d)
    assert layer.conv_du[0].out_channels == hidden
