# SPDX-License-Identifier: BSD-3-Clause
"""ResNet-50 (He et al., CVPR 2016), with the stride of a block in its 3x3 convolution, as
torchvision's has it."""

from torch import Tensor, nn


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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, input: Tensor) -> Tensor:
        y = self.maxpool(self.relu(self.bn1(self.conv1(input))))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        return self.fc(self.avgpool(y).flatten(1))


def resnet50(num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """ResNet-50: 25,557,032 parameters for 1000 classes of RGB images. Weights are random; see
    `load_weights`."""
    return ResNet((3, 4, 6, 3), num_classes, in_channels)
