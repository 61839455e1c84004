# SPDX-License-Identifier: BSD-3-Clause
"""Photographs of any size, decoded when they are asked for."""

import hashlib
import operator
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from pywino.data._files import damaged, is_archive, members
from pywino.data.folder import SUFFIXES, decoded

_ZIPS = (".zip", ".whl")
_LARGEST = 64 << 20  # bytes of a photo's file
_SIDE = 16  # pixels; less is no photo


class Photos(Sequence[Tensor]):
    """photos[i]: (3, H, W) uint8, RGB. `names` are what the split goes by.

    read: one function a photo that gives its file's content. keep: decoded photos stay in memory
    until they have so many bytes together. Raises RuntimeError with its name for a damaged photo,
    when it is decoded. Needs Pillow."""

    def __init__(
        self,
        names: Sequence[str],
        read: Sequence[Callable[[], bytes]],
        keep: int = 1 << 30,
    ):
        self.names = list(names)
        self._read = list(read)
        self._left = keep
        self._decoded: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        index = range(len(self))[operator.index(index)]  # negative ones, and IndexError
        if index in self._decoded:
            return self._decoded[index]
        pixels = decoded(self.names[index], self._read[index]())
        if min(pixels.shape[1:]) < _SIDE:
            raise damaged(self.names[index], f"it has {pixels.shape[2]} x {pixels.shape[1]} pixels")
        photo = torch.from_numpy(pixels.copy())
        if photo.nbytes <= self._left:
            self._left -= photo.nbytes
            self._decoded[index] = photo
        return photo

    def subset(self, indices: Iterable[int]) -> "Photos":
        indices = list(indices)
        return Photos(
            [self.names[i] for i in indices], [self._read[i] for i in indices], self._left
        )

    def split(self, fraction: float, seed: int = 0) -> tuple["Photos", "Photos"]:
        """(the rest, round(N * fraction) held-out photos of the N). Which ones depends on the names
        and the seed alone: those whose hash is smallest. Photos of one name stay together."""
        rest, held_out = self.split_indices(fraction, seed)
        return self.subset(rest), self.subset(held_out)

    def split_indices(self, fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
        """The same as indices."""
        if not 0 <= fraction < 1:
            raise ValueError(f"pywino.data.photos: fraction must be in [0, 1), got {fraction!r}")
        names = sorted(set(self.names), key=lambda name: _hash(name, seed))
        held_out = set(names[: round(len(names) * fraction)])
        indices = range(len(self))
        return (
            [i for i in indices if self.names[i] not in held_out],
            [i for i in indices if self.names[i] in held_out],
        )


def _hash(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def photos(
    source: str | os.PathLike | Iterable[str | os.PathLike], *, only: Sequence[str] = ()
) -> Photos:
    """The photos of a folder and its sub-folders, of a list of files, or inside a .zip, a wheel
    or a tar archive: JPEG, PNG, BMP or PPM, in the order of their names.

    only: patterns, one of which a name must match, as in `*/enhancement/*`. Names are paths inside
    the folder or the archive, and those of the list as they stand. Raises FileNotFoundError where
    there is no photo."""
    if isinstance(source, str | os.PathLike):
        found = _inside(Path(source))
    else:
        found = {str(path): Path(path).read_bytes for path in source}
    names = sorted(
        name
        for name in found
        if PurePosixPath(name).suffix.lower() in SUFFIXES
        and (not only or any(fnmatch(name, pattern) for pattern in only))
    )
    if not names:
        raise FileNotFoundError(
            f"pywino.data.photos: {source} must have {', '.join(SUFFIXES)} files"
            + (f" with names like {' or '.join(only)}" if only else "")
        )
    return Photos(names, [found[name] for name in names])


def _inside(path: Path) -> dict[str, Callable[[], bytes]]:
    if path.is_dir():
        return {
            file.relative_to(path).as_posix(): file.read_bytes
            for file in path.rglob("*")
            if file.is_file() and not file.name.startswith(".")
        }
    if path.is_file() and path.name.endswith(_ZIPS):
        return _zipped(path)
    if is_archive(path):
        # A tar has no index: its photos are kept packed.
        return {
            name: (lambda content=content: content)
            for name, content in members(path)
            if PurePosixPath(name).suffix.lower() in SUFFIXES
        }
    if path.is_file():
        return {path.name: path.read_bytes}
    raise FileNotFoundError(f"pywino.data.photos: there is no folder, archive or photo {path}")


def _zipped(path: Path) -> dict[str, Callable[[], bytes]]:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise damaged(path, error) from error

    def reader(member):
        def read():
            if member.file_size > _LARGEST:
                raise damaged(path / member.filename, f"it has {member.file_size} bytes")
            try:
                return archive.read(member)
            except Exception as error:  # zipfile and zlib raise almost anything
                raise damaged(path / member.filename, error) from error

        return read

    return {member.filename: reader(member) for member in archive.infolist() if not member.is_dir()}
