# SPDX-License-Identifier: BSD-3-Clause
"""Pictures from files and into files, whole or not at all."""

import contextlib
import json
import math
import os
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
# PyTorch's threads and buffers aside, what a picture costs is some floats a pixel: 16 bytes.
PIXELS = 200_000_000


class Refused(Exception):
    """A file that is skipped, with the reason."""


@dataclass
class Picture:
    """RGB in 0..1, (3, H, W), and what else a file holds."""

    rgb: Tensor
    grey: bool = False
    alpha: np.ndarray | None = None  # (H, W), as it was
    depth: int = 8  # bits a channel
    metadata: dict = field(default_factory=dict)  # EXIF and ICC, as Pillow saves them


def read_picture(path: Path) -> Picture:
    """A picture upright, whatever its EXIF orientation."""
    if _is_deep_colour_png(path):
        return _read_deep(path)
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # PIXELS says it
            with Image.open(path) as image:
                if image.width * image.height > PIXELS:
                    raise Refused(f"it has {image.width} x {image.height} pixels, more than 2e8")
                image.load()
                image = ImageOps.exif_transpose(image)
                return _picture_of(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, struct.error) as error:
        raise Refused(f"it cannot be read ({first_line(error)})") from error


def _picture_of(image) -> Picture:
    metadata = {"exif": image.getexif().tobytes()} if image.getexif() else {}
    icc = image.info.get("icc_profile")
    if icc and (image.mode in ("L", "LA", "RGB", "RGBA", "P", "I") or image.mode[:4] == "I;16"):
        metadata["icc_profile"] = icc
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.float32) / 65535
        return Picture(tensor_of(np.stack([values] * 3, -1)), True, None, 16, metadata)
    grey = image.mode in ("1", "L", "LA")
    has_alpha = image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info
    pixels = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    alpha = np.ascontiguousarray(pixels[..., 3]) if has_alpha else None
    return Picture(tensor_of(pixels[..., :3].astype(np.float32) / 255), grey, alpha, 8, metadata)


def tensor_of(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def write_picture(path: Path, picture: Picture) -> None:
    """In the format of the name's suffix, whole or not at all."""
    full = 2**picture.depth - 1
    values = picture.rgb.clamp(0, 1).mul(full).round().permute(1, 2, 0).numpy()
    values = values.astype(np.uint16 if picture.depth == 16 else np.uint8)
    if picture.grey:
        values = values[..., 0]
    suffix = path.suffix.lower()
    if picture.depth == 16 and suffix not in (".png", ".tif", ".tiff"):
        raise Refused(f"{suffix} holds no 16-bit channels; give a name that ends in .png")
    if picture.alpha is not None and suffix in (".jpg", ".jpeg", ".bmp"):
        raise Refused(f"{suffix} holds no alpha channel; give a name that ends in .png")
    with whole(path) as temporary:
        if picture.depth == 16 and not picture.grey:
            _write_deep(temporary, values, picture.alpha, picture.metadata)
            return
        from PIL import Image

        if picture.alpha is not None:
            values = np.dstack([values, picture.alpha])
        options = dict(picture.metadata)
        if suffix in (".jpg", ".jpeg", ".webp"):
            options["quality"] = 95
        Image.fromarray(values).save(temporary, **options)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` that takes its place when everything went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=path.suffix, prefix=f".{path.stem}-", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's are the owner's alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, content) -> None:
    """A report, whole or not at all. JSON has no infinity and no NaN: null instead."""
    with whole(path) as temporary:
        text = json.dumps(_finite(content), indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_deep_colour_png(path: Path) -> bool:
    """16-bit RGB, with alpha or without: Pillow would take their lower eight bits away."""
    try:
        head = path.open("rb").read(26)
    except OSError:
        return False
    return head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 26 and head[24] == 16 and head[25] != 0


def opencv(what: str):
    try:
        import cv2
    except ImportError as error:
        raise Refused(f"{what} needs OpenCV: pip install opencv-python-headless") from error
    return cv2


def _read_deep(path: Path) -> Picture:
    cv2 = opencv("a 16-bit colour PNG")
    values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if values is None or values.ndim != 3:
        raise Refused("it cannot be read (OpenCV finds no picture in it)")
    # What OpenCV leaves out, from the file's head.
    from PIL import Image

    try:
        with Image.open(path) as image:
            exif, icc = image.getexif(), image.info.get("icc_profile")
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise Refused(f"it cannot be read ({first_line(error)})") from error
    values = _UPRIGHT.get(exif.pop(0x0112, 1), lambda pixels: pixels)(values)
    metadata = {"exif": exif.tobytes()} if exif else {}
    if icc:
        metadata["icc_profile"] = icc
    alpha = np.ascontiguousarray(values[..., 3]) if values.shape[2] == 4 else None
    rgb = tensor_of(values[..., 2::-1].astype(np.float32) / 65535)
    return Picture(rgb, False, alpha, 16, metadata)


# By EXIF orientation.
_UPRIGHT = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


def _write_deep(path: Path, rgb: np.ndarray, alpha: np.ndarray | None, metadata: dict) -> None:
    bgr = rgb[..., ::-1] if alpha is None else np.dstack([rgb[..., ::-1], alpha])
    if not opencv("a 16-bit colour picture").imwrite(str(path), bgr):
        raise Refused(f"OpenCV cannot write {path.suffix}")
    if metadata and path.suffix.lower() == ".png":
        _insert_metadata(path, metadata)


def _insert_metadata(path: Path, metadata: dict) -> None:
    """Profile and EXIF into a PNG that has neither."""
    chunks = b""
    if "icc_profile" in metadata:
        chunks += _png_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(metadata["icc_profile"]))
    if "exif" in metadata:
        chunks += _png_chunk(b"eXIf", metadata["exif"].removeprefix(b"Exif\0\0"))
    data, head = path.read_bytes(), 8 + 25  # the signature and the chunk IHDR
    path.write_bytes(data[:head] + chunks + data[head:])


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
