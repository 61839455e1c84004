# SPDX-License-Identifier: BSD-3-Clause
"""Files as they are published, damaged in every way that occurs, and files that mean harm."""

import gzip
import io
import os
import pickle
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pywino.data import cifar10, cifar100, fashion_mnist, image_folder
from pywino.data.fashion_mnist import DEBIAN

# The module, which the function of the same name hides in the package.
cifar = sys.modules["pywino.data.cifar"]
RANDOM = np.random.default_rng(0)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


# ---------------------------------------------------------------------------------- Fashion-MNIST

COUNTS = {"train": 60_000, "t10k": 10_000}


def idx(array):
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def idx_files():
    files = {}
    for part, count in COUNTS.items():
        pixels = np.zeros((count, 28, 28), np.uint8)
        pixels[:, 0, 0] = np.arange(count) % 251
        files[f"{part}-images-idx3-ubyte"] = idx(pixels)
        files[f"{part}-labels-idx1-ubyte"] = idx(np.arange(count) % 10)
    return files


@pytest.fixture
def mnist(tmp_path, idx_files):
    for i, (name, content) in enumerate(idx_files.items()):
        write(tmp_path / (name if i % 2 else f"{name}.gz"), content)
    return tmp_path


def test_fashion_mnist(mnist):
    train, test = fashion_mnist(mnist, verify=False)
    assert train.images.shape == (60_000, 1, 28, 28)
    assert test.images.shape == (10_000, 1, 28, 28)
    assert train.images[255, 0, 0, :2].tolist() == [255 % 251, 0]
    assert test.labels[:12].tolist() == [*range(10), 0, 1]
    assert train.classes[9] == "Ankle boot"


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_of_debian():
    train, test = fashion_mnist()
    assert train.labels.bincount().tolist() == [6000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    train.normalise_()
    assert float(train.mean) == pytest.approx(0.2860, abs=1e-4)
    assert float(train.std) == pytest.approx(0.3530, abs=1e-4)


def test_fashion_mnist_checksum(mnist):
    with pytest.raises(RuntimeError, match=r"train-images-idx3-ubyte.gz is damaged .*sha256 must"):
        fashion_mnist(mnist)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def header(path):
    content = path.read_bytes()
    path.write_bytes(struct.pack(">II", 0x0801, 9_999) + content[8:])


def label(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x0a")


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("t10k-labels-idx1-ubyte", cut, "it must have 10008 bytes, got 10001"),
        ("t10k-labels-idx1-ubyte", lambda p: write(p, p.read_bytes() * 2), "got more than 10008"),
        ("t10k-labels-idx1-ubyte", header, "its header must say"),
        ("t10k-images-idx3-ubyte.gz", cut, "end-of-stream"),
        ("t10k-images-idx3-ubyte.gz", flip, "t10k-images-idx3-ubyte.gz is damaged"),
    ],
)
def test_damaged_idx(mnist, name, harm, message):
    harm(mnist / name)
    with pytest.raises(RuntimeError, match=message) as error:
        fashion_mnist(mnist, verify=False)
    assert f"{name} is damaged" in str(error.value)


def test_idx_label_out_of_range(mnist):
    label(mnist / "train-labels-idx1-ubyte")
    with pytest.raises(ValueError, match=r"Fashion-MNIST, train must be in \[0, 10\), got 10"):
        fashion_mnist(mnist, verify=False)


def test_missing_idx(mnist):
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"must have t10k-labels-idx1-ubyte or .*apt inst"):
        fashion_mnist(mnist, verify=False)


# ------------------------------------------------------------------------------------------ CIFAR


@pytest.fixture(scope="module")
def tables():
    """name -> (pixels, labels) of random batches."""
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    pixels = RANDOM.integers(0, 256, (10_000, 3072), np.uint8)
    return {
        name: (np.roll(pixels, i, 0), (np.arange(10_000) + i) % 10) for i, name in enumerate(names)
    }


def write_cifar10(folder, tables, binary):
    for name, (pixels, labels) in tables.items():
        if binary:
            table = np.concatenate([labels[:, None].astype(np.uint8), pixels], 1)
            write(folder / "cifar-10-batches-bin" / f"{name}.bin", table.tobytes())
        else:
            entry = {b"data": pixels, b"labels": labels.tolist(), b"batch_label": b"x"}
            write(folder / "cifar-10-batches-py" / name, pickle.dumps(entry, protocol=3))
    return folder


@pytest.fixture(scope="module", params=["python", "binary"])
def cifar_folder(request, tables, tmp_path_factory):
    return write_cifar10(tmp_path_factory.mktemp("cifar"), tables, request.param == "binary")


def check(train, test, tables):
    assert (len(train), len(test)) == (50_000, 10_000)
    for data, i, name, j in ((train, 10_007, "data_batch_2", 7), (test, 5, "test_batch", 5)):
        assert data.images[i].flatten().tolist() == tables[name][0][j].tolist()
        assert data.labels[i] == tables[name][1][j]


