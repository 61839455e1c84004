# SPDX-License-Identifier: BSD-3-Clause
"""Masked convolution: the reference by hand, every mask against float64, the layer, what is
refused."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import pywino
from pywino import backends, planner
from pywino.ops import masked_conv as rules
from pywino.reference import masked_conv as reference
from pywino.testing import assert_close_to_reference

ops = torch.ops.pywino
# Sums of up to 9 * 40 products in fp32, cut after 128: no worse than PyTorch's own, with room for
# another order of terms.
K = 4
K_TILES = 36  # of F(4x4,3x3): tests/ops/test_winograd.py
GEOMETRIES = [
    ((3, 3), (1, 1)),
    ((3, 3), (2, 3)),
    ((1, 1), (1, 1)),
    ((5, 2), (1, 1)),
    ((2, 4), (3, 1)),
]


def mask_of(name, n, h, w):
    mask = torch.zeros(n, 1, h, w, dtype=torch.bool)
    if name == "full":
        mask[:] = True
    elif name == "one":
        mask[-1, 0, h // 2, w - 1] = True
    elif name == "random":
        mask = torch.rand(n, 1, h, w) < 0.3
    elif name == "streaks":
        for i in range(n):
            for y in range(h):
                mask[i, 0, y, (3 * y + i) % w] = True
    elif name == "different":  # none, all, a cluster
        mask[1 % n] = True
        mask[2 % n, 0, : h // 2, w // 3 :] = True
    elif name == "shared":
        mask = torch.rand(1, 1, h, w) < 0.5
    return mask


MASKS = ("empty", "full", "one", "random", "streaks", "different", "shared")


def tensors(c=19, k=21, size=(9, 14), n=3, kernel=(3, 3), dtype=torch.float32, channels_last=False):
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(n, c, *size).to(dtype).contiguous(memory_format=format)
    return x, torch.randn(k, c, *kernel).to(dtype), torch.randn(k).to(dtype)


def op(x, mask, weight, bias=None, dilation=(1, 1), backend="cpu"):
    padding = rules.front(weight.shape[2:], dilation)
    return ops.masked_conv2d(x, mask, weight, bias, padding, dilation, backend)


def test_reference_by_hand():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)[None, None]
    x[~mask] = float("nan")
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1] = torch.tensor([1.0, 10.0, 100.0])  # left, centre, right
    y = reference.masked_conv2d(x, mask, weight, torch.tensor([1000.0]))
    assert y[0, 0, 0].tolist() == [1000 + 0 * 10 + 1 * 100, 1000 + 0 + 1 * 10, 0, 0]
    assert y[0, 0, 1].tolist() == [0, 0, 0, 0]
    assert y[0, 0, 2].tolist() == [0, 0, 1000 + 10 * 10 + 11 * 100, 1000 + 10 + 11 * 10]


@pytest.mark.parametrize(("kernel", "dilation"), GEOMETRIES, ids=str)
def test_reference_is_pytorchs_between_two_masks(kernel, dilation):
    x, weight, bias = tensors(3, 4, kernel=kernel, dtype=torch.float64)
    mask = mask_of("random", 3, 9, 14)
    expected = F.conv2d(x * mask, weight, bias, padding="same", dilation=dilation) * mask
    actual = reference.masked_conv2d(x, mask, weight, bias, dilation=dilation)
    torch.testing.assert_close(actual, expected)


@pytest.fixture(params=["pixels", "tiles"])
def way(request, monkeypatch):
    """Of the two kernels of the CPU, this one, where it can run."""

    def choose(input, mask, tiles, *_):
        return request.param if tiles is not None and len(tiles) else "pixels"

    monkeypatch.setattr(rules, "choose", choose)
    monkeypatch.setattr(rules, "_LANES", 1)
    return request.param


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("kernel", "dilation"), GEOMETRIES, ids=str)
def test_forward_and_backward(isa, way, kernel, dilation, name, channels_last):
    if way == "tiles" and kernel != (3, 3):
        pytest.skip("tiles are for 3x3 kernels")
    for c, k in ((19, 21), (16, 5), (32, 40)):
        made = tensors(c, k, kernel=kernel, channels_last=channels_last)
        mask = mask_of(name, 3, 9, 14)
        grad = torch.randn(3, k, 9, 14)

        def run(function, dtype, made=made, grad=grad):
            wanted = [t.to(dtype).requires_grad_() for t in made]
            y = function(*wanted)
            return y, *torch.autograd.grad(y, wanted, grad.to(dtype))

        def plain(x, weight, bias, mask=mask):
            padded = F.conv2d(x * mask, weight, bias, padding="same", dilation=dilation)
            return padded * mask

        exact, peer = run(plain, torch.float64), run(plain, torch.float32)
        ours = run(lambda x, w, b, mask=mask: op(x, mask, w, b, dilation), torch.float32)
        for a, b, c_ in zip(ours[:3], exact[:3], peer[:3], strict=True):
            if b.abs().max() == 0:
                assert not a.any()
            else:
                assert_close_to_reference(a, b, c_, K if way == "pixels" else K_TILES)
        # The bias's are few sums, whose errors compare by chance; 3 * 9 * 14 terms added in pairs
        # have log2(378) roundings of at most the sum of magnitudes.
        limit = 9 * 2**-24 * grad.double().abs().sum((0, 2, 3))
        assert ((ours[3] - exact[3]).abs() <= limit).all()
        assert backends.is_channels_last(ours[0]) == channels_last


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_16_bit_floats_are_rounded_once(isa, way, dtype, channels_last):
    x, weight, bias = tensors(33, 34, dtype=dtype, channels_last=channels_last)
    mask = mask_of("random", 3, 9, 14)
    actual = op(x, mask, weight, bias)
    expected = reference.masked_conv2d(x.double(), mask, weight.double(), bias.double())
    assert actual.dtype == dtype
    # Half a unit in the last place of the largest, and what fp32 sums add to it.
    unit = torch.finfo(dtype).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= 0.51 * unit


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_lies_outside_is_neither_read_nor_written(isa, way, channels_last):
    x, weight, bias = tensors(channels_last=channels_last)
    mask = mask_of("random", 3, 9, 14)
    expected = op(x, mask, weight, bias)
    spoilt = torch.where(mask, x, float("nan"))
    for backend in ("cpu", "aten", "auto"):
        actual = op(spoilt, mask, weight, bias, backend=backend)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert not actual.masked_select(~mask).any()


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
def test_many_pixels_same_bits_for_any_number_of_threads(way, channels_last):
    x, weight, bias = tensors(64, 64, (40, 61), 2, channels_last=channels_last)
    mask = mask_of("random", 2, 40, 61)
    expected = op(x, mask, weight, bias)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(op(x, mask, weight, bias), expected)
    finally:
        torch.set_num_threads(threads)


def test_gradcheck_twice():
    x, weight, bias = (t.requires_grad_() for t in tensors(2, 3, (4, 5), 2, dtype=torch.float64))
    mask = mask_of("random", 2, 4, 5)
    function = lambda *t: op(t[0], mask, *t[1:], backend="auto")  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    x, weight, bias = (
        t.requires_grad_() for t in tensors(4, 5, (5, 6), channels_last=channels_last)
    )
    mask = mask_of("random", 3, 5, 6)
    opcheck(ops.masked_conv2d.default, (x, mask, weight, bias, (1, 1), (1, 1), "auto"))
    grad = torch.randn(3, 5, 5, 6)
    opcheck(ops.masked_conv2d_backward_weight.default, (grad, x, mask, (3, 3), (1, 1), (1, 1)))


def test_compile_and_autocast():
    layer = pywino.MaskedConv2d(8, 9, 3)
    x, mask = torch.randn(2, 8, 7, 9), mask_of("random", 2, 7, 9)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask), layer(x, mask), rtol=1e-4, atol=1e-5)
    for context in (torch.enable_grad, torch.no_grad):
        with context(), torch.autocast("cpu", torch.bfloat16):
            y = layer(x, mask)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x, mask), rtol=3e-2, atol=3e-2)


def test_layer_is_pytorchs_between_two_masks():
    conv = torch.nn.Conv2d(5, 6, 3, padding="same", dilation=2)
    layer = pywino.MaskedConv2d(5, 6, 3, dilation=2)
    layer.load_state_dict(conv.state_dict())
    x, mask = torch.randn(5, 9, 8), mask_of("random", 1, 9, 8)
    for masked in (mask, mask[0]):
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                expected = conv(x * mask[0]) * mask[0]
                torch.testing.assert_close(layer(x, masked), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer.weight.mul_(2)  # the packed weight follows
        expected = F.conv2d(x * mask[0], layer.weight, layer.bias, padding=2, dilation=2) * mask[0]
        torch.testing.assert_close(layer(x, mask), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.native
def test_auto_takes_the_quickest(monkeypatch, tmp_path):
    x, weight, _ = tensors(16, 16, (20, 20), 1)
    mask = mask_of("random", 1, 20, 20)

    def choose(mask, backend="auto", weight=weight):
        tiles = rules.tiles_of(mask, weight, (1, 1), (1, 1))
        return rules.choose(x, mask, tiles, weight, (1, 1), (1, 1), backend)

    for wins in ("pixels", "tiles", "dense"):
        planner.reset()
        monkeypatch.setenv("PYWINO_PLAN", str(tmp_path / "plans.json"))
        seconds = {"pixels": 3e-3, "tiles": 2.9e-3, "dense": 2e-3} | {wins: 1e-3}
        monkeypatch.setattr(rules, "_race", lambda *_, seconds=seconds: seconds)
        assert choose(mask) == wins
        assert choose(mask, "cpu") == ("tiles" if wins == "dense" else wins)
    planner.reset()
    monkeypatch.setenv("PYWINO_PLAN", "static")
    one, full = mask_of("one", 1, 20, 20), mask_of("full", 1, 20, 20)
    assert choose(one) == "pixels"
    assert choose(mask) == "pixels"  # 26 % of the pixels, all of the tiles
    assert choose(full) == choose(full, "cpu") == "tiles"
    few = weight[:5]
    assert [choose(mask, weight=few) for mask in (one, full)] == ["pixels", "dense"]
    assert choose(full, "cpu", few) == choose(full ^ full, "cpu") == "pixels"
    planner.reset()


@pytest.mark.native
def test_the_race_is_of_the_calls_own_mask(monkeypatch):
    x, weight, _ = tensors(16, 16, (20, 20), 1)
    mask = mask_of("random", 1, 20, 20)
    seen = []
    mine = {"mine": lambda *given: seen.append(given)}
    seconds = rules._race(mine, x, mask, weight, (1, 1), (1, 1))
    assert seconds.keys() == {"mine", "dense"}
    assert seconds["mine"] < seconds["dense"]
    assert all(input.equal(x) and given is mask for input, given in seen)


@pytest.mark.native
def test_auto_measures_every_way(monkeypatch, tmp_path):
    x, weight, bias = tensors(16, 16, (20, 20), 2)
    mask = mask_of("random", 2, 20, 20)
    raced = []

    def race(runs, calls, device):
        results = [run() for run in runs.values()]
        raced.extend(runs)
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)
        return {"pixels": 3, "tiles": 1, "dense": 2}

    monkeypatch.setenv("PYWINO_PLAN", str(tmp_path / "plans.json"))
    monkeypatch.setattr(planner, "race", race)
    planner.reset()
    expected = reference.masked_conv2d(x, mask, weight, bias)
    for _ in range(2):
        actual = pywino.masked_conv2d(x, mask, weight, bias)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert raced == ["pixels", "tiles", "dense"]
    planner.reset()


@pytest.mark.native
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("tile", [2, 4, 6])
def test_tiles_are_those_that_the_mask_meets(tile, dilation):
    """Each pixel is in one tile: the lists of single pixels are one tile long, and those that are
    a tile's are `dilation` apart."""
    h, w = 13, 22
    of_pixel = torch.empty(h, w, dtype=torch.int32)
    for y in range(h):
        for x in range(w):
            mask = torch.zeros(1, 1, h, w, dtype=torch.bool)
            mask[0, 0, y, x] = True
            (of_pixel[y, x],) = ops._masked_tiles(mask, tile, (dilation, dilation))
    step = dilation
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    block = lambda at: at // (tile * step) * step + at % step  # noqa: E731
    same = block(y).flatten() * 10**4 + block(x).flatten()
    assert torch.equal(of_pixel.flatten()[:, None] == of_pixel.flatten(), same[:, None] == same)
    mask = mask_of("random", 2, h, w)
    listed = ops._masked_tiles(mask, tile, (dilation, dilation))
    per_image = len(of_pixel.unique())
    expected = torch.cat([of_pixel[m] + i * per_image for i, m in enumerate(mask[:, 0])]).unique()
    assert torch.equal(listed, expected.int())


