# SPDX-License-Identifier: BSD-3-Clause
"""The PSNR of Laplacians."""

import torch
from torch import Tensor
from torch.nn import functional as F


def laplacian_psnr(images: Tensor, truth: Tensor) -> Tensor:
    """PSNR of the images' Laplacians, in dB, one an image: (N,) for two (N, C, H, W) in 0..1 with
    H, W >= 3.

        -10 log10 mean((L x - L y)^2),   L x = up + down + left + right - 4 x

    over all inner pixels and channels. It weighs what PSNR hardly sees, edges and noise. Deblur-
    YOLO's authors report an "SPSNR" that measures smoothness and say no more; this is a measure of
    this library, and its values are not comparable with theirs. Equal images give infinity."""
    if images.shape != truth.shape or images.ndim != 4 or min(images.shape[2:]) < 3:
        raise ValueError(
            "pywino.metrics.laplacian_psnr: images and truth must be (N, C, H, W) of one shape "
            f"with H, W >= 3, got {tuple(images.shape)} and {tuple(truth.shape)}"
        )
    # L is linear.
    difference = (images - truth).double()
    kernel = difference.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    laplacian = F.conv2d(difference.flatten(0, 1)[:, None], kernel[None, None])
    error = laplacian.square().flatten(1).mean(1).view(images.shape[:2]).mean(1)
    return -10 * torch.log10(error)
