# SPDX-License-Identifier: BSD-3-Clause
"""Pairs of a degraded and a clean picture: both from files, or one made from the other."""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import PurePosixPath

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from pywino.data.photos import Photos, photos

Degrade = Callable[[Tensor, Generator], Tensor]

_DEGRADED = ("rain", "rainy", "blur", "blurry", "blurred", "input", "degraded")
_CLEAN = ("norain", "clean", "sharp", "target", "truth", "gt")


class Pairs:
    """Pairs of (3, H, W) float32 pictures, RGB in 0..1.

    degraded: the photos that belong to those of `clean`, one each; or a function (clean picture,
    generator) -> degraded picture of the same size. margin: that function gets so many more pixels
    on each side than are kept, where the photo has them (a blur needs them)."""

    def __init__(self, clean: Photos, degraded: Photos | Degrade, margin: int = 0):
        if isinstance(degraded, Photos) and len(degraded) != len(clean):
            raise ValueError(
                f"pywino.data.pairs: degraded must have a photo for each of {len(clean)} clean "
                f"ones, got {len(degraded)}"
            )
        self.clean, self.degraded, self.margin = clean, degraded, margin

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def names(self) -> list[str]:
        return self.clean.names

    def split(self, fraction: float, seed: int = 0) -> tuple["Pairs", "Pairs"]:
        """(the rest, held-out pairs), as `Photos.split` of the clean ones."""
        return tuple(self.subset(part) for part in self.clean.split_indices(fraction, seed))

    def subset(self, indices: list[int]) -> "Pairs":
        degraded = self.degraded
        if isinstance(degraded, Photos):
            degraded = degraded.subset(indices)
        return Pairs(self.clean.subset(indices), degraded, self.margin)

    def crops(self, count: int, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """(degraded, clean), both (count, 3, size, size): random places of random photos, half of
        them mirrored. The generator alone decides, also what is degraded how."""
        parts = [self._crop(size, generator) for _ in range(count)]
        return tuple(torch.stack(part) for part in zip(*parts))

    def picture(self, index: int, largest: int | None = None) -> tuple[Tensor, Tensor]:
        """(degraded, clean) of one photo, at most `largest` pixels a side around its centre. What
        degrades it depends on its name alone."""
        _, height, width = self.clean[index].shape
        size = (min(height, largest or height), min(width, largest or width))
        at = ((height - size[0]) // 2, (width - size[1]) // 2)
        digest = hashlib.sha256(self.names[index].encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return self._at(index, at, size, generator)

    def _crop(self, size, generator):
        index = _random(len(self), generator)
        _, height, width = self.clean[index].shape
        if min(height, width) < size:
            raise ValueError(
                f"pywino.data.pairs: photos must have {size} x {size} pixels or more, got "
                f"{width} x {height} for {self.names[index]}; use smaller crops"
            )
        at = (_random(height - size + 1, generator), _random(width - size + 1, generator))
        degraded, clean = self._at(index, at, (size, size), generator)
        if _random(2, generator):
            degraded, clean = degraded.flip(2), clean.flip(2)
        return degraded, clean

    def _at(self, index, at, size, generator):
        photo = self.clean[index]
        if isinstance(self.degraded, Photos):
            other = self.degraded[index]
            if other.shape != photo.shape:
                raise ValueError(
                    f"pywino.data.pairs: {self.degraded.names[index]} and {self.names[index]} "
                    f"must have one size, got {tuple(other.shape[1:])} and {tuple(photo.shape[1:])}"
                )
            return tuple(_cut(p, at, size, 0) for p in (other, photo))
        wide = _cut(photo, at, size, self.margin)
        inner = tuple(slice(self.margin, self.margin + n) for n in size)
        return self.degraded(wide, generator)[:, *inner], wide[:, *inner]


def _random(below: int, generator: Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def _cut(photo: Tensor, at, size, margin: int) -> Tensor:
    """A part with a margin; where the photo ends, its last pixels go on."""
    low = [max(0, start - margin) for start in at]
    high = [start + n + margin for start, n in zip(at, size)]
    part = photo[:, low[0] : high[0], low[1] : high[1]].float() / 255
    short = [margin - (start - begin) for start, begin in zip(at, low)]
    missing = [n + 2 * margin - s - got for n, s, got in zip(size, short, part.shape[1:])]
    if not any((*short, *missing)):
        return part
    return F.pad(part[None], (short[1], missing[1], short[0], missing[0]), mode="replicate")[0]


def paired_photos(source: str | os.PathLike) -> Pairs:
    """The pairs below a folder or in an archive, by the names that published sets use: folders
    `rain` or `rainy` and `norain`, `blur` and `sharp`, `input` and `target`; or files `rain-1.png`
    and `norain-1.png`. Otherwise names are equal, but for a variant's number behind a clean
    picture's name (`rain/7_3.png` or `rain/norain-7x2.png` to `7.png`)."""
    found = photos(source)
    clean: dict[str, int] = {}
    degraded: list[tuple[str, int]] = []
    for i, name in enumerate(found.names):
        is_clean, key = _side(name)
        if is_clean:
            clean[key] = i
        elif is_clean is not None:
            degraded.append((key, i))
    matches = []
    for key, i in degraded:
        without_variant = re.sub(r"(x\d+|[_-]\d+)$", "", key)
        j = clean.get(key, clean.get(without_variant))
        if j is not None:
            matches.append((i, j))
    if not matches:
        raise FileNotFoundError(
            f"pywino.data.pairs: {source} must have pictures in folders such as rain and norain, "
            f"blur and sharp, or input and target, with equal names; got {len(degraded)} degraded "
            f"and {len(clean)} clean ones that do not match"
        )
    return Pairs(found.subset(j for _, j in matches), found.subset(i for i, _ in matches))


def _side(name: str) -> tuple[bool | None, str]:
    """(whether it is clean, or None where nothing says so; the name without that)."""
    path = PurePosixPath(name)
    folders = [part for part in path.parts[:-1] if part.lower() not in (*_DEGRADED, *_CLEAN)]
    prefix = re.match(r"(no)?rain[-_]?", path.stem, re.IGNORECASE)
    key = "/".join([*folders, path.stem[prefix.end() :] if prefix else path.stem])
    for part in reversed(path.parts[:-1]):
        if part.lower() in (*_DEGRADED, *_CLEAN):
            return part.lower() in _CLEAN, key
    return (None if prefix is None else prefix[1] is not None), key
