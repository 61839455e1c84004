# SPDX-License-Identifier: BSD-3-Clause
"""The direct 3 x 3 convolution of any dilation in Triton, y = act(conv(x) + b + residual), as an
implicit product: rows are output pixels, columns output channels, and k runs over the nine taps and
the input's channels. Nothing is unfolded, so a dilation costs nothing.

    Y[p][k] = b[k] + sum over taps and c of V U        _convolve

V[p][tap][c] is X where tap (i, j) of pixel p lies, zero outside of the image. It is gathered while
the product runs.

Products are taken in the tensors' 16-bit dtype, those of float32 in TF32 where PyTorch may take it
too and as three TF32 ones elsewhere; sums are float32. Operations: 18 C K a pixel; the input is
read from memory once and nine times from the caches. No time of this kernel was measured on a GPU
yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pywino.kernels.launch import is_channels_last, jit, on_channels, on_device_of, on_pixels
from pywino.kernels.masked_conv import product

try:
    import triton
    import triton.language as tl
except ImportError:  # the module can be imported; its functions say what is missing
    triton = None


@jit
def _convolve(
    input, filter, bias, residual, output, pixels, channels, out_channels,
    height, width, out_height, out_width,
    in_n, in_c, in_h, in_w, out_n, out_c, out_h, out_w, pad_h, pad_w, dil_h, dil_w,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks of the same pixels follow one another: their input stays in the second-level cache."""
    k_blocks = tl.cdiv(out_channels, BLOCK_K)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    p = tl.program_id(0) // k_blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    k = tl.program_id(0) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    n = (p // (out_height * out_width)).to(tl.int64)
    y = p // out_width % out_height
    x = p % out_width
    top = tl.where(p < pixels, y - pad_h, height)  # else below the image: zeros
    left = x - pad_w
    at = input + (n * in_n + top.to(tl.int64) * in_h + left.to(tl.int64) * in_w)
    if CHANNELS_LAST:
        sums = tl.zeros((BLOCK_PIXELS, BLOCK_K), tl.float32)
    else:
        sums = tl.zeros((BLOCK_K, BLOCK_PIXELS), tl.float32)
    for step in range(9 * c_blocks):
        tap = step // c_blocks
        c = step % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        down = tap // 3 * dil_h
        right = tap % 3 * dil_w
        inside = (top + down >= 0) & (top + down < height)
        inside = inside & (left + right >= 0) & (left + right < width)
        shift = down * tl.cast(in_h, tl.int64) + right * tl.cast(in_w, tl.int64)
        v = tl.load(
            on_pixels(at + shift, CHANNELS_LAST)
            + on_channels(c.to(tl.int64) * in_c, CHANNELS_LAST),
            mask=on_pixels(inside, CHANNELS_LAST) & on_channels(c < channels, CHANNELS_LAST),
            other=0,
        )
        # A filter's numbers lie side by side: the lanes of U run along channels in both.
        u_at = filter + k.to(tl.int64)[:, None] * (9 * channels) + (tap * channels + c)[None, :]
        u = tl.load(u_at, mask=(k < out_channels)[:, None] & (c < channels)[None, :], other=0)
        if CHANNELS_LAST:
            sums = tl.dot(v, tl.trans(u), sums, input_precision=PRECISION)
        else:
            sums = tl.dot(u, v, sums, input_precision=PRECISION)
    if bias is not None:
        shifts = tl.load(bias + k, mask=k < out_channels, other=0)
        sums = sums + on_channels(shifts, CHANNELS_LAST)
    to = n * out_n + y.to(tl.int64) * out_h + x.to(tl.int64) * out_w
    to = on_pixels(to, CHANNELS_LAST) + on_channels(k.to(tl.int64) * out_c, CHANNELS_LAST)
    within = on_pixels(p < pixels, CHANNELS_LAST) & on_channels(k < out_channels, CHANNELS_LAST)
    if residual is not None:
        sums = sums + tl.load(residual + to, mask=within, other=0).to(tl.float32)
    if RELU:
        sums = tl.where(sums < 0, 0.0, sums)  # NaN stays NaN
    tl.store(output + to, sums.to(output.dtype.element_ty), mask=within)


# --- launching ---


def _launch(kernel, grid, *arguments, warps=4, stages=1, **constants):
    kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages)


def transform_filter(weight: Tensor, rotate: bool = False) -> Tensor:
    """(K, 3, 3, C) of a weight (K, C, 3, 3), contiguous; rotate=True gives the filter of the input
    gradient: K and C change places, kernels turn by 180 degrees."""
    if rotate:
        weight = weight.transpose(0, 1).flip(2, 3)
    return weight.permute(0, 2, 3, 1).contiguous()


def forward(
    input: Tensor,
    filter: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    padding: tuple[int, int],
    dilation: tuple[int, int],
    relu: bool,
    strict: bool,
) -> Tensor:
    """act(conv(input) + bias + residual), (N, K, OH, OW), channels_last iff input is.

    input: (N, C, H, W), float32, float16 or bfloat16, any strides; filter: from `transform_filter`;
    bias: K float32 numbers or None; residual: of the output's size, dtype and layout, or None,
    added before the ReLU; strict: float32 products as three TF32 ones.
    """
    n, channels, height, width = input.shape
    out_channels = filter.shape[0]
    out_height, out_width = (
        s + 2 * p - 2 * d for s, p, d in zip((height, width), padding, dilation)
    )
    last = is_channels_last(input)
    output = torch.empty(
        (n, out_channels, out_height, out_width), dtype=input.dtype, device=input.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip
    block = product(channels, out_channels, input.element_size())
    pixels = n * out_height * out_width
    with on_device_of(input):
        _launch(
            _convolve,
            (triton.cdiv(pixels, block.pixels) * triton.cdiv(out_channels, block.k),),
            *(input, filter, bias, residual, output, pixels, channels, out_channels),
            *(height, width, out_height, out_width, *input.stride(), *output.stride()),
            *(*padding, *dilation),
            RELU=relu,
            CHANNELS_LAST=last,
            BLOCK_PIXELS=block.pixels,
            BLOCK_K=block.k,
            BLOCK_C=block.c,
            PRECISION=("tf32x3" if strict else "tf32") if input.dtype == torch.float32 else None,
            warps=block.warps,
            stages=block.stages,
        )
    return output
