# SPDX-License-Identifier: BSD-3-Clause
"""The Winograd ops against PyTorch, and the reference against loops, hand and wincnn."""

import itertools
import math
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pywino import _native as native
from pywino import backends, planner
from pywino.ops.winograd import winograd_transform_filter
from pywino.reference import winograd as reference
from pywino.testing import assert_close_to_reference, relative_l2

ops = torch.ops.pywino
TILES = (2, 4, 6)
BF16_ISAS = ("avx512bf16", "amx")  # those with products of bfloat16
# How many times PyTorch's float32 error F(m x m, 3 x 3) may have. Direct sums of at most 630
# products round to 1 to 3e-7; the transforms of larger tiles add and subtract larger numbers
# (docs/winograd.md). Seen: at most 4, 18 and 109.
K = {2: 8, 4: 36, 6: 200}


def conv(input, weight, bias=None, residual=None, padding=1, dilation=1, activation=None, **choice):
    """The op with "auto" for what is not given."""
    choice = {"algorithm": "auto", "backend": "auto", "precision": "default"} | choice
    return ops.winograd_conv2d(
        input, weight, bias, residual, padding, dilation, activation, *choice.values()
    )


def plain(input, weight, bias=None, residual=None, padding=1, dilation=1, activation=None):
    output = F.conv2d(input, weight, bias, 1, padding, dilation)
    output = output if residual is None else output + residual
    return output.relu() if activation else output


def tensors(*shapes, dtype=torch.float32, channels_last=False):
    for shape in shapes:
        tensor = torch.randn(shape).to(dtype)
        last = channels_last and len(shape) == 4
        yield tensor.contiguous(memory_format=torch.channels_last) if last else tensor


def double(*tensors):
    return [t if t is None else t.double() for t in tensors]


# --- the reference ---


def test_reference_by_hand():
    ones = torch.ones(1, 1, 3, 3)
    expected = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]])
    for tile in TILES:
        actual = reference.winograd_conv2d(ones, ones, torch.tensor([0.5]), 1, tile=tile)
        torch.testing.assert_close(actual[0, 0], expected + 0.5)


def test_relu_reference_by_hand():
    # B^T has row sums 0, 2, 0, 0: a patch of ones is 4 at position (1, 1) and 0 elsewhere, and
    # column 1 of A^T is (1, 1).
    weight = torch.arange(16.0).reshape(1, 1, 4, 4)
    ones = torch.ones(1, 1, 4, 4)
    actual = reference.winograd_relu_conv2d(ones, weight, padding=0)
    assert torch.equal(actual, torch.full((1, 1, 2, 2), 4 * 5.0))
    assert torch.equal(reference.winograd_relu_conv2d(-ones, weight, padding=0), 0 * actual)


@pytest.mark.parametrize("tile", TILES)
def test_matrices_are_those_of_wincnn_up_to_row_scaling(tile):
    wincnn = pytest.importorskip("wincnn")
    at, g, bt, _ = wincnn.cookToomFilter(reference.POINTS[tile], tile, 3)
    ours_bt, ours_g, ours_at = reference.exact_matrices(tile)
    for i in range(tile + 2):
        pairs = (
            (ours_bt[i], bt.row(i)),
            (ours_g[i], g.row(i)),
            ([row[i] for row in ours_at], at.col(i)),
        )
        scales = 1
        for ours, theirs in pairs:
            ratios = {a / b for a, b in zip(ours, theirs) if b}
            assert len(ratios) == 1
            assert [bool(a) for a in ours] == [bool(b) for b in theirs]
            scales *= ratios.pop()
        assert scales == 1


def test_the_papers_matrices():
    bt, _, at = reference.transform_matrices(2)
    assert bt.tolist() == [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]
    assert at.tolist() == [[1, 1, 1, 0], [0, 1, -1, -1]]


@pytest.mark.native
@pytest.mark.parametrize("tile", TILES)
def test_native_matrices_are_the_references(tile):
    for ours, theirs in zip(
        reference.transform_matrices(tile), native.host.transform_matrices(tile)
    ):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-15, atol=0)


def geometries():
    """Some of every padding, dilation and odd size."""
    for padding, dilation, size in itertools.product(
        [(0, 0), (1, 1), (2, 0), (3, 5)], [(1, 1), (2, 2), (1, 3)], [(1, 1), (5, 9), (11, 14)]
    ):
        if all(s + 2 * p > 2 * d for s, p, d in zip(size, padding, dilation)):
            yield padding, dilation, size


@pytest.mark.parametrize("tile", TILES)
def test_reference_is_the_convolution(tile):
    for padding, dilation, size in geometries():
        input, weight, bias = tensors((2, 3, *size), (4, 3, 3, 3), (4,), dtype=torch.float64)
        actual = reference.winograd_conv2d(input, weight, bias, padding, dilation, tile)
        torch.testing.assert_close(actual, F.conv2d(input, weight, bias, 1, padding, dilation))


def relu_by_loops(input, weight, padding, dilation, tile):
    """Liu's layer, pixel by pixel, from its definition."""
    bt, _, at = reference.transform_matrices(tile)
    (n, c, *size), k = input.shape, weight.shape[0]
    out = [s + 2 * p - 2 * d for s, p, d in zip(size, padding, dilation)]
    output = torch.zeros(n, k, *out, dtype=torch.float64)
    starts = [[d * tile * t + r for r in range(d) for t in range(o)] for d, o in zip(dilation, out)]
    for top, left in itertools.product(*starts):
        patch = torch.zeros(n, c, tile + 2, tile + 2, dtype=torch.float64)
        for i, j in itertools.product(range(tile + 2), repeat=2):
            y, x = top + dilation[0] * i - padding[0], left + dilation[1] * j - padding[1]
            if 0 <= y < size[0] and 0 <= x < size[1]:
                patch[:, :, i, j] = input[:, :, y, x]
        v = (bt @ patch @ bt.T).relu()
        m = torch.einsum("ncab,kcab->nkab", v, weight)
        tile_output = at @ m @ at.T
        for p, q in itertools.product(range(tile), repeat=2):
            y, x = top + dilation[0] * p, left + dilation[1] * q
            if y < out[0] and x < out[1]:
                output[:, :, y, x] = tile_output[:, :, p, q]
    return output


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("padding", "dilation", "size"), [((1, 1), (1, 1), (5, 8)), ((0, 3), (2, 1), (7, 4))]
)
def test_relu_reference_against_loops(tile, padding, dilation, size):
    input, weight = tensors((2, 3, *size), (2, 3, tile + 2, tile + 2), dtype=torch.float64)
    actual = reference.winograd_relu_conv2d(input, weight, None, padding, dilation, tile)
    torch.testing.assert_close(actual, relu_by_loops(input, weight, padding, dilation, tile))


