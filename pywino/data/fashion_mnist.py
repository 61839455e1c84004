# SPDX-License-Identifier: BSD-3-Clause
"""Fashion-MNIST (Xiao et al., 2017): 60,000 + 10,000 images of 28 x 28 grey pixels."""

import os
import struct
from pathlib import Path

import numpy as np
import torch

from pywino.data._files import check_sum, damaged, read
from pywino.data.images import Images

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
# File -> (its array's shape, SHA-256 of the unpacked file).
_FILES = {
    "train-images-idx3-ubyte": (
        (60_000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train-labels-idx1-ubyte": (
        (60_000,),
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "t10k-images-idx3-ubyte": (
        (10_000, 28, 28),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    "t10k-labels-idx1-ubyte": (
        (10_000,),
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}


def fashion_mnist(
    root: str | os.PathLike | None = None, *, verify: bool = True
) -> tuple[Images, Images]:
    """(training images, test images) from the four idx files, packed (.gz) or not.

    root: the folder that has them; None for the place where Debian's package
    `dataset-fashion-mnist` puts them. verify: compare checksums too; sizes and formats are always
    checked. Raises FileNotFoundError and, for a damaged file, RuntimeError with its name."""
    folder = DEBIAN if root is None else Path(root)
    arrays = [
        _array(folder, name, shape, checksum if verify else None)
        for name, (shape, checksum) in _FILES.items()
    ]
    return (
        Images(arrays[0][:, None], arrays[1], CLASSES, "Fashion-MNIST, train"),
        Images(arrays[2][:, None], arrays[3], CLASSES, "Fashion-MNIST, test"),
    )


def _array(folder, name, shape, checksum):
    """An idx file: two zero bytes, 8 for bytes, the number of dimensions, each as a 32-bit
    big-endian integer, the values."""
    path = folder / name
    if not path.exists():
        path = folder / f"{name}.gz"
    if not path.exists():
        raise FileNotFoundError(
            f"pywino.data.fashion_mnist: {folder} must have {name} or {name}.gz; on Debian "
            "type `apt install dataset-fashion-mnist`, or give the folder that has the four files"
        )
    header = 4 + 4 * len(shape)
    content = read(path, header + int(np.prod(shape)))
    magic, *got = struct.unpack(f">{1 + len(shape)}I", content[:header])
    if (magic, tuple(got)) != (0x0800 + len(shape), shape):
        raise damaged(path, f"its header must say {shape} bytes, got {tuple(got)} of {magic:#x}")
    if checksum:
        check_sum(path, content, checksum)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())