@pytest.mark.native
def test_tiles_of_another_mask_are_refused():
    x, weight, _ = tensors(16, 16, (20, 20), 1)
    mask = mask_of("full", 1, 20, 20)
    filter = rules.pack(weight, "tiles")
    tiles = ops._masked_tiles(mask, 4, (1, 1))
    forward = lambda tiles, mask=mask: ops._masked_tiles_forward(  # noqa: E731
        x, mask, tiles, filter, None, 16, 4, (1, 1)
    )
    assert forward(tiles).shape == x.shape
    for wrong in (tiles + 1, tiles - 1, tiles.flip(0), tiles[:0], tiles.long()):
        with pytest.raises(RuntimeError, match="of another mask, or there are none"):
            forward(wrong)
    with pytest.raises(RuntimeError, match="of another mask"):
        forward(tiles, mask[:, :, 1:].contiguous())


def test_auto_on_a_gpu_waits_for_the_mask_where_that_is_cheap(monkeypatch, tmp_path):
    """The rule, on CPU tensors: what is raced, and when the mask is looked at."""
    x, weight, _ = tensors(16, 16, (20, 20), 1)
    masks = [mask_of(name, 1, 20, 20) for name in ("one", "full")]
    asked, raced, answers = [], [], {}
    density = rules._density
    monkeypatch.setattr(rules, "_density", lambda mask: asked.append(mask) or density(mask))
    monkeypatch.setattr(backends, "of_device", lambda device: ("cuda", "triton"))
    monkeypatch.setattr(backends, "can_run", lambda *_: None)

    def race(runs, input, mask, *_):
        raced.append((tuple(runs), mask))
        return {name: answers[name] for name in (*runs, "dense")}

    monkeypatch.setattr(rules, "_race", race)
    choose = lambda mask: rules.choose_on_gpu(x, mask, weight, (1, 1), (1, 1), None)  # noqa: E731
    for mode in ("static", "off"):
        monkeypatch.setenv("PYWINO_PLAN", mode)
        planner.reset()
        assert choose(masks[0]) == "dense"
    monkeypatch.setenv("PYWINO_PLAN", str(tmp_path / "plans.json"))
    planner.reset()
    answers |= {"asked": 1.5, "dense": 1, "cuda": 0.5, "triton": 0.4}
    assert choose(masks[0]) == choose(masks[0]) == "dense"
    assert (asked, raced) == ([], [(("asked",), masks[0])])
    planner.reset()
    answers |= {"asked": 1.02}
    assert choose(masks[0]) == choose(masks[0]) == "triton"
    assert raced[1:] == [(("asked",), masks[0]), (("cuda", "triton"), masks[0])]
    answers |= {"cuda": 1.5, "triton": 1.2}
    assert choose(masks[1]) == "dense"
    assert choose(masks[0]) == "triton"  # as it was measured
    assert len(asked) == 4
    monkeypatch.setattr(planner, "_may_measure", lambda: False)  # while a graph is captured
    assert choose(masks[0]) == "dense"
    assert len(asked) == 4
    planner.reset()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": torch.ones(2, 1, 5, 6)}, RuntimeError, "mask must be bool, got torch.float32"),
        ({"mask": None}, TypeError, "mask must be a tensor, got NoneType"),
        (
            {"mask": torch.ones(2, 1, 6, 5, dtype=torch.bool)},
            RuntimeError,
            r"mask must be \(2 or 1, 1, 5, 6\), got \(2, 1, 6, 5\)",
        ),
        (
            {"mask": torch.ones(3, 1, 5, 6, dtype=torch.bool)},
            RuntimeError,
            r"mask must be \(2 or 1, 1, 5, 6\)",
        ),
        ({"padding": 0}, RuntimeError, r"padding must be 'same' or \(1, 1\)"),
        ({"padding": "valid"}, RuntimeError, "padding must be 'same'"),
        ({"backend": "tpu"}, RuntimeError, "backend must be one of"),
        ({"weight": torch.ones(3, 5, 3, 3)}, RuntimeError, "input must be of 5 channels"),
        ({"bias": torch.ones(4)}, RuntimeError, r"bias must be \(3,\)"),
    ],
)
def test_what_is_refused(change, error, message):
    arguments = {
        "input": torch.ones(2, 4, 5, 6),
        "mask": torch.ones(1, 1, 5, 6, dtype=torch.bool),
        "weight": torch.ones(3, 4, 3, 3),
    }
    pywino.masked_conv2d(**arguments)
    with pytest.raises(error, match=message):
        pywino.masked_conv2d(**(arguments | change))


def test_layers_that_cannot_be():
    for change, message in (
        ({"stride": 2, "padding": 1}, "stride must be"),
        ({"groups": 2}, "groups must be 1"),
        ({"padding_mode": "reflect"}, "padding_mode must be zeros"),
    ):
        with pytest.raises(RuntimeError, match=message):
            pywino.MaskedConv2d(4, 4, 3, **change)