@pytest.mark.parametrize("tile", TILES)
def test_relu_reference_gradients_are_autograds(tile):
    for padding, dilation, size in geometries():
        shape = (2, 3, tile + 2, tile + 2)
        input, weight = tensors((2, 3, *size), shape, dtype=torch.float64)
        input.requires_grad_(), weight.requires_grad_()
        output = reference.winograd_relu_conv2d(input, weight, None, padding, dilation, tile)
        grad = torch.randn_like(output)
        expected = torch.autograd.grad(output, (input, weight), grad)
        input, weight = input.detach(), weight.detach()
        where = (padding, dilation, tile)
        actual = (
            reference.winograd_relu_backward_input(grad, input, weight, *where),
            reference.winograd_relu_backward_weight(grad, input, *where),
        )
        torch.testing.assert_close(actual, expected)


def test_reference_counts_the_multiplications_of_winograd():
    input, weight = torch.empty(1, 8, 24, 24), torch.empty(8, 8, 3, 3)
    counts = {}
    for tile in (0, *TILES):
        with FlopCounterMode(display=False) as counter:
            if tile:
                shape = (8, 8, tile + 2, tile + 2)
                v = torch.empty(8, (24 // tile) ** 2, (tile + 2) ** 2)
                torch.einsum("kcp,ctp->ktp", torch.empty(shape).flatten(2), v)
            else:
                F.conv2d(input, weight, padding=1)
        counts[tile] = counter.get_total_flops()
    call = planner.describe("winograd_conv2d", input, weight, 1)
    for tile in (0, *TILES):
        assert 2 * planner.operation_count(call, tile) == counts[tile]
    for tile, gain in {2: 2.25, 4: 4, 6: 5.0625}.items():
        assert counts[0] / counts[tile] == gain


@pytest.mark.native
@pytest.mark.parametrize("tile", TILES)
def test_operation_count_has_the_tiles_that_stick_out(tile):
    for dilation in (1, 2, 5):
        input, weight = torch.empty(3, 8, 23, 14), torch.empty(16, 8, 3, 3)
        call = planner.describe("winograd_conv2d", input, weight, dilation, dilation)
        count = native.host.operation_count(3, 8, 23, 14, 16, tile, dilation)
        assert planner.operation_count(call, tile) == count["winograd_multiplications"]
        assert planner.operation_count(call, 0) == count["direct_multiplications"]
    call = planner.describe("winograd_conv2d", torch.empty(1, 1, 7, 7), weight[:1, :1], 1)
    tiles = {2: 16, 4: 4, 6: 4}[tile]
    assert planner.operation_count(call, tile) == tiles * (tile + 2) ** 2


# --- the op's forward ---


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_forward(isa, tile, channels_last):
    """Every padding, dilation, odd size and epilogue, channels that fill no vector and that fill
    several."""
    epilogues = itertools.cycle(itertools.product((True, False), (True, False), (None, "relu")))
    channels = itertools.cycle([(3, 5), (16, 16), (35, 17), (64, 33), (1, 1)])
    for padding, dilation, size in geometries():
        (c, k), (with_bias, with_residual, activation) = next(channels), next(epilogues)
        out = [s + 2 * p - 2 * d for s, p, d in zip(size, padding, dilation)]
        input, weight, bias, residual = tensors(
            (2, c, *size), (k, c, 3, 3), (k,), (2, k, *out), channels_last=channels_last
        )
        terms = [bias if with_bias else None, residual if with_residual else None]
        geometry = (padding, dilation, activation)
        actual = conv(input, weight, *terms, *geometry, algorithm=f"f{tile}")
        peer = plain(input, weight, *terms, *geometry)
        exact = plain(*double(input, weight, *terms), *geometry)
        assert_close_to_reference(actual, exact, peer, K[tile], f"{c} -> {k} {size} {geometry}")
        assert backends.is_channels_last(actual) == (
            backends.is_channels_last(input)
            and backends.is_channels_last(peer.contiguous(memory_format=torch.channels_last))
        )


def _huge_pages_on_advice():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


@pytest.mark.native
@pytest.mark.skipif(not _huge_pages_on_advice(), reason="no huge pages on this system")
def test_outputs_of_32_mb_are_in_huge_pages():
    """glibc maps what has 32 MB anew each time: 8192 pages of 4 KB would be a fault each."""
    import resource

    input, weight = torch.randn(1, 16, 512, 512), torch.randn(32, 16, 3, 3)
    call = lambda: ops.winograd_conv2d(  # noqa: E731
        input, weight, None, None, [1, 1], [1, 1], None, "f4", "cpu", "default"
    )
    assert call().nbytes == 32 << 20
    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt  # noqa: E731
    before = faults()
    call()
    assert faults() - before < 4096


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("k", [64, 40, 33])  # whole lines, halves of them, neither
@pytest.mark.parametrize("tile", TILES)
def test_large_outputs(isa, tile, k, channels_last):
    """They are written past the caches, where that writes whole lines."""
    size = (1, k, 176, 188)
    assert 4 * torch.Size(size).numel() > 4 << 20  # kStreamBytes
    for residual, activation in [(None, "relu"), (torch.randn(size), None)]:
        terms = tensors((1, 3, 176, 188), (k, 3, 3, 3), (k,), channels_last=channels_last)
        terms = (*terms, residual)
        actual = conv(*terms, activation=activation, algorithm=f"f{tile}")
        exact, peer = (plain(*t, activation=activation) for t in (double(*terms), terms))
        assert_close_to_reference(actual, exact, peer, K[tile])


@pytest.mark.native
@pytest.mark.parametrize("k", [104, 272])  # the last panel is narrow, and stands alone or not
@pytest.mark.parametrize("tile", TILES)
def test_several_panels_at_once(isa, tile, k):
    """How one thread takes many channels: V is larger than the second-level cache."""
    input, weight = tensors((1, 512, 34, 29), (k, 512, 3, 3), channels_last=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        actual = conv(input, weight, algorithm=f"f{tile}")
    finally:
        torch.set_num_threads(threads)
    exact = plain(*double(input, weight))
    assert_close_to_reference(actual, exact, plain(input, weight), K[tile])


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_a_filter_that_is_used_once(isa, tile, rotate, dtype):
    """Few tiles and many channels: threads transform the filter panel by panel. Whoever makes it,
    from whatever strides, the result is the same."""
    c, k, where = 261, 275, ((1, 0), (1, 1))
    x = torch.randn(1, c, 7, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(k, c, 3, 3) / 48).to(dtype)
    weight = weight.transpose(0, 1).contiguous() if rotate else weight
    layouts = [weight, weight.contiguous(memory_format=torch.channels_last)]
    layouts += [weight.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)]
    layouts += [torch.cat([weight, weight], 3)[..., :3]]
    bias = torch.randn(k)
    fast = isa in BF16_ISAS and tile == 4
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            filter = ops._winograd_filter(weight, tile, rotate, fast)
            expected = ops._winograd_forward(
                x, filter, bias, None, k, tile, *where, True, False, fast
            )
            for layout in layouts:
                arguments = (x, layout, bias, None, tile, *where, True, False, rotate, fast)
                assert torch.equal(ops._winograd_convolve(*arguments), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", TILES)
def test_a_filter_of_the_domain_that_is_used_once(isa, tile, dtype, channels_last):
    """The same for weights of the Winograd domain, forward and for the input gradient."""
    c, k, where = 261, 275, ((1, 0), (1, 1))
    size = {2: (7, 9), 4: (13, 17), 6: (19, 26)}[tile]
    x, grad = tensors((1, c, *size), (1, k, size[0], size[1] - 2), channels_last=channels_last)
    x, grad, bias = x.to(dtype), grad.to(dtype), torch.randn(k)
    weight = (torch.randn(k, c, tile + 2, tile + 2) / 48).to(dtype)
    threads = torch.get_num_threads()
    try:
        for count, winograd_relu in ((1, True), (2, True), (3, False)):
            torch.set_num_threads(count)
            filter = ops._winograd_pack(weight, tile, False)
            assert torch.equal(
                ops._winograd_convolve(
                    x, weight, bias, None, tile, *where, True, winograd_relu, False, False
                ),
                ops._winograd_forward(
                    x, filter, bias, None, k, tile, *where, True, winograd_relu, False
                ),
            )
            filter = ops._winograd_pack(weight, tile, True)
            assert torch.equal(
                ops._winograd_domain_backward_input_once(
                    grad, x, weight, tile, *where, winograd_relu
                ),
                ops._winograd_domain_backward_input(grad, x, filter, tile, *where, winograd_relu),
            )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", TILES)
def test_forward_of_16_bit_floats_is_no_less_accurate(isa, tile, dtype):
    for channels_last in (False, True):
        input, weight, bias, residual = tensors(
            (2, 35, 13, 18), (33, 35, 3, 3), (33,), (2, 33, 13, 18),
            dtype=dtype, channels_last=channels_last,
        )  # fmt: skip
        arguments = (input, weight, bias, residual)
        actual = conv(*arguments, activation="relu", algorithm=f"f{tile}")
        exact = plain(*double(*arguments), activation="relu")
        # float32 inside and one rounding at the end: what a correctly rounded convolution has.
        assert_close_to_reference(actual, exact, exact.to(dtype), 1.02)


@pytest.mark.native
@pytest.mark.parametrize("relu_input", [False, True])
@pytest.mark.parametrize("channels", [64, 256, 512])
@pytest.mark.parametrize(("tile", "gate"), [(2, 7e-7), (4, 2.5e-6), (6, 7e-6)])
def test_error_gates(isa, tile, gate, channels, relu_input):
    input = torch.randn(1, channels, 18, 18)
    input = input.relu() if relu_input else input
    weight = torch.randn(channels, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
    exact = plain(*double(input, weight))
    for layout in (torch.contiguous_format, torch.channels_last):
        actual = conv(input.contiguous(memory_format=layout), weight, algorithm=f"f{tile}")
        assert relative_l2(actual, exact) < gate


@pytest.mark.native
@pytest.mark.parametrize("relu_input", [False, True])
@pytest.mark.parametrize(("tile", "gate"), [(2, 7e-7), (4, 2.5e-6), (6, 7e-6)])
def test_error_of_the_weight_gradient_hardly_grows_with_tiles(isa, tile, gate, relu_input):
    """Thousands of tiles: one long sum misses each of these gates by a factor of two and more."""
    input, grad = tensors((1, 16, 384, 384), (1, 16, 384, 384), channels_last=True)
    input = input.relu() if relu_input else input
    where = ((1, 1), (1, 1), f"f{tile}", "cpu", "default")
    actual = ops.winograd_conv2d_backward_weight(grad, input, *where)
    exact = torch.nn.grad.conv2d_weight(input.double(), (16, 16, 3, 3), grad.double(), padding=1)
    assert relative_l2(actual, exact) < gate


@pytest.mark.native
@pytest.mark.parametrize("relu_input", [False, True])
@pytest.mark.parametrize(("tile", "gate"), [(2, 6e-3), (4, 1.2e-2), (6, 7e-6)])
def test_precision_fast(isa, tile, gate, relu_input):
    """bf16 products where the instruction set has them; F6, which would lose 5 %, stays as it
    is."""
    input, weight = torch.randn(2, 128, 20, 20), torch.randn(64, 128, 3, 3)
    input = input.relu() if relu_input else input
    exact = plain(*double(input, weight))
    for layout in (torch.contiguous_format, torch.channels_last):
        layouts = input.contiguous(memory_format=layout)
        default = conv(layouts, weight, algorithm=f"f{tile}")
        fast = conv(layouts, weight, algorithm=f"f{tile}", precision="fast")
        assert relative_l2(fast, exact) < gate
        assert torch.equal(default, fast) == (tile == 6 or isa not in BF16_ISAS)


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(12, 7), (37, 51), (61, 47)])  # (37, 51): groups not full
@pytest.mark.parametrize(
    ("c", "k"), [(1, 7), (2, 16), (16, 17), (17, 40), (33, 32), (48, 96), (96, 275), (261, 64)]
)
def test_precision_fast_of_any_shape(isa, c, k, size, channels_last, monkeypatch):
    """V and U rounded to bfloat16, and nothing else. Products may read rows of tiles, and pairs of
    channels, that are not there: nothing of what earlier calls left in memory, here NaN, reaches
    the result."""
    if isa not in BF16_ISAS:
        pytest.skip(f"{isa} has no products of bfloat16")

    def rounded(numbers):
        return numbers.float().bfloat16().double()

    transformed = reference._transformed
    monkeypatch.setattr(reference, "_transformed", lambda *a: rounded(transformed(*a)))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    input = torch.randn(2, c, *size).contiguous(memory_format=layout)
    weight, bias = torch.randn(k, c, 3, 3), torch.randn(k)
    for tile in (2, 4):
        where = (k, tile, (1, 1), (1, 1), False, False, True)
        filter = ops._winograd_filter(weight, tile, False, True)
        ops._winograd_forward(torch.full_like(input, math.nan), filter, bias, None, *where)
        spoilt = [torch.full_like(filter, math.nan) for _ in range(8)]
        del spoilt
        filter = ops._winograd_filter(weight, tile, False, True)
        output = ops._winograd_forward(input, filter, bias, None, *where)
        u = rounded(reference.winograd_transform_filter(weight.double(), tile))
        exact = reference.winograd_domain_conv2d(*double(input), u, bias.double(), tile=tile)
        # The kernel rounds sums of float32, the reference exact ones: some round to other sides.
        assert relative_l2(output, exact) < 2e-4


@pytest.mark.native
@pytest.mark.parametrize("c", [16, 17])
def test_few_channels_have_no_use_for_tile_registers(isa, c):
    input, weight = torch.randn(1, c, 20, 20), torch.randn(16, c, 3, 3)
    choice = {"algorithm": "f4", "backend": "cpu"}
    default, fast = (conv(input, weight, **choice, precision=p) for p in ("default", "fast"))
    rounded = isa == "avx512bf16" or (isa == "amx" and c > 16)
    assert torch.equal(default, fast) != rounded


@pytest.mark.native
def test_tile_registers_are_shared_with_pytorchs_kernels(isa):
    """Both set their shapes anew, in the same threads."""
    if isa != "amx":
        pytest.skip(f"{isa} has no tile registers")
    input, weight = torch.randn(2, 64, 40, 40), torch.randn(48, 64, 3, 3)
    halves = input.bfloat16(), weight.bfloat16()
    left, right = torch.randn(2, 200, 200).bfloat16().unbind()
    fast = {"algorithm": "f4", "precision": "fast", "backend": "cpu"}
    first = None
    for _ in range(4):
        results = [conv(input, weight, **fast), F.conv2d(*halves, padding=1)]
        results += [conv(input, weight, **fast), left @ right]
        first = first or results
        assert all(map(torch.equal, results, first))
    assert torch.equal(first[0], first[2])


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("k", "size", "dilation"), [(21, (9, 14), 1), (40, (61, 47), 2), (512, (14, 14), 1)]
)
@pytest.mark.parametrize("tile", TILES)
def test_means_of_the_output_beside_it(isa, tile, k, size, dilation, dtype):
    x = torch.randn(1, 32, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(k, 32, 3, 3) / 17, torch.randn(k)
    filter = ops._winograd_filter(weight, tile, False, False)
    where = (k, tile, (dilation, dilation), (dilation, dilation))
    expected = ops._winograd_forward(x, filter, bias, None, *where, False, False, False)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            output, mean = ops._winograd_forward_mean(x, None, filter, bias, *where, False)
            assert torch.equal(output, expected)
            output.zero_()
            arguments = (output, x, None, filter, bias, *where, False)
            assert torch.equal(ops._winograd_forward_mean_out(*arguments), mean)
            assert torch.equal(output, expected)
            assert mean.shape == (1, k)
            # Before the output is rounded: half a unit of its type, and sums of 2000 in float32.
            exact = expected.double().mean((2, 3))
            limit = torch.finfo(dtype).eps * expected.double().abs().mean() + 1e-5
            assert (mean - exact).abs().max() <= limit
    finally:
        torch.set_num_threads(threads)


@pytest.mark.native
def test_means_are_of_one_image_in_channels_last():
    filter = ops._winograd_filter(torch.randn(4, 4, 3, 3), 4, False, False)
    for x in (torch.randn(1, 4, 6, 6), torch.randn(2, 4, 6, 6)):
        with pytest.raises(RuntimeError, match="one image in channels_last"):
            ops._winograd_forward_mean(x, None, filter, None, 4, 4, (1, 1), (1, 1), False)


@pytest.mark.native
@pytest.mark.parametrize(
    ("c", "size", "dilation"), [(21, (9, 14), 1), (40, (61, 47), 2), (16, (5, 6), 8)]
)
@pytest.mark.parametrize("tile", TILES)
def test_gate_on_the_input(isa, tile, c, size, dilation):
    """It is relu(gate x) that is convolved, zeros around it, also where vectors are not full."""
    x = torch.randn(1, c, *size).contiguous(memory_format=torch.channels_last)
    gate = torch.rand(1, c) + 0.5
    filter = ops._winograd_filter(torch.randn(24, c, 3, 3) / 17, tile, False, False)
    where = (24, tile, (dilation, dilation), (dilation, dilation))
    gated = torch.relu(x * gate[:, :, None, None])
    expected = ops._winograd_forward_mean(gated, None, filter, None, *where, False)
    actual = ops._winograd_forward_mean(x, gate, filter, None, *where, False)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    with pytest.raises(RuntimeError, match="gate must be a number for each channel"):
        ops._winograd_forward_mean(x, gate[:, 1:], filter, None, *where, False)


@pytest.mark.native
def test_an_output_to_write_into_must_fit():
    x = torch.randn(1, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    filter = ops._winograd_filter(torch.randn(4, 4, 3, 3), 4, False, False)
    for output in (torch.empty(1, 4, 6, 6), x[:, :3], x.double(), x[:, :, 1:]):
        with pytest.raises(RuntimeError, match="output must have the output's size"):
            ops._winograd_forward_mean_out(
                output, x, None, filter, None, 4, 4, (1, 1), (1, 1), False
            )


@pytest.mark.native
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize(
    ("n", "c", "channels", "size"),
    [(2, 16, 32, (9, 14)), (1, 48, 16, (2, 1)), (1, 32, 32, (61, 47)), (1, 16, 256, (7, 30))],
)
@pytest.mark.parametrize("tile", TILES)
def test_conv_lstm(isa, tile, n, c, channels, size, with_state):
    """The step that never writes its gates is the convolution and the cell, one by one."""
    format = torch.channels_last
    x = torch.randn(n, c, *size).contiguous(memory_format=format)
    hidden, cell = (
        torch.randn(n, channels, *size).contiguous(memory_format=format) for _ in range(2)
    )
    state = (hidden, cell) if with_state else (None, None)
    whole = torch.cat((x, hidden), 1) if with_state else x
    weight, bias = torch.randn(4 * channels, whole.shape[1], 3, 3) / 17, torch.randn(4 * channels)
    filter = ops._winograd_filter(weight, tile, False, False)
    for b in (bias, None):
        gates = ops._winograd_forward(
            whole, filter, b, None, 4 * channels, tile, (1, 1), (1, 1), False, False, False
        )
        expected = ops._conv_lstm_forward(gates, state[1])
        actual = ops._winograd_conv_lstm(x, *state, filter, b, channels, tile, False)
        for a, e in zip(actual, expected, strict=True):
            assert backends.is_channels_last(a)
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


@pytest.mark.native
def test_conv_lstm_past_the_caches_by_any_number_of_threads():
    x, hidden, cell = (
        torch.randn(1, 32, 190, 181).contiguous(memory_format=torch.channels_last) for _ in range(3)
    )
    filter = ops._winograd_filter(torch.randn(128, 64, 3, 3) / 24, 6, False, False)
    arguments = (x, hidden, cell, filter, torch.randn(128), 32, 6, False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops._winograd_conv_lstm(*arguments)
        torch.set_num_threads(3)
        assert all(map(torch.equal, one, ops._winograd_conv_lstm(*arguments)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.native
def test_conv_lstm_keeps_memory_safe():
    def like(c, h=5):
        return torch.randn(1, c, h, 5).contiguous(memory_format=torch.channels_last)

    filter = ops._winograd_filter(torch.randn(64, 32, 3, 3), 4, False, False)
    bias = torch.randn(64)
    good = {"x": like(16), "h": like(16), "c": like(16), "filter": filter, "bias": bias}
    for word, change in {
        "input must be": {"x": like(16).contiguous()},
        "hidden must be": {"h": like(16, 6)},
        "cell must be": {"c": like(32)},
        "filter was packed": {"filter": filter[1:]},
        "bias must be": {"bias": bias[1:]},
    }.items():
        with pytest.raises(RuntimeError, match=word):
            ops._winograd_conv_lstm(*(good | change).values(), 16, 4, False)


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
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("c", "k", "size"), [(16, 16, 60), (64, 640, 30), (512, 512, 14), (512, 272, 34), (1536, 64, 9)]
)
@pytest.mark.parametrize("tile", TILES)
def test_scratch_is_bounded(isa, tile, c, k, size, channels_last):
    """docs/design.md: 4 MB a thread in its two slots (positions lie an odd number of lines apart:
    1 % more); the weight gradient's accumulators besides, in whole huge pages of 2 MB."""
    x, w = torch.randn(1, c, size, size), torch.randn(k, c, 3, 3)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    choice = {"backend": "cpu", "algorithm": f"f{tile}"}
    most = (4 << 20) + (64 << 10)
    forward = scratch_of(lambda: conv(x, w, **choice))
    assert 0 < forward <= most
    fast = scratch_of(lambda: conv(x, w, **choice, precision="fast"))
    assert 0 < fast <= most
    x.requires_grad_()
    w.requires_grad_()
    both = scratch_of(lambda: conv(x, w, **choice).sum().backward())
    accumulators = 4 * (tile + 2) ** 2 * 128 * 128
    assert forward <= both <= most + accumulators + (2 << 20)


@pytest.mark.parametrize("algorithm", ["auto", "f2", "f4", "f6"])
def test_empty_batch(algorithm):
    input, weight = torch.empty(0, 4, 8, 8, requires_grad=True), torch.randn(5, 4, 3, 3)
    output = conv(input, weight.requires_grad_(), algorithm=algorithm)
    assert output.shape == (0, 5, 8, 8)
    output.sum().backward()
    assert input.grad.shape == input.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


STRIDED = {
    "sliced rows": lambda: torch.randn(2, 6, 20, 11)[:, :, 1::2],
    "sliced channels": lambda: torch.randn(2, 12, 10, 11)[:, 2:8],
    "sliced channels_last": lambda: torch.randn(2, 10, 11, 12).permute(0, 3, 1, 2)[:, 3:9],
    "transposed": lambda: torch.randn(2, 6, 11, 10).transpose(2, 3),
    "expanded": lambda: torch.randn(1, 6, 10, 1).expand(2, 6, 10, 11),
    "one channel, channels_last strides": lambda: torch.randn(2, 10, 11, 1).permute(0, 3, 1, 2),
    "one pixel": lambda: torch.randn(2, 1, 1, 6).permute(0, 3, 1, 2),
    "offset": lambda: torch.randn(2 * 6 * 110 + 1)[1:].view(2, 6, 10, 11),
}


@pytest.mark.parametrize("algorithm", ["auto", "f2", "f4", "f6"])
@pytest.mark.parametrize("name", STRIDED)
def test_strided_input_weight_and_residual(name, algorithm):
    input = STRIDED[name]()
    weight = torch.randn(3, 3, 7, input.shape[1]).permute(2, 3, 0, 1)
    bias = torch.randn(14)[::2]
    residual = torch.randn(2, 7, *input.shape[2:]).to(memory_format=torch.channels_last)
    arguments = (input, weight, bias, residual)
    actual = conv(*arguments, algorithm=algorithm)
    assert_close_to_reference(actual, plain(*double(*arguments)), plain(*arguments), K[6])
    last = backends.is_channels_last(input)
    assert actual.is_contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )


@pytest.mark.native
@pytest.mark.parametrize("tile", TILES)
def test_weights_of_any_strides_and_channels_last_outputs_that_are_also_contiguous(isa, tile):
    for k in (1, 16):
        input = torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last)
        weight = torch.randn(k, 3, 3, 3).to(memory_format=torch.channels_last)
        actual = conv(input, weight, algorithm=f"f{tile}")
        torch.testing.assert_close(actual, plain(input, weight), rtol=1e-4, atol=1e-4)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = conv(mode.from_tensor(input), mode.from_tensor(weight), algorithm=f"f{tile}")
        assert actual.stride() == fake.stride()


@pytest.mark.native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_the_tiles_that_read_them(isa, value):
    """Every output that reads the value is not finite, as in a convolution; what else it reaches
    shares a tile with one."""
    input, weight = torch.randn(1, 16, 24, 24), torch.randn(16, 16, 3, 3)
    exact = plain(input, weight)
    input[0, 3, 8, 8] = value
    expected = plain(input, weight).isfinite()
    assert not expected.all()
    for tile in TILES:
        actual = conv(input, weight, algorithm=f"f{tile}")
        finite = actual.isfinite()
        assert not (finite & ~expected).any()
        near = torch.zeros(24, 24, dtype=torch.bool)
        first, last = 7 // tile * tile, 9 // tile * tile + tile
        near[first:last, first:last] = True
        assert finite[:, :, ~near].all()
        torch.testing.assert_close(actual[finite], exact[finite], rtol=1e-3, atol=1e-3)


@pytest.mark.native
@pytest.mark.parametrize("tile", TILES)
def test_same_call_same_bits(tile):
    input, weight = torch.randn(3, 40, 30, 30), torch.randn(24, 40, 3, 3)
    threads = torch.get_num_threads()
    expected = conv(input, weight, algorithm=f"f{tile}")
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            assert torch.equal(conv(input, weight, algorithm=f"f{tile}"), expected)
    finally:
        torch.set_num_threads(threads)


# --- gradients ---


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_backward(isa, tile, channels_last):
    channels = itertools.cycle([(3, 5), (16, 16), (35, 17)])
    for padding, dilation, size in geometries():
        c, k = next(channels)
        out = [s + 2 * p - 2 * d for s, p, d in zip(size, padding, dilation)]
        leaves = list(
            tensors((2, c, *size), (k, c, 3, 3), (k,), (2, k, *out), channels_last=channels_last)
        )
        grad = torch.randn(2, k, *out)

        def gradients(function, *leaves, grad=grad, **options):
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            output = function(*leaves, padding, dilation, "relu", **options)  # noqa: B023
            # The mask of the ReLU is PyTorch's in all three: a sign that differs is no error of the
            # gradient.
            return torch.autograd.grad(output, leaves, grad.to(output.dtype) * mask)  # noqa: B023

        exact = plain(*double(*leaves), padding, dilation)
        mask = exact.abs() > 1e-3
        ours = gradients(conv, *leaves, grad=grad, algorithm=f"f{tile}")
        peers = gradients(plain, *leaves)
        exacts = gradients(plain, *double(*leaves))
        for name, actual, expected, peer in zip(
            ("input", "weight", "bias", "residual"), ours, exacts, peers
        ):
            what = f"{name} {c} -> {k} {size} {padding} {dilation}"
            assert_close_to_reference(actual, expected, peer, K[tile], what)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("padding", "dilation"), [((1, 1), (1, 1)), ((0, 3), (1, 2))])
def test_gradcheck(padding, dilation, activation):
    leaves = list(tensors((1, 2, 3, 4), (2, 2, 3, 3), (2,), dtype=torch.float64))
    leaves.append(torch.randn_like(plain(*leaves, None, padding, dilation)))
    for leaf in leaves:
        leaf.requires_grad_()

    def function(*leaves):
        return conv(*leaves, padding, dilation, activation, algorithm="f4")

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.native
@pytest.mark.parametrize("tile", TILES)
def test_double_backward_on_the_kernels(tile):
    """A gradient penalty, in float32 against float64."""

    def penalty(function, input, weight, **options):
        input, weight = (t.detach().requires_grad_() for t in (input, weight))
        output = function(input, weight, padding=(1, 0), **options)
        (grad,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (input, weight))

    leaves = list(tensors((2, 8, 12, 13), (6, 8, 3, 3)))
    ours = penalty(conv, *leaves, algorithm=f"f{tile}")
    peers = penalty(plain, *leaves)
    exacts = penalty(plain, *double(*leaves))
    for actual, exact, peer in zip(ours, exacts, peers):
        assert_close_to_reference(actual, exact, peer, K[tile])


class Recorded(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(op._schema.name.partition("::")[2])
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=3)))
def test_only_the_gradients_that_are_needed(needs):
    leaves = [
        t.requires_grad_(need) for t, need in zip(tensors((1, 4, 6, 6), (4, 4, 3, 3), (4,)), needs)
    ]
    output = conv(*leaves)
    assert output.requires_grad == any(needs)
    if any(needs):
        with Recorded() as recorded:
            output.sum().backward()
        for need, name in zip(needs, ("input", "weight")):
            assert (f"winograd_conv2d_backward_{name}" in recorded.names) == need
        expected = [t.detach().requires_grad_(need) for t, need in zip(leaves, needs)]
        plain(*expected).sum().backward()
        for leaf, other in zip(leaves, expected):
            torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_padding_wider_than_the_kernel_backward():
    input, weight = (t.requires_grad_() for t in tensors((1, 3, 4, 5), (2, 3, 3, 3)))
    conv(input, weight, padding=(4, 3), algorithm="f4").square().sum().backward()
    ours, input.grad = input.grad, None
    plain(input, weight, padding=(4, 3)).square().sum().backward()
    torch.testing.assert_close(ours, input.grad, rtol=1e-4, atol=1e-4)


