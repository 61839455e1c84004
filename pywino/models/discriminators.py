# SPDX-License-Identifier: BSD-3-Clause
"""Patch discriminators (Isola et al., CVPR 2017) with spectral norm (Miyato et al., ICLR 2018): the
two that judge Deblur-YOLO's generator see the whole image, one in small patches, one in large."""

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

_WIDTH = 64
_MOST = 8  # times the width


class PatchDiscriminator(nn.Module):
    """(N, 3, H, W), RGB in 0..1 -> (N, 1, about H / 2^layers, about W / 2^layers): one number a
    patch, without a sigmoid. 4x4 convolutions with padding 2, LeakyReLU 0.2 between them: one to 64
    channels, `layers` that double them up to 512, one to 1.

    All but the first and the last have their largest singular value divided out. Strides are 2,
    and 1 in the last two convolutions; with `all_stride2` they are 2 in these too. Train mode makes
    one more step of the power iteration in each call.

        layers   parameters   patch
        3        2,764,737    70 x 70 pixels, the local discriminator
        5        11,154,369   286 x 286, the global one
    """

    def __init__(self, layers: int = 3, all_stride2: bool = False):
        super().__init__()
        if not isinstance(layers, int) or layers < 1:
            raise ValueError(f"patch_discriminator: layers must be an integer >= 1, got {layers!r}")
        widths = [_WIDTH * min(2**i, _MOST) for i in range(layers + 1)]
        last = 2 if all_stride2 else 1
        modules: list[nn.Module] = [_conv(3, widths[0], 2), nn.LeakyReLU(0.2, inplace=True)]
        for i in range(layers):
            conv = _conv(widths[i], widths[i + 1], last if i == layers - 1 else 2)
            modules += [spectral_norm(conv), nn.LeakyReLU(0.2, inplace=True)]
        self.model = nn.Sequential(*modules, _conv(widths[-1], 1, last))

    def forward(self, input: Tensor) -> Tensor:
        return self.model(2 * input - 1)


def _conv(in_channels: int, channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 4, stride, padding=2)


def patch_discriminator(layers: int = 3, *, all_stride2: bool = False) -> PatchDiscriminator:
    """A patch discriminator with random weights: 3 layers are Deblur-YOLO's local one, 5 its global
    one. all_stride2: as the paper's text says; its base, DeblurGAN-v2, has 1 in the last two."""
    return PatchDiscriminator(layers, all_stride2)
