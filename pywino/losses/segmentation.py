# SPDX-License-Identifier: BSD-3-Clause
"""SAPNet's segmentation loss without labels, on a feature pyramid over ResNet-101."""

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pywino.models.resnet import ResNet
from pywino.models.weights import load_weights

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RGB_MEAN = (0.48109378172, 0.4575245789, 0.4078705409)  # which URSS takes away, as published


class SegmentationFPN(nn.Module):
    """(N, 3, H, W) -> (N, classes, H / 4, W / 4), scores of classes.

    Features of ResNet-101 at 1/4 ... 1/32, each to 256 channels by a 1x1 convolution; from the
    coarsest on, the sum with the next, scaled to its size; two 3x3 convolutions a level (256, 128),
    all levels scaled to 1/4, and one 3x3 convolution to the classes. No norm and no activation
    stand behind the trunk; every scaling is bilinear with aligned corners.

    trunk: torchvision's weights of ResNet-101; None for random ones. The head's are always random,
    N(0, 0.01^2), as the paper has them ("ImageNet and Gaussian weights"): it is never trained."""

    def __init__(self, trunk: str | os.PathLike | None = None, classes: int = 21):
        super().__init__()
        self.trunk = ResNet((3, 4, 23, 3))
        if trunk is not None:
            load_weights(self.trunk, trunk)
        del self.trunk.fc
        widths = (256, 512, 1024, 2048)
        self.lateral = nn.ModuleList(nn.Conv2d(width, 256, 1) for width in widths)
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.Conv2d(256, 128, 3, padding=1))
            for _ in widths
        )
        self.classify = nn.Conv2d(4 * 128, classes, 3, padding=1)
        self.draw_head()
        self.requires_grad_(False)

    @torch.no_grad()
    def draw_head(self) -> None:
        """Random weights behind the trunk."""
        for part in (self.lateral, self.smooth, self.classify):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.normal_(0, 0.01)
                    module.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        trunk = self.trunk
        x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(images))))
        levels = []
        for layer, lateral in zip(
            (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4), self.lateral
        ):
            x = layer(x)
            levels.append(lateral(x))
        for i in (2, 1, 0):
            levels[i] = levels[i] + _scaled(levels[i + 1], levels[i].shape[2:])
        size = levels[0].shape[2:]
        smoothed = [_scaled(smooth(level), size) for smooth, level in zip(self.smooth, levels)]
        return self.classify(torch.cat(smoothed, 1))


def _scaled(x: Tensor, size) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def focal_self_label_loss(scores: Tensor, gamma: float = 2.0, alpha: float = 1.0) -> Tensor:
    """The focal loss (Lin et al., ICCV 2017) of scores (N, classes, H, W) with their own largest
    as labels:

        L = mean over pixels of  -alpha (1 - p)^gamma log p,   p = max over k of softmax_k(scores)

    with p in 10^-7 .. 1 - 10^-7. It is small where the network is sure."""
    p = scores.softmax(1).amax(1).clamp(1e-7, 1 - 1e-7)
    return (-alpha * (1 - p) ** gamma * p.log()).mean()


class SegmentationLoss(nn.Module):
    """loss(restored x, clean, degraded y), each (N, 3, H, W) in 0..1: the focal self-label loss of
    a `SegmentationFPN`, frozen, on normalised images.

    on: "image", x (SAPNet's UBS, unsupervised background segmentation), or "residual", y - x in
    0..1 (URSS of its first version). trunk: torchvision's weights of ResNet-101. Without them the
    trunk is random, which shows that the loss works and is of no use.

    faithful: as published. "image": the head is drawn anew in every call, BatchNorm takes the
    batch's statistics, images are not normalised. "residual": the residual less the mean of RGB,
    and no gradient to x."""

    def __init__(
        self,
        trunk: str | os.PathLike | None = None,
        on: str = "image",
        gamma: float = 2.0,
        alpha: float = 1.0,
        faithful: bool = False,
    ):
        super().__init__()
        if on not in ("image", "residual"):
            raise ValueError(
                f"pywino.losses.SegmentationLoss: on must be 'image' or 'residual', got {on!r}"
            )
        self.network = SegmentationFPN(trunk)
        self.on, self.gamma, self.alpha, self.faithful = on, gamma, alpha, faithful
        for name, values in (("mean", _MEAN), ("std", _STD), ("rgb_mean", _RGB_MEAN)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.train()

    def train(self, mode: bool = True) -> "SegmentationLoss":
        """BatchNorm stays as it is, whatever the mode."""
        super().train(mode)
        self.network.train(self.faithful and self.on == "image")
        return self

    def forward(self, restored: Tensor, clean: Tensor | None, degraded: Tensor) -> Tensor:
        if self.on == "residual":
            image = (degraded - restored).clamp(0, 1)
            if self.faithful:
                image = (image - self.rgb_mean).detach()
        else:
            image = restored
            if self.faithful:
                self.network.draw_head()
        if not self.faithful:
            image = (image - self.mean) / self.std
        return focal_self_label_loss(self.network(image), self.gamma, self.alpha)
