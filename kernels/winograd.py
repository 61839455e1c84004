# SPDX-License-Identifier: BSD-3-Clause
"""Winograd convolution F(m x m, 3 x 3), m = 2, 4, 6, in Triton.

    V[tap][tile][c] = B^T d B            _to_domain       d: a x a patch of the input, a = m + 2
    M[tap][tile][k] = sum_c V U          _products        one matrix product for each of a^2 taps
    Y = A^T M A, bias, residual, ReLU    _from_domain     m x m outputs

    U[tap][k][c] = G g G^T               _transform_filter
    S[tap][k][c] = sum_t (A dY A^T) V    _to_domain twice, _summed_products
    dW = G^T S G                         _from_filter_domain

The input gradient is the forward pass with the turned filter. The maths is in docs/winograd.md.

Domains. "f32": V, U and M in fp32, each product as three TF32 ones. "f16": V and U in fp16, scaled
by powers of two to |V|, |U| <= 1, V by one for each tile, U by one for each output channel; the
products are summed in fp32 and M is stored in fp16 (|M| <= C); the inverse transform undoes both
scales. The exponent comes from max|d| and the largest absolute row sum R of B^T, as |V| <= R^2
max|d|: 2^2, 2^5 and 2^8 times max|d| for m = 2, 4 and 6. In the weight gradient the sum runs over
tiles, so there the scales belong to channels. Taps of A dY A^T, and of U in F6, have constant
powers of two beside these: the rows of A and G differ by up to 2^6 in size, and what is small by
its row alone would lie among fp16's subnormal numbers.

Layout. V and M have one plane for each tap; tiles and channels are padded to whole blocks of the
product, which has no masks. Padded tiles and channels of V are zeros, so nothing of what the
workspace held before enters a sum. The image may have any strides; lanes run along the channels of
a channels_last one, else along the tiles of an image row.

What it moves and computes, in bytes and multiplications of an output pixel with C = K and m = 4, so
that a^2 / m^2 = 2.25:

    _to_domain     read C e, write 2.25 C w          e: bytes of an element of the tensors
    _products      read 2.25 C w, write 2.25 C w     w: bytes in the domain, 2 or 4
    _from_domain   read 2.25 C w, write C e
    in all         C (2 e + 9 w): 22 C for 16-bit tensors; for fp32 ones 26 C in "f16", 44 C in
                   "f32"
    products       2.25 C^2, against 9 C^2 of a direct convolution; three times that in "f32"

Reading and writing the workspace is the limit up to C = 300 or so on an H200 (4.3 TB/s, 790 TFLOP/s
in fp16), and below C = 128 a perfect direct convolution in 16 bits is faster. No time of these
kernels was measured on a GPU yet.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pywino.kernels.launch import (
    is_channels_last,
    jit,
    on_channels,
    on_device_of,
    on_pixels,
    processors,
    why_not,
)
from pywino.reference.winograd import POINTS, exact_matrices

try:
    import triton
    import triton.language as tl
except ImportError:  # the module can be imported; its functions say what is missing
    triton = None

DOMAINS = {"f16": torch.float16, "f32": torch.float32}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WORKSPACE_LIMIT = 256 << 20


def _matrices(tile):
    """The matrices of F(tile, 3) by number; the last one leaves what is in the domain as it is."""
    bt, g, at = exact_matrices(tile)
    identity = [[int(i == j) for j in range(tile + 2)] for i in range(tile + 2)]
    return bt, g, list(zip(*at)), at, list(zip(*bt)), list(zip(*g)), identity


def _growth(matrix):
    """The smallest e with max|X d X^T| <= 2^e max|d|."""
    return math.ceil(math.log2(max(sum(map(abs, row)) for row in matrix) ** 2))


def _tap_shifts(matrix):
    """Of each row: the power of two that brings its absolute sum nearest to the largest, below."""
    sums = [sum(map(abs, row)) for row in matrix]
    return [next(e for e in range(99) if max(sums) < 2 ** (e + 1) * s) for s in sums]


BT, G, A, AT, B, GT, I = range(7)
# Entry (i, j) of each matrix and the growth of each, for use while a kernel is compiled.
ENTRY = {
    (number, tile, i, j): float(x)
    for tile in POINTS
    for number, matrix in enumerate(_matrices(tile))
    for i, row in enumerate(matrix)
    for j, x in enumerate(row)
}
GROWTH = {
    (number, tile): _growth(matrix)
    for tile in POINTS
    for number, matrix in enumerate(_matrices(tile))
}
# What tap (i, j) of X d X^T is multiplied by in "f16".
TAP = {
    (number, tile, i, j): 1.0
    for tile in POINTS
    for number in (BT, G, A, I)
    for i in range(tile + 2)
    for j in range(tile + 2)
}
for _tile in POINTS:
    for _number, _of in ((A, A), *(((G, G), (I, G)) if _tile == 6 else ())):
        _shifts = _tap_shifts(_matrices(_tile)[_of])
        for _i, _j in itertools.product(range(_tile + 2), repeat=2):
            TAP[_number, _tile, _i, _j] = 2.0 ** (_shifts[_i] + _shifts[_j])
X_BT, X_G, X_A, X_AT, X_B, X_GT, X_I = range(7)  # the numbers again, as the kernels name them
if triton and not triton.knobs.runtime.interpret:  # there, kernels are Python, and so are these
    ENTRY, GROWTH, TAP = tl.constexpr(ENTRY), tl.constexpr(GROWTH), tl.constexpr(TAP)
    X_BT, X_G, X_A, X_AT, X_B, X_GT, X_I = map(tl.constexpr, (X_BT, X_G, X_A, X_AT, X_B, X_GT, X_I))


# --- in registers ---


@jit
def _row(
    X: tl.constexpr, TILE: tl.constexpr, i: tl.constexpr, d, FIRST: tl.constexpr, STEP: tl.constexpr
):
    """sum_j X[i, j] d[j] for j = FIRST, FIRST + STEP, …; zeros and ones cost nothing."""
    y = None
    for j in tl.static_range(FIRST, len(d), STEP):
        if ENTRY[X, TILE, i, j] != 0:
            term = d[j] if ENTRY[X, TILE, i, j] == 1 else ENTRY[X, TILE, i, j] * d[j]
            y = term if y is None else y + term
    return y


@jit
def _paired_row(X: tl.constexpr, TILE: tl.constexpr, i: tl.constexpr, d, sums, differences):
    """Row i of X d where X[i, j + 1] = ±X[i, j] for odd j: one product for each such pair."""
    LAST: tl.constexpr = TILE + 1
    y = None
    for j in tl.static_range(0, LAST + 1):
        if ENTRY[X, TILE, i, j] != 0 and (j == 0 or j == LAST or j % 2 == 1):
            if j == 0 or j == LAST:
                x = d[j]
            elif ENTRY[X, TILE, i, j] == ENTRY[X, TILE, i, j + 1]:
                x = sums[j // 2]
            else:
                x = differences[j // 2]
            term = x if ENTRY[X, TILE, i, j] == 1 else ENTRY[X, TILE, i, j] * x
            y = term if y is None else y + term
    return y


@jit
def _times(X: tl.constexpr, TILE: tl.constexpr, d):
    """X d. All points but 0 and infinity come in pairs p, -p, which differ in the sign of their odd
    powers: the even and odd halves of a sum, or the terms of a pair, are shared."""
    LAST: tl.constexpr = TILE + 1
    if X == X_I:
        y = d
    elif X < X_AT:  # B^T, G, A: a row for each point
        y = (_row(X, TILE, 0, d, 0, 1),)
        for i in tl.static_range(1, LAST, 2):
            even = _row(X, TILE, i, d, 0, 2)
            odd = _row(X, TILE, i, d, 1, 2)
            y = y + (even + odd, even - odd)
        y = y + (_row(X, TILE, LAST, d, 0, 1),)
    else:  # A^T, B, G^T: a column for each point
        sums = ()
        differences = ()
        for j in tl.static_range(1, LAST, 2):
            sums = sums + (d[j] + d[j + 1],)
            differences = differences + (d[j] - d[j + 1],)
        y = ()
        for i in tl.static_range(LAST + 1 if X == X_B else (TILE if X == X_AT else 3)):
            y = y + (_paired_row(X, TILE, i, d, sums, differences),)
    return y


@jit
def _nth(columns, i: tl.constexpr):
    """Row i of a matrix given by its columns."""
    row = ()
    for j in tl.static_range(len(columns)):
        row = row + (columns[j][i],)
    return row


# --- scales: powers of two, exact ---


@jit
def _exponent(peak, GROWTH_OF: tl.constexpr):
    """e with |X d X^T| <= 2^e for |d| <= peak; 0 where peak is 0, inf or NaN. Beyond ±126, where
    2^e or its inverse would leave the normal numbers, e stops: then |V| may reach 2^8."""
    floor = (peak.to(tl.int32, bitcast=True) >> 23) - 127  # floor(log2(peak)) of a normal number
    e = tl.minimum(tl.maximum(floor + 1 + GROWTH_OF, -126), 126)
    return tl.where((peak > 0) & (peak < float("inf")), e, 0)


@jit
def _power_of_two(e):
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


# --- where tiles and channels are ---
#


@jit
def _place(t, image, first, tile_rows, tile_columns, dil_h, dil_w, TILE: tl.constexpr):
    """Image, row and column of the first output of tiles first + t, counted from `image` on.

    Tiles of the d phases of a dilated convolution are interleaved: row r of the grid of tiles is
    row r // d of phase r % d, so neighbours read neighbouring pixels."""
    index = first + t
    n = image + index // (tile_rows * tile_columns)
    row = index // tile_columns % tile_rows
    column = index % tile_columns
    y = row // dil_h * (TILE * dil_h) + row % dil_h
    x = column // dil_w * (TILE * dil_w) + column % dil_w
    return n, y, x