# --- Winograd-ReLU ---


def relu_conv(input, weight, bias=None, padding=1, dilation=1, tile=2, backend="auto"):
    return ops.winograd_relu_conv2d(input, weight, bias, padding, dilation, tile, backend)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_relu_forward_and_backward(isa, tile, channels_last, dtype):
    channels = itertools.cycle([(3, 5), (16, 16), (35, 17)])
    for padding, dilation, size in geometries():
        c, k = next(channels)
        leaves = list(
            tensors(
                (2, c, *size),
                (k, c, tile + 2, tile + 2),
                (k,),
                dtype=dtype,
                channels_last=channels_last,
            )
        )
        leaves[1] /= tile**3  # A^T has powers of the points: float16 ends at 65504

        def results(function, *leaves):
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            output = function(*leaves, padding, dilation, tile)  # noqa: B023
            torch.manual_seed(1)
            grad = (torch.randn(output.shape) / tile**2).to(dtype).to(output.dtype)
            return output, *torch.autograd.grad(output, leaves, grad)

        ours = results(relu_conv, *leaves)
        exacts = results(reference.winograd_relu_conv2d, *double(*leaves))
        for name, actual, exact in zip(("output", "input", "weight", "bias"), ours, exacts):
            what = f"{name} {c} -> {k} {size} {padding} {dilation}"
            assert actual.dtype == dtype
            assert actual.shape == exact.shape
            # There is no other implementation: the gates of the dense kernels, and the dtype's own
            # rounding. A tile value near 0 may fall on the other side of the ReLU, which the
            # gradient feels in full.
            limit = {2: 1e-6, 4: 5e-6, 6: 2e-5}[tile] + torch.finfo(dtype).eps
            assert relative_l2(actual, exact) < (
                limit if name in ("output", "bias") else 20 * limit
            ), what
        assert backends.is_channels_last(ours[1]) == backends.is_channels_last(leaves[0])


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("n", "c", "size", "k", "tile", "padding", "dilation"),
    [
        (1, 18, (70, 61), 20, 2, (1, 1), (1, 1)),  # bands of rows of tiles, the even ones first
        (3, 40, (64, 50), 8, 4, (2, 3), (2, 3)),
        (1, 9, (100, 90), 17, 6, (0, 4), (1, 4)),
        (41, 20, (6, 7), 24, 4, (1, 1), (1, 1)),  # several images at a time, and one that is left
        (2, 70, (9, 8), 520, 6, (1, 1), (1, 1)),  # a filter that is fetched while it is used
    ],
)
def test_relu_backward_input_by_any_number_of_threads(
    isa, n, c, size, k, tile, padding, dilation, channels_last
):
    """Threads share images, bands of them, or channels: the sums that patches overlap in have the
    same order for any number of threads."""
    out = [s + 2 * p - 2 * d for s, p, d in zip(size, padding, dilation)]
    input, grad, weight = tensors(
        (n, c, *size), (n, k, *out), (k, c, tile + 2, tile + 2), channels_last=channels_last
    )
    arguments = (grad, input, weight, padding, dilation, tile)
    exact = reference.winograd_relu_backward_input(*double(*arguments[:3]), *arguments[3:])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.winograd_relu_conv2d_backward_input(*arguments, "auto"))
    finally:
        torch.set_num_threads(threads)
    # As above: a number near 0 may fall on the other side of the ReLU.
    assert relative_l2(results[0], exact) < 20 * {2: 1e-6, 4: 5e-6, 6: 2e-5}[tile]
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_relu_gradcheck():
    for tile, backend in ((2, "auto"), (4, "aten")):
        leaves = [
            t.requires_grad_()
            for t in tensors((1, 2, 4, 5), (2, 2, tile + 2, tile + 2), (2,), dtype=torch.float64)
        ]
        assert torch.autograd.gradcheck(
            lambda *leaves: relu_conv(*leaves, (1, 2), (1, 2), tile, backend),  # noqa: B023
            leaves,
        )


