# SPDX-License-Identifier: BSD-3-Clause
"""Synthetic rain: streaks of light on a clean picture.

    rainy = clip(clean + sum over layers of  b * k,  0, 1)

b has the brightness of each drop where it stands (few pixels have one), * is the convolution, and k
is a streak of length l and width w at angle a, of height 1:

    k(p) = exp(-(across / w)^2 / 2) clip((l + 1) / 2 - |along|, 0, 1)

with (along, across) the position p in the streak's own axes. A layer has one l, w and a; the layers
of a picture fall in about the same direction.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Rain:
    """rain(clean, generator) -> rainy, (3, H, W) in 0..1. Each pair is a range, in which each
    layer draws its own; `slant` is one of all layers, `brightness` is each drop's.

    layers: how many. density: drops a pixel. length, width (sigma): pixels. slant: angle from the
    vertical, degrees. spread: how far a layer leaves that angle at most."""

    layers: tuple[int, int]
    density: tuple[float, float]
    length: tuple[float, float]
    brightness: tuple[float, float]
    width: tuple[float, float] = (0.5, 0.9)
    slant: tuple[float, float] = (-40.0, 40.0)
    spread: float = 6.0

    def __call__(self, clean: Tensor, generator: Generator) -> Tensor:
        low, high = self.layers
        layers = low + int(torch.randint(high - low + 1, (), generator=generator))
        slant = _uniform(self.slant, generator)
        total = clean.clone()
        for _ in range(layers):
            angle = slant + _uniform((-self.spread, self.spread), generator)
            length, width = (_uniform(r, generator) for r in (self.length, self.width))
            streak = streak_kernel(length, width, angle)
            reach = streak.shape[0] // 2
            size = [n + 2 * reach for n in clean.shape[1:]]  # drops outside reach in
            falls = torch.rand(size, generator=generator) < _uniform(self.density, generator)
            low, high = self.brightness
            drops = falls * (low + (high - low) * torch.rand(size, generator=generator))
            total += F.conv2d(drops[None, None], streak[None, None])[0]
        return total.clamp(0, 1)


def streak_kernel(length: float, width: float, angle: float) -> Tensor:
    """(K, K), K odd: a streak at `angle` degrees from the vertical."""
    reach = math.ceil(length / 2 + 2 * width)
    y, x = torch.meshgrid(*(torch.arange(-reach, reach + 1.0),) * 2, indexing="ij")
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    along, across = cosine * y + sine * x, cosine * x - sine * y
    return torch.exp(-((across / width) ** 2) / 2) * ((length + 1) / 2 - along.abs()).clamp(0, 1)


def _uniform(bounds: tuple[float, float], generator: Generator) -> float:
    low, high = bounds
    return low + (high - low) * float(torch.rand((), generator=generator))


@dataclass(frozen=True)
class OneOf:
    """One of several kinds of rain, each as likely."""

    kinds: tuple[Rain, ...]

    def __call__(self, clean: Tensor, generator: Generator) -> Tensor:
        kind = int(torch.randint(len(self.kinds), (), generator=generator))
        return self.kinds[kind](clean, generator)


_LIGHT = Rain((1, 1), density=(0.0014, 0.0038), length=(9, 19), brightness=(0.05, 0.35))
_HEAVY = Rain((2, 3), density=(0.002, 0.0048), length=(15, 35), brightness=(0.1, 0.55))
RAIN = {"light": _LIGHT, "heavy": _HEAVY, "mixed": OneOf((_LIGHT, _HEAVY))}
