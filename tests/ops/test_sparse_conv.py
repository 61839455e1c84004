# SPDX-License-Identifier: BSD-3-Clause
"""Convolution with spatial weights that have zeros."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck

import pywino
from pywino import backends, planner, testing
from pywino.ops import _layout, _packed, sparse_conv
from pywino.pruning import NM, Block, Magnitude, Pruner, prune_
from pywino.reference import sparse_conv as reference

ops = torch.ops.pywino
PATTERNS = ("unstructured", "blocks")
# Times PyTorch's own error against float64: both sum in float32, we in partial sums of fixed
# length, it in an order of its own (docs/sparse_conv.md).
TIMES = 3

# (n, c, h, w, k, kernel, stride, padding, dilation): channels off vectors, blocks and lists, rows
# of one to many vectors, strides with and without a dilation that they divide.
GEOMETRIES = [
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 16, 14, 14, 32, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 35, 13, 17, 50, (3, 3), (2, 2), (1, 1), (1, 1)),
    (1, 140, 9, 33, 20, (1, 1), (1, 1), (0, 0), (1, 1)),
    (1, 7, 20, 150, 18, (5, 3), (1, 2), (2, 0), (1, 1)),
    (1, 20, 40, 40, 33, (3, 3), (1, 1), (4, 3), (4, 3)),
    (1, 4, 31, 29, 16, (7, 7), (2, 3), (3, 2), (1, 2)),
    (3, 24, 7, 7, 64, (1, 1), (2, 2), (0, 1), (1, 1)),
    (1, 8, 12, 70, 8, (2, 4), (3, 1), (1, 3), (2, 3)),
    # All pixels as one row, whose last tile has fewer vectors; long rows of a wider kernel.
    (1, 200, 61, 61, 70, (1, 1), (1, 1), (0, 0), (1, 1)),
    (1, 6, 1, 1500, 20, (1, 5), (1, 1), (0, 2), (1, 1)),
    (2, 5, 1, 700, 9, (1, 3), (1, 2), (0, 1), (1, 1)),
    # Short rows: lanes are columns of 16, 8, 4 or 2 images; the last images do not fill a vector.
    (19, 20, 4, 4, 35, (3, 3), (1, 1), (1, 1), (1, 1)),
    (17, 18, 8, 5, 33, (3, 3), (2, 2), (1, 1), (1, 1)),
    (9, 33, 7, 7, 40, (3, 3), (1, 1), (2, 2), (2, 2)),
    (40, 5, 3, 2, 17, (2, 3), (1, 1), (0, 1), (1, 1)),
    (33, 16, 6, 6, 20, (1, 1), (2, 2), (0, 0), (1, 1)),
    (7, 16, 5, 28, 18, (3, 3), (1, 1), (1, 1), (1, 1)),
]


def pruned(weight, pattern, sparsity=0.8):
    k, c = weight.shape[:2]
    if pattern == "blocks":
        keep = (torch.rand(-(-k // 16), c) > sparsity).repeat_interleave(16, 0)[:k]
        return weight * keep[:, :, None, None]
    return weight * (torch.rand(weight.shape) > sparsity)


def case(geometry, pattern="unstructured", dtype=torch.float32, channels_last=False):
    n, c, h, w, k, kernel, *where = geometry
    layout = torch.channels_last if channels_last else torch.contiguous_format
    input = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(k, c, *kernel) / (c * kernel[0] * kernel[1]) ** 0.5
    return input, pruned(weight, pattern).to(dtype), torch.randn(k).to(dtype), *where


def kernel(input, weight, bias, stride, padding, dilation, pattern):
    filter = sparse_conv.pack(weight, pattern)
    return sparse_conv.native_forward(
        input, filter, bias, len(weight), tuple(weight.shape[2:]), stride, padding, dilation
    )


def test_reference_by_hand():
    input = torch.arange(9.0).reshape(1, 1, 3, 3)
    weight = torch.tensor([[[[1.0, 0], [0, -2]]]])
    # x[y, x] - 2 x[y + 1, x + 1]
    expected = torch.tensor([[0 - 8, 1 - 10], [3 - 14, 4 - 16.0]]).reshape(1, 1, 2, 2)
    assert torch.equal(reference.sparse_conv2d(input, weight), expected)
    input[0, 0, 0, 2] = torch.nan  # under a zero of the weight alone
    assert torch.equal(reference.sparse_conv2d(input, weight, stride=2), expected[..., :1, :1])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_reference_is_conv2d(geometry):
    input, weight, bias, *where = (
        t.double() if isinstance(t, torch.Tensor) else t for t in case(geometry)
    )
    expected = F.conv2d(input, weight, bias, *where)
    torch.testing.assert_close(reference.sparse_conv2d(input, weight, bias, *where), expected)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", PATTERNS)
def test_without_zeros(isa, how, dtype):
    """Each packing holds any weight: that of the other pattern too."""
    for geometry, pattern, channels_last in itertools.product(GEOMETRIES, PATTERNS, (False, True)):
        input, weight, bias, *where = case(geometry, pattern, dtype, channels_last)
        exact = reference.sparse_conv2d(input.double(), weight.double(), bias.double(), *where)
        peer = F.conv2d(input, weight, bias, *where)
        actual = kernel(input, weight, bias, *where, how)
        what = f"{geometry} {pattern} {channels_last}"
        testing.assert_close_to_reference(actual, exact, peer, TIMES, what)
        assert actual.is_contiguous(memory_format=torch.channels_last) or not channels_last
        actual = kernel(input, weight, None, *where, how)
        exact = exact - bias.double()[:, None, None]
        peer = F.conv2d(input, weight, None, *where)
        testing.assert_close_to_reference(actual, exact, peer, TIMES, what)


@pytest.mark.native
@pytest.mark.parametrize("how", PATTERNS)
def test_many_channels_keep_the_error(how):
    input, weight = torch.randn(1, 2048, 9, 9).relu(), torch.randn(32, 2048, 3, 3) / 136
    exact = F.conv2d(input.double(), weight.double(), None, 1, 1)
    actual = kernel(input, weight, None, (1, 1), (1, 1), (1, 1), how)
    peer = F.conv2d(input, weight, None, 1, 1)
    testing.assert_close_to_reference(actual, exact, peer, TIMES)


@pytest.mark.native
@pytest.mark.parametrize("how", PATTERNS)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(threads, how):
    """Parts of uneven zeros too: one vector of output channels has most of the weights."""
    before = torch.get_num_threads()
    try:
        for geometry in GEOMETRIES:
            input, weight, bias, *where = case(geometry)
            weight[16:] *= torch.rand_like(weight[16:]) > 0.9
            torch.set_num_threads(1)
            expected = kernel(input, weight, bias, *where, how)
            torch.set_num_threads(threads)
            assert torch.equal(kernel(input, weight, bias, *where, how), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.native
def test_kernels_with_more_taps_than_16_bits_count():
    input, weight = torch.randn(1, 1, 150, 150), torch.zeros(2, 1, 100, 100)
    weight[0, 0, 99, 99] = weight[1, 0, 0, 98] = 1
    where = ((1, 1), (0, 0), (1, 1))
    actual = kernel(input, weight, None, *where, "unstructured")
    assert torch.equal(actual, F.conv2d(input, weight))
    wide = torch.zeros(1, 9, 100, 100)  # eight of these channels are more than 2**16 taps
    wide[0, 8, 99, 99] = 1
    input = torch.randn(1, 9, 100, 100)
    assert torch.equal(kernel(input, wide, None, *where, "unstructured"), input[:, 8:, -1:, -1:])
    with pytest.raises(RuntimeError, match="too many entries"):
        sparse_conv.pack(torch.zeros(1, 1, 257, 256), "unstructured")


@pytest.mark.native
@pytest.mark.parametrize("how", PATTERNS)
def test_zeros_are_not_read(how):
    input, weight, bias, *where = case(GEOMETRIES[1])
    weight[:, 3] = 0
    weight[5] = 0
    expected = kernel(input, weight, bias, *where, how)
    assert torch.equal(expected[:, 5], bias[5].expand_as(expected[:, 5]))  # an empty filter
    input[:, 3] = torch.nan
    assert torch.equal(kernel(input, weight, bias, *where, how), expected)
    weight[0, 5, 1, 1] = torch.nan
    assert kernel(input, weight, bias, *where, how)[:, 0].isnan().any()
    nothing = kernel(input, weight * 0, bias, *where, "unstructured")
    assert nothing.isnan().any()  # 0 * NaN is NaN, and is kept
    nothing = kernel(input, torch.zeros_like(weight), bias, *where, how)
    assert torch.equal(nothing, bias[:, None, None].expand_as(nothing))


@pytest.mark.native
def test_a_filter_of_something_else_is_refused():
    input, weight, bias, *where = case(GEOMETRIES[1])
    filter = sparse_conv.pack(weight, "blocks")
    for wrong in (filter[:-1], filter[:8], filter + 1, sparse_conv.pack(weight[1:], "blocks")):
        with pytest.raises(RuntimeError, match="packed for another weight"):
            sparse_conv.native_forward(input, wrong, bias, 32, (3, 3), *where)


# --- the op ---


def conv(input, weight, bias=None, stride=(1, 1), padding=(1, 1), dilation=(1, 1), backend="auto"):
    return ops.sparse_conv2d(input, weight, bias, stride, padding, dilation, backend)


def test_gradcheck_twice():
    for geometry in ((3, 3), (1, 1), (1, 1), (1, 1)), ((2, 3), (2, 1), (0, 2), (1, 2)):
        size, *where = geometry
        leaves = [
            torch.randn(size, dtype=torch.double, requires_grad=True)
            for size in ((1, 2, 5, 6), (3, 2, *size), (3,))
        ]
        function = lambda x, w, b: conv(x, w, b, *where)  # noqa: E731, B023
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients(isa, pattern, channels_last):
    for geometry in GEOMETRIES:
        leaves = case(geometry, pattern, channels_last=channels_last)
        leaves, where = leaves[:3], leaves[3:]

        def results(function, leaves):
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            output = function(*leaves)
            torch.manual_seed(1)
            grad = torch.randn(output.shape).to(output.dtype)
            return output, *torch.autograd.grad(output, leaves, grad)

        ours = results(lambda x, w, b: conv(x, w, b, *where, "cpu"), leaves)  # noqa: B023
        peers = results(lambda x, w, b: F.conv2d(x, w, b, *where), leaves)  # noqa: B023
        exact = results(lambda x, w, b: F.conv2d(x, w, b, *where), [t.double() for t in leaves])  # noqa: B023
        for name, a, e, p in zip(("output", "input", "weight", "bias"), ours, exact, peers):
            testing.assert_close_to_reference(a, e, p, TIMES, f"{name} {geometry}")


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    input = torch.randn(1, 3, 6, 7, requires_grad=requires_grad)
    last = torch.randn(1, 3, 6, 7).contiguous(memory_format=torch.channels_last)
    weight = pruned(torch.randn(4, 3, 3, 3), "unstructured").requires_grad_(requires_grad)
    bias = torch.randn(4, requires_grad=requires_grad)
    for stride, backend in (((1, 1), "auto"), ((2, 1), "auto")):
        where = (stride, (1, 1), (1, 1), backend)
        grad = torch.randn_like(conv(input, weight, None, *where))
        opcheck(ops.sparse_conv2d, (input, weight, bias, *where))
        opcheck(ops.sparse_conv2d, (last, weight, None, *where))
        opcheck(ops.sparse_conv2d_backward_input, (grad, weight, input.shape, *where))
        opcheck(ops.sparse_conv2d, (input, weight, bias, *where, True))
        opcheck(ops.sparse_conv2d_backward_weight, (grad, input, None, (3, 3), *where))
        mask = weight.detach()
        opcheck(ops.sparse_conv2d_backward_weight, (grad, input, mask, (3, 3), *where))


# --- gradients of what is kept ---


def masked_gradient(grad, input, weight, *where):
    return torch.nn.grad.conv2d_weight(input, weight.shape, grad, *where) * (weight != 0)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_of_what_is_kept(isa, dtype):
    for geometry, pattern, last in itertools.product(GEOMETRIES, PATTERNS, (False, True)):
        input, weight, _, *where = case(geometry, pattern, dtype, last)
        weight[:, 0] = 1  # enough is kept that errors do not compare by chance
        grad = torch.randn_like(F.conv2d(input, weight, None, *where))
        grad = _layout.laid_as(grad, input)
        exact = masked_gradient(grad.double(), input.double(), weight, *where)
        # PyTorch's own of channels_last bfloat16 has NaN in places, on CPUs without AVX512-BF16.
        peer = masked_gradient(grad.contiguous(), input.contiguous(), weight, *where)
        actual = ops._sparse_kept_gradient(grad, input, weight, *where)
        what = f"{geometry} {pattern} {last}"
        testing.assert_close_to_reference(actual, exact, peer, TIMES, what)
        assert not actual[weight == 0].any(), what


@pytest.mark.native
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_what_is_kept_with_any_number_of_threads(threads):
    before = torch.get_num_threads()
    try:
        for geometry in GEOMETRIES:
            input, weight, _, *where = case(geometry, "blocks")
            grad = torch.randn_like(F.conv2d(input, weight, None, *where))
            torch.set_num_threads(1)
            expected = ops._sparse_kept_gradient(grad, input, weight, *where)
            torch.set_num_threads(threads)
            assert torch.equal(ops._sparse_kept_gradient(grad, input, weight, *where), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.native
def test_nothing_and_everything_is_kept():
    input, weight, _, *where = case(GEOMETRIES[2])
    grad = torch.randn_like(F.conv2d(input, weight, None, *where))
    assert not ops._sparse_kept_gradient(grad, input, torch.zeros_like(weight), *where).any()
    full = torch.ones_like(weight)
    expected = masked_gradient(grad, input, full, *where)
    actual = ops._sparse_kept_gradient(grad, input, full, *where)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="grad must be like the output"):
        ops._sparse_kept_gradient(grad[:, :, 1:].contiguous(), input, weight, *where)
    with pytest.raises(RuntimeError, match="of input's channels and dtype"):
        ops._sparse_kept_gradient(grad, input, weight.half(), *where)


BACKENDS = ["auto", "aten", pytest.param("cpu", marks=pytest.mark.native)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_of_what_is_kept(pattern, backend):
    input, weight, bias, *where = case(GEOMETRIES[2], pattern)
    leaves = [leaf.requires_grad_() for leaf in (input, weight, bias)]
    grads = []
    for gradients in ("all", "kept"):
        output = pywino.sparse_conv2d(*leaves, *where, backend=backend, gradients=gradients)
        (first,) = torch.autograd.grad(output.square().sum(), weight, create_graph=True)
        second = torch.autograd.grad((first * (weight.detach() != 0)).square().sum(), leaves[:2])
        grads.append((first, *second))
    (all_, by_input, by_weight), (kept, kept_by_input, kept_by_weight) = grads
    assert all_[weight == 0].any()
    kept_part = weight.detach() != 0
    torch.testing.assert_close(kept, all_ * kept_part, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(kept_by_input, by_input, rtol=1e-4, atol=1)
    torch.testing.assert_close(kept_by_weight, by_weight * kept_part, rtol=1e-4, atol=1)


def test_gradcheck_of_what_is_kept():
    """By the input, and twice; the weight is what it is multiplied with."""
    weight = torch.randn(3, 2, 3, 3, dtype=torch.double)
    weight[0, 1] = weight[2, :, 1] = 0
    input = torch.randn(1, 2, 5, 6, dtype=torch.double, requires_grad=True)
    scale = torch.randn(3, 1, 1, 1, dtype=torch.double, requires_grad=True)
    where = ((2, 1), (0, 2), (1, 2), "auto", True)
    function = lambda x, s: ops.sparse_conv2d(x, weight * s, None, *where)  # noqa: E731
    assert torch.autograd.gradcheck(function, (input, scale))
    assert torch.autograd.gradgradcheck(function, (input, scale))


@pytest.mark.native
def test_blocks_are_skipped_where_that_is_quicker(monkeypatch, tmp_path):
    input, where = torch.randn(1, 32, 20, 20), ((1, 1), (1, 1), (1, 1))
    weight = torch.randn(32, 32, 3, 3)
    grad = torch.randn(1, 32, 20, 20)
    few = pruned(weight, "blocks", 0.8)
    measured = []

    def times(grad, input, weight, where):
        measured.append(weight)
        return {"aten": 2e-3, "blocks": 1e-3 if weight is few else 3e-3}

    monkeypatch.setattr(sparse_conv, "_times_of_gradient", times)
    skips = lambda w, backend="auto": sparse_conv.skips_blocks(grad, input, w, where, backend)  # noqa: E731
    half = pruned(weight, "blocks", 0.5)
    assert (skips(few), skips(half), skips(weight, "cpu")) == (True, False, True)  # the rule
    assert not any(skips(few, backend) for backend in ("aten", "cuda"))
    monkeypatch.setenv("PYWINO_PLAN", "off")
    planner.reset()
    assert not skips(few)
    monkeypatch.setenv("PYWINO_PLAN", str(tmp_path / "plans.json"))
    planner.reset()
    assert (skips(few), skips(few), skips(half)) == (True, True, False)
    assert len(measured) == 2
    assert not skips(weight)
    assert len(measured) == 2  # nothing to find out
    planner.reset()
    assert (skips(few), skips(half)) == (True, False)  # the file knows


@pytest.mark.native
def test_the_times_of_gradients_are_those_of_both():
    input, where = torch.randn(1, 64, 20, 20), ((1, 1), (1, 1), (1, 1))
    weight, grad = pruned(torch.randn(64, 64, 3, 3), "blocks", 0.99), torch.randn(1, 64, 20, 20)
    seconds = sparse_conv._times_of_gradient(grad, input, weight, where)
    assert 0 < seconds["blocks"] < seconds["aten"]


@pytest.mark.parametrize("pattern", [Magnitude(0.8), Block(0.8)], ids=str)
def test_a_pruned_layer_trains_alike(pattern):
    twins = [nn.Conv2d(32, 32, 3, padding=1)]
    prune_(twins[0], pattern)
    twins.append(copy.deepcopy(twins[0]))
    layers = [pywino.SparseConv2d.from_dense(conv) for conv in twins]
    layers[1].gradients = "kept"
    pruner = Pruner(layers[0], pattern)
    pruner.step()
    input = torch.randn(2, 32, 12, 12)
    for layer in layers:
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(input).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layers[0].weight, layers[1].weight, rtol=1e-4, atol=1e-5)
    assert (layers[1].weight == 0).float().mean() > 0.75
    assert "gradients=kept" in repr(layers[1])
    assert not hasattr(layers[1].to_dense(), "gradients")


@pytest.mark.native
def test_opcheck_of_the_native_kernels():
    weight = torch.randn(4, 3, 3, 3)
    gradient = (torch.randn(1, 4, 6, 7), torch.randn(1, 3, 6, 7), weight, (1, 1), (1, 1), (1, 1))
    opcheck(ops._sparse_kept_gradient, gradient, test_utils=("test_schema", "test_faketensor"))
    opcheck(ops._sparse_pack, (weight, False, True), test_utils="test_schema")
    filter = ops._sparse_pack(weight, False, True)
    opcheck(
        ops._sparse_forward,
        (torch.randn(1, 3, 6, 7), filter, None, 4, (3, 3), (2, 2), (1, 1), (1, 1)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compile():
    input = torch.randn(1, 8, 9, 9, requires_grad=True)
    weight = pruned(torch.randn(8, 8, 3, 3), "unstructured").requires_grad_()
    function = lambda x, w: pywino.sparse_conv2d(x, w, padding=1, stride=2)  # noqa: E731
    results = []
    for run in (torch.compile(function, fullgraph=True), function):
        output = run(input, weight)
        results.append((output, *torch.autograd.grad(output.square().sum(), (input, weight))))
    torch.testing.assert_close(*results)


def test_autocast():
    input, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = pywino.sparse_conv2d(input, weight, torch.zeros(4), padding=1)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert weight.grad.dtype == torch.float32


# --- what runs ---


@pytest.mark.native
def test_the_rule(monkeypatch):
    input, where = torch.randn(1, 64, 28, 28), ((1, 1), (1, 1), (1, 1))
    weight = torch.randn(64, 64, 3, 3)
    for wanted, w in (
        ("dense", weight),
        ("dense", pruned(weight, "unstructured", 0.3)),
        ("unstructured", pruned(weight, "unstructured", 0.95)),
        ("blocks", pruned(weight, "blocks", 0.9)),
    ):
        assert sparse_conv.choose(input, w, *where, "auto") == wanted
    assert sparse_conv.choose(input, pruned(weight, "blocks", 0.9), *where, "aten") == "dense"
    assert sparse_conv.choose(input, weight, *where, "cpu") != "dense"
    sparse = pruned(weight, "blocks", 0.9)
    assert sparse_conv.choose(input.double(), sparse.double(), *where, "auto") == "dense"
    monkeypatch.setenv("PYWINO_PLAN", "off")
    planner.reset()
    assert sparse_conv.choose(input, sparse, *where, "auto") == "dense"


@pytest.mark.native
def test_the_choice_is_measured_once_and_stored(monkeypatch, tmp_path):
    monkeypatch.setenv("PYWINO_PLAN", str(tmp_path / "plans.json"))
    planner.reset()
    measured = []
    answers = iter((1e-3, 3e-3))

    def times(*arguments):
        measured.append(arguments[-1])
        return {"aten": 2e-3, arguments[-1]: next(answers)}

    monkeypatch.setattr(sparse_conv, "_times", times)
    input, where = torch.randn(1, 32, 20, 20), ((1, 1), (1, 1), (1, 1))
    sparse = pruned(torch.randn(32, 32, 3, 3), "unstructured", 0.9)
    for _ in range(3):
        assert sparse_conv.choose(input, sparse, *where, "auto") == "unstructured"
    assert measured == ["unstructured"]
    sparser = sparse * (torch.rand_like(sparse) > 0.7)  # another density, another choice
    assert sparse_conv.choose(input, sparser, *where, "auto") == "dense"
    assert len(measured) == 2
    planner.reset()  # the file knows both, and is only read
    assert sparse_conv.choose(input, sparse, *where, "auto") == "unstructured"
    assert sparse_conv.choose(input, sparser, *where, "auto") == "dense"
    # Of another stride nothing is stored: the rule.
    assert sparse_conv.choose(input, sparser, (2, 2), *where[1:], "auto") == "unstructured"
    assert len(measured) == 2


def test_a_layers_choice_on_a_gpu(monkeypatch, tmp_path):
    """The rule, on CPU tensors."""
    input, where = torch.randn(1, 32, 20, 20), ((1, 1), (1, 1), (1, 1))
    weight = torch.randn(64, 64, 3, 3)[:, :32].half()
    weight[:, :, :2] = 0
    monkeypatch.setattr(backends, "of_device", lambda device: ("cuda", "triton"))
    monkeypatch.setattr(backends, "can_run", lambda *_: None)
    answers = {"aten": 2e-3, "cuda direct": 1.5e-3, "triton direct": 1e-3}
    measured = []

    def times(input, weight, where, filters):
        measured.append({name: type(filter).__name__ for name, filter in filters.items()})
        return answers

    monkeypatch.setattr(sparse_conv, "_times_on_gpu", times)
    filter_of = lambda name: sparse_conv.pack(weight, name)  # noqa: E731
    choose = lambda: sparse_conv.choose_on_gpu(input, weight, where, filter_of)  # noqa: E731
    for mode in ("static", "off"):
        monkeypatch.setenv("PYWINO_PLAN", mode)
        planner.reset()
        assert choose() == "dense"
    monkeypatch.setenv("PYWINO_PLAN", str(tmp_path / "plans.json"))
    planner.reset()
    assert choose() == choose() == "triton"
    assert measured == [{"cuda": "Blocks", "triton": "Blocks"}]
    weight[:, :, 2] = 0  # of another density
    weight[0, 0, 2, 2] = 1
    answers["aten"] = 0.9e-3
    assert choose() == choose() == "dense"
    planner.reset()  # the file knows both, and is only read
    assert choose() == "dense"
    weight[:] = torch.randn(64, 32, 3, 3)
    assert choose() == "dense"  # nothing is stored
    assert len(measured) == 2
    assert sparse_conv.choose_on_gpu(input, weight, where, lambda name: None) == "dense"


@pytest.mark.native
def test_measuring_takes_the_quicker(monkeypatch):
    input, where = torch.randn(1, 128, 28, 28), ((1, 1), (1, 1), (1, 1))
    weight = torch.randn(128, 128, 3, 3)

    def times(sparsity, pattern):
        return sparse_conv._times(input, pruned(weight, pattern, sparsity), *where, pattern)

    def ever(sparsity, pattern, holds):  # another process may disturb one measurement
        return any(holds(times(sparsity, pattern)) for _ in range(5))

    assert ever(0.99, "blocks", lambda ms: ms["blocks"] < ms["aten"])
    assert ever(0, "unstructured", lambda ms: ms["unstructured"] > ms["aten"])
    monkeypatch.setattr(sparse_conv, "_PYTHON", 10)  # what is saved must pay for the Python
    assert times(0.99, "blocks")["blocks"] > 10


# --- the function ---


@pytest.mark.parametrize("backend", ["auto", "aten", pytest.param("cpu", marks=pytest.mark.native)])
@pytest.mark.parametrize("size", [(3, 3), (2, 4), (1, 1)])
def test_padding_same(size, backend):
    input, weight = torch.randn(2, 4, 9, 10), pruned(torch.randn(6, 4, *size), "unstructured")
    for dilation in (1, 2):
        for padding in ("same", "valid"):
            if padding == "valid" or min(size) > 0:
                actual = pywino.sparse_conv2d(
                    input, weight, padding=padding, dilation=dilation, backend=backend
                )
                expected = F.conv2d(input, weight, padding=padding, dilation=dilation)
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_other_callers_reach_pytorch():
    input, weight = torch.randn(2, 4, 9, 10), pruned(torch.randn(6, 4, 3, 3), "unstructured")
    expected = F.conv2d(input, weight)
    torch.testing.assert_close(pywino.sparse_conv2d(input[0], weight), expected[0])
    batched = torch.vmap(lambda x: pywino.sparse_conv2d(x, weight))(input)
    torch.testing.assert_close(batched, expected)
    _, tangent = torch.func.jvp(lambda x: pywino.sparse_conv2d(x, weight), (input,), (input,))
    torch.testing.assert_close(tangent, expected)
    assert pywino.sparse_conv2d(torch.randn(0, 4, 9, 10), weight).shape == (0, 6, 7, 8)


@pytest.mark.parametrize(("k", "c"), [(200, 70), (64, 32), (5, 3)])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 2)])
def test_blocks_of_a_gpu_are_the_weight(k, c, kernel):
    weight = torch.randn(k, c, *kernel)
    weight[:64, :32, 0] = 0
    values, entries, starts = _packed.pack_blocks(weight)
    group, chunks = values.shape[1], -(-c // 32)
    padded = torch.zeros((len(starts) - 1) * group, kernel[0] * kernel[1], chunks * 32)
    for g in range(len(starts) - 1):
        of_group = entries[starts[g] : starts[g + 1]].tolist()
        assert of_group == sorted(set(of_group))
        for entry, block in zip(of_group, values[starts[g] : starts[g + 1]], strict=True):
            tap, chunk = divmod(entry, chunks)
            padded[g * group : (g + 1) * group, tap, chunk * 32 : (chunk + 1) * 32] = block
    actual = padded[:k, :, :c].transpose(1, 2).unflatten(2, kernel)
    assert torch.equal(actual, weight)
    assert starts[-1] == len(values) == len(entries)


def test_groups_of_a_gpu_are_those_that_fetch_less():
    weight = torch.randn(256, 64, 1, 1)
    assert _packed.pack_blocks(weight).values.shape == (4, 128, 32)
    weight[:64, :32] = 0  # seven of eight blocks of 64 are left, each read for half the work
    assert _packed.pack_blocks(weight).values.shape == (4, 128, 32)
    weight[:64] = weight[128:192] = 0  # of 128 nothing is all zeros
    assert _packed.pack_blocks(weight).values.shape == (4, 64, 32)


def test_two_of_four_only_where_blocks_are_kept():
    weight = torch.randn(64, 128, 1, 1).half()
    assert isinstance(sparse_conv.pack(weight, "cuda"), _packed.Blocks)  # four of four
    weight[:, ::2] = 0
    assert isinstance(sparse_conv.pack(weight, "cuda"), _packed.TwoOfFour)
    assert isinstance(sparse_conv.pack(weight.float(), "cuda"), _packed.Blocks)
    assert isinstance(sparse_conv.pack(weight, "triton"), _packed.Blocks)
    weight[:, :96] = 0
    assert isinstance(sparse_conv.pack(weight, "cuda"), _packed.Blocks)


def test_lists_of_a_gpu_where_blocks_are_nearly_empty():
    weight = torch.randn(128, 64, 3, 3)
    weight[torch.rand_like(weight) < 0.9] = 0
    values, entries, starts = sparse_conv.pack(weight, "cuda")
    assert isinstance(sparse_conv.pack(weight, "cuda"), _packed.Csr)
    rows = torch.zeros(128, 64 * 9)
    for k, row in enumerate(rows):
        of_row = slice(starts[k], starts[k + 1])
        row[entries[of_row].long()] = values[of_row]
    assert torch.equal(rows.view_as(weight), weight)
    assert isinstance(sparse_conv.pack(weight.half(), "cuda"), _packed.Blocks)
    assert isinstance(_packed.pack(weight)[0], _packed.Blocks)  # TF32
    weight[:, 32:] = 0  # half of the blocks are left, and have a tenth of their numbers
    assert isinstance(sparse_conv.pack(weight, "cuda"), _packed.Csr)
    weight[:, :32] += torch.rand(128, 32, 3, 3) < 0.1
    assert isinstance(sparse_conv.pack(weight, "cuda"), _packed.Blocks)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"gradients": "some"}, "gradients must be 'all' or 'kept', got 'some'"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"backend": "triton"}, "the tensors are on cpu"),
        ({"padding": -1}, "padding must be >= 0"),
        ({"stride": 0}, "stride must be >= 1"),
        ({"padding": "same", "stride": 2}, "stride must be 1 with padding='same'"),
        ({"dilation": 9}, "padded height"),
        ({"weight": torch.randn(6, 3, 3, 3)}, "input must be of 3 channels"),
        ({"weight": torch.randn(6, 4, 3)}, "weight must be"),
        ({"bias": torch.randn(5)}, r"bias must be \(6,\)"),
        ({"weight": torch.randn(6, 4, 3, 3).double()}, "input's dtype"),
    ],
)
def test_refusals(arguments, match):
    weight = arguments.pop("weight", torch.randn(6, 4, 3, 3))
    with pytest.raises(RuntimeError, match=rf"pywino\.sparse_conv2d: .*{match}"):
        pywino.sparse_conv2d(torch.randn(1, 4, 8, 8), weight, **arguments)


# --- the layer ---


def layers(**options):
    dense = nn.Conv2d(16, 32, 3, padding=1, **options).eval()
    return dense, pywino.SparseConv2d.from_dense(prune_(dense, Magnitude(0.9)))


@pytest.mark.native
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_layer_is_conv2d(padding_mode):
    dense, sparse = layers(stride=2, padding_mode=padding_mode)
    sparse.backend = "cpu"
    input = torch.randn(2, 16, 13, 14)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            torch.testing.assert_close(sparse(input), dense(input), rtol=1e-4, atol=1e-5)
    assert sparse.weight is dense.weight
    assert list(sparse.state_dict()) == list(dense.state_dict())
    assert type(sparse.to_dense()) is nn.Conv2d
    twin = pickle.loads(pickle.dumps(copy.deepcopy(sparse)))
    torch.testing.assert_close(twin(input), dense(input), rtol=1e-4, atol=1e-5)


def test_a_layer_is_traced():
    layer, x = pywino.SparseConv2d(4, 6, 3, padding=1).eval(), torch.randn(1, 4, 8, 9)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        other = torch.randn(2, 4, 11, 7)
        torch.testing.assert_close(traced(other), layer(other))


@pytest.mark.native
def test_the_filter_is_packed_once_a_version(monkeypatch):
    dense, sparse = layers()
    sparse.backend = "cpu"
    made = []
    pack = sparse_conv.pack
    monkeypatch.setattr(sparse_conv, "pack", lambda *a, **k: made.append(1) or pack(*a, **k))
    input = torch.randn(1, 16, 9, 9)
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1)
    with torch.no_grad():
        sparse(input), sparse(input)
    assert len(made) == 1
    sparse(input).square().sum().backward()
    made.clear()
    optimizer.step()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(sparse(input), dense(input), rtol=1e-4, atol=1e-4)
    assert len(made) == 1


def test_from_dense_checks_the_pattern():
    conv = nn.Conv2d(32, 32, 3)
    for spec in (NM(2, 4), Block(0.5)):
        with pytest.raises(RuntimeError, match=r"got filter \d+ without it"):
            pywino.SparseConv2d.from_dense(conv, spec)
    prune_(conv, NM(2, 4))
    pywino.SparseConv2d.from_dense(conv, NM(2, 4))
    with pytest.raises(RuntimeError, match="groups must be 1, got 4"):
        pywino.SparseConv2d(16, 16, 3, groups=4)


def test_swap():
    def model():
        return nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, groups=2)
        )

    net = prune_(model(), Magnitude(0.9), filter_fn=lambda module, name: name != "0")
    input = torch.randn(1, 3, 12, 12)
    expected = net(input)
    pywino.swap_(net, pywino.Sparse())
    assert [type(m).__name__ for m in net] == ["Conv2d", "SparseConv2d", "Conv2d"]
    torch.testing.assert_close(net(input), expected, rtol=1e-4, atol=1e-5)
    reasons = [row.reason for row in pywino.swap.last_report(net)]
    assert "0% of its weights are zero, fewer than 50%" in reasons[0]
    assert "2 groups" in reasons[2]
    assert net[1].gradients == "all"
    pywino.swap_(net, pywino.Sparse(gradients="kept"))
    assert net[1].gradients == "kept"
    pywino.restore_(net)
    assert type(net[1]) is nn.Conv2d
    pywino.swap_(net, pywino.Sparse(gradients="kept"))
    assert net[1].gradients == "kept"
    with pytest.raises(RuntimeError, match="gradients must be 'all' or 'kept', got 'none'"):
        pywino.Sparse(gradients="none")
    pywino.restore_(net)
    pywino.swap_(net)  # every kernel that keeps the function
    assert [type(m).__name__ for m in net] == ["WinogradConv2d", "SparseConv2d", "Conv2d"]
    with pytest.raises(RuntimeError, match=r"1: its filter \d+ lacks the pattern of NM"):
        pywino.swap_(prune_(model(), Magnitude(0.6)), pywino.Sparse(NM(1, 4)), strict=True)
