# SPDX-License-Identifier: BSD-3-Clause
"""Files that are there whole or not at all."""

import io
import os
import tempfile
from pathlib import Path

import torch

FORMAT = 1
_PART = ".part"


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file so that a kill or a power cut at any moment leaves the old one or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=_PART)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the folder's entry too
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def clear_leftovers(folder: str | os.PathLike) -> None:
    """Removes what kills have left of files that were being written."""
    for path in Path(folder).glob(f".*{_PART}"):
        path.unlink(missing_ok=True)


def save_checkpoint(path: str | os.PathLike, state: dict) -> None:
    """A dict of tensors, numbers, texts, lists and dicts, written whole."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_whole(path, buffer.getvalue())


def load_checkpoint(path: str | os.PathLike) -> dict:
    """What `save_checkpoint` wrote, on the CPU. Runs no code of the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"pywino.train: there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader raise almost anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"pywino.train: checkpoint {path} is damaged or no checkpoint ({reason}); "
            "remove it to start again"
        ) from error
    got = state.get("format") if isinstance(state, dict) else None
    if got != FORMAT:
        raise RuntimeError(
            f"pywino.train: checkpoint {path} must be of format {FORMAT}, got {got!r}; "
            "remove it to start again, or use the version of pywino that wrote it"
        )
    return state
