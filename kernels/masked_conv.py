# SPDX-License-Identifier: BSD-3-Clause
"""Convolution of the pixels of a mask in Triton: m (conv(m x) + b), whose work follows the number
of pixels in the mask. The maths is in docs/masked_conv.md.

    counts[b] = how many pixels of block b are in the mask      _count
    list      = the numbers of the pixels in the mask, rising   _list
    Y[p][k]   = b[k] + sum over taps and c of V U, p in list    _convolve_pixels

V[p][tap][c] is X[q][c] where q = p + (i d - t, j d - l) is a pixel of the mask, else 0. It is
gathered while the product runs and lies nowhere.

Nothing waits for the host: a GPU's grid of programs is fixed, and each takes its blocks of 128 (or
64) listed pixels up to the number that `_list` has left on the device. So the kernel works in a
CUDA graph, with another mask at each replay. The same mask gives the same bits.

Products are taken in the tensors' 16-bit dtype, those of float32 in TF32 where PyTorch may take it
too and as three TF32 ones elsewhere; sums are float32.

What it moves and computes, for P pixels, L of them in the mask, elements of e bytes and r taps:

    compaction         read 2 P, write 4 L
    zeros              write P K e
    _convolve_pixels   read L C e from memory and r L C e from the caches, write L K e
    products           r C K L, against r C K P of a dense convolution

With C = K the zeros and the listed pixels are (P + 2 L) C e bytes: at a quarter of the pixels a
64-channel layer in 16 bits takes 192 bytes and 9216 multiplications a pixel, 45 ps and 23 ps on an
H200 (4.3 TB/s, 395 T multiplications/s): memory is the limit up to C = 120 or so. No time of these
kernels was measured on a GPU yet.
"""

from __future__ import annotations

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
)

try:
    import triton
    import triton.language as tl
except ImportError:  # the module can be imported; its functions say what is missing
    triton = None

BLOCK = 1024  # pixels that a program of the compaction looks at

# --- the mask's pixels ---


@jit
def _seen(mask, at, pixels):
    return tl.load(mask + at, mask=at < pixels, other=0).to(tl.int32)


@jit
def _count(mask, counts, pixels, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts + block, tl.sum(_seen(mask, at, pixels), 0))


@jit
def _list(mask, ends, list, pixels, BLOCK: tl.constexpr):
    """ends[b]: pixels of the mask in the blocks up to b."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    seen = _seen(mask, at, pixels)
    first = tl.load(ends + block) - tl.sum(seen, 0)
    tl.store(list + first + tl.cumsum(seen, 0) - seen, at, mask=seen != 0)


# --- the product ---
#


@jit
def _convolve_pixels(
    input, mask, list, count, filter, bias, output, channels, out_channels, height, width,
    stride_n, stride_c, stride_h, stride_w, out_n, out_c, out_h, out_w,
    kernel_h, kernel_w, pad_h, pad_w, dil_h, dil_w,
    CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y of the listed pixels, by persistent programs. Blocks of the same pixels follow one another:
    those of their input stay in the second-level cache."""
    pixels = tl.load(count)
    k_blocks = tl.cdiv(out_channels, BLOCK_K)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    depth = kernel_h * kernel_w * channels
    blocks = tl.cdiv(pixels, BLOCK_PIXELS) * k_blocks
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        a = block // k_blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        k = block % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        listed = a < pixels
        p = tl.load(list + a, mask=listed, other=0)
        n = (p // (height * width)).to(tl.int64)
        y = p // width % height
        x = p % width
        at = input + (n * stride_n + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w)
        if CHANNELS_LAST:
            sums = tl.zeros((BLOCK_PIXELS, BLOCK_K), tl.float32)
        else:
            sums = tl.zeros((BLOCK_K, BLOCK_PIXELS), tl.float32)
        for step in range(kernel_h * kernel_w * c_blocks):
            tap = step // c_blocks
            c = step % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
            down = tap // kernel_w * dil_h - pad_h
            right = tap % kernel_w * dil_w - pad_w
            inside = (y + down >= 0) & (y + down < height) & (x + right >= 0) & (x + right < width)
            seen = tl.load(mask + p + (down * width + right), mask=listed & inside, other=0) != 0
            shift = down * tl.cast(stride_h, tl.int64) + right * tl.cast(stride_w, tl.int64)
            v = tl.load(
                on_pixels(at + shift, CHANNELS_LAST)
                + on_channels(c.to(tl.int64) * stride_c, CHANNELS_LAST),
                mask=on_pixels(seen, CHANNELS_LAST) & on_channels(c < channels, CHANNELS_LAST),
                other=0,
            )
            # A filter's numbers lie side by side: the lanes of U run along channels in both.
            u_at = filter + k.to(tl.int64)[:, None] * depth + (tap * channels + c)[None, :]
            u = tl.load(u_at, mask=(k < out_channels)[:, None] & (c < channels)[None, :], other=0)
            if CHANNELS_LAST:
                sums = tl.dot(v, tl.trans(u), sums, input_precision=PRECISION)
            else:
                sums = tl.dot(u, v, sums, input_precision=PRECISION)
        if bias is not None:
            shifts = tl.load(bias + k, mask=k < out_channels, other=0)
            sums = sums + on_channels(shifts, CHANNELS_LAST)
        to = n * out_n + y.to(tl.int64) * out_h + x.to(tl.int64) * out_w
        tl.store(
            output
            + on_pixels(to, CHANNELS_LAST)
            + on_channels(k.to(tl.int64) * out_c, CHANNELS_LAST),
            sums.to(output.dtype.element_ty),
            mask=on_pixels(listed, CHANNELS_LAST) & on_channels(k < out_channels, CHANNELS_LAST),
        )


# --- blocks: fixed rules of the shape, so every run has the same machine code and results ---


class Product(NamedTuple):
    """Blocks of the product, and how Triton runs it."""

    pixels: int
    k: int
    c: int
    warps: int
    stages: int


# By bytes of an element and block of k. Three stages of 128 x 128 x 64 in 16 bits take 96 KB of
# shared memory, which every architecture from sm_80 on has.
PRODUCTS = {
    (2, 128): Product(128, 128, 64, 8, 3),
    (2, 64): Product(128, 64, 64, 4, 3),
    (2, 32): Product(128, 32, 64, 4, 3),
    (4, 128): Product(64, 128, 32, 8, 3),
    (4, 64): Product(64, 64, 32, 4, 3),
    (4, 32): Product(64, 32, 16, 4, 3),  # 32 channels at a time spill on sm_80
}


def product(channels, out_channels, element_size):
    """The `Product` of C channels in and K out."""
    block = 32 if out_channels <= 32 else 64 if out_channels <= 64 else 128
    chosen = PRODUCTS[element_size, block]
    return chosen._replace(c=min(chosen.c, max(16, triton.next_power_of_2(channels))))


# --- launching ---


def _launch(kernel, grid, *arguments, warps=4, stages=1, **constants):
    kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages)


