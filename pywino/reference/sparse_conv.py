# SPDX-License-Identifier: BSD-3-Clause
"""Convolution with a weight that has zeros in plain PyTorch: the specification that every kernel is
held against.

    Y[n, k, y, x] = b[k] + sum over (c, i, j) with W[k, c, i, j] != 0 of
                    W[k, c, i, j] X[n, c, y s + i d - p, x s + j d - p]

It is F.conv2d but for inputs that are not finite: what a zero would multiply is not read.
float32 and float64 are computed as they are, 16-bit floats in float32."""

import torch
import torch.nn.functional as F


def sparse_conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1):
    """(N, C, H, W) input and (K, C, height, width) weight -> (N, K, H_out, W_out)."""
    (sh, sw), (ph, pw), (dh, dw) = (_pair(value) for value in (stride, padding, dilation))
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    k, _, kernel_h, kernel_w = weight.shape
    padded = F.pad(input.to(compute), (pw, pw, ph, ph))
    height = (padded.shape[2] - dh * (kernel_h - 1) - 1) // sh + 1
    width = (padded.shape[3] - dw * (kernel_w - 1) - 1) // sw + 1
    output = padded.new_zeros(len(input), k, height, width)
    for i in range(kernel_h):
        for j in range(kernel_w):
            rows = slice(i * dh, i * dh + (height - 1) * sh + 1, sh)
            columns = slice(j * dw, j * dw + (width - 1) * sw + 1, sw)
            seen = padded[:, :, rows, columns].unsqueeze(1)
            w = weight[:, :, i, j].to(compute)[None, :, :, None, None]
            output = output + torch.where(w != 0, w * seen, 0).sum(2)
    if bias is not None:
        output = output + bias.to(compute).reshape(1, -1, 1, 1)
    return output.to(input.dtype)


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)
