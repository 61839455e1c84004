# SPDX-License-Identifier: BSD-3-Clause
"""ResNets (He et al., CVPR 2016): 50 with the stride of a block in its 3x3 convolution, as
torchvision has it; 32 for CIFAR; and 18 in the form of Liu et al. (ICLR 2018)."""

from torch import Tensor, nn
from torch.nn import functional as F

from pywino.models._plain import check_kind, conv3x3, initialise


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, input: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(input)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (input if self.downsample is None else self.downsample(input)))


class ResNet(nn.Module):
    """A ResNet of bottleneck blocks, `blocks` of them in each of four stages.

    Input (N, in_channels, H, W), output (N, num_classes).
    """

    def __init__(
        self, blocks: tuple[int, int, int, int], num_classes: int = 1000, in_channels: int = 3
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        width = 64
        for stage, count in enumerate(blocks):
            channels = 64 << stage
            layers = []
            for block in range(count):
                layers.append(_Bottleneck(width, channels, stride=2 if stage and block == 0 else 1))
                width = channels * _Bottleneck.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, input: Tensor) -> Tensor:
        y = self.maxpool(self.relu(self.bn1(self.conv1(input))))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        return self.fc(self.avgpool(y).flatten(1))


def resnet50(num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """ResNet-50: 25,557,032 parameters for 1000 classes of RGB images. Weights are random; see
    `load_weights`."""
    return ResNet((3, 4, 6, 3), num_classes, in_channels)


class _BasicBlock(nn.Module):
    """s -> BN2(W2 r(BN1(W1 r(s)))) + shortcut(ReLU(s)): `s` is the sum before its ReLU, and r is a
    ReLU, or nothing where the convolution W has it inside. Option A's shortcut: every stride-th
    pixel, new channels zero."""

    def __init__(self, in_channels, channels, stride, conv, tile):
        super().__init__()
        self.stride = stride
        self.more = channels - in_channels
        self.relu_inside = conv == "winograd_relu"
        self.conv1 = conv3x3(conv, in_channels, channels, stride=stride, bias=False, tile=tile)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(conv, channels, channels, bias=False, tile=tile)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, input: Tensor) -> Tensor:
        x = F.relu(input)
        y = self.bn1(self.conv1(input if self.relu_inside else x))
        y = self.bn2(self.conv2(y if self.relu_inside else F.relu(y)))
        if self.stride > 1 or self.more:  # a pad of nothing would copy
            x = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return y + x


class CIFARResNet(nn.Module):
    """A ResNet of 6 n + 2 layers: a 3x3 convolution, three stages of n blocks with 16, 32 and 64
    channels, a linear layer.

    Input (N, in_channels, H, W), output (N, num_classes)."""

    def __init__(self, n, num_classes, in_channels, conv, dropout, tile):
        super().__init__()
        check_kind(f"resnet{6 * n + 2}", conv)
        first = "dense" if conv == "winograd_relu" else conv
        self.conv1 = conv3x3(first, in_channels, 16, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, width = [], 16
        for channels in (16, 32, 64):
            for _ in range(n):
                stride = 1 if width == channels else 2
                blocks.append(_BasicBlock(width, channels, stride, conv, tile))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, input: Tensor) -> Tensor:
        y = F.relu(self.blocks(self.bn1(self.conv1(input))))
        return self.fc(self.dropout(y.mean((2, 3))))


def resnet32(
    num_classes: int = 10,
    in_channels: int = 3,
    conv: str = "dense",
    *,
    dropout: float = 0.0,
    tile: int = 2,
) -> CIFARResNet:
    """ResNet-32 for CIFAR: 464,154 parameters for 10 classes of RGB images, 470,004 for 100.

    conv: "dense", "winograd" or "winograd_relu" (all 3x3 convolutions but the first; those of
    stride 2 become stride 1 and a 2x2 max pool). dropout: before the linear layer."""
    return CIFARResNet(5, num_classes, in_channels, conv, dropout, tile)


class _LiuBlock(nn.Module):
    """x -> BN(W r(BN(W r(BN(x))))) + shortcut(ReLU(x)), r a ReLU, or nothing where W has it inside.
    The shortcut is a 1x1 convolution and BatchNorm in the first block of a stage."""

    def __init__(self, in_channels, channels, first, conv, tile):
        super().__init__()
        self.relu_inside = conv == "winograd_relu"
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(conv, in_channels, channels, bias=False, tile=tile)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(conv, channels, channels, bias=False, tile=tile)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if first:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, input: Tensor) -> Tensor:
        y = input
        for norm, conv in ((self.bn1, self.conv1), (self.bn2, self.conv2)):
            y = norm(y)
            y = conv(y if self.relu_inside else F.relu(y))
        return self.bn3(y) + self.shortcut(F.relu(input))


class LiuResNet18(nn.Module):
    """ResNet-18 as Liu et al. change it, so that every 3x3 convolution has stride 1: maps are
    halved by 3x3 max pools after the first two stages, and the last two stages both run at 14 x 14
    (for 224 x 224).

    Input (N, in_channels, H, W), output (N, num_classes)."""

    def __init__(self, num_classes, in_channels, conv, dropout, tile):
        super().__init__()
        check_kind("resnet18", conv)
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        width = 64
        for stage in range(4):
            channels = 64 << stage
            blocks = []
            for block in range(2):
                blocks.append(_LiuBlock(width, channels, block == 0, conv, tile))
                width = channels
            if stage < 2:
                blocks.append(nn.MaxPool2d(3, stride=2, padding=1))
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, input: Tensor) -> Tensor:
        y = self.maxpool(self.conv1(input))
        y = F.relu(self.layer4(self.layer3(self.layer2(self.layer1(y)))))
        return self.fc(self.dropout(y.mean((2, 3))))


def resnet18(
    num_classes: int = 1000,
    in_channels: int = 3,
    conv: str = "dense",
    *,
    dropout: float = 0.15,
    tile: int = 2,
) -> LiuResNet18:
    """ResNet-18 in the form of Liu et al., which is not the one of other model collections.

    conv: "dense", "winograd" or "winograd_relu" (all sixteen 3x3 convolutions). dropout: before the
    linear layer."""
    return LiuResNet18(num_classes, in_channels, conv, dropout, tile)
