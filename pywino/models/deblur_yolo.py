# SPDX-License-Identifier: BSD-3-Clause
"""Deblur-YOLO's generator: the feature pyramid of DeblurGAN-v2 (Kupyn et al., ICCV 2019) on
MobileNetV2, with dilated top-down convolutions.

With e0 … e4 the features of MobileNetV2 at 1/2, 1/4, 1/8, 1/16 and 1/32 of the size (16, 24, 32,
64, 160 channels), l_i the 1x1 convolutions of them to 128 channels (l0: 64), and `up` the nearest
neighbour at twice the size:

    m4 = l4(e4)
    m3 = td1(l3(e3) + up(m4));  m2 = td2(l2(e2) + up(m3));  m1 = td3(l1(e1) + up(m2))
    s = smooth([head4(m4), head3(m3), head2(m2), head1(m1)], each brought to 1/4 by `up`)
    s = smooth2(up(s) + l0(e0))
    y = clamp(x + tanh(final(up(s))), -1, 1),  x the image in -1..1

td1 … td3, smooth and smooth2 are a 3x3 convolution, a norm and a ReLU, a head is twice a 3x3
convolution and a ReLU. The convolutions of td1 … td3 have dilation 2; with 1 it is DeblurGAN-v2's
network. norm is an instance normalisation without parameters.
"""

import os
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pywino.models.mobilenet import MobileNetV2
from pywino.models.weights import load_state, read_weights
from pywino.nn._instance_norm import InstanceNorm2d
from pywino.nn.dilated_conv import DilatedConv2d
from pywino.nn.winograd import WinogradConv2d

_CHANNELS = 128  # of the pyramid
_STRIDE = 32  # of the deepest features
_USED = 16  # of MobileNetV2's 19 features


def _conv(in_channels: int, channels: int, bias: bool = True) -> WinogradConv2d:
    return WinogradConv2d(in_channels, channels, 3, padding=1, bias=bias)


def _norm_relu(conv: nn.Conv2d) -> nn.Sequential:
    norm = InstanceNorm2d(conv.out_channels, affine=False, track_running_stats=True)
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True))


def _up(input: Tensor, factor: int = 2) -> Tensor:
    return F.interpolate(input, scale_factor=factor, mode="nearest")


