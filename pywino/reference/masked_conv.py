# SPDX-License-Identifier: BSD-3-Clause
"""Convolution of the pixels of a mask in plain PyTorch: the specification that every kernel is held
against.

    Y[n, k, p] = m[n, p] (b[k] + sum over (c, i, j) of W[k, c, i, j] m[n, q] X[n, c, q])
    q = p + (i d - t, j d - l),   t + bottom = d (height - 1),   l + right = d (width - 1)

What lies outside the mask is not read: NaN there does not spread. float32 and float64 are computed
as they are, 16-bit floats in float32."""

import torch
import torch.nn.functional as F


def masked_conv2d(input, mask, weight, bias=None, padding=None, dilation=(1, 1)):
    """(N, C, H, W) input, (N or 1, 1, H, W) bool mask, (K, C, height, width) weight ->
    (N, K, H, W).

    padding: zeros before the first row and column (t, l), None for half of all."""
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    both = [d * (r - 1) for d, r in zip(dilation, weight.shape[2:])]
    top, left = [total // 2 for total in both] if padding is None else padding
    seen = torch.where(mask, input.to(compute), 0)
    padded = F.pad(seen, (left, both[1] - left, top, both[0] - top))
    output = F.conv2d(padded, weight.to(compute), None, 1, 0, dilation)
    if bias is not None:
        output = output + bias.to(compute).reshape(1, -1, 1, 1)
    return torch.where(mask, output, 0).to(input.dtype)
