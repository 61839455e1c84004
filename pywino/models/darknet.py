# SPDX-License-Identifier: BSD-3-Clause
"""Darknet's `.weights` files: a header, and all numbers of the network in a row."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def _layout(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in the file's order: of each convolution the BatchNorm's bias, weight, mean
    and variance, or else its own bias, and then its weight."""
    layers = [m for m in module.named_modules() if isinstance(m[1], nn.Conv2d | nn.BatchNorm2d)]
    norms = iter([m for m in layers if isinstance(m[1], nn.BatchNorm2d)])
    for name, conv in (m for m in layers if isinstance(m[1], nn.Conv2d)):
        if conv.bias is None:
            _, norm = next(norms)
            for part in ("bias", "weight", "running_mean", "running_var"):
                yield f"BatchNorm after {name}", getattr(norm, part)
        else:
            yield name, conv.bias
        yield name, conv.weight


def _header(path: Path, content: bytes) -> int:
    """The header's bytes: three 32-bit numbers of the version, and the images seen in training, of
    64 bits since version 0.2."""
    if len(content) < 16:
        raise RuntimeError(
            f"load_darknet: {path} must begin with a header of 16 or 20 bytes, got {len(content)} "
            "bytes; get the file again"
        )
    major, minor, revision = struct.unpack("<3i", content[:12])
    if not (0 <= major < 1000 and 0 <= minor < 1000 and 0 <= revision < 1000):
        raise RuntimeError(
            f"load_darknet: {path} must begin with a version such as 0.2.5, got "
            f"{major}.{minor}.{revision}; it is no .weights file of Darknet"
        )
    return 20 if major * 10 + minor >= 2 else 16


def load_darknet(module: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Fill a network of convolutions, with BatchNorm or with a bias, from a `.weights` file of
    Darknet's and return it: `yolov3()` from `yolov3.weights`, `yolov3().trunk` from
    `darknet53.conv.74`.

    The file must have exactly the network's numbers, all finite; otherwise a RuntimeError says what
    differs and the network is left as it was."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_darknet: there is no file {path}")
    layout = list(_layout(module))
    expected = sum(tensor.numel() for _, tensor in layout)
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = _header(path, file.read(20))
        if size - header > 4 * expected:
            raise RuntimeError(
                f"load_darknet: {path} is too long: {type(module).__name__} has {expected} numbers "
                f"({header + 4 * expected} bytes), the file {size} bytes; use the file of this "
                "network with this number of classes"
            )
        if size - header < 4 * expected:
            raise RuntimeError(
                f"load_darknet: {path} is too short: it ends in {_end(layout, size - header)}, "
                f"{type(module).__name__} has {expected} numbers ({header + 4 * expected} bytes), "
                f"the file {size} bytes; get the file again, or use that of this network"
            )
        file.seek(header)
        values = torch.from_numpy(np.fromfile(file, "<f4", expected))
    position = 0
    for name, tensor in layout:
        part = values[position : position + tensor.numel()]
        if not bool(part.isfinite().all()):
            raise RuntimeError(
                f"load_darknet: numbers of {path} must be finite, got others in {name}; "
                "get the file again"
            )
        position += tensor.numel()
    position = 0
    with torch.no_grad():
        for _, tensor in layout:
            tensor.copy_(values[position : position + tensor.numel()].view_as(tensor))
            position += tensor.numel()
    return module


def _end(layout: list[tuple[str, Tensor]], size: int) -> str:
    """The name of what the byte after `size` belongs to."""
    for name, tensor in layout:
        size -= 4 * tensor.numel()
        if size < 0:
            return name
    raise AssertionError("the file is not too short")
