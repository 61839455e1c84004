# SPDX-License-Identifier: BSD-3-Clause
"""Plain networks (convolutions and pools in a row) with one of three kinds of 3x3 convolution.

dense           nn.Conv2d
winograd        pywino.WinogradConv2d: the same function, the same parameters
winograd_relu   pywino.WinogradReLUConv2d for every 3x3 convolution but the first (Liu et al.,
                ICLR 2018): BatchNorm -> transform -> ReLU -> product. The ReLU before such a
                layer is inside of it, also where a max pool stands between (the two commute).
                A stride of 2 becomes stride 1 and a 2x2 max pool.
"""

from dataclasses import dataclass

from torch import nn

from pywino.nn import WinogradConv2d, WinogradReLUConv2d

KINDS = ("dense", "winograd", "winograd_relu")


@dataclass(frozen=True)
class Conv:
    """A convolution to `channels`, followed by BatchNorm (where the network has it) and a ReLU."""

    channels: int
    kernel: int = 3
    stride: int = 1
    relu: bool = True


@dataclass(frozen=True)
class Pool:
    """A max pool."""

    kernel: int = 2
    stride: int = 2
    padding: int = 0


def check_kind(model: str, conv: str) -> None:
    if conv not in KINDS:
        raise ValueError(f"{model}: conv must be one of {', '.join(KINDS)}, got {conv!r}")


def conv3x3(
    kind: str, in_channels: int, out_channels: int, *, stride: int = 1, bias: bool, tile: int = 2
) -> nn.Module:
    """A 3x3 convolution of a kind, with padding 1; (N, C, H, W) -> (N, K, ceil(H / stride), …)."""
    if kind == "winograd_relu":
        layer = WinogradReLUConv2d(in_channels, out_channels, 3, padding=1, bias=bias, tile=tile)
        if stride == 1:
            return layer
        return nn.Sequential(layer, nn.MaxPool2d(stride, stride, ceil_mode=True))
    conv = WinogradConv2d if kind == "winograd" and stride == 1 else nn.Conv2d
    return conv(in_channels, out_channels, 3, stride, padding=1, bias=bias)


def features(
    layers: list[Conv | Pool],
    in_channels: int,
    kind: str,
    *,
    bias: bool,
    batch_norm: bool,
    dropout: float,
    tile: int,
) -> nn.Sequential:
    """The layers in a row. dropout: after each convolution's ReLU but the last."""
    relu_inside = [
        kind == "winograd_relu" and isinstance(layer, Conv) and layer.kernel == 3 and i > 0
        for i, layer in enumerate(layers)
    ]
    modules: list[nn.Module] = []
    for i, layer in enumerate(layers):
        if isinstance(layer, Pool):
            modules.append(nn.MaxPool2d(layer.kernel, layer.stride, layer.padding))
            continue
        if layer.kernel == 3:
            own = "dense" if kind == "winograd_relu" and not relu_inside[i] else kind
            conv = conv3x3(
                own, in_channels, layer.channels, stride=layer.stride, bias=bias, tile=tile
            )
        else:
            conv = nn.Conv2d(in_channels, layer.channels, layer.kernel, layer.stride, bias=bias)
        modules.append(conv)
        if batch_norm:
            modules.append(nn.BatchNorm2d(layer.channels))
        later = [j for j in range(i + 1, len(layers)) if isinstance(layers[j], Conv)]
        if layer.relu and not (later and relu_inside[later[0]]):
            modules.append(nn.ReLU(inplace=True))
        if dropout and later:
            modules.append(nn.Dropout(dropout))
        in_channels = layer.channels
    return nn.Sequential(*modules)


def initialise(model: nn.Module) -> None:
    """He's normal weights (ICCV 2015) for convolutions, zero biases; Winograd-ReLU layers have an
    initialisation of their own."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
