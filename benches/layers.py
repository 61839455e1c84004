# SPDX-License-Identifier: BSD-3-Clause
"""The named layer shapes that benches and tests share: no other file types a size."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution with stride 1 and padding = dilation, on (n, c, h, w), to k channels."""

    name: str
    n: int
    c: int
    h: int
    w: int
    k: int
    dilation: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def flops(self) -> int:
        """Operations of the direct convolution, two a multiply-add."""
        return 2 * 9 * self.n * self.c * self.h * self.w * self.k

    def tensors(
        self,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Input (n, c, h, w) and bias (k) ~ N(0, 1), weight (k, c, 3, 3) ~ N(0, 1 / (9 c)): outputs
        are near 1.

        Input and weight have the memory format. The values depend on the seed, the shape and the
        kind of device alone.
        """
        random = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
        input = torch.randn(self.n, self.c, self.h, self.w, **random)
        weight = torch.randn(self.k, self.c, 3, 3, **random) / (9 * self.c) ** 0.5
        bias = torch.randn(self.k, **random)
        input = input.to(dtype).contiguous(memory_format=memory_format)
        return input, weight.to(dtype).contiguous(memory_format=memory_format), bias.to(dtype)


def _square(model: str, batch: int, channels: int, size: int) -> Layer:
    return Layer(f"{model}-{channels}x{size}-b{batch}", batch, channels, size, size, channels)


def _sapnet(h: int, w: int, dilation: int) -> Layer:
    return Layer(f"sap-32x{h}x{w}-d{dilation}", 1, 32, h, w, 32, dilation)


# VGG-16's conv1_2, conv2_2, conv3_2, conv4_2, conv5_2 (the last four are ResNet-34's and similar
# nets' sizes too).
VGG = tuple(
    _square("vgg", batch, channels, size)
    for batch in (1, 8)
    for channels, size in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14))
)
# ResNet-20 to -110 on CIFAR: 16x32, 32x16, 64x8. VGG on CIFAR: 64x32, 128x16, 256x8, 512x4.
CIFAR = tuple(
    _square("cifar", 128, channels, size)
    for channels, size in ((16, 32), (32, 16), (64, 32), (64, 8), (128, 16), (256, 8), (512, 4))
)
# SAPNet's residual blocks, on its paper's two image sizes.
SAPNET = tuple(_sapnet(h, w, d) for h, w in ((512, 512), (481, 321)) for d in (1, 2, 4, 8))

DENSE = VGG + CIFAR  # the 17 without SAPNet's
LAYERS = DENSE + SAPNET  # the 25
UNDILATED = tuple(layer for layer in LAYERS if layer.dilation == 1)  # the 19

# What a short run keeps of the 25: every channel count but one, every kind of size, both ends of
# the batch.
QUICK = tuple(
    layer
    for layer in LAYERS
    if layer.name
    in {
        "vgg-64x224-b1",
        "vgg-128x112-b1",
        "vgg-256x56-b1",
        "vgg-512x28-b1",
        "vgg-512x14-b1",
        "cifar-16x32-b128",
        "cifar-64x8-b128",
        "cifar-512x4-b128",
        "sap-32x481x321-d1",
        "sap-32x481x321-d4",
    }
)

# Sizes that fit no tile, vector or block: C and K off multiples of 16, K != C, H and W below and
# between tiles.
ADVERSARIAL = (
    Layer("odd-48x7x7-b3", 3, 48, 7, 7, 48),
    Layer("odd-48x13x13-b3", 3, 48, 13, 13, 48),
    Layer("odd-48x17x17-b3", 3, 48, 17, 17, 48),
    Layer("odd-3x224x224-k64", 1, 3, 224, 224, 64),
    Layer("odd-64x57x33-k3", 1, 64, 57, 33, 3),
    Layer("odd-40x56x56-k72", 1, 40, 56, 56, 72),
    Layer("odd-129x28x28-k127", 1, 129, 28, 28, 127),
    Layer("odd-64x2x301-d3", 1, 64, 2, 301, 64, 3),
    Layer("odd-1x1x1-k1", 1, 1, 1, 1, 1),
)

# The 3x3 convolutions of Deblur-YOLO's generator on 720 x 1280 (736 x 1280 inside): the pyramid's
# dilated ones, the heads of the finest and the coarsest level, and what follows them.
DEBLUR = (
    Layer("deblur-td1", 1, 128, 46, 80, 128, 2),
    Layer("deblur-td2", 1, 128, 92, 160, 128, 2),
    Layer("deblur-td3", 1, 128, 184, 320, 128, 2),
    Layer("deblur-head1.0", 1, 128, 184, 320, 64),
    Layer("deblur-head1.1", 1, 64, 184, 320, 64),
    Layer("deblur-head4.0", 1, 128, 23, 40, 64),
    Layer("deblur-head4.1", 1, 64, 23, 40, 64),
    Layer("deblur-smooth", 1, 256, 184, 320, 64),
    Layer("deblur-smooth2", 1, 64, 368, 640, 32),
    Layer("deblur-final", 1, 32, 736, 1280, 3),
)

# The GPU's (benches/gpu). First those that its aims are set on: all sizes of VGG-16 and of the
# ImageNet ResNets at batch 32; conv5_x is (512, 14).
VGG_B32 = (
    _square("vgg", 32, 64, 224),
    Layer("vgg-64x112-b32-k128", 32, 64, 112, 112, 128),
    _square("vgg", 32, 128, 112),
    Layer("vgg-128x56-b32-k256", 32, 128, 56, 56, 256),
    _square("vgg", 32, 256, 56),
    Layer("vgg-256x28-b32-k512", 32, 256, 28, 28, 512),
    _square("vgg", 32, 512, 28),
    _square("vgg", 32, 512, 14),
)
_RESNET = ((64, 56), (128, 28), (256, 14), (512, 7))
RESNET_B32 = tuple(_square("resnet", 32, channels, size) for channels, size in _RESNET)
GPU_AIMS = VGG_B32 + RESNET_B32
# Then, the more important ones first: single images, CIFAR, SAPNet with its LSTM gate, a deblurring
# net's dilated ones, odd sizes, and batch 128.
GPU_LAYERS = (
    *GPU_AIMS,
    *(layer for layer in VGG if layer.n == 1),
    *(layer for layer in CIFAR if layer.c >= 64),
    *(_sapnet(481, 321, d) for d in (1, 2, 4, 8, 16)),
    Layer("lstm-64x481x321-k128", 1, 64, 481, 321, 128),
    *(Layer(f"deblur-128x128-b1-d{d}", 1, 128, 128, 128, 128, d) for d in (1, 2, 4)),
    Layer("deblur-128x64-b32-d2", 32, 128, 64, 64, 128, 2),
    Layer("deblur-128x128-b32-d4", 32, 128, 128, 128, 128, 4),
    *ADVERSARIAL,
    *(_square("resnet", 128, channels, size) for channels, size in _RESNET[2:]),
    *(_square("vgg", 128, layer.c, layer.h) for layer in VGG if layer.n == 1),
)

# Six equal layers in a row, for peers that pay for converting a network's input and output once.
CHAINS = tuple(layer for layer in VGG if layer.n == 1) + tuple(
    layer for layer in SAPNET if layer.name == "sap-32x481x321-d1"
)

# Whole models (functions of pywino.models) and their inputs.
MODELS = {
    "vgg16": (1, 3, 224, 224),
    "resnet50": (1, 3, 224, 224),
    "sapnet": (1, 3, 481, 321),
}
