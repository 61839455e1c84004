# SPDX-License-Identifier: BSD-3-Clause
"""Weights of the Winograd domain, dense and without their zeros."""

import itertools
import threading

import pytest
import torch
from torch.library import opcheck

import pywino.ops._winograd_domain  # noqa: F401  defines the op
from pywino import _native as native
from pywino import testing
from pywino.ops import _winograd_zeros as domain
from pywino.ops.winograd import winograd_transform_filter
from pywino.reference import winograd as reference
from pywino.testing import relative_l2

ops = torch.ops.pywino
TILES = (2, 4, 6)
PATTERNS = ("unstructured", "blocks")
# Against float64, of the dense kernels too (docs/winograd.md): a sum over fewer terms is no worse.
LIMITS = {2: 7e-7, 4: 2.5e-6, 6: 7e-6}

# (n, c, h, w, k, padding, dilation): channels off vectors and blocks, tiles that stick out, few
# tiles (all threads share one chunk) and many, and more channels than one partial sum takes.
GEOMETRIES = [
    (1, 1, 1, 1, 1, (1, 1), (1, 1)),
    (2, 16, 12, 12, 32, (1, 1), (1, 1)),
    (1, 3, 5, 37, 5, (0, 2), (1, 1)),
    (3, 35, 13, 17, 50, (1, 1), (1, 1)),
    (1, 300, 9, 8, 20, (2, 2), (2, 2)),
    (1, 40, 50, 44, 72, (1, 3), (1, 3)),
]