def test_cifar10(cifar_folder, tables):
    check(*cifar10(cifar_folder, verify=False), tables)
    (inner,) = cifar_folder.iterdir()
    check(*cifar10(inner, verify=False), tables)


def test_cifar10_archive(cifar_folder, tables, tmp_path):
    with tarfile.open(tmp_path / "cifar.tar", "w") as archive:
        (inner,) = cifar_folder.iterdir()
        archive.add(inner, arcname=inner.name)
    check(*cifar10(tmp_path / "cifar.tar", verify=False), tables)


def test_pickle_of_python_2(tables, tmp_path):
    """The published files are of Python 2, whose pickles have byte strings where others have
    texts."""

    def string(text):
        return b"T" + struct.pack("<I", len(text)) + text

    pixels, labels = tables["data_batch_1"]
    array = b"".join(
        [
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85"
            + string(b"b")
            + b"tR",
            b"(K\x01M" + struct.pack("<H", 10_000) + b"M" + struct.pack("<H", 3072) + b"\x86",
            b"cnumpy\ndtype\n(" + string(b"u1") + b"K\x00K\x01tR(K\x03" + string(b"|"),
            b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + string(pixels.tobytes()) + b"tb",
        ]
    )
    numbers = b"]" + b"".join(b"K" + bytes([n]) + b"a" for n in labels)
    entry = b"\x80\x02}" + string(b"data") + array + b"s" + string(b"labels") + numbers + b"s."
    write(tmp_path / "data_batch_1", entry)
    files = cifar._Files(tmp_path, "cifar10", (), False)
    images, got = cifar._unpickled(files, "data_batch_1", b"labels", 10_000)
    assert np.array_equal(images.reshape(10_000, -1), pixels)
    assert got.tolist() == labels.tolist()


def test_cifar_checksum(tables, tmp_path):
    write_cifar10(tmp_path, {name: tables[name] for name in ["data_batch_1"]}, binary=False)
    with pytest.raises(RuntimeError, match=r"data_batch_1 is damaged .*md5 must be c99cafc15224"):
        cifar10(tmp_path)


@pytest.mark.parametrize("binary", [False, True])
def test_cifar100(tmp_path, binary):
    folder = tmp_path / ("cifar-100-binary" if binary else "cifar-100-python")
    names = [f"class_{i}" for i in range(100)]
    parts = {}
    for name, count in (("train", 50_000), ("test", 10_000)):
        pixels = np.zeros((count, 3072), np.uint8)
        pixels[:, -1] = np.arange(count) % 256
        fine, coarse = np.arange(count) % 100, np.arange(count) % 20
        if binary:
            table = np.concatenate([coarse[:, None], fine[:, None], pixels], 1).astype(np.uint8)
            write(folder / f"{name}.bin", table.tobytes())
            write(folder / "fine_label_names.txt", "\n".join(names).encode())
        else:
            entry = {
                b"data": pixels,
                b"fine_labels": fine.tolist(),
                b"coarse_labels": coarse.tolist(),
            }
            write(folder / name, pickle.dumps(entry, protocol=3))
            write(folder / "meta", pickle.dumps({b"fine_label_names": [n.encode() for n in names]}))
        parts[name] = fine
    train, test = cifar100(tmp_path, verify=False)
    assert train.labels.tolist() == parts["train"].tolist()
    assert len(test) == 10_000
    assert train.classes[42] == "class_42"
    assert train.images[300, 2, 31, 31] == 300 % 256