def list_pixels(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(list, count) of a contiguous bool mask of less than 2^31 pixels: the numbers of the pixels
    in it, rising, in a tensor of mask.numel() int32 numbers of which the rest is undefined, and how
    many they are, a tensor of one number on the device."""
    pixels = mask.numel()
    blocks = triton.cdiv(pixels, BLOCK)
    counts = torch.empty(blocks, dtype=torch.int32, device=mask.device)
    list = torch.empty(pixels, dtype=torch.int32, device=mask.device)
    with on_device_of(mask):
        _launch(_count, (blocks,), mask, counts, pixels, BLOCK=BLOCK)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        _launch(_list, (blocks,), mask, ends, list, pixels, BLOCK=BLOCK)
    return list, ends[-1:]


def forward(
    input: Tensor,
    mask: Tensor,
    filter: Tensor,
    bias: Tensor | None,
    padding: tuple[int, int],
    dilation: tuple[int, int],
    strict: bool,
) -> Tensor:
    """m (conv(m input) + bias), (N, K, H, W), channels_last iff input is.

    input: (N, C, H, W), float32, float16 or bfloat16, any strides; mask: bool (N, 1, H, W),
    contiguous; filter: (K, height, width, C) of input's dtype, contiguous; bias: K float32 numbers
    or None; padding: zeros before the first row and column; strict: float32 products as three TF32
    ones. Purohit et al., ICCV 2021.
    """
    n, channels, height, width = input.shape
    out_channels, *kernel_size, _ = filter.shape
    last = is_channels_last(input)
    format = torch.channels_last if last else torch.contiguous_format
    output = torch.empty(
        (n, out_channels, height, width), dtype=input.dtype, device=input.device,
        memory_format=format,
    ).zero_()  # fmt: skip
    list, count = list_pixels(mask)
    block = product(channels, out_channels, input.element_size())
    k_blocks = triton.cdiv(out_channels, block.k)
    most = triton.cdiv(mask.numel(), block.pixels) * k_blocks
    precision = ("tf32x3" if strict else "tf32") if input.dtype == torch.float32 else None
    with on_device_of(input):
        _launch(
            _convolve_pixels,
            (min(most, 2 * processors(input.device)),),
            *(input, mask, list, count, filter, bias, output, channels, out_channels),
            *(height, width, *input.stride(), *output.stride()),
            *(*kernel_size, *padding, *dilation),
            CHANNELS_LAST=last,
            BLOCK_PIXELS=block.pixels,
            BLOCK_K=block.k,
            BLOCK_C=block.c,
            PRECISION=precision,
            warps=block.warps,
            stages=block.stages,
        )
    return output