def test_relu_double_backward_says_that_it_is_not_there():
    input, weight = (t.requires_grad_() for t in tensors((1, 2, 6, 6), (2, 2, 4, 4)))
    grads = torch.autograd.grad(
        relu_conv(input, weight).square().sum(), (input, weight), create_graph=True
    )
    for grad in grads:
        with pytest.raises(RuntimeError, match="double backward is not implemented"):
            grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize("tile", TILES)
def test_transform_filter(tile):
    weight = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    transformed = winograd_transform_filter(weight, tile)
    _, g, _ = reference.transform_matrices(tile)
    torch.testing.assert_close(transformed, g @ weight @ g.T)
    assert torch.autograd.gradcheck(lambda w: winograd_transform_filter(w, tile), weight)
    assert torch.autograd.gradgradcheck(
        lambda w: winograd_transform_filter(w, tile), weight, fast_mode=True
    )


# --- registration ---


def op_samples():
    for channels_last, requires_grad in itertools.product((False, True), repeat=2):
        input, weight, bias, residual = (
            t.requires_grad_(requires_grad)
            for t in tensors(
                (2, 3, 6, 7), (4, 3, 3, 3), (4,), (2, 4, 6, 7), channels_last=channels_last
            )
        )
        for algorithm, extra in (("auto", (None, None)), ("f4", (bias, residual))):
            choice = (algorithm, "auto", "default")
            yield ops.winograd_conv2d, (input, weight, *extra, (1, 1), (1, 1), "relu", *choice)
            grad = residual.detach().requires_grad_(requires_grad)
            geometry = ((1, 1), (1, 1))
            yield ops.winograd_conv2d_backward_input, (grad, weight, *geometry, *choice)
            yield ops.winograd_conv2d_backward_weight, (grad, input, *geometry, *choice)
        relu_weight = torch.randn(4, 3, 4, 4, requires_grad=requires_grad)
        where = ((1, 1), (1, 1), 2, "auto")
        yield ops.winograd_relu_conv2d, (input, relu_weight, bias, *where)
        grad, input, relu_weight = (t.detach() for t in (grad, input, relu_weight))
        yield ops.winograd_relu_conv2d_backward_input, (grad, input, relu_weight, *where)
        yield ops.winograd_relu_conv2d_backward_weight, (grad, input, *where)
        yield ops.winograd_transform_filter, (weight, 4)
    sliced = torch.randn(2, 6, 6, 7)[:, ::2]
    yield ops.winograd_conv2d, (sliced, weight, None, None, (1, 1), (1, 1), None, *choice)
    empty = torch.randn(0, 3, 6, 7)
    yield ops.winograd_conv2d, (empty, weight, None, None, (1, 1), (1, 1), None, *choice)


