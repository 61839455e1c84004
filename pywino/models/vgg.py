# SPDX-License-Identifier: BSD-3-Clause
"""VGG-16 (Simonyan and Zisserman, ICLR 2015), configuration D: without batch normalisation for
images of 224 x 224 pixels, with it for those of 32 x 32."""

from torch import Tensor, nn

from pywino.models._plain import Conv, Pool, check_kind, features, initialise

# Output channels of the 3x3 convolutions, block by block; each block ends in a 2x2 max pool.
_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def _features(in_channels, conv, **options):
    check_kind("vgg16", conv)
    layers = [layer for block in _BLOCKS for layer in (*map(Conv, block), Pool())]
    return features(layers, in_channels, conv, **options)


class VGG(nn.Module):
    """`features` (convolutions), `avgpool` (to 7x7), `classifier` (three linear layers), as
    torchvision names them.

    Input (N, in_channels, H, W) with H, W >= 32, output (N, num_classes).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.5,
        conv: str = "dense",
        tile: int = 2,
    ):
        super().__init__()
        self.features = _features(
            in_channels, conv, bias=True, batch_norm=False, dropout=0.0, tile=tile
        )
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
        initialise(self)
        for module in self.classifier:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(input)).flatten(1))


class SmallVGG(nn.Module):
    """The 13 convolutions with BatchNorm, and one linear layer.

    Input (N, in_channels, H, W) with H, W >= 32, output (N, num_classes).
    """

    def __init__(self, num_classes, in_channels, conv, dropout, tile):
        super().__init__()
        self.features = _features(
            in_channels, conv, bias=True, batch_norm=True, dropout=dropout, tile=tile
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)  # the identity for 32 x 32
        self.classifier = nn.Linear(512, num_classes)
        initialise(self)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(input)).flatten(1))


def vgg16(
    num_classes: int = 1000,
    in_channels: int = 3,
    conv: str = "dense",
    *,
    image_size: int = 224,
    dropout: float | None = None,
    tile: int = 2,
) -> VGG | SmallVGG:
    """VGG-16. Weights are random; see `load_weights`.

    image_size 224: torchvision's names, 138,357,544 parameters for 1000 classes of RGB images.
    image_size 32: BatchNorm and one linear layer, 14,723,136 parameters and 513 a class for RGB.

    conv: "dense", "winograd" or "winograd_relu" (all but the first convolution, F(tile x tile, 3 x
    3)). dropout: 224: after the first two linear layers (default 0.5); 32: after each convolution
    but the last (default 0)."""
    if image_size not in (32, 224):
        raise ValueError(f"vgg16: image_size must be 32 or 224, got {image_size!r}")
    if image_size == 32:
        return SmallVGG(num_classes, in_channels, conv, dropout or 0.0, tile)
    return VGG(num_classes, in_channels, 0.5 if dropout is None else dropout, conv, tile)
