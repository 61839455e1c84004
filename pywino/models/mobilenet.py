# SPDX-License-Identifier: BSD-3-Clause
"""MobileNetV2 (Sandler et al., CVPR 2018), as torchvision names it."""

import os

from torch import Tensor, nn

from pywino.models._plain import initialise
from pywino.models.weights import load_weights

# Table 2 of the paper: (t, c, n, s). n blocks to c channels, the first with stride s; inside a
# block the width is t times that of its input.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv_bn_relu6(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            in_channels, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False
        ),
        nn.BatchNorm2d(channels),
        nn.ReLU6(inplace=True),
    )


class _InvertedResidual(nn.Module):
    """1x1 to t times the channels, 3x3 depthwise, 1x1 to the output's channels without an
    activation; plus the input where that has the same shape."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        expand = [_conv_bn_relu6(in_channels, hidden, 1)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *expand,
            _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.residual = stride == 1 and in_channels == channels

    def forward(self, input: Tensor) -> Tensor:
        return input + self.conv(input) if self.residual else self.conv(input)


class MobileNetV2(nn.Module):
    """`features` (19 modules) and `classifier`.

    Input (N, 3, H, W), normalised by ImageNet's mean and deviation; output (N, num_classes). As a
    trunk, slices of `features` give 16 channels at 1/2 of the size ([0:2]), 24 at 1/4 ([2:4]), 32
    at 1/8 ([4:7]), 96 at 1/16 ([7:14]), 320 at 1/32 ([14:18]) and 1280 there ([18]). Sides that
    are no multiple of 32 are rounded up at each halving.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.2):
        super().__init__()
        width = 32
        layers: list[nn.Module] = [_conv_bn_relu6(3, width, 3, stride=2)]
        for expansion, channels, count, stride in _STAGES:
            for block in range(count):
                step = stride if block == 0 else 1
                layers.append(_InvertedResidual(width, channels, step, expansion))
                width = channels
        layers.append(_conv_bn_relu6(width, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, num_classes))
        initialise(self)
        nn.init.normal_(self.classifier[1].weight, 0, 0.01)
        nn.init.zeros_(self.classifier[1].bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.features(input).mean((2, 3)))


def mobilenet_v2(num_classes: int = 1000, weights: str | os.PathLike | None = None) -> MobileNetV2:
    """MobileNetV2: 3,504,872 parameters for 1000 classes, random or those of a file with
    torchvision's names (`mobilenet_v2-b0353104.pth`)."""
    model = MobileNetV2(num_classes)
    return model if weights is None else load_weights(model, weights)
