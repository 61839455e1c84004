# SPDX-License-Identifier: BSD-3-Clause
"""The distance of images in the features of a classifier (Johnson et al., ECCV 2016)."""

import os

from torch import Tensor, nn
from torch.nn import functional as F

from pywino.losses.perceptual import VGG16Features


class FeatureLoss(nn.Module):
    """mean((V(x) - V(y))^2), V the features conv3_3 of VGG before their ReLU: DeblurGAN's and
    Deblur-YOLO's L_P. (They take VGG-19, which has the same layers as VGG-16 as far as that.) All
    images are normalised as ImageNet's.

    weights: as `VGG16Features` takes it."""

    def __init__(self, weights: str | os.PathLike | None = None):
        super().__init__()
        self.features = VGG16Features(weights, 3)
        self.features.blocks[2][-1] = nn.Identity()  # in the place of the ReLU

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """A number, for (N, 3, H, W) in 0..1. No gradient goes into y."""
        return F.mse_loss(self.features(x)[2], self.features(y.detach())[2])
