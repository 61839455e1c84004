# SPDX-License-Identifier: BSD-3-Clause
"""Losses of image restoration. Images are (N, 3, H, W), RGB in 0..1; a loss is a number.

The losses of SAPNet come in their intended form, which has a gradient, and with `faithful=True` as
the published code has them. They are called as loss(restored, clean, degraded); Deblur-YOLO's as
loss(restored, sharp).
"""

from pywino.losses.adversarial import RelativisticCritic
from pywino.losses.detection import DetectionLoss
from pywino.losses.edge import EdgeLoss
from pywino.losses.feature import FeatureLoss
from pywino.losses.perceptual import (
    PerceptualContrastiveLoss,
    PerceptualSimilarityLoss,
    VGG16Features,
)
from pywino.losses.segmentation import SegmentationFPN, SegmentationLoss, focal_self_label_loss
from pywino.losses.ssim import psnr, ssim, ssim_loss

__all__ = [
    "DetectionLoss",
    "EdgeLoss",
    "FeatureLoss",
    "PerceptualContrastiveLoss",
    "PerceptualSimilarityLoss",
    "RelativisticCritic",
    "SegmentationFPN",
    "SegmentationLoss",
    "VGG16Features",
    "focal_self_label_loss",
    "psnr",
    "ssim",
    "ssim_loss",
]
