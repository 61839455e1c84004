# SPDX-License-Identifier: BSD-3-Clause
"""Losses of image restoration. All take (N, 3, H, W), RGB in 0..1, and give a number."""

from pywino.losses.adversarial import RelativisticCritic
from pywino.losses.ssim import psnr, ssim, ssim_loss

__all__ = ["RelativisticCritic", "psnr", "ssim", "ssim_loss"]
