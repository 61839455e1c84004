# SPDX-License-Identifier: BSD-3-Clause
"""VGG-16 (Simonyan and Zisserman, ICLR 2015), configuration D without batch normalisation."""

from torch import Tensor, nn

# Output channels of the 3x3 convolutions, block by block; each block ends in a 2x2 max pool.
_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """`features` (convolutions), `avgpool` (to 7x7), `classifier` (three linear layers), as
    torchvision names them.

    Input (N, in_channels, H, W) with H, W >= 32, output (N, num_classes).
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.5):
        super().__init__()
        layers: list[nn.Module] = []
        for block in _BLOCKS:
            for channels in block:
                layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU(inplace=True)]
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(input)).flatten(1))


def vgg16(num_classes: int = 1000, in_channels: int = 3) -> VGG:
    """VGG-16: 138,357,544 parameters for 1000 classes of RGB images. Weights are random; see
    `load_weights`."""
    return VGG(num_classes, in_channels)