@pytest.mark.parametrize(
    ("op", "arguments"), [pytest.param(*s, id=f"{s[0]}-{i}") for i, s in enumerate(op_samples())]
)
def test_opcheck(op, arguments):
    opcheck(op, arguments)  # schema, autograd registration, fake, AOT dispatch with dynamic shapes


@pytest.mark.native
def test_opcheck_of_the_native_kernels():
    utils = ("test_schema", "test_faketensor")
    for channels_last in (False, True):
        input, weight = tensors((2, 3, 6, 7), (4, 3, 3, 3), channels_last=channels_last)
        filter = ops._winograd_filter(weight, 4, False, False)
        geometry = ((1, 1), (1, 1))
        opcheck(ops._winograd_filter, (weight, 4, True, False), test_utils="test_schema")
        opcheck(
            ops._winograd_forward,
            (input, filter, None, None, 4, 4, *geometry, True, False, False),
            test_utils=utils,
        )
        packed = ops._winograd_pack(torch.randn(4, 3, 6, 6), 4, True)
        grad = conv(input, weight)
        if (
            backends.can_run(
                "cpu", planner.describe("winograd_relu_conv2d_backward_input", input, weight, 1)
            )
            is None
        ):
            opcheck(
                ops._winograd_domain_backward_input,
                (grad, input, packed, 4, *geometry, True),
                test_utils=utils,
            )
            opcheck(
                ops._winograd_backward_weight,
                (grad, input, 4, *geometry, True, False),
                test_utils=utils,
            )