@jit
def _inside(y, x, height, width, within, CHANNELS_LAST: tl.constexpr):
    """Which of the pixels (y, x), one for each tile, exist, in the channels that exist."""
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return on_pixels(inside, CHANNELS_LAST) & within


@jit
def _corner(
    tensor, n, c, y, x, stride_n, stride_c, stride_h, stride_w, CHANNELS_LAST: tl.constexpr
):
    """Where the pixels (y, x) of images n lie, for channels c, in 64 bits. Pixels of a patch have
    one distance from it in all tiles."""
    at = n.to(tl.int64) * stride_n + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    at_c = c.to(tl.int64) * stride_c
    return tensor + (on_pixels(at, CHANNELS_LAST) + on_channels(at_c, CHANNELS_LAST))


@jit
def _patch_in_domain(
    corner, y, x, height, width, stride_h, stride_w, dil_h, dil_w, within,
    X: tl.constexpr, TILE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The columns of X d, each a tuple; `_times(X, _nth(…, i))` then is row i of X d X^T."""
    SIZE: tl.constexpr = TILE if X == X_A else TILE + 2
    down = tl.cast(stride_h, tl.int64) * dil_h
    right = tl.cast(stride_w, tl.int64) * dil_w
    half = ()
    for j in tl.static_range(SIZE):
        at = corner
        column = ()
        for i in tl.static_range(SIZE):
            mask = _inside(y + i * dil_h, x + j * dil_w, height, width, within, CHANNELS_LAST)
            column = column + (tl.load(at, mask=mask, other=0).to(tl.float32),)
            at += down
        half = half + (_times(X, TILE, column),)
        corner += right
    return half


# --- kernels ---


@jit
def _to_domain(
    tensor, v, scale, peaks, channels, height, width, stride_n, stride_c, stride_h, stride_w,
    image, first, tiles, rows, padded, tile_rows, tile_columns, pad_h, pad_w, dil_h, dil_w,
    X: tl.constexpr, TILE: tl.constexpr, SCALES: tl.constexpr, RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """V = B^T d B of the patches of an input (X = BT), or A y A^T of the tiles of an output
    gradient (X = A).

    SCALES = "tile": one power of two for each tile, left in `scale`; the program sees all channels
    of its tiles twice, the second time in the cache. "channel": of max|d| in `peaks`. None: none.
    """
    A: tl.constexpr = TILE + 2
    SIZE: tl.constexpr = TILE if X == X_A else A
    t = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    n, y, x = _place(t, image, first, tile_rows, tile_columns, dil_h, dil_w, TILE)
    y = tl.where(t < tiles, y - pad_h, height)  # a padded tile lies below the image: zeros
    x = x - pad_w
    lanes = tl.arange(0, BLOCK_CHANNELS)
    plane = rows.to(tl.int64) * padded
    if SCALES == "tile":
        if CHANNELS_LAST:
            peak = tl.zeros((BLOCK_TILES, BLOCK_CHANNELS), tl.float32)
        else:
            peak = tl.zeros((BLOCK_CHANNELS, BLOCK_TILES), tl.float32)
        down = tl.cast(stride_h, tl.int64) * dil_h
        right = tl.cast(stride_w, tl.int64) * dil_w
        for start in range(0, channels, BLOCK_CHANNELS):
            c = start + lanes
            within = on_channels(c < channels, CHANNELS_LAST)
            corner = _corner(
                tensor, n, c, y, x, stride_n, stride_c, stride_h, stride_w, CHANNELS_LAST
            )
            for i in range(SIZE):
                for j in tl.static_range(SIZE):
                    mask = _inside(
                        y + i * dil_h, x + j * dil_w, height, width, within, CHANNELS_LAST
                    )
                    d = tl.load(corner + (i * down + j * right), mask=mask, other=0)
                    peak = tl.maximum(peak, tl.abs(d.to(tl.float32)))
        e = _exponent(tl.max(peak, axis=1 if CHANNELS_LAST else 0), GROWTH[X, TILE])
        tl.store(scale + t, _power_of_two(e))
        tile_factor = on_pixels(_power_of_two(-e), CHANNELS_LAST)
    step = BLOCK_CHANNELS * tl.num_programs(1)
    for start in range(tl.program_id(1) * BLOCK_CHANNELS, padded, step):
        c = start + lanes
        within = on_channels(c < channels, CHANNELS_LAST)
        corner = _corner(tensor, n, c, y, x, stride_n, stride_c, stride_h, stride_w, CHANNELS_LAST)
        if SCALES == "tile":
            factor = tile_factor
        elif SCALES == "channel":
            e = _exponent(tl.load(peaks + c, mask=c < channels, other=0), GROWTH[X, TILE])
            factor = on_channels(_power_of_two(-e), CHANNELS_LAST)
        half = _patch_in_domain(
            corner, y, x, height, width, stride_h, stride_w, dil_h, dil_w, within, X, TILE,
            CHANNELS_LAST,
        )  # fmt: skip
        at = on_pixels(t.to(tl.int64) * padded, CHANNELS_LAST) + on_channels(c, CHANNELS_LAST)
        at = v + at
        mask = on_channels(c < padded, CHANNELS_LAST)
        for i in tl.static_range(A):
            row = _times(X, TILE, _nth(half, i))
            for j in tl.static_range(A):
                value = row[j]
                if RELU:
                    value = tl.where(value < 0, 0.0, value)  # NaN stays NaN
                if SCALES is not None:
                    value = value * (factor * TAP[X, TILE, i, j])
                tl.store(at, value.to(v.dtype.element_ty), mask=mask)
                at += plane  # one step at a time: a^2 products i plane would fill the registers


@jit
def _products(
    v, u, m, rows, k_padded, c_padded, taps,
    BLOCK_TILES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """M[tap] = V[tap] U[tap]^T for all taps, by persistent programs.

    Blocks of one tap follow one another, those of the same tiles first: V is read once from
    memory, U[tap] stays in the second-level cache."""
    k_blocks = k_padded // BLOCK_K
    t_blocks = rows // BLOCK_TILES
    c = tl.arange(0, BLOCK_C)
    for block in range(tl.program_id(0), taps * t_blocks * k_blocks, tl.num_programs(0)):
        tap = block // (t_blocks * k_blocks)
        t = tap * rows + block // k_blocks % t_blocks * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
        k = block % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        v_at = v + t.to(tl.int64)[:, None] * c_padded + c[None, :]
        u_at = u + (tap * k_padded + k).to(tl.int64)[None, :] * c_padded + c[:, None]
        sums = tl.zeros((BLOCK_TILES, BLOCK_K), tl.float32)
        for _ in range(0, c_padded, BLOCK_C):
            sums = tl.dot(tl.load(v_at), tl.load(u_at), sums, input_precision=PRECISION)
            v_at += BLOCK_C
            u_at += BLOCK_C
        m_at = m + t.to(tl.int64)[:, None] * k_padded + k[None, :]
        tl.store(m_at, sums.to(m.dtype.element_ty))


@jit
def _from_domain(
    m, scale, filter_scale, bias, residual, output, channels, height, width,
    stride_n, stride_c, stride_h, stride_w,
    image, first, tiles, rows, padded, tile_rows, tile_columns, dil_h, dil_w,
    TILE: tl.constexpr, SCALED: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_TILES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Y = A^T M A, with both scales undone, + bias + residual, and ReLU."""
    A: tl.constexpr = TILE + 2
    t = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    k = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    within = on_pixels(t < tiles, CHANNELS_LAST) & on_channels(k < channels, CHANNELS_LAST)
    corner = on_pixels(t.to(tl.int64) * padded, CHANNELS_LAST) + on_channels(k, CHANNELS_LAST)
    corner = m + corner
    plane = rows.to(tl.int64) * padded
    half = ()
    for j in tl.static_range(A):
        at = corner
        column = ()
        for i in tl.static_range(A):
            value = tl.load(at, mask=within, other=0).to(tl.float32)
            if SCALED:
                value = value * (1 / TAP[X_G, TILE, i, j])
            column = column + (value,)
            at += A * plane
        half = half + (_times(X_AT, TILE, column),)
        corner += plane
    if SCALED:
        tile_scale = on_pixels(tl.load(scale + t, mask=t < tiles, other=0), CHANNELS_LAST)
        k_scale = tl.load(filter_scale + k, mask=k < channels, other=0)
        k_scale = on_channels(k_scale, CHANNELS_LAST)
    if bias is not None:
        shift = on_channels(tl.load(bias + k, mask=k < channels, other=0), CHANNELS_LAST)
    n, y, x = _place(t, image, first, tile_rows, tile_columns, dil_h, dil_w, TILE)
    corner = _corner(0, n, k, y, x, stride_n, stride_c, stride_h, stride_w, CHANNELS_LAST)
    down = tl.cast(stride_h, tl.int64) * dil_h
    right = tl.cast(stride_w, tl.int64) * dil_w
    for p in tl.static_range(TILE):
        row = _times(X_AT, TILE, _nth(half, p))
        offset = corner
        for q in tl.static_range(TILE):
            mask = _inside(y + p * dil_h, x + q * dil_w, height, width, within, CHANNELS_LAST)
            value = row[q]
            if SCALED:
                value = value * tile_scale * k_scale
            if bias is not None:
                value = value + shift
            if residual is not None:
                value = value + tl.load(residual + offset, mask=mask, other=0).to(tl.float32)
            if RELU:
                value = tl.where(value < 0, 0.0, value)
            tl.store(output + offset, value.to(output.dtype.element_ty), mask=mask)
            offset += right
        corner += down


@jit
def _transform_filter(
    weight, u, scale, out_channels, in_channels, stride_k, stride_c, stride_h, stride_w,
    k_padded, c_padded,
    X: tl.constexpr, TILE: tl.constexpr, ROTATE: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """U = G g G^T (X = G), or a copy of a x a weights (X = I); zeros in padded channels.

    For "f32" in double: the error of a filter is in every output."""
    A: tl.constexpr = TILE + 2
    SIZE: tl.constexpr = 3 if X == X_G else A
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    lanes = tl.arange(0, BLOCK_C)
    if SCALED:
        peak = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        for start in range(0, in_channels, BLOCK_C):
            c = start + lanes
            base = weight + k.to(tl.int64)[:, None] * stride_k + c.to(tl.int64)[None, :] * stride_c
            within = (k < out_channels)[:, None] & (c < in_channels)[None, :]
            for i in tl.static_range(SIZE):
                for j in tl.static_range(SIZE):
                    g = tl.load(base + i * stride_h + j * stride_w, mask=within, other=0)
                    g = tl.abs(g.to(tl.float32))
                    if X == X_I:
                        g = g * TAP[X, TILE, i, j]
                    peak = tl.maximum(peak, g)
        e = _exponent(tl.max(peak, axis=1), GROWTH[X, TILE])
        factor = _power_of_two(-e)[:, None]
    else:
        e = tl.zeros((BLOCK_K,), tl.int32)
    tl.store(scale + k, _power_of_two(e))
    for start in range(0, c_padded, BLOCK_C):
        c = start + lanes
        base = weight + k.to(tl.int64)[:, None] * stride_k + c.to(tl.int64)[None, :] * stride_c
        within = (k < out_channels)[:, None] & (c < in_channels)[None, :]
        half = ()
        for j in tl.static_range(SIZE):
            column = ()
            for i in tl.static_range(SIZE):
                row_of_g = SIZE - 1 - i if ROTATE else i
                column_of_g = SIZE - 1 - j if ROTATE else j
                at = base + row_of_g * stride_h + column_of_g * stride_w
                g = tl.load(at, mask=within, other=0)
                column = column + (g.to(tl.float32 if SCALED else tl.float64),)
            half = half + (_times(X, TILE, column),)
        for i in tl.static_range(A):
            row = _times(X, TILE, _nth(half, i))
            for j in tl.static_range(A):
                value = row[j]
                if SCALED:
                    value = value * (factor * TAP[X, TILE, i, j])
                at = u + ((i * A + j) * k_padded + k).to(tl.int64)[:, None] * c_padded + c[None, :]
                tl.store(at, value.to(u.dtype.element_ty), mask=(c < c_padded)[None, :])


@jit
def _summed_products(
    d, v, s, rows, k_padded, c_padded, taps, splits,
    ACCUMULATE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S[split][tap] (+)= D[tap]^T V[tap] over the tiles of each split: sums in a fixed order."""
    k_blocks = k_padded // BLOCK_K
    c_blocks = c_padded // BLOCK_C
    block = tl.program_id(0)
    k = block // c_blocks % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    c = block % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = block // (c_blocks * k_blocks) % taps
    split = block // (c_blocks * k_blocks * taps)
    steps = rows // BLOCK_TILES
    begin = split * steps // splits
    t = tap * rows + begin * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    d_at = d + t.to(tl.int64)[None, :] * k_padded + k[:, None]
    v_at = v + t.to(tl.int64)[:, None] * c_padded + c[None, :]
    s_at = s + ((split * taps + tap) * k_padded + k).to(tl.int64)[:, None] * c_padded + c[None, :]
    sums = tl.load(s_at) if ACCUMULATE else tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for _ in range(begin, (split + 1) * steps // splits):
        sums = tl.dot(tl.load(d_at), tl.load(v_at), sums, input_precision=PRECISION)
        d_at += BLOCK_TILES * k_padded
        v_at += BLOCK_TILES * c_padded
    tl.store(s_at, sums)


@jit
def _from_filter_domain(
    s, k_peaks, c_peaks, gradient, out_channels, in_channels, k_padded, c_padded, splits,
    X: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dW = G^T S G (X = GT), or S itself (X = I), of the sum over splits, scales undone."""
    A: tl.constexpr = TILE + 2
    SIZE: tl.constexpr = 3 if X == X_GT else A
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = (k < out_channels)[:, None] & (c < in_channels)[None, :]
    half = ()
    for j in tl.static_range(A):
        column = ()
        for i in tl.static_range(A):
            value = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
            for split in range(splits):
                row = (split * A * A + i * A + j) * k_padded + k
                at = s + row.to(tl.int64)[:, None] * c_padded + c[None, :]
                value += tl.load(at, mask=within, other=0)
            if SCALED:
                value = value * (1 / TAP[X_A, TILE, i, j])
            column = column + (value,)
        half = half + (_times(X, TILE, column),)
    if SCALED:
        k_peak = tl.load(k_peaks + k, mask=k < out_channels, other=0)
        c_peak = tl.load(c_peaks + c, mask=c < in_channels, other=0)
        k_scale = _power_of_two(_exponent(k_peak, GROWTH[X_A, TILE]))[:, None]
        c_scale = _power_of_two(_exponent(c_peak, GROWTH[X_BT, TILE]))[None, :]
    at = gradient + (k.to(tl.int64)[:, None] * in_channels + c[None, :]) * (SIZE * SIZE)
    for i in tl.static_range(SIZE):
        row = _times(X, TILE, _nth(half, i))
        for j in tl.static_range(SIZE):
            value = row[j]
            if SCALED:
                value = value * k_scale * c_scale
            tl.store(at + i * SIZE + j, value.to(gradient.dtype.element_ty), mask=within)


@jit
def _masked_patches(
    input, m, scale, filter_scale, patches, channels, height, width,
    stride_n, stride_c, stride_h, stride_w,
    image, first, tiles, rows, padded, tile_rows, tile_columns, pad_h, pad_w, dil_h, dil_w,
    TILE: tl.constexpr, SCALED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_TILES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """P = B [ M . (B^T d B > 0) ] B^T: what each tile adds to the gradient of its patch."""
    A: tl.constexpr = TILE + 2
    t = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    within = on_pixels(t < tiles, CHANNELS_LAST) & on_channels(c < channels, CHANNELS_LAST)
    n, y, x = _place(t, image, first, tile_rows, tile_columns, dil_h, dil_w, TILE)
    y = y - pad_h
    x = x - pad_w
    corner = _corner(input, n, c, y, x, stride_n, stride_c, stride_h, stride_w, CHANNELS_LAST)
    half = _patch_in_domain(
        corner, y, x, height, width, stride_h, stride_w, dil_h, dil_w, within, X_BT, TILE,
        CHANNELS_LAST,
    )  # fmt: skip
    offset = on_pixels(t.to(tl.int64) * padded, CHANNELS_LAST) + on_channels(c, CHANNELS_LAST)
    plane = rows.to(tl.int64) * padded
    at = m + offset
    rows_of_patch = ()
    for i in tl.static_range(A):
        v = _times(X_BT, TILE, _nth(half, i))
        row = ()
        for j in tl.static_range(A):
            dv = tl.load(at, mask=within, other=0).to(tl.float32)
            if SCALED:
                dv = dv * (1 / (TAP[X_A, TILE, i, j] * TAP[X_G, TILE, i, j]))
            row = row + (tl.where(v[j] > 0, dv, 0.0),)
            at += plane
        rows_of_patch = rows_of_patch + (_times(X_B, TILE, row),)
    if SCALED:
        tile_scale = on_pixels(tl.load(scale + t, mask=t < tiles, other=0), CHANNELS_LAST)
        c_scale = tl.load(filter_scale + c, mask=c < channels, other=0)
        c_scale = on_channels(c_scale, CHANNELS_LAST)
    corner = patches + offset
    for j in tl.static_range(A):
        column = _times(X_B, TILE, _nth(rows_of_patch, j))
        at = corner
        for i in tl.static_range(A):
            value = column[i]
            if SCALED:
                value = value * tile_scale * c_scale
            tl.store(at, value, mask=within)
            at += A * plane
        corner += plane


@jit
def _overlap_add(
    patches, output, channels, height, width, stride_n, stride_c, stride_h, stride_w,
    image, pixels, rows, padded, tile_rows, tile_columns, pad_h, pad_w, dil_h, dil_w,
    TILE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Each pixel is the sum of the at most four patches that cover it, in a fixed order: those of
    neighbouring tiles overlap by two rows and columns."""
    A: tl.constexpr = TILE + 2
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    n = pixel // (height * width)
    y = pixel // width % height
    x = pixel % width
    row = (y + pad_h) // dil_h  # within its phase
    column = (x + pad_w) // dil_w
    y_phase = (y + pad_h) % dil_h
    x_phase = (x + pad_w) % dil_w
    within = on_pixels(pixel < pixels, CHANNELS_LAST) & on_channels(c < channels, CHANNELS_LAST)
    if CHANNELS_LAST:
        sums = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    else:
        sums = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    for above in tl.static_range(2):
        for left in tl.static_range(2):
            i = row % TILE + above * TILE
            j = column % TILE + left * TILE
            t_row = (row // TILE - above) * dil_h + y_phase
            t_column = (column // TILE - left) * dil_w + x_phase
            covered = (i < A) & (t_row >= 0) & (t_row < tile_rows)
            covered = covered & (j < A) & (t_column >= 0) & (t_column < tile_columns)
            t = (n * tile_rows + t_row) * tile_columns + t_column
            at = ((i * A + j) * rows + t).to(tl.int64) * padded
            at = on_pixels(at, CHANNELS_LAST) + on_channels(c, CHANNELS_LAST)
            mask = on_pixels(covered, CHANNELS_LAST) & within
            sums += tl.load(patches + at, mask=mask, other=0)
    at = (image + n).to(tl.int64) * stride_n + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    at = on_pixels(at, CHANNELS_LAST) + on_channels(c.to(tl.int64) * stride_c, CHANNELS_LAST)
    tl.store(output + at, sums.to(output.dtype.element_ty), mask=within)


# --- blocks: fixed rules of the shape, so every run has the same machine code and results ---


class Product(NamedTuple):
    """Blocks of a matrix product, and how Triton runs it."""

    tiles: int
    k: int
    c: int
    warps: int
    stages: int


# By domain and block of k; three stages of 128 x 128 x 64 take 96 KB of shared memory, which every
# architecture from sm_80 on has.
PRODUCTS = {
    ("f16", 128): Product(128, 128, 64, 8, 3),
    ("f16", 64): Product(128, 64, 64, 4, 3),
    ("f16", 32): Product(128, 32, 64, 4, 3),
    ("f32", 128): Product(128, 128, 16, 8, 3),  # 32 channels at a time spill on sm_80
    ("f32", 64): Product(128, 64, 16, 4, 3),
    ("f32", 32): Product(128, 32, 32, 4, 3),
}
SUMMED_PRODUCTS = {
    ("f16", 128): Product(64, 128, 128, 8, 3),
    ("f16", 64): Product(64, 64, 64, 4, 3),
    ("f16", 32): Product(64, 32, 32, 4, 3),
    ("f32", 128): Product(32, 128, 128, 8, 3),
    ("f32", 64): Product(32, 64, 64, 4, 3),
    ("f32", 32): Product(32, 32, 32, 4, 3),
}
FEW_TILES = 64  # then blocks of 64 x 64, so that more processors have one
SUMMED_BLOCKS = 512  # programs that sum over tiles, where the channels alone are fewer blocks
ROWS = 128  # tiles of a workspace are padded to a multiple of this
FILTER_BLOCK = {2: (8, 32), 4: (8, 32), 6: (4, 32)}  # (k, c) of a block of a filter
PRECISION = {"f16": None, "f32": "tf32x3"}
# Values of each of the a^2 positions that a transform's block holds in registers.
ELEMENTS = {2: 512, 4: 256, 6: 128}


def padded(channels):
    """Channels of a plane of the workspace: 32, or a multiple of 64."""
    return 32 if channels <= 32 else -(-channels // 64) * 64


def product(tiles, k_padded, c_padded, domain):
    """The `Product` of M = V U^T."""
    block = 128 if k_padded % 128 == 0 else min(k_padded, 64)
    if tiles <= FEW_TILES:
        block = min(block, 64)
    chosen = PRODUCTS[domain, block]
    if tiles <= FEW_TILES:
        chosen = chosen._replace(tiles=64)
    return chosen._replace(c=min(chosen.c, c_padded))


def summed_product(k_padded, c_padded, domain):
    """The `Product` of S = D^T V."""
    return SUMMED_PRODUCTS[domain, math.gcd(128, k_padded, c_padded)]


def configurations():
    """Every (domain, `Product`) that these two rules can choose: of M = V U^T and of S = D^T V."""
    sizes = (32, 64, 128)
    products = {
        (domain, product(tiles, k, c, domain))
        for domain in DOMAINS
        for tiles in (FEW_TILES, FEW_TILES + 1)
        for k in sizes
        for c in sizes
    }
    summed = {
        (domain, summed_product(k, c, domain)) for domain in DOMAINS for k in sizes for c in sizes
    }
    return sorted(products), sorted(summed)


def transform_block(tiles, channels_padded, tile, channels_last):
    """(tiles, channels) of a block of a transform. Lanes run along the channels of a channels_last
    tensor; else along 32 tiles, or 4 where that would leave processors idle."""
    if channels_last:
        channels = min(triton.next_power_of_2(channels_padded), ELEMENTS[tile])
        return ELEMENTS[tile] // channels, channels
    along = 32 if tiles >= 4096 else 4
    return along, ELEMENTS[tile] // along


# --- launching ---


def _launch(kernel, grid, *arguments, warps=4, stages=1, **constants):
    if isinstance(kernel, triton.JITFunction):
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages)


def _empty(size, like):
    last = is_channels_last(like)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _require(holds, op, message):
    if not holds:
        raise RuntimeError(f"pywino::_winograd_triton_{op}: {message()}")


def _check(op, tile, domain, **tensors):
    _require(triton is not None, op, why_not)
    _require(tile in POINTS, op, lambda: f"tile must be 2, 4 or 6, got {tile}")
    _require(domain in DOMAINS, op, lambda: f'domain must be "f16" or "f32", got {domain!r}')
    for name, tensor in tensors.items():
        _check_tensor(op, name, tensor)


def _check_tensor(op, name, tensor):
    interpreted = not isinstance(_products, triton.JITFunction)
    _require(
        tensor.is_cuda or interpreted,
        op,
        lambda: f'{name} must be on a CUDA device, got {tensor.device}; take backend="cpu"',
    )
    dtype = str(tensor.dtype).removeprefix("torch.")
    _require(
        tensor.dtype in DTYPES,
        op,
        lambda: f"{name} must be float32, float16 or bfloat16, got {dtype}; convert it",
    )


class Geometry(NamedTuple):
    """The tiles of a convolution: n, h and w are of its input."""

    n: int
    h: int
    w: int
    padding: tuple[int, int]
    dilation: tuple[int, int]
    tile: int

    @property
    def output_size(self):
        return tuple(
            s + 2 * p - 2 * d for s, p, d in zip((self.h, self.w), self.padding, self.dilation)
        )

    @property
    def grid(self):
        """(rows, columns) of tiles of one image, all phases of the dilation."""
        return tuple(-(-s // (d * self.tile)) * d for s, d in zip(self.output_size, self.dilation))

    @property
    def tiles_of_image(self):
        return self.grid[0] * self.grid[1]

    def chunks(self, op, bytes_of_tile, limit, whole_images=False):
        """Slices (image, first, tiles) of all tiles in their order, as even as can be, whose
        workspace is within the limit."""
        tiles = self.n * self.tiles_of_image
        unit = self.tiles_of_image if whole_images else ROWS
        most = min(limit // bytes_of_tile // ROWS * ROWS, 1 << 24) // unit * unit
        what = "one image" if whole_images else f"{ROWS} tiles"
        least = -(-unit // ROWS) * ROWS * bytes_of_tile
        _require(
            most > 0,
            op,
            lambda: (
                f"workspace_limit must be at least {least} bytes, for {what} of this call, got "
                f"{limit}; raise it, or take a smaller tile"
            ),
        )
        count = -(-tiles // most)
        size = -(-tiles // (count * unit)) * unit if count else unit
        return [
            (start // self.tiles_of_image, start % self.tiles_of_image, min(size, tiles - start))
            for start in range(0, tiles, size)
        ]


def _transform(tensor, v, scale, peaks, geometry, chunk, X, SCALES, relu=False):
    """Launches `_to_domain` of an input or an output gradient."""
    image, first, tiles = chunk
    rows, channels_padded = v.shape[1:]
    last, tile = is_channels_last(tensor), geometry.tile
    block = transform_block(tiles, channels_padded, tile, last)
    columns = 1 if SCALES == "tile" else -(-channels_padded // block[1])
    _launch(
        _to_domain,
        (-(-rows // block[0]), columns),
        *(tensor, v, scale, peaks, *tensor.shape[1:], *tensor.stride(), image, first, tiles),
        *(rows, channels_padded, *geometry.grid),
        *(geometry.padding if X == BT else (0, 0)),
        *geometry.dilation,
        X=X,
        TILE=tile,
        SCALES=SCALES,
        RELU=relu,
        CHANNELS_LAST=last,
        BLOCK_TILES=block[0],
        BLOCK_CHANNELS=block[1],
    )


def _multiply(v, u, m, domain, tiles):
    """Launches `_products`."""
    taps, rows, c_padded = v.shape
    k_padded = u.shape[1]
    block = product(tiles, k_padded, c_padded, domain)
    blocks = taps * (rows // block.tiles) * (k_padded // block.k)
    _launch(
        _products,
        (min(blocks, 2 * processors(v.device)),),
        *(v, u, m, rows, k_padded, c_padded, taps),
        BLOCK_TILES=block.tiles,
        BLOCK_K=block.k,
        BLOCK_C=block.c,
        PRECISION=PRECISION[domain],
        warps=block.warps,
        stages=block.stages,
    )


def _multiply_summed(d, v, s, domain, accumulate):
    """Launches `_summed_products`."""
    splits, taps, k_padded, c_padded = s.shape
    block = summed_product(k_padded, c_padded, domain)
    _launch(
        _summed_products,
        (splits * taps * (k_padded // block.k) * (c_padded // block.c),),
        *(d, v, s, v.shape[1], k_padded, c_padded, taps, splits),
        ACCUMULATE=accumulate,
        BLOCK_K=block.k,
        BLOCK_C=block.c,
        BLOCK_TILES=block.tiles,
        PRECISION=PRECISION[domain],
        warps=block.warps,
        stages=block.stages,
    )


def _rows(chunks):
    """Rows of the workspace that holds each chunk in turn."""
    return -(-max((tiles for _, _, tiles in chunks), default=0) // ROWS) * ROWS


# --- the public surface ---


def transform_filter(
    weight: Tensor, tile: int, domain: str, rotate: bool = False, spatial: bool = True
) -> tuple[Tensor, Tensor]:
    """U = G g G^T and its scales: (U, scale), to be kept as long as the weight stays.

    weight: (K, C, 3, 3), or with spatial=False (K, C, tile + 2, tile + 2), which is in the Winograd
    domain already; float32, float16 or bfloat16, any strides. rotate=True gives the filter of the
    input gradient: K and C change places, 3 x 3 kernels turn by 180 degrees.
    U: ((tile + 2)^2, K', C'), fp16 or fp32 by `domain`; scale: (K',) fp32 powers of two, by which
    U[:, k] is to be multiplied. Lavin and Gray, CVPR 2016.
    """
    _check("filter", tile, domain, weight=weight)
    size = 3 if spatial else tile + 2
    _require(
        weight.dim() == 4 and tuple(weight.shape[2:]) == (size, size),
        "filter",
        lambda: f"weight must be (K, C, {size}, {size}), got {tuple(weight.shape)}; reshape it",
    )
    order = (1, 0) if rotate else (0, 1)
    k, c = (weight.shape[i] for i in order)
    k_padded, c_padded = padded(k), padded(c)
    u = weight.new_empty(((tile + 2) ** 2, k_padded, c_padded), dtype=DOMAINS[domain])
    scale = weight.new_empty(k_padded, dtype=torch.float32)
    with on_device_of(weight):
        _launch(
            _transform_filter,
            (k_padded // FILTER_BLOCK[tile][0],),
            *(weight, u, scale, k, c, *(weight.stride(i) for i in (*order, 2, 3))),
            *(k_padded, c_padded),
            X=G if spatial else I,
            TILE=tile,
            ROTATE=rotate and spatial,
            SCALED=domain == "f16",
            BLOCK_K=FILTER_BLOCK[tile][0],
            BLOCK_C=FILTER_BLOCK[tile][1],
        )
    return u, scale


def forward(
    input: Tensor,
    filter: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    tile: int,
    padding: list[int],
    dilation: list[int],
    relu: bool,
    winograd_relu: bool,
    domain: str,
    workspace_limit: int = WORKSPACE_LIMIT,
) -> Tensor:
    """act(conv(input) + bias + residual), (N, K, OH, OW), channels_last iff input is.

    input: (N, C, H, W), float32, float16 or bfloat16, any strides; filter, scale: from
    `transform_filter` of the same tile and domain; bias: K numbers or None; residual: like the
    output or None, added before the ReLU. winograd_relu: ReLU on B^T d B (Liu et al., ICLR 2018).
    The gradient by the input is this with the rotated filter and padding 2 dilation - padding.
    workspace_limit, in bytes, bounds V, M and the scales; tiles are worked on in as many chunks as
    that takes, and less than 128 of them is an error.
    """
    _check("forward", tile, domain, input=input, filter=filter)
    _check_filter("forward", input, filter, scale, out_channels, tile, domain)
    g = Geometry(input.shape[0], *input.shape[2:], tuple(padding), tuple(dilation), tile)
    _check_geometry("forward", g)
    output = _empty((g.n, out_channels, *g.output_size), input)
    _require(
        bias is None or tuple(bias.shape) == (out_channels,),
        "forward",
        lambda: f"bias must be {out_channels} numbers, got {tuple(bias.shape)}",
    )
    _require(
        residual is None or residual.shape == output.shape,
        "forward",
        lambda: (
            f"residual must have the output's size {tuple(output.shape)}, got "
            f"{tuple(residual.shape)}"
        ),
    )
    taps, k_padded, c_padded = filter.shape
    last = is_channels_last(input)
    if bias is not None:
        bias = bias.float().contiguous()
    if residual is not None:
        memory_format = torch.channels_last if last else torch.contiguous_format
        residual = residual.to(input.dtype).contiguous(memory_format=memory_format)
    bytes_of_tile = taps * (k_padded + c_padded) * filter.element_size() + 4
    chunks = g.chunks("forward", bytes_of_tile, workspace_limit)
    rows = _rows(chunks)
    v = filter.new_empty((taps, rows, c_padded))
    m = filter.new_empty((taps, rows, k_padded))
    tile_scale = scale.new_empty(rows)
    with on_device_of(input):
        for chunk in chunks:
            tiles = chunk[2]
            scales = "tile" if domain == "f16" else None
            _transform(input, v, tile_scale, None, g, chunk, BT, scales, winograd_relu)
            _multiply(v, filter, m, domain, tiles)
            block = transform_block(tiles, k_padded, tile, last)
            _launch(
                _from_domain,
                (-(-tiles // block[0]), -(-k_padded // block[1])),
                *(m, tile_scale, scale, bias, residual, output),
                *(out_channels, *g.output_size, *output.stride()),
                *(*chunk, rows, k_padded, *g.grid, *g.dilation),
                TILE=tile,
                SCALED=domain == "f16",
                RELU=relu,
                CHANNELS_LAST=last,
                BLOCK_TILES=block[0],
                BLOCK_CHANNELS=block[1],
            )
    return output


def weight_gradient(
    grad: Tensor,
    input: Tensor,
    tile: int,
    padding: list[int],
    dilation: list[int],
    winograd_relu: bool,
    domain: str,
    workspace_limit: int = WORKSPACE_LIMIT,
) -> Tensor:
    """dW = G^T [ sum_tiles (A dY A^T) (B^T d B) ] G, (K, C, 3, 3); with winograd_relu that of the
    weight in the Winograd domain, (K, C, tile + 2, tile + 2). Contiguous, of input's dtype.

    grad: (N, K, OH, OW), the gradient of the output; input: (N, C, H, W); both of one dtype, any
    strides. Sums are taken in a fixed order. workspace_limit bounds the two transformed tensors,
    not the (tile + 2)^2 K' C' sums.
    """
    _check("weight_gradient", tile, domain, grad=grad, input=input)
    g = Geometry(input.shape[0], *input.shape[2:], tuple(padding), tuple(dilation), tile)
    _check_geometry("weight_gradient", g)
    _check_grad("weight_gradient", grad, input, g)
    k, c = grad.shape[1], input.shape[1]
    size = tile + 2 if winograd_relu else 3
    gradient = torch.empty((k, c, size, size), dtype=input.dtype, device=input.device)
    if g.n == 0:
        return gradient.zero_()
    scaled, taps = domain == "f16", (tile + 2) ** 2
    k_padded, c_padded = padded(k), padded(c)
    k_peaks, c_peaks = (_peaks(grad), _peaks(input)) if scaled else (None, None)
    dtype = DOMAINS[domain]
    bytes_of_tile = taps * (k_padded + c_padded) * dtype.itemsize
    chunks = g.chunks("weight_gradient", bytes_of_tile, workspace_limit)
    rows = _rows(chunks)
    d = input.new_empty((taps, rows, k_padded), dtype=dtype)
    v = input.new_empty((taps, rows, c_padded), dtype=dtype)
    block = summed_product(k_padded, c_padded, domain)
    blocks = taps * (k_padded // block.k) * (c_padded // block.c)
    splits = max(1, min(SUMMED_BLOCKS // blocks, rows // block.tiles))
    s = input.new_empty((splits, taps, k_padded, c_padded), dtype=torch.float32)
    with on_device_of(input):
        for chunk in chunks:
            scales = "channel" if scaled else None
            _transform(grad, d, None, k_peaks, g, chunk, A, scales)
            _transform(input, v, None, c_peaks, g, chunk, BT, scales, winograd_relu)
            _multiply_summed(d, v, s, domain, accumulate=chunk != chunks[0])
        _launch(
            _from_filter_domain,
            (k_padded // FILTER_BLOCK[tile][0], -(-c // FILTER_BLOCK[tile][1])),
            *(s, k_peaks, c_peaks, gradient, k, c, k_padded, c_padded, splits),
            X=I if winograd_relu else GT,
            TILE=tile,
            SCALED=scaled,
            BLOCK_K=FILTER_BLOCK[tile][0],
            BLOCK_C=FILTER_BLOCK[tile][1],
        )
    return gradient


def relu_input_gradient(
    grad: Tensor,
    input: Tensor,
    filter: Tensor,
    scale: Tensor,
    tile: int,
    padding: list[int],
    dilation: list[int],
    domain: str,
    workspace_limit: int = WORKSPACE_LIMIT,
) -> Tensor:
    """dX = sum_tiles B [ (U^T (A dY A^T)) . (B^T d B > 0) ] B^T of the Winograd-ReLU layer: like
    input, channels_last iff it is.

    grad: (N, K, OH, OW); input: (N, C, H, W); filter, scale: from `transform_filter` with
    rotate=True, spatial=False. The patches of neighbouring tiles overlap: each pixel gathers its
    sum in a fixed order. workspace_limit bounds the transformed gradient, the products and the
    patches; too small for one image is an error that says what it takes.
    """
    _check("relu_input_gradient", tile, domain, grad=grad, input=input, filter=filter)
    g = Geometry(input.shape[0], *input.shape[2:], tuple(padding), tuple(dilation), tile)
    _check_geometry("relu_input_gradient", g)
    _check_grad("relu_input_gradient", grad, input, g)
    c = input.shape[1]
    _check_filter("relu_input_gradient", grad, filter, scale, c, tile, domain)
    last = is_channels_last(input)
    output = _empty(input.shape, input)
    taps, c_padded, k_padded = filter.shape
    bytes_of_tile = taps * ((k_padded + c_padded) * filter.element_size() + 4 * c_padded) + 4
    chunks = g.chunks("relu_input_gradient", bytes_of_tile, workspace_limit, whole_images=True)
    rows = _rows(chunks)
    d = filter.new_empty((taps, rows, k_padded))
    m = filter.new_empty((taps, rows, c_padded))
    patches = filter.new_empty((taps, rows, c_padded), dtype=torch.float32)
    tile_scale = scale.new_empty(rows)
    with on_device_of(input):
        for chunk in chunks:
            image, _, tiles = chunk
            scales = "tile" if domain == "f16" else None
            _transform(grad, d, tile_scale, None, g, chunk, A, scales)
            _multiply(d, filter, m, domain, tiles)
            block = transform_block(tiles, c_padded, tile, last)
            _launch(
                _masked_patches,
                (-(-tiles // block[0]), -(-c_padded // block[1])),
                *(input, m, tile_scale, scale, patches, *input.shape[1:], *input.stride()),
                *(*chunk, rows, c_padded, *g.grid, *g.padding, *g.dilation),
                TILE=tile,
                SCALED=domain == "f16",
                CHANNELS_LAST=last,
                BLOCK_TILES=block[0],
                BLOCK_CHANNELS=block[1],
            )
            pixels = tiles // g.tiles_of_image * g.h * g.w
            block = transform_block(pixels, c_padded, 2, last)
            _launch(
                _overlap_add,
                (-(-pixels // block[0]), -(-c_padded // block[1])),
                *(patches, output, *input.shape[1:], *output.stride()),
                *(image, pixels, rows, c_padded, *g.grid, *g.padding, *g.dilation),
                TILE=tile,
                CHANNELS_LAST=last,
                BLOCK_PIXELS=block[0],
                BLOCK_CHANNELS=block[1],
            )
    return output


def _peaks(tensor):
    """max|x| of each channel."""
    return torch.linalg.vector_norm(tensor, math.inf, (0, 2, 3)).float()


# --- checks ---


def _check_geometry(op, g):
    _require(
        min(g.padding) >= 0 and min(g.dilation) >= 1,
        op,
        lambda: (
            f"padding must be >= 0 and dilation >= 1, got {g.padding} and {g.dilation}; crop "
            "the input instead"
        ),
    )
    _require(
        min(g.output_size) > 0,
        op,
        lambda: (
            "the dilated kernel must fit into the padded input, got an output of "
            f"{g.output_size[0]} x {g.output_size[1]}; add padding"
        ),
    )


def _check_filter(op, input, filter, scale, out_channels, tile, domain):
    size = ((tile + 2) ** 2, padded(out_channels), padded(input.shape[1]))
    _require(
        tuple(filter.shape) == size
        and tuple(scale.shape) == size[1:2]
        and filter.dtype == DOMAINS[domain],
        op,
        lambda: (
            f"filter must be transformed for tile {tile}, domain {domain!r} and "
            f"{input.shape[1]} to {out_channels} channels, so {size} of {DOMAINS[domain]}, got "
            f"{tuple(filter.shape)} of {filter.dtype}; call transform_filter"
        ),
    )


def _check_grad(op, grad, input, g):
    size = (g.n, grad.shape[1], *g.output_size)
    _require(
        tuple(grad.shape) == size and grad.dtype == input.dtype,
        op,
        lambda: (
            f"grad must have the output's size {size} and input's dtype {input.dtype}, got "
            f"{tuple(grad.shape)} and {grad.dtype}; convert it"
        ),
    )


# --- the ops: torch.compile sees the kernels in them, and takes shapes and strides from them ---

OPS = {
    "filter": transform_filter,
    "forward": forward,
    "weight_gradient": weight_gradient,
    "relu_input_gradient": relu_input_gradient,
}
if triton:
    for _name, _function in OPS.items():
        torch.library.triton_op(f"pywino::_winograd_triton_{_name}", _function, mutates_args=())
