# SPDX-License-Identifier: BSD-3-Clause
"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 50,000 + 10,000 images of 32 x 32 RGB pixels, in the
two formats in which they are published, unpacked or as the archive."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import torch

from pywino.data._files import check_sum, damaged, is_archive, members
from pywino.data.images import Images

_PIXELS = 3 * 32 * 32
_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
# MD5 of the files of the python format, as the authors and everyone else publish them. Of the
# binary format the archives' sums are published, not the files'.
_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
_CLASSES_10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_LARGEST = 200 << 20  # bytes; the largest file of them has 155 MB


def cifar10(root: str | os.PathLike, *, verify: bool = True) -> tuple[Images, Images]:
    """(training images, test images) of CIFAR-10.

    root: the archive (`cifar-10-python.tar.gz`, `cifar-10-binary.tar.gz`), or the folder that has
    its files, or the folder around that one. verify: compare checksums of the python format's files
    too; sizes, formats and labels are always checked. Raises FileNotFoundError and, for a damaged
    file, RuntimeError with its name."""
    files = _Files(root, "cifar10", ("cifar-10-batches-py", "cifar-10-batches-bin"), verify)
    if files.has("data_batch_1"):
        parts = [_unpickled(files, name, b"labels", 10_000) for name in (*_BATCHES, "test_batch")]
    else:
        names = [f"{name}.bin" for name in (*_BATCHES, "test_batch")]
        parts = [_records(files, name, 10_000, labels=1) for name in names]
    return _images(parts[:5], _CLASSES_10, "CIFAR-10, train"), _images(
        parts[5:], _CLASSES_10, "CIFAR-10, test"
    )


def cifar100(root: str | os.PathLike, *, verify: bool = True) -> tuple[Images, Images]:
    """(training images, test images) of CIFAR-100 with its 100 fine labels; as `cifar10`."""
    files = _Files(root, "cifar100", ("cifar-100-python", "cifar-100-binary"), verify)
    if files.has("train"):
        names = _names(files)
        train = _unpickled(files, "train", b"fine_labels", 50_000)
        test = _unpickled(files, "test", b"fine_labels", 10_000)
    else:
        names = files.read("fine_label_names.txt").decode("utf-8", "replace").split()
        train = _records(files, "train.bin", 50_000, labels=2)
        test = _records(files, "test.bin", 10_000, labels=2)
    if len(names) != 100:
        raise damaged(files.where, f"it must name 100 classes, got {len(names)}")
    return _images([train], names, "CIFAR-100, train"), _images([test], names, "CIFAR-100, test")


def _images(parts, classes, name):
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts))
    return Images(torch.from_numpy(images), torch.from_numpy(labels), classes, name)


class _Files:
    """The files of a data set by their base names."""

    def __init__(self, root, function, folders, verify):
        self.where = Path(root)
        self.verify = verify
        self.content = None
        if is_archive(self.where):
            self.content = {
                Path(name).name: content
                for name, content in members(self.where)
                if Path(name).parent.name in folders
            }
        elif inner := [self.where / f for f in folders if (self.where / f).is_dir()]:
            self.where = inner[0]
        if not any(map(self.has, ("data_batch_1", "data_batch_1.bin", "train", "train.bin"))):
            raise FileNotFoundError(
                f"pywino.data.{function}: {self.where} must have the files of "
                f"{' or '.join(folders)}, and has none; give that folder or the archive itself"
            )

    def has(self, name):
        if self.content is not None:
            return name in self.content
        return (self.where / name).is_file()

    def read(self, name):
        if not self.has(name):
            raise FileNotFoundError(f"pywino.data: {self.where / name} is missing")
        if self.content is not None:
            content = self.content[name]
        else:
            with open(self.where / name, "rb") as file:
                content = file.read(_LARGEST)
        if self.verify and name in _MD5:
            check_sum(self.where / name, content, _MD5[name])
        return content


# ---------------------------------------------------------------------------------- binary format


def _records(files, name, count, labels):
    """Records of `labels` bytes (the last is the fine one) and 3072 pixels, plane by plane."""
    content = files.read(name)
    record = labels + _PIXELS
    if len(content) != count * record:
        got = f"it must have {count * record} bytes, got {len(content)}"
        raise damaged(files.where / name, got)
    table = np.frombuffer(content, np.uint8).reshape(count, record)
    return table[:, labels:].reshape(-1, 3, 32, 32), _in_range(files, name, table[:, labels - 1])


def _in_range(files, name, labels):
    labels = np.asarray(labels)
    classes = 10 if "batch" in name else 100
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
        raise damaged(files.where / name, f"its labels must be in [0, {classes})")
    return labels.astype(np.int64)


# ---------------------------------------------------------------------------------- python format


def _byte_dtype(name, *_):
    if name not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"arrays must hold bytes (u1), got {name!r}")
    return np.dtype("u1", False, True)  # a copy: pickle sets its state


def _empty_array(kind, shape, dtype):
    return np.ndarray.__new__(np.ndarray, (0,), np.uint8)


class _Unpickler(pickle.Unpickler):
    """Admits what these files are made of: dicts, lists, numbers, texts and arrays of bytes."""

    _ADMITTED = {  # noqa: RUF012
        ("numpy", "dtype"): _byte_dtype,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy.core.multiarray", "_reconstruct"): _empty_array,
        ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    }

    def find_class(self, module, name):
        if (module, name) not in self._ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in this format")
        return self._ADMITTED[module, name]


def _load(files, name):
    content = files.read(name)
    try:
        entry = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise damaged(files.where / name, error) from error
    if not isinstance(entry, dict):
        raise damaged(files.where / name, f"it must hold a dict, got {type(entry).__name__}")
    return entry


def _unpickled(files, name, labels, count):
    entry = _load(files, name)
    data = entry.get(b"data")
    shape = getattr(data, "shape", None)
    if shape != (count, _PIXELS) or data.dtype != np.uint8:
        raise damaged(files.where / name, f"its data must be ({count}, 3072) bytes, got {shape}")
    values = entry.get(labels)
    if not isinstance(values, list) or len(values) != count:
        raise damaged(files.where / name, f"it must have {count} labels")
    return data.reshape(-1, 3, 32, 32), _in_range(files, name, values)


def _names(files):
    names = _load(files, "meta").get(b"fine_label_names", [])
    return [name.decode("utf-8", "replace") for name in names if isinstance(name, bytes)]
