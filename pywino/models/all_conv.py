# SPDX-License-Identifier: BSD-3-Clause
"""All-CNN-C and ConvPool-CNN-C (Springenberg et al., ICLR 2015 workshop)."""

from torch import Tensor, nn

from pywino.models._plain import Conv, Pool, check_kind, features, initialise


class AllConv(nn.Module):
    """Convolutions only, then the mean over all pixels of num_classes maps.

    Input (N, in_channels, H, W) with H, W >= 8, output (N, num_classes)."""

    def __init__(self, layers, in_channels, conv, batch_norm, dropout, tile):
        super().__init__()
        self.features = features(
            layers, in_channels, conv, bias=True, batch_norm=batch_norm, dropout=dropout, tile=tile
        )
        initialise(self)

    def forward(self, input: Tensor) -> Tensor:
        return self.features(input).mean((2, 3))


def _layers(num_classes, width, reduce):
    """`reduce(channels)` halves the maps of so many channels."""
    a, b = round(96 * width), round(192 * width)
    return [
        *(Conv(a), Conv(a), *reduce(a)),
        *(Conv(b), Conv(b), *reduce(b)),
        *(Conv(b), Conv(b, kernel=1), Conv(num_classes, kernel=1, relu=False)),
    ]


def all_cnn_c(
    num_classes: int = 10,
    in_channels: int = 3,
    conv: str = "dense",
    *,
    width: float = 1.0,
    batch_norm: bool = False,
    dropout: float = 0.0,
    tile: int = 2,
) -> AllConv:
    """All-CNN-C: 1,369,738 parameters for 10 classes of RGB images, 1,387,108 for 100.

    The last 1x1 convolution has no ReLU here, its outputs being logits. conv: "dense", "winograd"
    or "winograd_relu", where the two convolutions of stride 2 become stride 1 and a 2x2 max pool,
    and `batch_norm=True` belongs to it. width: of 96 and 192 channels. dropout: after each
    convolution but the last."""
    check_kind("all_cnn_c", conv)
    layers = _layers(num_classes, width, lambda channels: [Conv(channels, stride=2)])
    return AllConv(layers, in_channels, conv, batch_norm, dropout, tile)


def convpool_cnn_c(
    num_classes: int = 10,
    in_channels: int = 3,
    conv: str = "dense",
    *,
    width: float = 1.0,
    batch_norm: bool = False,
    dropout: float = 0.0,
    tile: int = 2,
) -> AllConv:
    """ConvPool-CNN-C: All-CNN-C with a convolution of stride 1 and a 3x3 max pool of stride 2 in
    place of each convolution of stride 2; the same numbers of parameters, the same arguments."""
    check_kind("convpool_cnn_c", conv)
    layers = _layers(num_classes, width, lambda channels: [Conv(channels), Pool(3, 2, 1)])
    return AllConv(layers, in_channels, conv, batch_norm, dropout, tile)
