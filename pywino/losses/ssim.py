# SPDX-License-Identifier: BSD-3-Clause
"""Structural similarity (Wang et al., 2004).

    SSIM = (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2))

with means m, variances s^2 and covariance s_xy under a Gaussian window of 11 x 11 pixels with
sigma 1.5, C1 = 0.01^2 and C2 = 0.03^2.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def ssim(x: Tensor, y: Tensor, padding: str = "same") -> Tensor:
    """The mean SSIM of each pair of images, (N,). x, y: (N, C, H, W) in 0..1, each channel for
    itself.

    padding: "same" takes zeros around the images, as papers on deraining do in their loss; "valid"
    only windows inside them, as the metric is defined (11 x 11 pixels at least)."""
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(
            f"pywino.losses.ssim: x and y must be (N, C, H, W) of one shape, got {tuple(x.shape)} "
            f"and {tuple(y.shape)}"
        )
    if padding not in ("same", "valid"):
        raise ValueError(f"pywino.losses.ssim: padding must be 'same' or 'valid', got {padding!r}")
    if padding == "valid" and min(x.shape[2:]) < _WINDOW:
        raise ValueError(
            f"pywino.losses.ssim: images must have {_WINDOW} x {_WINDOW} pixels or more, got "
            f"{tuple(x.shape[2:])}; use padding='same'"
        )
    images, channels = x.shape[:2]
    # Five means under the window at once: every channel of them is an image of its own.
    stack = torch.stack((x, y, x * x, y * y, x * y)).flatten(0, 2)[:, None]
    means = _blurred(stack, padding).unflatten(0, (5, images, channels)).squeeze(3)
    mx, my, xx, yy, xy = means
    similarity = (2 * mx * my + _C1) * (2 * (xy - mx * my) + _C2)
    similarity = similarity / ((mx**2 + my**2 + _C1) * (xx - mx**2 + yy - my**2 + _C2))
    return similarity.mean((1, 2, 3))


def _blurred(x: Tensor, padding: str) -> Tensor:
    """The window is a product of two: first down, then across."""
    offset = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    window = torch.exp(-(offset**2) / (2 * _SIGMA**2))
    window = window / window.sum()
    x = F.conv2d(x, window.view(1, 1, -1, 1), padding=padding)
    return F.conv2d(x, window.view(1, 1, 1, -1), padding=padding)


def ssim_loss(x: Tensor, y: Tensor) -> Tensor:
    """-SSIM(x, y) with zeros around the images, the mean over all of them: a number."""
    return -ssim(x, y).mean()


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """10 log10(1 / mean((x - y)^2)) of each pair of images, in decibels, (N,). x, y: (N, C, H, W)
    in 0..1."""
    return -10 * torch.log10(((x - y) ** 2).mean((1, 2, 3)))
