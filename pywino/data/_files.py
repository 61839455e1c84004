# SPDX-License-Identifier: BSD-3-Clause
"""Files that are read whole, from a folder or from an archive, and checked."""

import gzip
import hashlib
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_MOST = 1 << 31  # bytes of a member; a larger one is no file of these data sets
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
# What damaged archives and streams raise.
READING = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError)


def damaged(path: str | os.PathLike, reason: object) -> RuntimeError:
    """The error for a file that is not what it should be."""
    return RuntimeError(
        f"pywino.data: {path} is damaged or another file: {reason}; get it again from its source"
    )


def read(path: Path, size: int) -> bytes:
    """The content of a file of `size` bytes (after unpacking, where it is a .gz)."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            content = file.read(size + 1)
    except FileNotFoundError:
        raise
    except READING as error:
        raise damaged(path, error) from error
    check_size(path, content, size)
    return content


def check_size(path, content: bytes, size: int) -> None:
    if len(content) != size:
        got = f"more than {size}" if len(content) > size else len(content)
        raise damaged(path, f"it must have {size} bytes, got {got}")


def check_sum(path, content: bytes, wanted: str) -> None:
    """wanted: an MD5 (32 digits) or SHA-256 (64), which are against damage, not against malice."""
    name = "md5" if len(wanted) == 32 else "sha256"
    got = hashlib.new(name, content, usedforsecurity=False).hexdigest()
    if got != wanted:
        raise damaged(path, f"its {name} must be {wanted}, got {got}")


def is_archive(path: Path) -> bool:
    return path.is_file() and path.name.endswith(ARCHIVES)


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files of an archive, in its order. Names that lead out of it
    are refused, though nothing is written; links and devices are passed over."""
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise damaged(path, f"its member {member.name!r} leads out of the archive")
                if not member.isreg():
                    continue
                if member.size > _MOST:
                    raise damaged(path, f"its member {member.name!r} has {member.size} bytes")
                yield str(name), archive.extractfile(member).read()
            # An empty block ends an archive. tarfile does not ask for it, so a file that is cut
            # between two members would seem whole; a compressed one that is cut cannot be read.
            if not _is_compressed(path) and path.stat().st_size <= archive.offset:
                raise damaged(path, "it is cut off")
    except READING as error:
        raise damaged(path, error) from error


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
