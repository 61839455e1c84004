# SPDX-License-Identifier: BSD-3-Clause
"""Convolution with a weight that has blocks of zeros, in Triton: the work follows the blocks that
are kept. The maths is in docs/sparse_conv.md, why the blocks are so large in
csrc/core/sparse_conv/README.md.

    Y[p][k] = b[k] + sum over the blocks of k's group of V U       _convolve_blocks

A block is one tap, 32 input channels and a group of 64 or 128 output channels. V[p][c] is X at the
tap's place, gathered while the product runs; U is the block's, which lie one behind the other in
the order of the sum. So the same filter gives the same bits.

Products are taken in the tensors' 16-bit dtype, those of float32 in TF32 where PyTorch may take it
too and as three TF32 ones elsewhere; sums are float32. No time of this kernel was measured on a GPU
yet.
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


@jit
def _convolve_blocks(
    input, values, entries, starts, bias, output, pixels, groups, channels, out_channels,
    height, width, out_height, out_width,
    in_n, in_c, in_h, in_w, out_n, out_c, out_h, out_w,
    chunks, kernel_w, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """By persistent programs. Groups of the same pixels follow one another: the input stays in the
    second-level cache."""
    lanes = tl.arange(0, CHUNK)
    within = tl.arange(0, GROUP)
    for block in range(
        tl.program_id(0), tl.cdiv(pixels, BLOCK_PIXELS) * groups, tl.num_programs(0)
    ):
        group = block % groups
        p = block // groups * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        k = group * GROUP + within
        n = (p // (out_height * out_width)).to(tl.int64)
        y = p // out_width % out_height
        x = p % out_width
        top = tl.where(p < pixels, y * stride_h - pad_h, height)  # else below the image: zeros
        left = x * stride_w - pad_w
        at = input + (n * in_n + top.to(tl.int64) * in_h + left.to(tl.int64) * in_w)
        if CHANNELS_LAST:
            sums = tl.zeros((BLOCK_PIXELS, GROUP), tl.float32)
        else:
            sums = tl.zeros((GROUP, BLOCK_PIXELS), tl.float32)
        for e in range(tl.load(starts + group), tl.load(starts + group + 1)):
            entry = tl.load(entries + e)
            tap = entry // chunks
            c = entry % chunks * CHUNK + lanes
            down = tap // kernel_w * dil_h
            right = tap % kernel_w * dil_w
            inside = (top + down >= 0) & (top + down < height)
            inside = inside & (left + right >= 0) & (left + right < width)
            shift = down * tl.cast(in_h, tl.int64) + right * tl.cast(in_w, tl.int64)
            v = tl.load(
                on_pixels(at + shift, CHANNELS_LAST)
                + on_channels(c.to(tl.int64) * in_c, CHANNELS_LAST),
                mask=on_pixels(inside, CHANNELS_LAST) & on_channels(c < channels, CHANNELS_LAST),
                other=0,
            )
            # A block's numbers lie side by side: the lanes of U run along channels in both.
            u_at = tl.cast(e, tl.int64) * (GROUP * CHUNK) + within[:, None] * CHUNK + lanes[None, :]
            u = tl.load(values + u_at)
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
            mask=on_pixels(p < pixels, CHANNELS_LAST)
            & on_channels(k < out_channels, CHANNELS_LAST),
        )


# --- blocks: fixed rules of the shape, so every run has the same machine code and results ---


class Product(NamedTuple):
    """Blocks of the product, and how Triton runs it."""

    pixels: int
    warps: int
    stages: int


# By bytes of an element and output channels of a group. Where a block lies is read some stages
# before the block itself is, which leaves so many fewer to hold blocks.
PRODUCTS = {
    (2, 128): Product(128, 8, 6),
    (2, 64): Product(128, 4, 6),
    (4, 128): Product(64, 8, 4),
    (4, 64): Product(64, 4, 4),
}


# --- launching ---


def _launch(kernel, grid, *arguments, warps=4, stages=1, **constants):
    kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages)


def forward(
    input: Tensor,
    values: Tensor,
    entries: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    strict: bool,
) -> Tensor:
    """conv(input) + bias, (N, K, OH, OW), channels_last iff input is.

    input: (N, C, H, W), float32, float16 or bfloat16, any strides. The filter is a list of blocks,
    those of a group of output channels behind one another: values (blocks, 64 or 128 output
    channels, 32 input channels) of input's dtype, zeros in what sticks out; entries, int32, tap
    ceil(C / 32) + chunk of each; starts, int32, where each group begins, and their number. bias: K
    float32 numbers or None; strict: float32 products as three TF32 ones.
    """
    n, channels, height, width = input.shape
    group, chunk = values.shape[1:]
    sizes = zip((height, width), kernel_size, stride, padding, dilation)
    out_height, out_width = ((i + 2 * p - d * (r - 1) - 1) // s + 1 for i, r, s, p, d in sizes)
    last = is_channels_last(input)
    output = torch.empty(
        (n, out_channels, out_height, out_width), dtype=input.dtype, device=input.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip
    block = PRODUCTS[input.element_size(), group]
    pixels, groups = n * out_height * out_width, triton.cdiv(out_channels, group)
    blocks = triton.cdiv(pixels, block.pixels) * groups
    with on_device_of(input):
        _launch(
            _convolve_blocks,
            (min(blocks, 2 * processors(input.device)),),
            *(input, values, entries, starts, bias, output, pixels, groups, channels),
            *(out_channels, height, width, out_height, out_width),
            *(*input.stride(), *output.stride()),
            *(triton.cdiv(channels, chunk), kernel_size[1], *stride, *padding, *dilation),
            CHANNELS_LAST=last,
            BLOCK_PIXELS=block.pixels,
            GROUP=group,
            CHUNK=chunk,
            PRECISION=("tf32x3" if strict else "tf32") if input.dtype == torch.float32 else None,
            warps=block.warps,
            stages=block.stages,
        )
    return output