class _Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def _floats():
    return {b"data": np.zeros((10_000, 3072), np.float32), b"labels": [0] * 10_000}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: pickle.dumps({b"data": _Trap(), b"labels": []}, 3), "posix.system has no place"),
        (lambda: pickle.dumps(_floats(), 3), "arrays must hold bytes"),
        (lambda: pickle.dumps([1, 2], 3), "must hold a dict, got list"),
        (lambda: pickle.dumps({b"data": np.zeros((3, 3072), np.uint8)}, 3), r"got \(3, 3072\)"),
        (lambda: pickle.dumps({b"data": b"text"}, 3), "got None"),
        (
            lambda: pickle.dumps({b"data": np.zeros((10_000, 3072), np.uint8), b"labels": [0]}, 3),
            "must have 10000 labels",
        ),
        (
            lambda: pickle.dumps(
                {b"data": np.zeros((10_000, 3072), np.uint8), b"labels": [10] * 10_000}, 3
            ),
            r"labels must be in \[0, 10\)",
        ),
        (lambda: b"", "data_batch_1 is damaged"),
        (lambda: b"\x80\x02}", "data_batch_1 is damaged"),
    ],
)
def test_harmful_pickles(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data_batch_1", content())
    with pytest.raises(RuntimeError, match=message):
        cifar10(tmp_path, verify=False)
    assert not Path("trapped").exists()


def test_truncated_binary(tmp_path):
    write(tmp_path / "data_batch_1.bin", bytes(30_729_999))
    with pytest.raises(RuntimeError, match=r"data_batch_1.bin .*30730000 bytes, got 30729999"):
        cifar10(tmp_path)


def test_binary_label_out_of_range(tmp_path):
    write(tmp_path / "data_batch_1.bin", b"\x0a" + bytes(30_729_999))
    with pytest.raises(RuntimeError, match=r"data_batch_1.bin .*labels must be in \[0, 10\)"):
        cifar10(tmp_path)


def test_missing_cifar(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py or cifar-10-batches-bin"):
        cifar10(tmp_path)
    write(tmp_path / "data_batch_1.bin", bytes(30_730_000))
    with pytest.raises(FileNotFoundError, match=r"data_batch_2.bin is missing"):
        cifar10(tmp_path)


# ------------------------------------------------------------------------------------ image folder


def png(color, size=(4, 3)):
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    buffer = io.BytesIO()
    image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def pictures():
    return {
        "train/cat/1.png": png((10, 20, 30)),
        "train/cat/0.png": png((1, 2, 3)),
        "train/ant/7.png": png((7, 7, 7)),
        "train/ant/notes.txt": b"passed over",
        "test/cat/a.png": png((9, 9, 9)),
    }


def as_folder(files, path):
    for name, content in files.items():
        write(path / name, content)
    return path


def as_tar(files, path):
    with tarfile.open(path, "w:xz" if path.suffix == ".xz" else "w") as archive:
        for name, content in reversed(files.items()):
            info = tarfile.TarInfo(
                f"somewhere/{name}" if name[0] != "/" and ".." not in name else name
            )
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_image_folder(tmp_path, kind):
    path = (
        as_folder(pictures(), tmp_path)
        if kind == "folder"
        else as_tar(pictures(), tmp_path / "p.tar.xz")
    )
    train, test = image_folder(path)
    assert train.classes == test.classes == ("ant", "cat")
    assert train.labels.tolist() == [0, 1, 1]
    assert train.images.shape == (3, 3, 3, 4)
    assert train.images[:, :, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3], [10, 20, 30]]
    assert test.labels.tolist() == [1]
    assert image_folder(path, mode="L", size=(8, 6))[0].images.shape == (3, 1, 8, 6)


@pytest.mark.parametrize("name", ["../../train/cat/1.png", "/train/cat/1.png"])
def test_tar_members_that_lead_outside(tmp_path, name):
    path = as_tar(pictures() | {name: png((0, 0, 0))}, tmp_path / "p.tar.xz")
    with pytest.raises(RuntimeError, match="leads out of the archive"):
        image_folder(path)


def test_links_in_a_tar_are_passed_over(tmp_path):
    path = as_tar(pictures(), tmp_path / "p.tar")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("train/cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert len(image_folder(path)[0]) == 3


def test_a_tar_that_is_cut_between_two_members(tmp_path):
    path = as_tar(pictures(), tmp_path / "p.tar")
    whole = path.read_bytes()
    end = -(-len(whole.rstrip(b"\0")) // 512) * 512  # of the last member: empty blocks follow
    path.write_bytes(whole[: end + 512])  # one is enough
    assert sum(map(len, image_folder(path))) == 4
    path.write_bytes(whole[:end])
    with pytest.raises(RuntimeError, match=r"p\.tar is damaged or another file: it is cut off"):
        image_folder(path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train/cat/1.png": b"no picture"}, RuntimeError, "train/cat/1.png is damaged"),
        ({"train/cat/2.png": png((1, 1, 1))[:45]}, RuntimeError, "train/cat/2.png is damaged"),
        ({"train/cat/2.png": png((1, 1, 1), (5, 3))}, ValueError, r"one size, got 3 x 4, 3 x 5"),
        ({"test/dog/2.png": png((1, 1, 1))}, ValueError, "must be those of train, got dog too"),
    ],
)
def test_wrong_pictures(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        image_folder(as_folder(pictures() | change, tmp_path))


def test_a_picture_that_unpacks_to_gigabytes(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(RuntimeError, match="is damaged"):
        image_folder(as_folder(pictures(), tmp_path))


def test_missing_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder or archive"):
        image_folder(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="got 0 training and 0 test images"):
        image_folder(tmp_path)
    path = as_tar(pictures(), tmp_path / "p.tar.xz")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RuntimeError, match=r"p.tar.xz is damaged"):
        image_folder(path)
    with pytest.raises(ValueError, match="mode must be 'RGB' or 'L'"):
        image_folder(tmp_path, mode="CMYK")