def test_fakes_refuse_what_the_kernels_refuse():
    with torch._subclasses.FakeTensorMode():
        for input, weight, padding, message in (
            ((1, 3, 8, 8), (4, 2, 3, 3), 1, "channels"),
            ((1, 3, 8, 8), (4, 3, 5, 5), 1, r"\(K, C, 3, 3\)"),
            ((3, 8, 8), (4, 3, 3, 3), 1, r"\(N, C, H, W\)"),
            ((1, 3, 2, 2), (4, 3, 3, 3), 0, "must fit"),
            ((1, 3, 8, 8), (4, 3, 3, 3), -1, "padding must be >= 0"),
        ):
            with pytest.raises(RuntimeError, match=message):
                conv(torch.empty(input), torch.empty(weight), padding=padding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_the_dtype_that_was_asked_for(dtype):
    input, weight, bias = (t.requires_grad_() for t in tensors((1, 4, 8, 8), (4, 4, 3, 3), (4,)))
    relu_weight = torch.randn(4, 4, 4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype):
        output, relu_output = conv(input, weight, bias), relu_conv(input, relu_weight)
        assert conv(input.double(), weight.double()).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert conv(input, weight).dtype == torch.float32
    assert output.dtype == relu_output.dtype == dtype
    torch.testing.assert_close(output, plain(input, weight, bias).to(dtype), rtol=0.05, atol=0.05)
    (output.sum() + relu_output.sum()).backward()
    assert all(t.grad.dtype == torch.float32 for t in (input, weight, bias, relu_weight))


# --- torch.compile ---


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_forward_and_backward(backend):
    @torch.compile(fullgraph=True, backend=backend)
    def compiled(input, weight, bias, relu_weight):
        return relu_conv(conv(input, weight, bias, activation="relu"), relu_weight)

    leaves = [*tensors((2, 8, 9, 10), (8, 8, 3, 3), (8,), (6, 8, 4, 4), channels_last=True)]
    grads = []
    for function in (compiled, compiled.__wrapped__):
        copies = [t.clone().requires_grad_() for t in leaves]
        output = function(*copies)
        grads.append([output, *torch.autograd.grad(output.square().sum(), copies)])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    assert grads[0][0].stride() == grads[1][0].stride()


def test_compile_does_not_recompile_for_another_batch():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(input, weight):
        return conv(input, weight, activation="relu")

    weight = torch.randn(4, 3, 3, 3)
    compiled(torch.randn(2, 3, 8, 8), weight)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (3, 7):
            input = torch.randn(n, 3, 8, 8)
            torch.testing.assert_close(
                compiled(input, weight), conv(input, weight, activation="relu")
            )


@pytest.mark.native
def test_compiled_graphs_plan_when_they_run(monkeypatch, tmp_path):
    """ "auto" stays in the graph, and neither tracing nor a fake asks the planner."""
    monkeypatch.setenv("PYWINO_PLAN", str(tmp_path / "plans.json"))
    planner.reset()
    asked = []
    lookup = planner._plans.lookup
    monkeypatch.setattr(planner._plans, "lookup", lambda call: asked.append(call) or lookup(call))
    input, weight = torch.randn(1, 32, 20, 20), torch.randn(32, 32, 3, 3)
    with torch._subclasses.FakeTensorMode() as mode:
        conv(mode.from_tensor(input), mode.from_tensor(weight))
    graph = make_fx(lambda *args: conv(*args), tracing_mode="fake")(input, weight)
    assert "'auto', 'auto'" in graph.code
    assert not asked
    torch.testing.assert_close(graph(input, weight), plain(input, weight), rtol=1e-3, atol=1e-3)
    graph(input, weight)
    assert len(asked) == 1
