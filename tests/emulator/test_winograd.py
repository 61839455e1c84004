# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA Winograd kernels, run by the emulator: each stage against float64 on what it really
got, rounding where it rounds; then the whole against a float64 convolution."""

import functools
import math
from ctypes import c_bool, c_int, c_int64
from typing import NamedTuple

import numpy as np
import pytest
import torch
from emulator.build import CSRC, HERE
from emulator.harness import EmulatorError, In, InOut, Out, Struct, Workspace, bf16, from_bf16
from emulator.mutate import Recipe

from pywino.reference import conv_lstm as lstm
from pywino.reference import winograd as reference

SOURCE = HERE / "kernels" / "rooms.cu"
CORE = CSRC / "core" / "winograd"
SM90 = CORE / "cuda_product_sm90.cu"
GROUPED_TILES = CSRC / "core" / "common" / "grouped_tiles.cuh"
GROUPED_TILES_HARMLESS = {
    "return {int(groups), int((rows + G::BM - 1) / G::BM), int((columns + G::BN - 2) / G::BN)};": (
        "channels are multiples of 8"
    ),
    "return {int(groups), int((rows + G::BM - 1) / G::BM), int((columns + G::BN + 1) / G::BN)};": (
        "a tile more, of columns that do not exist"
    ),
}
DTYPES = {"f32": 0, "bf16": 1, "f16": 2}
DOMAINS = {"f16": 0, "f32": 1}
# The unit roundoff of a format, and half the distance of its smallest numbers.
HALF_ULP = {"f32": 2.0**-24, "bf16": 2.0**-8, "f16": 2.0**-11}
SMALLEST = {"f32": 0.0, "bf16": 0.0, "f16": 2.0**-25}
# Relative L2 error against float64 of C = 16...140 channels: performance bounds that the library
# promises (docs/winograd.md), by (domain, tensor, tile).
BOUND = {
    ("f16", "f16", 2): 8e-4,
    ("f16", "f16", 4): 2e-3,
    ("f16", "bf16", 2): 2.6e-3,
    ("f16", "bf16", 4): 3e-3,
    ("f16", "f32", 2): 7e-4,
    ("f16", "f32", 4): 2e-3,
    ("f16", "f16", 6): 7.5e-3,
    ("f16", "bf16", 6): 8e-3,
    ("f16", "f32", 6): 7.5e-3,
    ("f32", "f32", 2): 7e-7,
    ("f32", "f32", 4): 2.5e-6,
    ("f32", "f32", 6): 7e-6,
}


class Case(NamedTuple):
    """A convolution. Nothing here is a multiple of what it should be one of."""

    n: int = 1
    c: int = 16
    h: int = 9
    w: int = 7
    k: int = 24
    padding: int = 1
    dilation: int = 1
    tile: int = 4
    dtype: str = "f16"
    domain: str = "f16"
    channels_last: bool = True
    relu: bool = False
    bias: bool = True
    residual: bool = True
    winograd_relu: bool = False

    @property
    def out(self):
        return tuple(s + 2 * self.padding - 2 * self.dilation for s in (self.h, self.w))

    @property
    def tiles(self):
        """(phases_h, phases_w, rows, columns) of the index map."""
        phases = tuple(min(self.dilation, s) for s in self.out)
        rows = (math.ceil(s / self.dilation) for s in self.out)  # of the first phase
        return *phases, *(math.ceil(r / self.tile) for r in rows)

    @property
    def taps(self):
        return (self.tile + 2) ** 2


CASES = [
    Case(),
    Case(n=2, c=5, h=13, w=11, k=3, tile=2, dtype="bf16"),
    Case(c=40, k=70, dtype="f32", relu=True),
    Case(c=72, k=70, dtype="f32", domain="f32"),
    Case(n=2, c=7, h=9, w=17, k=10, dtype="f32", domain="f32", tile=6, channels_last=False),
    Case(c=130, h=19, w=22, k=140, padding=2, dilation=2),
    Case(n=3, c=24, h=5, w=6, k=16, padding=3, dilation=3, tile=2, dtype="bf16", residual=False),
    Case(c=3, h=2, w=1, k=9, padding=4, dilation=4, dtype="f32", channels_last=False, bias=False),
    Case(n=2, c=20, h=8, w=6, k=33, padding=0, tile=2, dtype="f32", domain="f32", relu=True),
    Case(n=2, c=6, h=13, w=9, k=35, tile=6, channels_last=False),
    # NCHW: strips of 8 tiles and what is left of a row, dilated ones, more channels than a stage.
    Case(c=40, h=6, w=45, k=36, dtype="bf16", channels_last=False, relu=True),
    Case(c=70, h=13, w=11, k=66, padding=2, dilation=2, tile=2, channels_last=False),
    Case(n=2, c=34, h=5, w=62, k=9, tile=6, dtype="f32", channels_last=False, bias=False),
    Case(c=50, h=9, w=15, k=12, padding=2, dilation=2, tile=6, dtype="bf16", relu=True),
    Case(c=18, h=6, w=6, k=20, tile=2, winograd_relu=True, dtype="bf16", residual=False),
    Case(c=18, h=6, w=9, k=20, winograd_relu=True, dtype="f32", domain="f32", residual=False),
    # More channels than a block's threads have in pairs, without a bias.
    Case(c=530, h=5, w=5, k=4, bias=False),
]


def encode(values, dtype):
    if dtype == "bf16":
        return bf16(values)
    return np.asarray(values, {"f32": np.float32, "f16": np.float16}[dtype])


def decode(values):
    return from_bf16(values) if values.dtype == np.uint16 else values.astype(np.float64)


def empty(shape, dtype):
    return np.empty(shape, {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[dtype])


def padded(channels):
    return -(-channels // 8) * 8


class Tensors:
    """Random tensors of a case, in the layout that the kernels read."""

    def __init__(self, case, seed=0):
        random = np.random.default_rng(seed)
        size = case.tile + 2 if case.winograd_relu else 3
        self.case = case
        self.input = encode(random.standard_normal((case.n, case.c, case.h, case.w)), case.dtype)
        weight = random.standard_normal((case.k, case.c, size, size)) / (size * np.sqrt(case.c))
        self.weight = encode(weight, case.dtype)
        self.bias = random.standard_normal(case.k).astype(np.float32)
        self.residual = encode(random.standard_normal((case.n, case.k, *case.out)), case.dtype)
        self.grad = encode(random.standard_normal((case.n, case.k, *case.out)), case.dtype)

    def layout(self, x):
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1) if self.case.channels_last else x)

    def back(self, x):
        return x.transpose(0, 3, 1, 2) if self.case.channels_last else x


def tiles_fields(case):
    phases_h, phases_w, rows, columns = case.tiles
    numbers = {
        "size": case.tile,
        "phases_h": phases_h,
        "phases_w": phases_w,
        "rows": rows,
        "columns": columns,
        "dil_h": case.dilation,
        "dil_w": case.dilation,
    }
    count = case.n * phases_h * phases_w * rows * columns
    return {**{n: c_int(v) for n, v in numbers.items()}, "tile_count": c_int64(count)}


def map_fields(case, c, h, w):
    if case.channels_last:
        strides = (h * w * c, 1, w * c, c)
    else:
        strides = (c * h * w, h * w, w, 1)
    names = ("n", "c", "h", "w", "stride_n", "stride_c", "stride_h", "stride_w")
    return {name: c_int64(v) for name, v in zip(names, (case.n, c, h, w, *strides))}


def geometry_fields(case):
    sizes = (case.n, case.c, case.h, case.w, case.k, *[case.padding] * 2, *[case.dilation] * 2)
    names = ("n", "c", "h", "w", "k", "pad_h", "pad_w", "dil_h", "dil_w")
    return {
        **{name: c_int64(v) for name, v in zip(names, sizes)},
        "tile": c_int(case.tile),
        "channels_last": c_bool(case.channels_last),
        "dtype": c_int(DTYPES[case.dtype]),
        "end": c_int(0),  # the struct ends at a multiple of eight bytes
    }


# --- the stages ---


def run_filter(kernel, tensors, tile=None, rotate=False, **how):
    """U and its scales by the kernel; tile 1: for the direct one."""
    case, weight = tensors.case, tensors.weight
    tile = tile or case.tile
    k, c = (case.c, case.k) if rotate else (case.k, case.c)
    element = case.dtype if tile == 1 else case.domain
    taps = 9 if tile == 1 else (tile + 2) ** 2
    u = empty((taps, padded(k), c if tile == 1 else padded(c)), element)
    scale = np.ones(k, np.float32)
    strides = [s // weight.itemsize for s in weight.strides]
    if rotate:
        strides[:2] = strides[1::-1]
    names = ("stride_k", "stride_c", "stride_h", "stride_w")
    scaled = tile != 1 and element == "f16"
    fields = {
        "weight": In(weight),
        "dtype": c_int(DTYPES[case.dtype]),
        "out_channels": c_int64(k),
        "in_channels": c_int64(c),
        **{name: c_int64(s) for name, s in zip(names, strides)},
        "padded_out": c_int64(u.shape[1]),
        "padded_in": c_int64(u.shape[2]),
        "tile": c_int(tile),
        "rotate": c_bool(rotate),
        "spatial": c_bool(not case.winograd_relu),
        "element": c_int(DTYPES[element]),
        "u": Out(u),
        "scale": Out(scale) if scaled else None,
    }
    kernel.call("pywino_winograd_filter_transform", Struct(fields), None, **how)
    return u, scale


def launch(kernel, stage, fields, images, nchw=False, **how):
    """A launcher's call; with so many images before the tensor, where `images` is a number; nchw:
    the launcher of cuda_nchw.cu itself."""
    if images is None:
        kernel.call(
            f"pywino_winograd_{stage}{'_nchw' if nchw else ''}", Struct(fields), None, **how
        )
    else:
        kernel.call(f"winograd_far_{stage}", Struct(fields), images, None, **how)


def run_transform(kernel, tensors, first, count, gradient=False, peaks=None, images=None, **how):
    """V and its tiles' scales; `gradient`: D, of an output's gradient."""
    case = tensors.case
    channels, size = (case.k, case.out) if gradient else (case.c, (case.h, case.w))
    v = empty((case.taps, count, padded(channels)), case.domain)
    scale = np.ones(count, np.float32)
    by_tile = case.domain == "f16" and peaks is None
    fields = {
        **tiles_fields(case),
        **map_fields(case, channels, *size),
        "first": c_int64(first),
        "count": c_int64(count),
        "channels": c_int64(v.shape[2]),
        "pad_h": c_int(0 if gradient else case.padding),
        "pad_w": c_int(0 if gradient else case.padding),
        "dtype": c_int(DTYPES[case.dtype]),
        "domain": c_int(DOMAINS[case.domain]),
        "relu": c_bool(case.winograd_relu and not gradient),
        "gradient": c_bool(gradient),
        "input": In(tensors.layout(tensors.grad if gradient else tensors.input)),
        "v": Out(v),
        "scale": Out(scale) if by_tile else None,
        "peaks": None if peaks is None else In(peaks),
        "gate": None,
    }
    launch(kernel, "input_transform", fields, images, **how)
    return v, scale


def product_of(domain, v, u, m, out_channels=None):
    """The struct of a product into M, an `Out`, of as many output channels as U has."""
    fields = {
        "tiles": c_int64(v.shape[1]),
        "channels": c_int64(v.shape[2]),
        "out_channels": c_int64(out_channels or u.shape[1]),
        "taps": c_int(v.shape[0]),
        "domain": c_int(DOMAINS[domain]),
        "v": In(v),
        "u": In(u),
        "m": m,
    }
    return Struct(fields)


def run_product(kernel, domain, v, u, launcher="pywino_winograd_product", more=(), **how):
    m = np.empty((v.shape[0], v.shape[1], u.shape[1]), v.dtype)
    kernel.call(launcher, product_of(domain, v, u, Out(m)), *more, None, **how)
    return m


def run_summed_product(kernel, domain, d, v, splits, s=None, **how):
    """S of each split; added to `s` where there is one."""
    sums = np.zeros((splits, len(v), d.shape[2], v.shape[2]), np.float32) if s is None else s
    fields = {
        "tiles": c_int64(v.shape[1]),
        "channels": c_int64(v.shape[2]),
        "out_channels": c_int64(d.shape[2]),
        "taps": c_int(v.shape[0]),
        "splits": c_int(splits),
        "domain": c_int(DOMAINS[domain]),
        "accumulate": c_bool(s is not None),
        "d": In(d),
        "v": In(v),
        "s": Out(sums) if s is None else InOut(sums),
    }
    kernel.call("pywino_winograd_summed_product", Struct(fields), None, **how)
    return sums


def run_filter_gradient(kernel, case, s, peaks, **how):
    """dW of S (splits, taps, K', C'); `peaks`: of the gradient and the input, or None."""
    size = case.tile + 2 if case.winograd_relu else 3
    gradient = empty((case.k, case.c, size, size), case.dtype)
    fields = {
        "out_channels": c_int64(case.k),
        "in_channels": c_int64(case.c),
        "padded_out": c_int64(s.shape[2]),
        "padded_in": c_int64(s.shape[3]),
        "tile": c_int(case.tile),
        "splits": c_int(s.shape[0]),
        "dtype": c_int(DTYPES[case.dtype]),
        "spatial": c_bool(not case.winograd_relu),
        "s": In(s),
        "grad_peaks": In(peaks[0]) if peaks else None,
        "input_peaks": In(peaks[1]) if peaks else None,
        "gradient": Out(gradient),
    }
    kernel.call("pywino_winograd_filter_gradient", Struct(fields), None, **how)
    return gradient


def run_input_gradient(
    kernel, tensors, m, tile_scale, filter_scale, first, gradient, masked, **how
):
    """Adds what tiles `first` and on of M give to `gradient`."""
    case = tensors.case
    for part in range(4):
        fields = {
            **tiles_fields(case),
            **map_fields(case, case.c, case.h, case.w),
            "first": c_int64(first),
            "count": c_int64(m.shape[1]),
            "channels": c_int64(m.shape[2]),
            "pad_h": c_int(case.padding),
            "pad_w": c_int(case.padding),
            "dtype": c_int(DTYPES[case.dtype]),
            "domain": c_int(DOMAINS[case.domain]),
            "row": c_int(part // 2),
            "column": c_int(part % 2),
            "input": In(tensors.layout(tensors.input)) if masked else None,
            "m": In(m),
            "tile_scale": In(tile_scale),
            "filter_scale": In(filter_scale),
            "gradient": InOut(gradient),
        }
        kernel.call("pywino_winograd_input_gradient", Struct(fields), None, **how)


def run_output(kernel, tensors, m, tile_scale, filter_scale, first, images=None, **how):
    """The output, of which tiles `first` and on are written, the rest is as it was: zero."""
    case = tensors.case
    y = np.zeros(tensors.layout(tensors.residual).shape, tensors.residual.dtype)
    fields = {
        **tiles_fields(case),
        **map_fields(case, case.k, *case.out),
        "first": c_int64(first),
        "count": c_int64(m.shape[1]),
        "channels": c_int64(m.shape[2]),
        "dtype": c_int(DTYPES[case.dtype]),
        "domain": c_int(DOMAINS[case.domain]),
        "relu": c_bool(case.relu),
        "m": In(m),
        "tile_scale": In(tile_scale),
        "filter_scale": In(filter_scale),
        "bias": In(tensors.bias) if case.bias else None,
        "residual": In(tensors.layout(tensors.residual)) if case.residual else None,
        "output": InOut(y),
        "partial": None,
    }
    launch(kernel, "output_transform", fields, images, **how)
    return tensors.back(y)


# --- float64 ---


def matrices(case):
    return [m.numpy() for m in reference.transform_matrices(case.tile, torch.float64, "cpu")]


def in_tiles(case, y):
    """(n, channels, H, W) -> (tiles in the kernels' order, channels, rows, columns), zeros where
    tiles stick out: `y` begins at the first tile's first row."""
    phases_h, phases_w, rows, columns = case.tiles
    d, m = case.dilation, case.tile
    size = m + 2 if y.shape[2] == case.out[0] + 2 * d else m  # of a patch, or of an output tile
    tiles = []
    whole = np.zeros((*y.shape[:2], (rows * m + 2) * d, (columns * m + 2) * d))
    whole[:, :, : y.shape[2], : y.shape[3]] = y
    for image in whole:
        for p in range(phases_h):
            for q in range(phases_w):
                grid = image[:, p::d, q::d]
                for r in range(rows):
                    for c in range(columns):
                        tiles.append(grid[:, r * m : r * m + size, c * m : c * m + size])
    return np.stack(tiles)


def patches(tensors):
    case, p = tensors.case, tensors.case.padding
    return in_tiles(case, np.pad(decode(tensors.input), ((0, 0), (0, 0), (p, p), (p, p))))


def transformed(matrix, tiles):
    """matrix x matrix^T for all tiles and the sum of its terms' magnitudes, as (taps, tiles, C)."""
    a = len(matrix) ** 2
    value = np.einsum("ai,tcij,bj->abtc", matrix, tiles, matrix)
    size = np.einsum("ai,tcij,bj->abtc", *(abs(x) for x in (matrix, tiles, matrix)))
    return value.reshape(a, *value.shape[2:]), size.reshape(a, *size.shape[2:])


def assert_rounded(actual, expected, magnitude, form, sums=1):
    """`actual` is `expected` rounded once to a format, after fp32 arithmetic whose terms have a sum
    of magnitudes: `sums` roundings of 2^-24 of it."""
    bound = HALF_ULP[form] * 1.01 * np.abs(expected) + SMALLEST[form]
    bound = bound + sums * 2.0**-24 * magnitude
    excess = np.abs(decode(actual) - expected) - bound
    assert (excess <= 0).all(), f"{(excess > 0).sum()} of {excess.size}, worst {excess.max():.2e}"


def tap_scale(matrix, domain):
    """What taps are multiplied by beside tiles, filters and channels, (a, a): each row of a matrix
    by the power of two that brings its absolute sum nearest to the largest one."""
    rows = np.abs(matrix).sum(1)
    shift = 2.0 ** np.floor(np.log2(rows.max() / rows) + 1e-9)
    if domain == "f32":
        shift[:] = 1
    return np.outer(shift, shift)


def of_filters(case):
    """The same of U: in F6 alone, whatever the weight's domain."""
    _, g, _ = matrices(case)
    return tap_scale(g, case.domain if case.tile == 6 else "f32")


# A transform is two passes of at most four additions of products, each rounded once or twice.
TRANSFORM = 16


# (gradient, by_channel) of check_transform: forward's, the input gradient's, the weight gradient's.
TRANSFORMS = [(False, False), (True, False), (False, True), (True, True)]


def tiles_between(count, first=1):
    """Those of a launch that is neither the first nor the last, where there are enough."""
    first = min(first, count - 1)
    return slice(first, max(first + 1, count - 1))


def check_transform(kernel, case, gradient=False, by_channel=False, **how):
    """V of the input or D of the output's gradient, scaled by tile or by channel."""
    tensors = Tensors(case)
    bt, _, at = matrices(case)
    matrix = at.T if gradient else bt
    tiles = in_tiles(case, decode(tensors.grad)) if gradient else patches(tensors)
    value, magnitude = transformed(matrix, tiles)
    launch = tiles_between(value.shape[1])
    first, count = launch.start, launch.stop - launch.start
    channels = tiles.shape[1]
    peaks = peaks_of(tensors.grad if gradient else tensors.input) if by_channel else None
    v, scale = run_transform(kernel, tensors, first, count, gradient, peaks, **how)
    growth = np.abs(matrix).sum(1).max() ** 2
    taps = tap_scale(matrix, case.domain if gradient else "f32").reshape(-1, 1, 1)
    value, magnitude = value * taps, magnitude * taps
    if by_channel:
        scale = scale_of(peaks, growth)
    else:
        scale = scale[:, None]
        if case.domain == "f16":
            largest = np.abs(tiles).max((1, 2, 3))[launch, None]
            assert (scale == 2.0 ** np.round(np.log2(scale))).all()
            assert (scale >= largest * growth).all()
            assert (scale <= np.maximum(largest * growth * 4, 1)).all()
    if case.domain == "f16":
        assert np.abs(v.astype(float)).max() <= 1
    value, magnitude = (x[:, launch] / scale for x in (value, magnitude))
    if case.winograd_relu and not gradient:
        value = np.maximum(value, 0)
    assert_rounded(v[..., :channels], value, magnitude, case.domain, TRANSFORM)
    assert not v[..., channels:].any()


def peaks_of(x):
    """max |x| of each channel."""
    return np.abs(decode(x)).max((0, 2, 3)).astype(np.float32)


def scale_of(peaks, growth):
    """The powers of two that a transform takes from peaks: of growth 2^2, 2^5, …, 2^12."""
    bits = np.ceil(np.log2(growth))
    return 2.0 ** (np.floor(np.log2(peaks.astype(float))) + 1 + bits)


def check_filter_transform(kernel, case, rotate, **how):
    tensors = Tensors(case)
    u, scale = run_filter(kernel, tensors, rotate=rotate, **how)
    weight = decode(tensors.weight)
    if rotate:
        weight = weight.transpose(1, 0, 2, 3)
        if not case.winograd_relu:
            weight = weight[:, :, ::-1, ::-1]
    g = np.eye(case.tile + 2) if case.winograd_relu else matrices(case)[1]
    value, magnitude = transformed(g, weight)
    taps = of_filters(case).reshape(-1, 1, 1)
    value, magnitude = value * taps, magnitude * taps
    k, c = weight.shape[:2]
    if case.domain == "f16":
        largest = np.abs(value).max((0, 2))
        assert (scale == 2.0 ** np.round(np.log2(scale))).all()
        assert (scale * 1.001 >= largest).all()
        assert (scale <= 4 * largest).all()
    expected, magnitude = (x / scale[:, None] for x in (value, magnitude))
    # In double precision, then to fp32, then to the format.
    assert_rounded(u[:, :k, :c], expected, magnitude, case.domain)
    assert not u[:, k:].any()
    assert not u[:, :, c:].any()


# taps, tiles, C', K': each of the three block shapes, with edges and without, one block and
# several, fewer steps than stages and more.
PRODUCTS = [
    (4, 49, 24, 72),  # 64 x 64
    (3, 70, 200, 8),
    (2, 257, 64, 128),
    (64, 129, 24, 40),  # 128 x 64
    (32, 256, 40, 136),  # 128 x 128
    (64, 130, 8, 128),
]


def block_of(shape):
    """As launch_for in cuda_product.cu has it."""
    taps, tiles, _, k = shape
    if taps * -(-tiles // 128) * -(-k // 128) < 128 or tiles <= 64:
        return 64, 64
    return 128, 64 if k <= 64 else 128


def test_products_take_every_block():
    assert {block_of(shape) for shape in PRODUCTS} == {(64, 64), (128, 64), (128, 128)}


# The same for wgmma: each of its three tiles, and edges of each; blocks with one tile and with
# several, fewer steps than stages and more, one step that is not whole.
PRODUCTS_SM90 = [
    (2, 300, 136, 264),
    (5, 250, 200, 128),
    (1, 129, 520, 120),
    (7, 65, 8, 72),
    (1, 260, 64, 136),
]


def check_product(kernel, shape, domain, **how):
    taps, tiles, c, k = shape
    random = np.random.default_rng(c)
    v = empty((taps, tiles, c), domain)
    u = empty((taps, k, c), domain)
    for array in (v, u):
        array[...] = random.uniform(-1, 1, array.shape)
    m = run_product(kernel, domain, v, u, **how)
    v, u = decode(v), decode(u)
    expected = np.einsum("ptc,pkc->ptk", v, u)
    magnitude = np.einsum("ptc,pkc->ptk", abs(v), abs(u))
    # fp16: products are exact. 3xTF32: high and low have 22 bits of a factor, and low low is left
    # out, so a product has an error of 3 2^-22 or twelve fp32 roundings.
    assert_rounded(m, expected, magnitude, domain, sums=4 if domain == "f16" else 16)
    if domain == "f32":
        assert np.linalg.norm(m - expected) <= 1e-6 * np.linalg.norm(expected)


def check_product_sm90(kernel, shape, **how):
    check_product(kernel, shape, "f16", launcher="pywino_winograd_product_sm90", **how)


def check_output_transform(kernel, case, **how):
    tensors = Tensors(case)
    random = np.random.default_rng(1)
    phases_h, phases_w, rows, columns = case.tiles
    count = case.n * phases_h * phases_w * rows * columns
    m = empty((case.taps, count, padded(case.k)), case.domain)
    m[...] = random.standard_normal(m.shape)
    tile_scale = 2.0 ** random.integers(-3, 3, count).astype(np.float32)
    filter_scale = 2.0 ** random.integers(-3, 3, case.k).astype(np.float32)
    launch = tiles_between(count, count // 2)
    own = np.ascontiguousarray(m[:, launch])
    y = run_output(kernel, tensors, own, tile_scale[launch], filter_scale, launch.start, **how)
    a = case.tile + 2
    _, _, at = matrices(case)
    square = decode(m)[..., : case.k].reshape(a, a, count, case.k)
    square = square / of_filters(case)[..., None, None]
    value = np.einsum("pa,abtk,qb->tkpq", at, square, at)
    magnitude = np.einsum("pa,abtk,qb->tkpq", abs(at), abs(square), abs(at))
    if case.domain == "f16":
        scale = (tile_scale[:, None] * filter_scale)[..., None, None]
        value, magnitude = value * scale, magnitude * scale
    for exists, extra in (
        (case.bias, tensors.bias[None, :, None, None].astype(float)),
        (case.residual, in_tiles(case, decode(tensors.residual))),
    ):
        if exists:
            value, magnitude = value + extra, magnitude + abs(extra)
    if case.relu:
        value = np.maximum(value, 0)
    inside = in_tiles(case, np.ones((case.n, case.k, *case.out)))
    others = np.ones(count, bool)
    others[launch] = False
    inside[others] = 0
    form = "f32" if y.dtype == np.float32 else case.dtype
    written = in_tiles(case, decode(y))
    assert not written[others].any(), "tiles of another launch were written"
    half_ulp = HALF_ULP[form] * 1.01 * abs(value) + SMALLEST[form]
    bound = half_ulp + TRANSFORM * 2.0**-24 * magnitude
    excess = (abs(written - value) - bound) * inside
    assert excess.max() <= 0, f"worst {excess.max():.2e}"


# taps, tiles, C', K', splits: both block shapes and edges of each, one step, splits without a tile.
SUMS = [
    *((4, 49, 24, 72, 3), (3, 129, 136, 72, 2), (2, 291, 72, 200, 5), (1, 5, 8, 16, 4)),
    *((2, 64, 64, 64, 1), (2, 70, 128, 128, 2)),
]


def check_summed_product(kernel, shape, domain, **how):
    taps, tiles, c, k, splits = shape
    random = np.random.default_rng(c)
    d, v = (empty((taps, tiles, channels), domain) for channels in (k, c))
    for array in (d, v):
        array[...] = random.uniform(-1, 1, array.shape)
    s = run_summed_product(kernel, domain, d, v, splits, **how)
    d, v = decode(d), decode(v)
    expected = np.einsum("ptk,ptc->pkc", d, v)
    magnitude = np.einsum("ptk,ptc->pkc", abs(d), abs(v))
    # As in check_product; the splits' sums are rounded to fp32.
    assert_rounded(s.sum(0, np.float64), expected, magnitude, "f32", sums=16)
    half = tiles // 2 // 64 * 64
    if half:  # two launches: the second adds
        parts = [(d[:, :half], v[:, :half]), (d[:, half:], v[:, half:])]
        encoded = [tuple(np.ascontiguousarray(encode(x, domain)) for x in part) for part in parts]
        s = run_summed_product(kernel, domain, *encoded[0], splits, **how)
        s = run_summed_product(kernel, domain, *encoded[1], splits, s, **how)
        assert_rounded(s.sum(0, np.float64), expected, magnitude, "f32", sums=20)


def check_filter_gradient(kernel, case, **how):
    random = np.random.default_rng(case.c)
    splits = 1 + case.c % 3
    s = random.standard_normal((splits, case.taps, padded(case.k), padded(case.c)))
    s = s.astype(np.float32)
    peaks = None
    scale = np.ones((case.k, case.c))
    bt, g, at = matrices(case)
    if case.domain == "f16":
        peaks = [2.0 ** random.uniform(-12, -4, n).astype(np.float32) for n in (case.k, case.c)]
        growths = (np.abs(x).sum(1).max() ** 2 for x in (at.T, bt))
        scales = [scale_of(peak, growth) for peak, growth in zip(peaks, growths)]
        scale = scales[0][:, None] * scales[1]
    actual = run_filter_gradient(kernel, case, s, peaks, **how)
    a = case.tile + 2
    sums = s.astype(float).sum(0)[:, : case.k, : case.c].transpose(1, 2, 0)
    sizes = abs(s.astype(float)).sum(0)[:, : case.k, : case.c].transpose(1, 2, 0)
    scale = scale[..., None, None] / tap_scale(at.T, case.domain)
    sums, sizes = (x.reshape(case.k, case.c, a, a) * scale for x in (sums, sizes))
    if not case.winograd_relu:
        sums = np.einsum("ai,kcab,bj->kcij", g, sums, g)
        sizes = np.einsum("ai,kcab,bj->kcij", abs(g), sizes, abs(g))
    assert_rounded(actual, sums, sizes, case.dtype, TRANSFORM + splits)


def check_input_gradient(kernel, case, masked=True, **how):
    tensors = Tensors(case)
    random = np.random.default_rng(1)
    bt, _, at = matrices(case)
    v, _ = transformed(bt, patches(tensors))
    m = empty((case.taps, v.shape[1], padded(case.c)), case.domain)
    m[...] = random.standard_normal(m.shape)
    tile_scale = 2.0 ** random.integers(-3, 3, v.shape[1]).astype(np.float32)
    filter_scale = 2.0 ** random.integers(-3, 3, case.c).astype(np.float32)
    gradient = tensors.layout(np.zeros(tensors.input.shape, np.float32))
    half = v.shape[1] // 2  # two launches, as in parts
    for first, tiles in ((0, slice(0, half)), (half, slice(half, None))):
        part = np.ascontiguousarray(m[:, tiles])
        if part.shape[1]:
            scales = tile_scale[tiles], filter_scale
            run_input_gradient(kernel, tensors, part, *scales, first, gradient, masked, **how)
    taps = (tap_scale(at.T, case.domain) * of_filters(case)).reshape(-1, 1, 1)
    dv = decode(m)[..., : case.c] / taps
    dv = dv * (v > 0) if masked else dv
    if case.domain == "f16":
        dv = dv * tile_scale[:, None] * filter_scale
    value, magnitude = (overlap_add(case, *x) for x in ((bt, dv), (abs(bt), abs(dv))))
    assert_rounded(tensors.back(gradient), value, magnitude, "f32", TRANSFORM + 4)


ENDS = [
    check_input_gradient,
    functools.partial(check_input_gradient, masked=False),
    check_filter_gradient,
]


def overlap_add(case, bt, dv):
    """The sum of B dv B^T over all tiles, (n, C, H, W)."""
    phases_h, phases_w, rows, columns = case.tiles
    d, m, a, p = case.dilation, case.tile, case.tile + 2, case.padding
    square = np.einsum("ai,abtc,bj->tcij", bt, dv.reshape(a, a, *dv.shape[1:]), bt)
    whole = np.zeros((case.n, case.c, (rows * m + 2) * d, (columns * m + 2) * d))
    order = np.ndindex(case.n, phases_h, phases_w, rows, columns)
    for tile, (n, y, x, r, c) in zip(square, order):
        grid = whole[n, :, y::d, x::d]
        grid[:, r * m : r * m + a, c * m : c * m + a] += tile
    whole = np.pad(whole, [(0, 0), (0, 0)] + 2 * [(0, max(case.h, case.w) + p)])
    return whole[:, :, p : p + case.h, p : p + case.w]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("check", ENDS)
def test_ends_of_gradients(emulate, run, check, case):
    mode, schedule = run
    check(emulate(SOURCE, mode), case, schedule=schedule)


@pytest.mark.parametrize("shape", SUMS, ids=str)
@pytest.mark.parametrize("domain", DOMAINS)
def test_summed_product(emulate, run, shape, domain):
    mode, schedule = run
    check_summed_product(emulate(SOURCE, mode), shape, domain, schedule=schedule)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("check", [check_transform, check_output_transform])
def test_transforms(emulate, run, check, case):
    mode, schedule = run
    check(emulate(SOURCE, mode), case, schedule=schedule)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("check", [check_transform, check_output_transform])
def test_more_than_two_to_the_31_elements(emulate, check, channels_last):
    """Images whose elements are numbered from 2^32 on, and their bytes from 2^33 on."""
    case = Case(c=16, k=16, channels_last=channels_last)
    images = 2**32 // (16 * case.h * case.w) + 1
    check(emulate(SOURCE, "check"), case, images=images)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transforms_of_gradients(emulate, run, case):
    mode, schedule = run
    for gradient, by_channel in TRANSFORMS[1:]:
        if case.domain == "f16" or not by_channel:
            check_transform(emulate(SOURCE, mode), case, gradient, by_channel, schedule=schedule)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rotate", [False, True])
def test_filter_transform(emulate, run, case, rotate):
    mode, schedule = run
    check_filter_transform(emulate(SOURCE, mode), case, rotate, schedule=schedule)


MMA = {"launcher": "winograd_product", "more": (0,)}  # mma.sync, where wgmma would be chosen, too


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
@pytest.mark.parametrize("domain", DOMAINS)
def test_product(emulate, run, shape, domain):
    mode, schedule = run
    check_product(emulate(SOURCE, mode), shape, domain, **MMA, schedule=schedule)


@pytest.mark.parametrize("shape", PRODUCTS_SM90, ids=str)
def test_product_sm90(emulate, run, shape):
    mode, schedule = run
    check_product_sm90(emulate(SM90, mode), shape, schedule=schedule)


@pytest.mark.parametrize(
    ("shape", "domain", "wgmma", "chosen"),
    [
        ((36, 131, 8, 136), "f16", 1, "product_sm90"),
        ((36, 131, 8, 136), "f16", 0, "product"),
        ((36, 131, 8, 136), "f32", 1, "product"),
        ((64, 257, 8, 64), "f16", 1, "product"),  # few outputs
        ((2, 131, 8, 136), "f16", 1, "product"),  # few blocks
    ],
)
def test_choice_of_the_product(emulate, shape, domain, wgmma, chosen):
    """By the name of the kernel that writes to an M that is an input."""
    taps, tiles, c, k = shape
    v, u, m = (
        np.zeros((taps, *size), "f2" if domain == "f16" else "f4")
        for size in ((tiles, c), (k, c), (tiles, k))
    )
    arguments = product_of(domain, v, u, In(m)), wgmma, None
    with pytest.raises(EmulatorError) as caught:
        emulate(SOURCE, "check").call("winograd_product", *arguments)
    ((kind, kernel),) = {(finding.kind, finding.kernel) for finding in caught.value.findings}
    assert kind == "READ-ONLY"
    assert kernel.strip("(").split("<")[0] == chosen


# --- the whole ---


def convolution(tensors):
    case = tensors.case
    to_torch = lambda x: torch.from_numpy(np.ascontiguousarray(decode(x)))  # noqa: E731
    input, weight = to_torch(tensors.input), to_torch(tensors.weight)
    if case.winograd_relu:
        y = reference.winograd_relu_conv2d(
            input, weight, None, case.padding, case.dilation, case.tile
        )
    else:
        y = torch.conv2d(input, weight, None, 1, case.padding, case.dilation)
    y = y.numpy()
    if case.bias:
        y = y + tensors.bias[:, None, None]
    if case.residual:
        y = y + decode(tensors.residual)
    return np.maximum(y, 0) if case.relu else y


NO_CELL = {"second": None, "second_c": c_int64(0), "cell": None, "next_cell": None}


def extra_fields(gate, mean, partial_bytes):
    """A gate and the means of one image, in the kernels' params."""
    fields = {"gate": In(gate) if gate is not None else None}
    fields["mean"] = Out(mean) if mean is not None else None
    return fields | {"partial": Workspace(partial_bytes) if mean is not None else None}


def run_forward(kernel, tensors, limit=256 << 20, gate=None, mean=None, **how):
    case = tensors.case
    u, filter_scale = run_filter(kernel, tensors, **how)
    tiles, nbytes = workspace_of(kernel, case, limit)
    floats = np.zeros(1, np.int64)
    kernel.call("winograd_mean_floats", Struct(geometry_fields(case)), tiles, InOut(floats))
    y = empty(tensors.layout(tensors.residual).shape, case.dtype)
    fields = {
        **geometry_fields(case),
        "domain": c_int(DOMAINS[case.domain]),
        "relu": c_bool(case.relu),
        "winograd_relu": c_bool(case.winograd_relu),
        "input": In(tensors.layout(tensors.input)),
        "filter": In(u),
        "filter_scale": In(filter_scale),
        "bias": In(tensors.bias) if case.bias else None,
        "residual": In(tensors.layout(tensors.residual)) if case.residual else None,
        "output": Out(y),
        "workspace": Workspace(nbytes),
        "chunk": c_int64(tiles),
        **extra_fields(gate, mean, 4 * int(floats[0])),
    }
    kernel.call("winograd_forward", Struct(fields), None, **how)
    return tensors.back(y), tiles


def workspace_of(kernel, case, limit):
    tiles, nbytes = np.zeros(1, np.int64), np.zeros(1, np.int64)
    geometry = Struct(geometry_fields(case))
    arguments = (DOMAINS[case.domain], limit, InOut(tiles), InOut(nbytes))
    kernel.call("winograd_workspace", geometry, *arguments)
    assert nbytes[0] <= limit
    return int(tiles[0]), int(nbytes[0])


def run_weight_gradient(kernel, tensors, limit=256 << 20, **how):
    case = tensors.case
    tiles, nbytes = workspace_of(kernel, case, limit)
    numbers = np.zeros(2, np.int64)
    kernel.call(
        "winograd_sums", Struct(geometry_fields(case)), DOMAINS[case.domain], InOut(numbers)
    )
    size = case.tile + 2 if case.winograd_relu else 3
    gradient = empty((case.k, case.c, size, size), case.dtype)
    scaled = case.domain == "f16"
    fields = {
        **geometry_fields(case),
        "domain": c_int(DOMAINS[case.domain]),
        "spatial": c_bool(not case.winograd_relu),
        "winograd_relu": c_bool(case.winograd_relu),
        "input": In(tensors.layout(tensors.input)),
        "grad": In(tensors.layout(tensors.grad)),
        "input_peaks": In(peaks_of(tensors.input)) if scaled else None,
        "grad_peaks": In(peaks_of(tensors.grad)) if scaled else None,
        "gradient": Out(gradient),
        "sums": Workspace(4 * int(numbers[1])),
        "workspace": Workspace(nbytes),
        "chunk": c_int64(tiles),
    }
    kernel.call("winograd_weight_gradient", Struct(fields), None, **how)
    return gradient


def run_domain_input_gradient(kernel, tensors, limit=256 << 20, **how):
    case = tensors.case
    u, filter_scale = run_filter(kernel, tensors, rotate=True, **how)
    tiles, nbytes = workspace_of(kernel, case, limit)
    gradient = tensors.layout(np.zeros(tensors.input.shape, np.float32))
    fields = {
        **geometry_fields(case),
        "domain": c_int(DOMAINS[case.domain]),
        "winograd_relu": c_bool(case.winograd_relu),
        "input": In(tensors.layout(tensors.input)),
        "grad": In(tensors.layout(tensors.grad)),
        "filter": In(u),
        "filter_scale": In(filter_scale),
        "gradient": InOut(gradient),
        "workspace": Workspace(nbytes),
        "chunk": c_int64(tiles),
    }
    kernel.call("winograd_domain_input_gradient", Struct(fields), None, **how)
    return tensors.back(gradient)


def exact_gradients(tensors):
    """Of the input and of the weight, in float64."""
    case = tensors.case
    leaves = [tensors.input, tensors.weight, tensors.grad]
    x, w, g = (torch.from_numpy(np.ascontiguousarray(decode(t))) for t in leaves)
    x.requires_grad_()
    w.requires_grad_()
    if case.winograd_relu:
        y = reference.winograd_relu_conv2d(x, w, None, case.padding, case.dilation, case.tile)
    else:
        y = torch.conv2d(x, w, None, 1, case.padding, case.dilation)
    return [t.numpy() for t in torch.autograd.grad(y, (x, w), g)]


def error(y, expected):
    return np.linalg.norm(decode(y) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mode", ["fast", "check", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_forward(emulate, mode, case):
    tensors = Tensors(case)
    y, _ = run_forward(emulate(SOURCE, mode), tensors)
    assert error(y, convolution(tensors)) <= BOUND[case.domain, case.dtype, case.tile]


@pytest.mark.parametrize("mode", ["fast", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_forward_of_many_tiles_and_outputs(emulate, mode):
    """Large enough for wgmma, where there is that, among the other stages."""
    case = Case(n=2, c=40, h=33, w=34, k=136, dtype="bf16", residual=False)
    tensors = Tensors(case)
    y, tiles = run_forward(emulate(SOURCE, mode), tensors)
    assert case.taps * -(-tiles // 128) * -(-case.k // 128) >= 128
    assert error(y, convolution(tensors)) <= BOUND["f16", "bf16", 4]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mode", ["fast", "check", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_weight_gradient(emulate, mode, case):
    tensors = Tensors(case)
    gradient = run_weight_gradient(emulate(SOURCE, mode), tensors)
    bound = BOUND[case.domain, case.dtype, case.tile]
    assert error(gradient, exact_gradients(tensors)[1]) <= bound


RELU_CASES = [
    *(case for case in CASES if case.winograd_relu),
    Case(
        n=2, c=13, h=9, w=11, k=18, dilation=2, padding=1, tile=2, winograd_relu=True, dtype="f16"
    ),
    Case(c=7, h=3, w=5, k=9, padding=2, winograd_relu=True, dtype="f32", channels_last=False),
    Case(n=2, c=6, h=9, w=8, k=5, padding=0, tile=6, winograd_relu=True, dtype="f32", domain="f32"),
    Case(n=2, c=6, h=9, w=8, k=5, tile=6, winograd_relu=True),
]


@pytest.mark.parametrize("case", RELU_CASES, ids=str)
@pytest.mark.parametrize("mode", ["fast", "check", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_relu_gradients(emulate, mode, case):
    tensors = Tensors(case)
    by_input, by_weight = exact_gradients(tensors)
    bound = BOUND[case.domain, case.dtype, case.tile]
    kernel = emulate(SOURCE, mode)
    assert error(run_domain_input_gradient(kernel, tensors), by_input) <= bound
    assert error(run_weight_gradient(kernel, tensors), by_weight) <= bound


def test_gradients_in_parts(emulate):
    """Parts change the order of sums, and nothing else; the same parts give the same bits."""
    kernel = emulate(SOURCE, "fast")
    tensors = Tensors(Case(n=3, c=16, h=40, w=38, k=16, dtype="f32", domain="f32"))
    limit = 36 * 128 * 32 * 4 + 2048
    whole, parts = (run_weight_gradient(kernel, tensors, at) for at in (256 << 20, limit))
    assert (parts == run_weight_gradient(kernel, tensors, limit)).all()
    assert 0 < error(parts, whole.astype(float)) <= 1e-6
    tensors = Tensors(
        Case(n=3, c=16, h=40, w=38, k=16, dtype="f32", domain="f32", winograd_relu=True)
    )
    whole, parts = (run_domain_input_gradient(kernel, tensors, at) for at in (256 << 20, limit))
    assert (parts == run_domain_input_gradient(kernel, tensors, limit)).all()
    assert error(parts, whole.astype(float)) <= 1e-6


def test_range_of_the_weight_gradient(emulate):
    """Channels far from one another keep their accuracy: each has powers of two of its own."""
    case = Case(n=1, c=9, h=9, w=9, k=9, dtype="bf16", tile=4)
    tensors = Tensors(case)
    powers = 2.0 ** np.arange(-60, 48, 12).reshape(1, 9, 1, 1)
    tensors.input = bf16(from_bf16(tensors.input) * powers)
    tensors.grad = bf16(from_bf16(tensors.grad) * powers[:, ::-1])
    gradient = run_weight_gradient(emulate(SOURCE, "fast"), tensors)
    expected = exact_gradients(tensors)[1]
    undo = 1 / (powers[0, ::-1, None] * powers[0])[..., 0].reshape(9, 9, 1, 1)
    assert error(from_bf16(gradient) * undo, expected * undo) <= 6e-3


def test_forward_in_parts(emulate):
    """A workspace that holds 128 tiles gives the same bits as one that holds all 300."""
    tensors = Tensors(Case(n=3, c=16, h=40, w=38, k=16))
    kernel = emulate(SOURCE, "fast")
    whole, tiles = run_forward(kernel, tensors)
    assert tiles == 300
    limit = 36 * 128 * 32 * 2 + 2048
    parts, tiles = run_forward(kernel, tensors, limit)
    assert tiles == 128
    assert (whole.view(np.uint16) == parts.view(np.uint16)).all()


@pytest.mark.parametrize("power", [-118, -30, 0, 60, 110])
def test_range(emulate, power):
    """Powers of two in the data change nothing but the exponents of the result: no tile is near
    the ends of fp16, whatever the tensor's range (bf16 ones, whose range is that of fp32)."""
    case = Case(n=1, c=9, h=9, w=9, k=9, dtype="bf16", tile=4, bias=False, residual=False)
    kernel = emulate(SOURCE, "fast")
    tensors = Tensors(case)
    y, _ = run_forward(kernel, tensors)
    tensors.input = bf16(from_bf16(tensors.input) * 2.0**power)
    scaled, _ = run_forward(kernel, tensors)
    y, scaled = from_bf16(y), from_bf16(scaled)
    normal = abs(scaled) >= 2.0**-126
    assert normal.mean() > 0.99
    assert (scaled == y * 2.0**power)[normal].all()


def test_not_a_number(emulate):
    """NaN and infinity reach the outputs whose tiles see them, and no others."""
    tensors = Tensors(Case(c=8, h=8, w=8, k=8, padding=1, residual=False, bias=False))
    tensors.input[0, 3, 1, 1] = np.nan
    tensors.input[0, 5, 6, 6] = np.inf
    y, _ = run_forward(emulate(SOURCE, "fast"), tensors)
    bad = ~np.isfinite(y)
    assert bad[0, :, 0:3, 0:3].all()
    assert bad[0, :, 5:8, 5:8].all()
    assert not bad[0, :, 0:4, 5:8].any()
    assert not bad[0, :, 5:8, 0:3].any()


DIRECT = [
    Case(c=24),
    Case(n=2, c=72, h=13, w=9, k=70, padding=2, dilation=2, dtype="bf16", relu=True),
    Case(c=20, h=13, w=9, k=13, dtype="f32", domain="f32"),
    Case(c=36, h=13, w=19, k=80, dtype="f32", domain="f16"),
    Case(n=3, c=8, h=3, w=2, k=8, padding=5, dilation=4, residual=False, bias=False),
    Case(n=1, c=136, h=12, w=12, k=136, padding=0),
    Case(c=64, h=8, w=16, k=128),  # whole blocks
    Case(c=8, h=3, w=43, k=64),  # and one pixel more
]
DIRECT_BOUND = {
    ("f16", "f16"): 2.6e-4,
    ("f16", "bf16"): 2e-3,
    ("f32", "f32"): 3e-7,
    ("f16", "f32"): 4e-4,  # TF32
}


def run_direct(kernel, tensors, u=None, gate=None, mean=None, **how):
    case = tensors.case
    if u is None:
        u, _ = run_filter(kernel, tensors, tile=1, **how)
    y = empty(tensors.layout(tensors.residual).shape, case.dtype)
    sizes = (case.n, case.h, case.w, case.c, *case.out, case.k, padded(case.k))
    fields = {
        **{f"size{i}": c_int64(v) for i, v in enumerate(sizes)},
        **{f"pad{i}": c_int(case.padding) for i in range(2)},
        **{f"dil{i}": c_int(case.dilation) for i in range(2)},
        "dtype": c_int(DTYPES[case.dtype]),
        "strict": c_bool(case.domain == "f32"),
        "relu": c_bool(case.relu),
        "input": In(tensors.layout(tensors.input)),
        "u": In(u),
        "bias": In(tensors.bias) if case.bias else None,
        "residual": In(tensors.layout(tensors.residual)) if case.residual else None,
        "output": Out(y),
        **extra_fields(gate, mean, 4 * case.k * math.ceil(math.prod(case.out) / 128)),
        **NO_CELL,
    }
    kernel.call("pywino_winograd_direct", Struct(fields), None, **how)
    return tensors.back(y)


def check_direct(kernel, case, u=None, **how):
    tensors = Tensors(case)
    y = run_direct(kernel, tensors, u, **how)
    assert error(y, convolution(tensors)) <= DIRECT_BOUND[case.domain, case.dtype]


@pytest.mark.parametrize("case", DIRECT, ids=str)
def test_direct(emulate, run, case):
    mode, schedule = run
    check_direct(emulate(SOURCE, mode), case, schedule=schedule)


# One image, with a gate for its channels and the means of the output's: blocks with several tiles
# and tiles with several blocks, launches in parts, each type.
MEANS = [
    Case(c=20, h=21, w=30, k=32, bias=True, residual=False),
    Case(c=33, h=9, w=14, k=528, tile=2, dtype="bf16", residual=False),
    Case(c=5, h=11, w=7, k=257, dtype="f32", domain="f32", channels_last=False, residual=False),
    Case(c=7, h=23, w=9, k=6, tile=6, dtype="f32", domain="f32", residual=False),
    Case(c=12, h=19, w=26, k=9, dilation=3, padding=3, dtype="f32", tile=2, residual=False),
]
DIRECT_MEANS = [
    Case(c=32, h=19, w=23, k=32, residual=False),
    Case(c=72, h=13, w=9, k=70, padding=2, dilation=2, dtype="bf16", residual=False),
    Case(c=20, h=13, w=19, k=13, dtype="f32", domain="f32", residual=False),
    Case(c=36, h=13, w=19, k=150, dtype="f32", residual=False, bias=False),
]


def check_gate_and_mean(kernel, case, gated=True, limit=256 << 20, direct=False, **how):
    """relu(gate input) is convolved, and the output's means are those of its float32 numbers."""
    tensors = Tensors(case)
    random = np.random.default_rng(case.k)
    gate = random.uniform(0.1, 1, case.c).astype(np.float32) if gated else None
    mean = np.empty(case.k, np.float32)
    if direct:
        u = direct_filter(tensors)
        y = run_direct(kernel, tensors, u, gate=gate, mean=mean, **how)
        bound = DIRECT_BOUND[case.domain, case.dtype]
    else:
        y, _ = run_forward(kernel, tensors, limit, gate=gate, mean=mean, **how)
        bound = BOUND[case.domain, case.dtype, case.tile]
    exact = Tensors(case)
    if gated:
        product = decode(tensors.input) * gate.astype(float)[:, None, None]
        exact.input = np.maximum(product, 0)
        # The direct kernel rounds relu(gate input) to the tensors' type before it multiplies.
        bound = bound + (2 * HALF_ULP[case.dtype] if direct and case.dtype != "f32" else 0)
    expected = convolution(exact)
    assert error(y, expected) <= bound
    means = expected.mean((2, 3))[0]
    # A mean of numbers with a relative error of `bound`.
    assert np.abs(mean - means).max() <= bound * np.abs(expected).mean((0, 2, 3)).max()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("case", MEANS, ids=str)
def test_gate_and_mean(emulate, run, case, gated):
    mode, schedule = run
    check_gate_and_mean(emulate(SOURCE, mode), case, gated, schedule=schedule)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("case", DIRECT_MEANS, ids=str)
def test_direct_gate_and_mean(emulate, run, case, gated):
    mode, schedule = run
    check_gate_and_mean(emulate(SOURCE, mode), case, gated, direct=True, schedule=schedule)


def test_mean_in_parts(emulate):
    """Sums of several launches meet in one mean."""
    case = Case(c=16, h=60, w=70, k=20, residual=False)
    check_gate_and_mean(emulate(SOURCE, "fast"), case, limit=36 * 128 * 40 * 2 + 2048)


class Cell(NamedTuple):
    """A step of a convolutional LSTM: input's channels, the state's."""

    n: int = 1
    c: int = 8
    h: int = 9
    w: int = 15
    state: int = 16
    dtype: str = "f16"
    strict: bool = False
    bias: bool = True
    first: bool = False  # the first step: h and c are zeros, and are not there


CELLS = [
    Cell(),
    Cell(n=2, c=32, h=11, w=13, state=40, dtype="bf16", bias=False),
    Cell(c=64, state=8, first=True),
    Cell(c=12, h=7, w=20, state=36, dtype="f32", strict=True),
    Cell(n=2, c=4, state=4, dtype="f32"),
]


def check_cell(kernel, case, **how):
    """Gates that are never written: against float64, with the errors of the direct kernel."""
    random = np.random.default_rng(case.c)
    draw = lambda *size: encode(random.standard_normal(size), case.dtype)  # noqa: E731
    n, c, h, w, k = case.n, case.c, case.h, case.w, case.state
    channels = c if case.first else c + k
    x, hidden, cell = draw(n, h, w, c), draw(n, h, w, k), draw(n, h, w, k)
    weight = encode(random.standard_normal((4, k, channels, 9)) / (9 * c) ** 0.5, case.dtype)
    bias = random.standard_normal((4, k)).astype(np.float32)
    u = np.ascontiguousarray(weight.transpose(3, 1, 0, 2).reshape(9, 4 * k, channels))
    out, next_cell = (np.empty_like(cell) for _ in range(2))
    sizes = (n, h, w, c, h, w, 4 * k, 4 * k)
    fields = {
        **{f"size{i}": c_int64(v) for i, v in enumerate(sizes)},
        **{f"pad{i}": c_int(1) for i in range(2)},
        **{f"dil{i}": c_int(1) for i in range(2)},
        "dtype": c_int(DTYPES[case.dtype]),
        "strict": c_bool(case.strict),
        "relu": c_bool(False),
        "input": In(x),
        "u": In(u),
        "bias": In(np.ascontiguousarray(bias.T)) if case.bias else None,
        "residual": None,
        "output": Out(out),
        **extra_fields(None, None, 0),
        "second": None if case.first else In(hidden),
        "second_c": c_int64(0 if case.first else k),
        "cell": None if case.first else In(cell),
        "next_cell": Out(next_cell),
    }
    kernel.call("pywino_winograd_direct", Struct(fields), None, **how)
    images = [torch.from_numpy(decode(t).transpose(0, 3, 1, 2)) for t in (x, hidden, cell)]
    exact = lstm.conv_lstm_cell(
        images[0],
        None if case.first else tuple(images[1:]),
        torch.from_numpy(decode(weight).reshape(4 * k, channels, 3, 3)),
        torch.from_numpy(bias.reshape(-1).astype(float)) if case.bias else None,
    )
    domain = "f32" if case.strict else "f16"
    # A gate's derivative is at most 1, and each state is rounded once.
    bound = 2 * DIRECT_BOUND[domain, case.dtype] + HALF_ULP[case.dtype]
    for actual, expected in zip((out, next_cell), exact):
        assert error(actual.transpose(0, 3, 1, 2), expected.numpy()) <= bound


@pytest.mark.parametrize("case", CELLS, ids=str)
def test_direct_with_a_cell(emulate, run, case):
    mode, schedule = run
    check_cell(emulate(SOURCE, mode), case, schedule=schedule)


def direct_filter(tensors):
    """What `run_filter` gives for the direct kernel, without it."""
    case = tensors.case
    u = np.zeros((9, padded(case.k), case.c), tensors.weight.dtype)
    u[:, : case.k] = tensors.weight.reshape(case.k, case.c, 9).transpose(2, 0, 1)
    return u


def check_direct_filter(kernel, case, **how):
    tensors = Tensors(case)
    u, _ = run_filter(kernel, tensors, tile=1, **how)
    np.testing.assert_array_equal(u, direct_filter(tensors))


@pytest.mark.parametrize("case", DIRECT, ids=str)
def test_direct_filter(emulate, run, case):
    mode, schedule = run
    check_direct_filter(emulate(SOURCE, mode), case, schedule=schedule)


# For mutate.py: each file, by what it is tested with.
NCHW = [case for case in CASES if not case.channels_last]
MUTATE = [
    Recipe(
        CORE / "cuda_nchw.cu",
        [
            *(functools.partial(check_output_transform, case=c, nchw=True) for c in NCHW),
            *(
                functools.partial(
                    check_transform, case=c, gradient=g, by_channel=by_channel, nchw=True
                )
                for c in NCHW
                for g, by_channel in TRANSFORMS
                if c.domain == "f16" or not by_channel
            ),
        ],
        harmless={
            "const int at_once = pixels <= kThreads ? pixels : kThreads, "
            "group = int(threadIdx.x) / at_once;": "the same",
            "__device__ int groups() const { return pixels <= kThreads ? "
            "kThreads / pixels : 1; }": "the same",
            "while (strip < kWarps && strip <= tiles.columns) strip *= 2;": "a wider strip",
            "for (int64_t c0 = 0; c0 <= p.channels; c0 += strip.channels) {": "a round of none",
            "const int64_t channels = p.map.c - k0 <= strip.channels ? p.map.c - k0 : "
            "strip.channels;": "the same",
            "if (p.relu) sum = sum <= 0.f ? 0.f : sum;  // NaN stays": "of 0",
        },
    ),
    Recipe(
        CORE / "cuda_transforms.cu",
        [
            *(
                functools.partial(check, case=case)
                for case in CASES
                for check in (check_transform, check_output_transform)
            ),
            *(
                functools.partial(check_transform, case=case, gradient=g, by_channel=by_channel)
                for case in CASES
                for g, by_channel in TRANSFORMS[1:]
                if case.domain == "f16" or not by_channel
            ),
            *(functools.partial(check_filter_transform, case=c, rotate=True) for c in CASES),
            *(functools.partial(check_direct_filter, case=c) for c in DIRECT),
            *(functools.partial(check_gate_and_mean, case=c) for c in MEANS),
        ],
        harmless={
            "d.x[0] = d.x[0] <= 0.f ? 0.f : d.x[0];  // NaN stays": "of 0",
            "for (int e = 0; e < V; ++e) o[j].x[e] = o[j].x[e] <= 0.f ? 0.f : o[j].x[e];": "of 0",
            "for (int i = 0; i <= kSize; ++i)": "of the peak: a neighbour's pixel more",
            "for (int j = 0; j <= kSize; ++j) {": "of the peak: a neighbour's pixel more",
            "const int own = groups <= kThreads ? int(groups) : kThreads;": "the same",
            "return {own, kThreads / own, (groups + own + 1) / own};": "a block with no channel",
            "p.input, p.map, p.tiles, position(p.tiles, p.first + (exists ? tile : tile)), "
            "p.pad_h, p.pad_w);": "a tile that is not there is not read",
        },
        others=[
            HERE / "kernels" / "winograd_launchers.cu",
            CORE / "cuda.cpp",
            *sorted({*CORE.glob("*.cu")} - {CORE / "cuda_transforms.cu"}),
        ],
    ),
    Recipe(
        CORE / "cuda_product.cu",
        [
            functools.partial(check, shape=shape, domain=domain)
            for check, shapes in ((check_product, PRODUCTS), (check_summed_product, SUMS))
            for shape in shapes
            for domain in DOMAINS
        ],
        harmless={
            # gemm.cuh
            "/* ptx::cp_async_wait_group<0>(); */;": "no stage is in flight any more",
            "ptx::cp_async_wait_group<0 + 1>();": "no stage is in flight any more",
            "ptx::cp_async_wait_group<kStages - 3>();": "waits for more",
            "if (s <= iterations) load(s, s * kStageBytes);": "one more stage of zeros",
            "if (next <= iterations) load(next, next % kStages * kStageBytes);": (
                "one more stage of zeros"
            ),
            "kStages * kStageBytes >= Base::kTileBytes ? kStages * kStageBytes : "
            "Base::kTileBytes;": "the same",
            "for (int i = 0; i <= FM; ++i)": "fragments that nobody reads (README: what it cannot)",
            **dict.fromkeys(
                (
                    "for (int i = 0; i <= 4; ++i) ra[i] = ptx::to_tf32(__uint_as_float(a[i]));",
                    "for (int i = 0; i <= 2; ++i) rb[i] = ptx::to_tf32(__uint_as_float(b[i]));",
                    "iterations, [&](int filled, int stage) { load(filled, shared - stage); },",
                    "multiply(sums, shared - stage,",
                ),
                "of the direct kernel",
            ),
            **GROUPED_TILES_HARMLESS,
            # cuda_product.cu
            "const int64_t steps = (p.tiles + G::BK + 1) / G::BK;": "one more stage of zeros",
            "const int steps = int((p.channels + G::BK + 1) / G::BK);": "one more stage of zeros",
            **dict.fromkeys(
                (
                    "const int steps = int((p.channels + G::BK - 2) / G::BK);",
                    "const int64_t blocks_n = (p.out_channels + G::BN - 2) / G::BN;",
                    "const int64_t blocks_n = (p.channels + G::BN - 2) / G::BN;",
                    "const int64_t blocks_m = (p.out_channels + G::BM - 2) / G::BM;",
                    "const int64_t blocks = (p.out_channels + G::BM - 2) / G::BM * "
                    "((p.channels + G::BN - 1) / G::BN);",
                    "const int64_t blocks = (p.out_channels + G::BM - 1) / G::BM * "
                    "((p.channels + G::BN - 2) / G::BN);",
                ),
                "channels are multiples of 8",
            ),
            **dict.fromkeys(
                (
                    "if (p.channels < 64 || p.out_channels <= 64) return "
                    "launch<GemmTn<Mma, 64, 64, 2, 2>>(p, stream);",
                    "if (p.channels <= 64 || p.out_channels < 64) return "
                    "launch<GemmTn<Mma, 64, 64, 2, 2>>(p, stream);",
                    "if (p.out_channels < 64) return launch<Gemm<Mma, 128, 64, 4, 2>>(p, stream);",
                ),
                "a block of another size",
            ),
        },
        choices=("is_large",),
        headers=[CSRC / "core" / "common" / "gemm.cuh", GROUPED_TILES],
    ),
    Recipe(
        SM90,
        [functools.partial(check_product_sm90, shape=shape) for shape in PRODUCTS_SM90],
        harmless={
            **GROUPED_TILES_HARMLESS,
            "return {int(groups), int((rows + G::BM + 1) / G::BM), int((columns + G::BN - 1) / "
            "G::BN)};": "a tile more, of rows that do not exist: TMA drops them",
            "int((p.channels + G::BK + 1) / G::BK));": "one more stage of zeros",
            "int((p.channels + G::BK - 2) / G::BK));": "channels are multiples of 8",
            "if (thread == 0) ptx::tma_store_wait_group_read<kSlabs - 2>();": "waits for both",
            "static constexpr int kSharedBytes = kBarriers + 2 * kStages * 16;": "more memory",
            "static constexpr int kSharedBytes = kBarriers + 3 * kStages * 8;": "more memory",
            "if (threadIdx.x % 256 == 0) produce(stages, full, empty, a, b, tiles, steps);": (
                "thread 256, as before"
            ),
        },
        choices=("waves",),
        headers=[CSRC / "core" / "common" / "gemm_sm90.cuh", GROUPED_TILES],
    ),
    Recipe(
        CORE / "cuda_gradients.cu",
        [functools.partial(check, case=case) for case in CASES for check in ENDS],
    ),
    Recipe(
        CORE / "cuda_direct.cu",
        [
            *(functools.partial(check_direct, case=c, u=direct_filter(Tensors(c))) for c in DIRECT),
            *(
                functools.partial(check_gate_and_mean, case=c, direct=True, gated=gated)
                for c in DIRECT_MEANS
                for gated in (False, True)
            ),
            *(functools.partial(check_cell, case=c) for c in CELLS),
        ],
        harmless={
            "x[e] = from_float<E>(product <= 0.f ? 0.f : product);  // NaN stays": "of 0",
            "if (p.relu) sums.x[e] = sums.x[e] <= 0.f ? 0.f : sums.x[e];  // NaN stays": "of 0",
            "return p.k < 64 ? launch<Narrow, Fused::none>(p, stream) : "
            "launch<Wide, Fused::none>(p, stream);": "a block of another size",
            "const int steps = int((channels + G::BK + 1) / G::BK);": "one more stage of zeros",
            "const int steps = int((channels + G::BK - 2) / G::BK);": "channels are whole 16 bytes",
            "const int64_t blocks_n = (p.padded_out + G::BN - 2) / G::BN;": "multiples of 8",
            "const int64_t blocks = (p.padded_out + G::BN - 2) / G::BN * "
            "((pixels + G::BM - 1) / G::BM);": "multiples of 8",
            "const int64_t blocks = (p.padded_out + G::BN + 1) / G::BN * "
            "((pixels + G::BM - 1) / G::BM);": "blocks without a pixel",
            "const int64_t blocks = (p.padded_out + G::BN - 1) / G::BN * "
            "((pixels + G::BM + 1) / G::BM);": "blocks without a pixel",
            "const bool whole = p.k % 16 == 0;  // every chunk of eight channels is aligned": (
                "number by number instead of eight at once"
            ),
            "exists ? u + (tap * p.padded_out + row) * channels + k : u, exists ? 16 : 16);": (
                "of k that are zero in the pixels, or of outputs that are not there"
            ),
        },
        others=[CORE / "cuda_transforms.cu", CORE / "cuda_nchw.cu"],
    ),
]