def pruned(weight, pattern, sparsity=0.8):
    k, c, *positions = weight.shape
    if pattern == "blocks":
        keep = torch.rand(-(-k // 16), c, *positions) > sparsity
        keep = keep.repeat_interleave(16, 0)[:k]
    else:
        keep = torch.rand(weight.shape) > sparsity
    return weight * keep


def case(geometry, tile, pattern="unstructured", dtype=torch.float32, channels_last=False):
    n, c, h, w, k, padding, dilation = geometry
    input = torch.randn(n, c, h, w)
    weight = winograd_transform_filter(torch.randn(k, c, 3, 3) / (9 * c) ** 0.5, tile)
    weight = pruned(weight, pattern).to(dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    input = input.to(dtype).contiguous(memory_format=layout)
    return input, weight, torch.randn(k).to(dtype), padding, dilation


def kernel(input, weight, bias, padding, dilation, tile, how, relu=False, winograd_relu=False):
    if how == "dense":
        filter = ops._winograd_pack(weight, tile, False)
    else:
        filter = ops._winograd_sparse_pack(weight, tile, False, how == "blocks")
    arguments = (bias.float(), None, len(weight), tile, padding, dilation)
    return ops._winograd_forward(input, filter, *arguments, relu, winograd_relu, False)


def exactly(function, input, weight, bias, padding, dilation, tile):
    tensors = (t.double() for t in (input, weight, bias))
    return function(*tensors, padding, dilation, tile)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", PATTERNS)
@pytest.mark.parametrize("tile", TILES)
def test_without_zeros(isa, tile, how, dtype):
    """Each packing holds any weight: that of the other pattern too."""
    options = itertools.cycle(itertools.product(PATTERNS, (False, True), (False, True)))
    for geometry in GEOMETRIES:
        pattern, channels_last, winograd_relu = next(options)
        arguments = (*case(geometry, tile, pattern, dtype, channels_last), tile)
        function = reference.winograd_domain_conv2d
        if winograd_relu:
            function = reference.winograd_relu_conv2d
        exact = exactly(function, *arguments)
        actual = kernel(*arguments, how, winograd_relu=winograd_relu)
        what = f"{geometry} {pattern} {channels_last} {winograd_relu}"
        assert actual.dtype == dtype
        assert actual.shape == exact.shape
        limit = LIMITS[tile] + torch.finfo(dtype).eps
        assert relative_l2(actual, exact) < limit, what
        fused = kernel(*arguments, how, relu=True, winograd_relu=winograd_relu)
        assert torch.equal(fused, actual.relu()), what


@pytest.mark.native
@pytest.mark.parametrize("how", PATTERNS)
@pytest.mark.parametrize("k", [48, 40])
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_outputs(isa, channels_last, k, how):
    """They are written past the caches, where that writes whole lines."""
    geometry = (1, 4, 176, 188, k, (1, 1), (1, 1))
    arguments = (*case(geometry, 4, how, channels_last=channels_last), 4)
    exact = exactly(reference.winograd_domain_conv2d, *arguments)
    assert relative_l2(kernel(*arguments, how), exact) < LIMITS[4]


@pytest.mark.native
@pytest.mark.parametrize("how", PATTERNS)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(threads, how):
    before = torch.get_num_threads()
    try:
        for geometry in GEOMETRIES:
            arguments = (*case(geometry, 4), 4)
            torch.set_num_threads(1)
            expected = kernel(*arguments, how)
            torch.set_num_threads(threads)
            first, second = (kernel(*arguments, how) for _ in range(2))
            # Sums run over channels alone, in their order, whoever computes them.
            assert torch.equal(first, expected)
            assert torch.equal(first, second)
    finally:
        torch.set_num_threads(before)


@pytest.mark.native
@pytest.mark.parametrize("how", PATTERNS)
@pytest.mark.parametrize("tile", TILES)
def test_more_channels_than_a_partial_sum(tile, how):
    """Nothing is pruned: the longest lists that there are, and the dense kernels' limits."""
    input = torch.randn(1, 515, 12, 12).relu()
    weight = winograd_transform_filter(torch.randn(40, 515, 3, 3) / (9 * 515) ** 0.5, tile)
    arguments = (input, weight, torch.randn(40), (1, 1), (1, 1), tile)
    exact = exactly(reference.winograd_domain_conv2d, *arguments)
    assert relative_l2(kernel(*arguments, how), exact) < LIMITS[tile]


@pytest.mark.native
@pytest.mark.parametrize("how", PATTERNS)
def test_zeros_are_not_read(how):
    """Where no weight is kept, not even NaN in the input reaches the output."""
    input, weight, bias, *where = case(GEOMETRIES[1], 4)
    weight[:, 3] = 0
    expected = kernel(input, weight, bias, *where, 4, how)
    input[:, 3] = torch.nan
    assert torch.equal(kernel(input, weight, bias, *where, 4, how), expected)
    assert kernel(input, weight, bias, *where, 4, "dense").isnan().any()
    weight[0, 5, 1, 1] = torch.nan  # a weight that is not zero
    assert kernel(input, weight, bias, *where, 4, how)[:, 0].isnan().all()


@pytest.mark.native
@pytest.mark.parametrize("how", PATTERNS)
def test_nothing_is_kept(how):
    input, weight, bias, *where = case(GEOMETRIES[3], 2)
    actual = kernel(input, weight * 0, bias, *where, 2, how)
    assert torch.equal(actual, bias[:, None, None].expand_as(actual))
    weight[7] = 0  # one empty filter
    actual = kernel(input, weight, bias, *where, 2, how)
    assert torch.equal(actual[:, 7], bias[7].expand_as(actual[:, 7]))


@pytest.mark.native
def test_the_ends_of_four_lists_are_not_read():
    """Four output channels are multiplied together, up to the longest: the others do not multiply
    what they have no weight for."""
    input, weight = torch.randn(1, 40, 9, 9), torch.randn(6, 40, 6, 6)
    weight[1:3, 3:] = 0  # three weights a position, beside forty
    weight[5, 8] = 0
    where = (torch.randn(6), (1, 1), (1, 1), 4, "unstructured")
    expected = kernel(input, weight, *where)
    input[:, 8] = torch.nan
    actual = kernel(input, weight, *where)
    assert torch.equal(actual[:, (1, 2, 5)], expected[:, (1, 2, 5)])
    assert actual[:, (0, 3, 4)].isnan().any((0, 2, 3)).all()


@pytest.mark.native
def test_four_lists_are_of_like_length():
    """64 output channels are sorted at a time, so that four neighbours have few zeros to add."""
    weight = pruned(torch.randn(102, 6, 4, 4), "unstructured", 0.5)
    packed = ops._winograd_sparse_pack(weight, 2, False, False)
    lists = 16 * 26
    starts, rows = packed[16 : 16 + lists + 1], packed[16 + lists + 1 :][: 4 * lists]
    longest, rows = starts.diff().view(16, 26), rows.view(16, 104).long()
    kept = torch.cat([(weight != 0).sum(1).flatten(1), torch.zeros(2, 16)]).long().T
    kept = kept.gather(1, rows)  # by list
    for first, last in ((0, 64), (64, 104)):
        part = kept[:, first:last]
        assert (part.diff() <= 0).all()
        assert torch.equal(longest[:, first // 4 : last // 4], part[:, ::4])
        assert torch.equal(
            rows[:, first:last].sort().values, torch.arange(first, last).expand(part.shape)
        )


@pytest.mark.native
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("how", PATTERNS)
def test_packing_reads_any_strides(rotate, how):
    weight = pruned(torch.randn(20, 36, 4, 4), how)
    strided = weight.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    expected = weight.transpose(0, 1).contiguous() if rotate else weight
    assert torch.equal(
        ops._winograd_sparse_pack(strided, 2, rotate, how == "blocks"),
        ops._winograd_sparse_pack(expected, 2, False, how == "blocks"),
    )


@pytest.mark.native
def test_a_filter_of_something_else_is_refused():
    input, weight, bias, *where = case(GEOMETRIES[1], 4)
    filter = ops._winograd_sparse_pack(weight, 4, False, True)
    rest = (bias, None, 32, 4, *where, False, False, False)
    for wrong in (
        filter[:-1],
        filter[:8],
        filter + 1,
        ops._winograd_sparse_pack(weight[:, :-1], 4, False, True),
        ops._winograd_sparse_pack(weight[..., :4, :4], 2, False, True),
    ):
        with pytest.raises(RuntimeError, match="packed for other channels, another tile"):
            ops._winograd_forward(input, wrong, *rest)
    with testing.force_isa("portable"):
        filter = ops._winograd_sparse_pack(weight, 4, False, True)
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        with pytest.raises(RuntimeError, match="another instruction set"):
            ops._winograd_forward(input, filter, *rest)


def test_densities():
    weight = torch.zeros(40, 3, 4, 4)
    assert domain.densities(weight) == (0, 0)
    weight[5, 1, 2, 2] = weight[39, 0, 0, 0] = 1
    single, blocks = domain.densities(weight)
    assert single == pytest.approx(2 / weight.numel())
    assert blocks == pytest.approx(2 / (3 * 3 * 16))  # three blocks of up to 16 output channels


def test_what_is_packed_is_the_least_work():
    weight = torch.randn(64, 64, 6, 6)
    assert domain.pattern(weight) == "dense"
    assert domain.pattern(pruned(weight, "unstructured", 0.2)) == "dense"
    assert domain.pattern(pruned(weight, "unstructured", 0.8)) == "unstructured"
    assert domain.pattern(pruned(weight, "blocks", 0.5)) == "blocks"
    assert domain.pattern(weight * 0) == "blocks"


# --- the op ---


def conv(input, weight, bias=None, residual=None, activation=None, tile=4, backend="auto"):
    return ops.winograd_domain_conv2d(
        input, weight, bias, residual, (1, 1), (1, 1), activation, tile, backend
    )


def test_reference_is_the_convolution_of_a_transformed_filter():
    input, weight = torch.randn(2, 3, 9, 10).double(), torch.randn(4, 3, 3, 3).double()
    for tile, padding, dilation in itertools.product(TILES, (0, 2), (1, 2)):
        transformed = winograd_transform_filter(weight, tile)
        actual = reference.winograd_domain_conv2d(input, transformed, None, padding, dilation, tile)
        expected = torch.conv2d(input, weight, None, 1, padding, dilation)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("tile", TILES)
def test_reference_gradients_are_autograds(tile):
    input = torch.randn(2, 3, 7, 8, dtype=torch.double, requires_grad=True)
    weight = torch.randn(4, 3, tile + 2, tile + 2, dtype=torch.double, requires_grad=True)
    for where in ((1, 1, tile), ((0, 2), (2, 1), tile)):
        output = reference.winograd_domain_conv2d(input, weight, None, *where)
        grad = torch.randn_like(output)
        expected = torch.autograd.grad(output, (input, weight), grad)
        actual = (
            reference.winograd_domain_backward_input(grad, weight.detach(), *where),
            reference.winograd_domain_backward_weight(grad, input.detach(), *where),
        )
        torch.testing.assert_close(actual, expected)


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_gradients(isa, tile, channels_last):
    for geometry in GEOMETRIES[:5]:
        input, weight, bias, padding, dilation = case(geometry, tile, channels_last=channels_last)

        def results(function, *leaves):
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            output = function(*leaves)
            torch.manual_seed(1)
            return output, *torch.autograd.grad(
                output, leaves, torch.randn(output.shape).to(output.dtype)
            )

        where = (padding, dilation)
        ours = results(
            lambda x, w, b: ops.winograd_domain_conv2d(x, w, b, None, *where, None, tile, "cpu"),  # noqa: B023
            *(input, weight, bias),
        )
        exact = results(
            lambda x, w, b: reference.winograd_domain_conv2d(x, w, b, *where, tile),  # noqa: B023
            *(t.double() for t in (input, weight, bias)),
        )
        for name, a, e in zip(("output", "input", "weight", "bias"), ours, exact):
            assert relative_l2(a, e) < 3 * LIMITS[tile], f"{name} {geometry}"
        assert ours[1].stride() == input.stride()


def input_gradient(geometry, tile, winograd_relu, dtype=torch.float32, channels_last=False):
    """(grad, input, W, what the kernel takes behind the filter, the gradient in float64)."""
    input, weight, _, padding, dilation = case(geometry, tile, "unstructured", dtype, channels_last)
    function = reference.winograd_domain_conv2d
    if winograd_relu:
        function = reference.winograd_relu_conv2d
    leaf = input.double().requires_grad_()
    output = function(leaf, weight.double(), None, padding, dilation, tile)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad = torch.randn(output.shape).to(dtype).contiguous(memory_format=layout)
    (exact,) = torch.autograd.grad(output, leaf, grad.double())
    return grad, input, weight, (tile, padding, dilation, winograd_relu), exact


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("winograd_relu", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_input_gradient_without_zeros(isa, tile, winograd_relu, dtype):
    for i, geometry in enumerate(GEOMETRIES):
        grad, input, weight, rest, exact = input_gradient(
            geometry, tile, winograd_relu, dtype, channels_last=i % 2 == 1
        )
        filter = ops._winograd_sparse_pack(weight, tile, True, False)
        actual = ops._winograd_domain_backward_input(grad, input, filter, *rest)
        limit = 3 * LIMITS[tile] + torch.finfo(dtype).eps
        assert actual.dtype == dtype
        assert actual.stride() == input.stride()
        assert relative_l2(actual, exact) < limit, f"{geometry}"


@pytest.mark.native
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_input_gradient_with_any_number_of_threads(threads):
    before = torch.get_num_threads()
    try:
        for geometry in GEOMETRIES:
            grad, input, weight, rest, _ = input_gradient(geometry, 4, True)
            filter = ops._winograd_sparse_pack(weight, 4, True, False)
            torch.set_num_threads(threads)
            actual = ops._winograd_domain_backward_input(grad, input, filter, *rest)
            torch.set_num_threads(1)
            # Patches are added in their order, whoever adds them.
            expected = ops._winograd_domain_backward_input(grad, input, filter, *rest)
            assert torch.equal(actual, expected)
    finally:
        torch.set_num_threads(before)


def scratch_of(run):
    """Bytes of scratch that a new thread keeps after `run`, on that thread alone."""
    kept = []

    def body():
        run()
        kept.append(native.host.scratch_bytes())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(threads)
    return kept[0]


@pytest.mark.native
@pytest.mark.parametrize("how", PATTERNS)
@pytest.mark.parametrize(("c", "k"), [(64, 640), (512, 512), (1024, 64)])
def test_scratch_is_bounded(c, k, how):
    """4 MB a thread in whole huge pages of 2 MB; the gradient takes 32 tiles of all channels."""
    input = torch.randn(1, c, 30, 30)
    weight, grad = pruned(torch.randn(k, c, 6, 6), how), torch.randn(1, k, 30, 30)
    filter = ops._winograd_sparse_pack(weight, 4, False, how == "blocks")
    turned = ops._winograd_sparse_pack(weight, 4, True, False)
    where = ((1, 1), (1, 1))
    forward = scratch_of(
        lambda: ops._winograd_forward(input, filter, None, None, k, 4, *where, False, False, False)
    )
    assert 0 < forward <= 6 << 20
    backward = scratch_of(
        lambda: ops._winograd_domain_backward_input(grad, input, turned, 4, *where, False)
    )
    channels = -(-c // 16) * 16 + k
    assert 0 < backward <= max(4 << 20, 36 * 32 * channels * 4) + (4 << 20)


@pytest.mark.native
def test_the_input_gradient_takes_lists_only():
    grad, input, weight, rest, _ = input_gradient(GEOMETRIES[1], 4, False)
    filter = ops._winograd_sparse_pack(weight, 4, True, True)
    with pytest.raises(RuntimeError, match="_winograd_domain_backward_input"):
        ops._winograd_domain_backward_input(grad, input, filter, *rest)


@pytest.mark.native
def test_the_filter_of_the_gradient_has_no_zeros_where_that_is_less_work():
    weight = torch.randn(64, 64, 6, 6)
    for how, expected in (("dense", "dense"), ("unstructured",) * 2, ("blocks", "unstructured")):
        zeroed = weight if how == "dense" else pruned(weight, how)
        assert domain.pattern(zeroed, rotate=True) == expected


def test_gradcheck_twice():
    leaves = [
        torch.randn(size, dtype=torch.double, requires_grad=True)
        for size in ((1, 2, 5, 4), (3, 2, 4, 4), (3,), (1, 3, 5, 4))
    ]
    for activation in (None, "relu"):
        function = lambda *t: conv(*t, activation, 2)  # noqa: E731, B023
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    input = torch.randn(1, 3, 6, 7, requires_grad=requires_grad)
    last = torch.randn(1, 3, 6, 7).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4, 3, 4, 4, requires_grad=requires_grad)
    bias, grad = torch.randn(4, requires_grad=requires_grad), torch.randn(1, 4, 6, 7)
    where = ((1, 1), (1, 1))
    opcheck(ops.winograd_domain_conv2d, (input, weight, bias, grad, *where, "relu", 2, "auto"))
    opcheck(ops.winograd_domain_conv2d, (last, weight, None, None, *where, None, 2, "auto"))
    opcheck(ops.winograd_domain_conv2d_backward_input, (grad, weight, *where, 2, "auto"))
    opcheck(ops.winograd_domain_conv2d_backward_weight, (grad, input, *where, 2, "auto"))


@pytest.mark.native
def test_opcheck_of_the_packing():
    weight = torch.randn(4, 3, 4, 4)
    opcheck(ops._winograd_sparse_pack, (weight, 2, False, True), test_utils="test_schema")
    filter = ops._winograd_sparse_pack(weight, 2, False, True)
    arguments = (None, None, 4, 2, (1, 1), (1, 1), False, False, False)
    opcheck(
        ops._winograd_forward,
        (torch.randn(1, 3, 6, 7), filter, *arguments),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compile():
    input = torch.randn(1, 8, 9, 9, requires_grad=True)
    weight = pruned(torch.randn(8, 8, 6, 6), "unstructured").requires_grad_()
    compiled = torch.compile(lambda x, w: conv(x, w, activation="relu"), fullgraph=True)
    for function in (compiled, lambda x, w: conv(x, w, activation="relu")):
        output = function(input, weight)
        grads = torch.autograd.grad(output.square().sum(), (input, weight))
        if function is compiled:
            expected = (output, *grads)
    torch.testing.assert_close((output, *grads), expected)


def test_what_does_not_fit_is_refused():
    for input, weight, tile in (
        ((1, 3, 8, 8), (4, 2, 6, 6), 4),
        ((1, 3, 8, 8), (4, 3, 6, 6), 2),
        ((3, 8, 8), (4, 3, 6, 6), 4),
    ):
        with pytest.raises(RuntimeError, match=r"weight \(K, C, tile \+ 2"):
            conv(torch.randn(input), torch.randn(weight), tile=tile)


def test_zeros_of_a_full_weight_are_not_counted(monkeypatch):
    """A step of training packs it twice; to count takes longer than that."""
    counted = []
    densities = domain.densities
    monkeypatch.setattr(domain, "densities", lambda w: counted.append(w) or densities(w))
    weight = torch.randn(200, 300, 6, 6)
    assert domain.pattern(weight) == "dense"
    assert not counted
    weight[torch.rand_like(weight) < 0.9] = 0
    assert domain.pattern(weight) == "unstructured"
    assert counted
