# SPDX-License-Identifier: BSD-3-Clause
"""Channel (residual) attention, y = act(x g) + residual with g = sigmoid(W2 relu(W1 z + b1) + W3 z
+ b2) and z the mean of x over its pixels, in Triton: forward and backward.

    small tensors   _whole, _whole_gradient     one program an image, which keeps it in registers
    others          _sums                       partial sums of x (of D x) over blocks of pixels
                    _gate, _gate_gradient       the sums of an image, the two small layers
                    _apply, _apply_gradient     blocks of pixels again, the last one first: what was
                                                read last is still in the second-level cache

D is the gradient of x g: that of y where the ReLU let it through. The maths is in
docs/channel_attention.md.

Bytes of an element of e bytes: forward 3 e in two passes (x twice, y), 2 e in one; backward 5 e (x
and dY twice, dX) and 3 e; a residual is e more. One multiplication each. So the limit is memory:
of the eager composition (mean, product, ReLU, sum, ReLU: 10 e) it is less than a half. No time of
these kernels was measured on a GPU yet.

Sums are taken in fp32 in an order that the shape alone decides: the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pywino.kernels.launch import is_channels_last, jit, on_channels, on_device_of, on_pixels

try:
    import triton
    import triton.language as tl
except ImportError:  # the module can be imported; its functions say what is missing
    triton = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ELEMENTS = 8192  # of an image that one program keeps, and of a weight in one piece
BLOCK = 4096  # elements of a block of pixels and channels
PARTS = 128  # partial sums of a channel, at most
GATE_BLOCK = (32, 16)  # channels and hidden numbers of a program of the two small layers

# --- in registers ---
#
# A block is (pixels, channels) where `CHANNELS_LAST`, else (channels, pixels): lanes run along
# what is contiguous.


@jit
def _places(image, c, p, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """(offsets, mask) of channels c and pixels p of an image, offsets in 64 bits."""
    first = image.to(tl.int64) * channels * pixels
    c_step = 1 if CHANNELS_LAST else pixels
    p_step = channels if CHANNELS_LAST else 1
    offsets = first + on_channels(c.to(tl.int64) * c_step, CHANNELS_LAST)
    offsets = offsets + on_pixels(p.to(tl.int64) * p_step, CHANNELS_LAST)
    within = on_channels(c < channels, CHANNELS_LAST) & on_pixels(p < pixels, CHANNELS_LAST)
    return offsets, within


@jit
def _load(tensor, offsets, within):
    return tl.load(tensor + offsets, mask=within, other=0).to(tl.float32)


@jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)  # NaN stays NaN


@jit
def _output(x, gate, residual, offsets, within, RELU: tl.constexpr, SUM_RELU: tl.constexpr):
    y = x * gate
    if RELU:
        y = _relu(y)
    if residual is not None:
        y = y + _load(residual, offsets, within)
        if SUM_RELU:
            y = _relu(y)
    return y


@jit
def _behind_relu(grad, x, gate, RELU: tl.constexpr):
    """D, of the gradient of y."""
    return tl.where(x * gate > 0, grad, 0.0) if RELU else grad


@jit
def _matrix(weight, rows, columns, n_rows, n_columns):
    """weight[rows, columns] of a dense (n_rows, n_columns), zero outside."""
    at = weight + rows[:, None] * n_columns + columns[None, :]
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(at, mask=mask, other=0).to(tl.float32)


@jit
def _vector(bias, at, size):
    if bias is None:
        x = tl.zeros(at.shape, tl.float32)
    else:
        x = tl.load(bias + at, mask=at < size, other=0).to(tl.float32)
    return x


# --- one program an image ---


@jit
def _whole(
    input, w1, b1, w2, b2, w3, residual, output, mean, gate, channels, pixels, hidden,
    RELU: tl.constexpr, SUM_RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    c, p, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_R)
    offsets, within = _places(image, c, p, channels, pixels, CHANNELS_LAST)
    x = _load(input, offsets, within)
    z = tl.sum(x, axis=0 if CHANNELS_LAST else 1) / pixels
    h = tl.sum(_matrix(w1, r, c, hidden, channels) * z[None, :], axis=1) + _vector(b1, r, hidden)
    u = tl.sum(_matrix(w2, c, r, channels, hidden) * _relu(h)[None, :], axis=1)
    if w3 is not None:
        u += tl.sum(_matrix(w3, c, c, channels, channels) * z[None, :], axis=1)
    g = tl.sigmoid(u + _vector(b2, c, channels))
    at = image * channels + c
    tl.store(mean + at, z, mask=c < channels)
    tl.store(gate + at, g, mask=c < channels)
    y = _output(
        x, on_channels(g, CHANNELS_LAST), residual, offsets, within, RELU, SUM_RELU
    )  # fmt: skip
    tl.store(output + offsets, y.to(output.dtype.element_ty), mask=within)


@jit
def _whole_gradient(
    grad, input, mean, gate, w1, b1, w2, w3, input_gradient, logit_gradient,
    channels, pixels, hidden,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    c, p, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_R)
    offsets, within = _places(image, c, p, channels, pixels, CHANNELS_LAST)
    at = image * channels + c
    z = tl.load(mean + at, mask=c < channels, other=0)
    g = tl.load(gate + at, mask=c < channels, other=0)
    x = _load(input, offsets, within)
    d = _behind_relu(_load(grad, offsets, within), x, on_channels(g, CHANNELS_LAST), RELU)
    du = g * (1 - g) * tl.sum(d * x, axis=0 if CHANNELS_LAST else 1)
    tl.store(logit_gradient + at, du, mask=c < channels)
    w = _matrix(w1, r, c, hidden, channels)
    h = tl.sum(w * z[None, :], axis=1) + _vector(b1, r, hidden)
    dh = tl.sum(_matrix(w2, c, r, channels, hidden) * du[:, None], axis=0)
    dz = tl.sum(w * tl.where(h > 0, dh, 0.0)[:, None], axis=0)
    if w3 is not None:
        dz += tl.sum(_matrix(w3, c, c, channels, channels) * du[:, None], axis=0)
    dx = d * on_channels(g, CHANNELS_LAST) + on_channels(dz / pixels, CHANNELS_LAST)
    tl.store(input_gradient + offsets, dx.to(input_gradient.dtype.element_ty), mask=within)


# --- several programs an image ---


@jit
def _sums(
    grad, input, gate, partial, channels, pixels, parts,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """partial[image][part][c] of x, or with a gradient of D x; parts are whole blocks of pixels."""
    part, image = tl.program_id(0) % parts, tl.program_id(0) // parts
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    blocks = tl.cdiv(pixels, BLOCK_P)
    if grad is not None:
        g = tl.load(gate + image * channels + c, mask=c < channels, other=0)
        g = on_channels(g, CHANNELS_LAST)
    if CHANNELS_LAST:
        sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    else:
        sums = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for block in range(part * blocks // parts, (part + 1) * blocks // parts):
        p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        offsets, within = _places(image, c, p, channels, pixels, CHANNELS_LAST)
        x = _load(input, offsets, within)
        if grad is None:
            sums += x
        else:
            sums += _behind_relu(_load(grad, offsets, within), x, g, RELU) * x
    at = partial + (image * parts + part) * channels + c
    tl.store(at, tl.sum(sums, axis=0 if CHANNELS_LAST else 1), mask=c < channels)


@jit
def _total(partial, image, c, channels, parts, PARTS_2: tl.constexpr):
    """The sums of channels c of an image, from those of its parts."""
    part = tl.arange(0, PARTS_2)
    at = partial + (image * parts + part)[:, None] * channels + c[None, :]
    mask = (part < parts)[:, None] & (c < channels)[None, :]
    return tl.sum(tl.load(at, mask=mask, other=0), axis=0)


@jit
def _gate(
    partial, w1, b1, w2, b2, w3, mean, gate, channels, pixels, hidden, parts,
    PARTS_2: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """z and g of a block of an image's channels; each program computes the hidden layer."""
    image = tl.program_id(0)
    own = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    u = _vector(b2, own, channels)
    for start in range(0, hidden, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        h = _vector(b1, r, hidden)
        for first in range(0, channels, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            z = _total(partial, image, c, channels, parts, PARTS_2) / pixels
            h += tl.sum(_matrix(w1, r, c, hidden, channels) * z[None, :], axis=1)
        u += tl.sum(_matrix(w2, own, r, channels, hidden) * _relu(h)[None, :], axis=1)
    if w3 is not None:
        for first in range(0, channels, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            z = _total(partial, image, c, channels, parts, PARTS_2) / pixels
            u += tl.sum(_matrix(w3, own, c, channels, channels) * z[None, :], axis=1)
    at = image * channels + own
    z = _total(partial, image, own, channels, parts, PARTS_2) / pixels
    tl.store(mean + at, z, mask=own < channels)
    tl.store(gate + at, tl.sigmoid(u), mask=own < channels)


@jit
def _gate_gradient(
    partial, mean, gate, w1, b1, w2, w3, logit_gradient, shift, channels, pixels, hidden, parts,
    PARTS_2: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """du and dz / pixels of a block of an image's channels."""
    image = tl.program_id(0)
    own = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dz = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, hidden, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        h = _vector(b1, r, hidden)
        dh = tl.zeros((BLOCK_R,), tl.float32)
        for first in range(0, channels, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            at = image * channels + c
            z = tl.load(mean + at, mask=c < channels, other=0)
            g = tl.load(gate + at, mask=c < channels, other=0)
            du = g * (1 - g) * _total(partial, image, c, channels, parts, PARTS_2)
            h += tl.sum(_matrix(w1, r, c, hidden, channels) * z[None, :], axis=1)
            dh += tl.sum(_matrix(w2, c, r, channels, hidden) * du[:, None], axis=0)
        dh = tl.where(h > 0, dh, 0.0)
        dz += tl.sum(_matrix(w1, r, own, hidden, channels) * dh[:, None], axis=0)
    if w3 is not None:
        for first in range(0, channels, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            g = tl.load(gate + image * channels + c, mask=c < channels, other=0)
            du = g * (1 - g) * _total(partial, image, c, channels, parts, PARTS_2)
            dz += tl.sum(_matrix(w3, c, own, channels, channels) * du[:, None], axis=0)
    at = image * channels + own
    g = tl.load(gate + at, mask=own < channels, other=0)
    du = g * (1 - g) * _total(partial, image, own, channels, parts, PARTS_2)
    tl.store(logit_gradient + at, du, mask=own < channels)
    tl.store(shift + at, dz / pixels, mask=own < channels)


@jit
def _apply(
    input, gate, residual, output, channels, pixels,
    RELU: tl.constexpr, SUM_RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(pixels, BLOCK_P)
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    image = index // blocks
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = index % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    offsets, within = _places(image, c, p, channels, pixels, CHANNELS_LAST)
    g = tl.load(gate + image * channels + c, mask=c < channels, other=0)
    g = on_channels(g, CHANNELS_LAST)
    x = _load(input, offsets, within)
    y = _output(x, g, residual, offsets, within, RELU, SUM_RELU)
    tl.store(output + offsets, y.to(output.dtype.element_ty), mask=within)


@jit
def _apply_gradient(
    grad, input, gate, shift, input_gradient, channels, pixels,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(pixels, BLOCK_P)
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    image = index // blocks
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = index % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    offsets, within = _places(image, c, p, channels, pixels, CHANNELS_LAST)
    at = image * channels + c
    g = on_channels(tl.load(gate + at, mask=c < channels, other=0), CHANNELS_LAST)
    s = on_channels(tl.load(shift + at, mask=c < channels, other=0), CHANNELS_LAST)
    x = _load(input, offsets, within)
    dx = _behind_relu(_load(grad, offsets, within), x, g, RELU) * g + s
    tl.store(input_gradient + offsets, dx.to(input_gradient.dtype.element_ty), mask=within)


# --- blocks: fixed rules of the shape ---


def fits(channels: int, pixels: int, hidden: int, has_w3: bool) -> bool:
    """Whether one program keeps an image, and the layers' weights, in registers."""
    c, p, r = (triton.next_power_of_2(n) for n in (channels, pixels, hidden))
    return max(c * p, c * r, c * c if has_w3 else 0) <= ELEMENTS


def block(channels: int, pixels: int, channels_last: bool) -> tuple[int, int]:
    """(channels, pixels) of a block: as many as fit along the lanes, the rest across."""
    c, p = triton.next_power_of_2(channels), triton.next_power_of_2(pixels)
    if channels_last:
        c = min(c, 128)
        return c, min(p, BLOCK // c)
    p = min(p, 1024)
    return min(c, BLOCK // p), p


# --- launching ---


def _launch(kernel, grid, *arguments, warps=4, **constants):
    kernel[grid](*arguments, **constants, num_warps=warps)


def _sizes(input, w1):
    n, c, h, w = input.shape
    return n, c, h * w, w1.shape[0]


def _matrices(*weights):
    return [None if w is None else w.contiguous() for w in weights]


def _sum_up(grad, input, gate, relu, size):
    """Partial sums (N, parts, C) of x, or of D x."""
    n, c, pixels, _ = size
    last = is_channels_last(input)
    block_c, block_p = block(c, pixels, last)
    parts = min(PARTS, -(-pixels // block_p))
    partial = input.new_empty((n, parts, c), dtype=torch.float32)
    _launch(
        _sums,
        (n * parts, -(-c // block_c)),
        *(grad, input, gate, partial, c, pixels, parts),
        RELU=relu,
        CHANNELS_LAST=last,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
    )
    return partial


# --- the public surface ---


def forward(
    input: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    residual_relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, z, g): y like input, z and g (N, C) in float32.

    input, residual: (N, C, H, W), float32, float16 or bfloat16, both contiguous or both
    channels_last; w1 (R, C), b1 (R,), w2 (C, R), b2 (C,), w3 (C, C). Zheng, Lu and Narasimhan, WACV
    2022; without w3 Hu et al., CVPR 2018.
    """
    size = n, c, pixels, hidden = _sizes(input, w1)
    last = is_channels_last(input)
    w1, w2, w3 = _matrices(w1, w2, w3)
    output = torch.empty_like(input)
    mean = input.new_empty((n, c), dtype=torch.float32)
    gate = torch.empty_like(mean)
    layers = (w1, b1, w2, b2, w3)
    with on_device_of(input):
        if fits(c, pixels, hidden, w3 is not None):
            _launch(
                _whole,
                (n,),
                *(input, *layers, residual, output, mean, gate, c, pixels, hidden),
                RELU=relu,
                SUM_RELU=residual_relu,
                CHANNELS_LAST=last,
                BLOCK_C=triton.next_power_of_2(c),
                BLOCK_P=triton.next_power_of_2(pixels),
                BLOCK_R=triton.next_power_of_2(hidden),
                warps=8,
            )
            return output, mean, gate
        partial = _sum_up(None, input, None, relu, size)
        parts = partial.shape[1]
        _launch(
            _gate,
            (n, -(-c // GATE_BLOCK[0])),
            *(partial, *layers, mean, gate, c, pixels, hidden, parts),
            PARTS_2=triton.next_power_of_2(parts),
            BLOCK_C=GATE_BLOCK[0],
            BLOCK_R=GATE_BLOCK[1],
        )
        block_c, block_p = block(c, pixels, last)
        _launch(
            _apply,
            (n * -(-pixels // block_p), -(-c // block_c)),
            *(input, gate, residual, output, c, pixels),
            RELU=relu,
            SUM_RELU=residual_relu,
            CHANNELS_LAST=last,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
        )
    return output, mean, gate


def backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    gate: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    w3: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, du): the gradient of x, like input, and that of the sigmoid's argument, (N, C) in
    float32. grad is of act(x g), in input's dtype and memory format; mean and gate are `forward`'s.
    """
    size = n, c, pixels, hidden = _sizes(input, w1)
    last = is_channels_last(input)
    w1, w2, w3 = _matrices(w1, w2, w3)
    mean, gate = mean.contiguous(), gate.contiguous()
    input_gradient, logit_gradient = torch.empty_like(input), torch.empty_like(mean)
    layers = (w1, b1, w2, w3)
    with on_device_of(input):
        if fits(c, pixels, hidden, w3 is not None):
            _launch(
                _whole_gradient,
                (n,),
                *(grad, input, mean, gate, *layers, input_gradient, logit_gradient),
                *(c, pixels, hidden),
                RELU=relu,
                CHANNELS_LAST=last,
                BLOCK_C=triton.next_power_of_2(c),
                BLOCK_P=triton.next_power_of_2(pixels),
                BLOCK_R=triton.next_power_of_2(hidden),
                warps=8,
            )
            return input_gradient, logit_gradient
        partial = _sum_up(grad, input, gate, relu, size)
        parts = partial.shape[1]
        shift = torch.empty_like(mean)
        _launch(
            _gate_gradient,
            (n, -(-c // GATE_BLOCK[0])),
            *(partial, mean, gate, *layers, logit_gradient, shift, c, pixels, hidden, parts),
            PARTS_2=triton.next_power_of_2(parts),
            BLOCK_C=GATE_BLOCK[0],
            BLOCK_R=GATE_BLOCK[1],
        )
        block_c, block_p = block(c, pixels, last)
        _launch(
            _apply_gradient,
            (n * -(-pixels // block_p), -(-c // block_c)),
            *(grad, input, gate, shift, input_gradient, c, pixels),
            RELU=relu,
            CHANNELS_LAST=last,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
        )
    return input_gradient, logit_gradient
