# SPDX-License-Identifier: BSD-3-Clause
"""Pictures in folders named after their classes, or in a tar archive of such folders."""

import io
import os
import warnings
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from pywino.data._files import damaged, is_archive, members
from pywino.data.images import Images

_FORMATS = ("JPEG", "PNG", "BMP", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm")


def image_folder(
    path: str | os.PathLike, *, mode: str = "RGB", size: tuple[int, int] | None = None
) -> tuple[Images, Images]:
    """(training images, test images) of `train/<class>/*` and `test/<class>/*` below a folder or in
    a tar archive: JPEG, PNG, BMP or PPM. Classes are numbered in alphabetical order, images stand
    in that of their names. All are decoded at once and kept in memory.

    mode: "RGB" or "L" (grey). size: (height, width) to which every image is scaled; None requires
    that all have the same. Raises FileNotFoundError and, for a damaged image or archive,
    RuntimeError with its name. Needs Pillow."""
    path = Path(path)
    if mode not in ("RGB", "L"):
        raise ValueError(f"pywino.data.image_folder: mode must be 'RGB' or 'L', got {mode!r}")
    found: dict[str, dict[tuple[str, str], np.ndarray]] = {"train": {}, "test": {}}
    for name, content in _files(path):
        parts = PurePosixPath(name).parts
        if len(parts) < 3 or parts[-3] not in found or not name.lower().endswith(SUFFIXES):
            continue
        split, label, file = parts[-3:]
        found[split][label, file] = decoded(path / name, content, mode, size)
    if not found["train"] or not found["test"]:
        raise FileNotFoundError(
            f"pywino.data.image_folder: {path} must have train/<class>/ and test/<class>/ with "
            f"{', '.join(SUFFIXES)} files, got {len(found['train'])} training and "
            f"{len(found['test'])} test images"
        )
    classes = sorted({label for label, _ in found["train"]})
    return tuple(_images(path, split, found[split], classes) for split in ("train", "test"))


def _files(path):
    if is_archive(path):
        yield from members(path)
        return
    if not path.is_dir():
        raise FileNotFoundError(f"pywino.data.image_folder: there is no folder or archive {path}")
    for file in sorted(path.glob("*/*/*")):
        if file.suffix.lower() in SUFFIXES and file.is_file():
            yield str(file.relative_to(path)), file.read_bytes()


def decoded(
    path: str | os.PathLike,
    content: bytes,
    mode: str = "RGB",
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """(C, H, W) bytes of a picture's file. `path` is for errors."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise RuntimeError(
            "pywino.data: decoding pictures needs Pillow; type `pip install pillow`"
        ) from error
    try:
        with warnings.catch_warnings():
            # A few bytes that unpack to gigabytes only warn by default.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I;16"):  # convert() would cut it at 255
                    image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
                image = image.convert(mode)
                if size is not None and image.size != size[::-1]:
                    image = image.resize(size[::-1])
                pixels = np.asarray(image)
    except Exception as error:  # decoders raise almost anything
        raise damaged(path, error) from error
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def _images(path, split, found, classes):
    shapes = {pixels.shape[1:] for pixels in found.values()}
    if len(shapes) > 1:
        raise ValueError(
            f"pywino.data.image_folder: images of {path} must have one size, got "
            f"{', '.join(f'{h} x {w}' for h, w in sorted(shapes)[:4])}; give size=(height, width)"
        )
    unknown = {label for label, _ in found} - set(classes)
    if unknown:
        raise ValueError(
            f"pywino.data.image_folder: classes of {path / split} must be those of train, got "
            f"{', '.join(sorted(unknown)[:4])} too"
        )
    order = sorted(found)
    images = torch.from_numpy(np.stack([found[key] for key in order]))
    labels = torch.tensor([classes.index(label) for label, _ in order])
    return Images(images, labels, classes, f"{path.name}, {split}")
