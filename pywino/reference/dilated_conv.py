# SPDX-License-Identifier: BSD-3-Clause
"""Dilated convolution in plain PyTorch, for any floating dtype: the specification."""

import torch.nn.functional as F


def dilated_conv2d(input, weight, bias=None, padding=(0, 0), dilation=(1, 1)):
    """y[n, k, y, x] = b[k] + sum over c, i, j of w[k, c, i, j] x[n, c, y + d i - p, x + d' j - p'],
    with zeros around x (Yu and Koltun, ICLR 2016). Stride 1.

    input (N, C, H, W), weight (K, C, R, S), bias (K,) or None; p and d are (height, width)."""
    (ph, pw), (dh, dw), (r, s) = padding, dilation, weight.shape[2:]
    padded = F.pad(input, (pw, pw, ph, ph))
    height, width = padded.shape[2] - dh * (r - 1), padded.shape[3] - dw * (s - 1)
    output = 0
    for i in range(r):
        for j in range(s):
            shifted = padded[:, :, dh * i : dh * i + height, dw * j : dw * j + width]
            output = output + (weight[:, :, i, j] @ shifted.flatten(2)).unflatten(
                2, (height, width)
            )
    return output if bias is None else output + bias[:, None, None]


def grids(tensor, dilation):
    """The d x d' interleaved grids of a tensor's pixels, row by row: a convolution with this
    dilation is an undilated one on each."""
    return [tensor[..., i :: dilation[0], j :: dilation[1]]
            for i in range(dilation[0]) for j in range(dilation[1])]  # fmt: skip
