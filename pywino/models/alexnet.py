# SPDX-License-Identifier: BSD-3-Clause
"""AlexNet (Krizhevsky et al., NeurIPS 2012) for images of 28 x 28 and 32 x 32 pixels."""

from torch import Tensor, nn

from pywino.models._plain import Conv, Pool, check_kind, features, initialise

_LAYERS = [Conv(64), Pool(), Conv(192), Pool(), Conv(384), Conv(256), Conv(256), Pool()]


class AlexNet(nn.Module):
    """Five 3x3 convolutions with BatchNorm, 64, P, 192, P, 384, 256, 256, P, then linear layers of
    1024, 1024 and num_classes.

    Input (N, in_channels, H, W) with H, W >= 24, output (N, num_classes)."""

    def __init__(self, num_classes, in_channels, conv, dropout, tile):
        super().__init__()
        check_kind("alexnet", conv)
        self.features = features(
            _LAYERS, in_channels, conv, bias=False, batch_norm=True, dropout=dropout, tile=tile
        )
        self.avgpool = nn.AdaptiveAvgPool2d(3)  # the identity for 28 x 28
        self.classifier = nn.Sequential(
            nn.Linear(256 * 9, 1024),
            nn.ReLU(inplace=True),
            nn.Linear(1024, 1024),
            nn.ReLU(inplace=True),
            nn.Linear(1024, num_classes),
        )
        initialise(self)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(input)).flatten(1))


def alexnet(
    num_classes: int = 10,
    in_channels: int = 1,
    conv: str = "dense",
    *,
    dropout: float = 0.0,
    tile: int = 2,
) -> AlexNet:
    """AlexNet for small images, as "Efficient ensemble sparse convolutional neural networks with
    dynamic batch size" trains it on Fashion-MNIST; the paper does not print the layers.

    conv: "dense", "winograd" or "winograd_relu" (all but the first convolution, F(tile x tile, 3 x
    3)). dropout: after each convolution but the last."""
    return AlexNet(num_classes, in_channels, conv, dropout, tile)