class _Pyramid(nn.Module):
    """(N, 3, H, W) -> l0(e0), m1, m2, m3, m4; H and W are multiples of 32."""

    def __init__(self, dilation: int, trim: bool):
        super().__init__()
        features = MobileNetV2().features
        self.features = features[:_USED] if trim else features
        for level in (1, 2, 3):
            conv = DilatedConv2d(_CHANNELS, _CHANNELS, 3, padding=dilation, dilation=dilation)
            self.add_module(f"td{level}", _norm_relu(conv))
        self.lateral4 = nn.Conv2d(160, _CHANNELS, 1, bias=False)
        self.lateral3 = nn.Conv2d(64, _CHANNELS, 1, bias=False)
        self.lateral2 = nn.Conv2d(32, _CHANNELS, 1, bias=False)
        self.lateral1 = nn.Conv2d(24, _CHANNELS, 1, bias=False)
        self.lateral0 = nn.Conv2d(16, _CHANNELS // 2, 1, bias=False)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        features = []
        for layer in self.features[:_USED]:
            input = layer(input)
            features.append(input)
        # The last features of each size that DeblurGAN-v2 takes.
        e0, e1, e2, e3, e4 = (features[i] for i in (1, 3, 6, 10, 15))
        m4 = self.lateral4(e4)
        m3 = self.td1(self.lateral3(e3) + _up(m4))
        m2 = self.td2(self.lateral2(e2) + _up(m3))
        m1 = self.td3(self.lateral1(e1) + _up(m2))
        return self.lateral0(e0), m1, m2, m3, m4


class _Head(nn.Module):
    """Two 3x3 convolutions to 64 channels, a ReLU behind each."""

    def __init__(self):
        super().__init__()
        self.block0 = _conv(_CHANNELS, _CHANNELS // 2, bias=False)
        self.block1 = _conv(_CHANNELS // 2, _CHANNELS // 2, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(self.block1(F.relu(self.block0(input))))


class DeblurYOLO(nn.Module):
    """The generator. Input and output (N, 3, H, W), RGB in 0..1, H and W >= 1: the image is
    continued to multiples of 32 by its outermost pixels, and cut again.

    In training mode the norms take mean and deviation of each image, as DeblurGAN-v2 does at any
    time; in eval mode those that were gathered in training, so that a part of an image gives the
    same result as the whole."""

    def __init__(self, dilation: int = 2, trim: bool = False):
        super().__init__()
        if not isinstance(dilation, int) or dilation < 1:
            raise ValueError(f"deblur_yolo: dilation must be an integer >= 1, got {dilation!r}")
        self.fpn = _Pyramid(dilation, trim)
        for level in (1, 2, 3, 4):
            self.add_module(f"head{level}", _Head())
        self.smooth = _norm_relu(_conv(4 * 64, 64))
        self.smooth2 = _norm_relu(_conv(64, 32))
        self.final = _conv(32, 3)

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[-2:]
        x = F.pad(2 * input - 1, (0, -width % _STRIDE, 0, -height % _STRIDE), mode="replicate")
        l0, m1, m2, m3, m4 = self.fpn(x)
        maps = (_up(self.head4(m4), 8), _up(self.head3(m3), 4), _up(self.head2(m2)), self.head1(m1))
        s = self.smooth(torch.cat(maps, 1))
        s = self.smooth2(_up(s) + l0)
        y = (x + torch.tanh(self.final(_up(s)))).clamp(-1, 1)
        return (y[..., :height, :width] + 1) / 2


# DeblurGAN-v2's MobileNetV2 has the layers of a block in one row: convolution, norm, ReLU6, … In
# torchvision's, whose names ours are, each of these three is a part of its own.
_IN_A_ROW = re.compile(r"(fpn\.features\.\d+\.conv)\.(\d)\.(\w+)")
_PARTS = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}
_FIRST_PARTS = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}  # the block that does not widen


def _named_as_here(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of DeblurGAN-v2 with our names; one with our names as it is."""
    if "fpn.features.2.conv.6.weight" not in state:
        return state

    def renamed(match):
        block, place, name = match.groups()
        parts = _FIRST_PARTS if block == "fpn.features.1.conv" else _PARTS
        return f"{block}.{parts.get(place, place)}.{name}"

    return {
        _IN_A_ROW.sub(renamed, name): value
        for name, value in state.items()
        if not name.startswith("fpn.enc")  # the same tensors as fpn.features
    }


def deblur_yolo(
    weights: str | os.PathLike | None = None,
    *,
    encoder: str | os.PathLike | None = None,
    dilation: int = 2,
    trim: bool = False,
) -> DeblurYOLO:
    """Deblur-YOLO's generator.

    weights: a `.safetensors` or `torch.save` file with the names here, or DeblurGAN-v2's own
        (`fpn_mobilenet.h5`; give dilation=1).
    encoder: a file of MobileNetV2 with torchvision's names, for the encoder alone.
    dilation: of the three top-down convolutions.
    trim: leave out the last three features of MobileNetV2, which the network carries and never
        uses: 2,106,627 parameters instead of 3,312,707. Files of the complete form fit too.
    """
    model = DeblurYOLO(dilation, trim)
    if encoder is not None:
        features = {
            name.removeprefix("features."): value
            for name, value in read_weights(encoder).items()
            if name.startswith("features.")
        }
        load_state(model.fpn.features, _trimmed(features, "") if trim else features, encoder)
    if weights is not None:
        state = _named_as_here(read_weights(weights))
        load_state(model, _trimmed(state, "fpn.features.") if trim else state, weights)
    return model


def _trimmed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    unused = tuple(f"{prefix}{i}." for i in range(_USED, 19))
    return {name: value for name, value in state.items() if not name.startswith(unused)}
