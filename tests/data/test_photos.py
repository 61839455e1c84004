# SPDX-License-Identifier: BSD-3-Clause
"""Photos of folders and archives, pairs by the names of published sets, and rain."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from pywino.data import RAIN, Pairs, Photos, Rain, paired_photos, photos
from pywino.data.rain import streak_kernel
from pywino.losses import psnr, ssim

image = pytest.importorskip("PIL.Image", reason="photos need Pillow")


def picture(value, size=(40, 48)):
    """PNG of noise around a value."""
    noise = np.random.default_rng(value).integers(0, 50, (*size, 3))
    buffer = io.BytesIO()
    image.fromarray((value + noise).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {f"{folder}/{i}.png": picture(10 * i) for folder in ("a", "b") for i in range(10)}


@pytest.fixture(params=["folder", "zip", "tar"])
def source(request, tmp_path):
    if request.param == "folder":
        path = tmp_path / "photos"
        for name, content in FILES.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        (path / "readme.txt").write_text("no photo")
    elif request.param == "zip":
        path = tmp_path / "photos.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in FILES.items():
                archive.writestr(name, content)
    else:
        path = tmp_path / "photos.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name, content in FILES.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def test_every_source_gives_the_same_photos(source):
    found = photos(source)
    assert found.names == sorted(FILES)
    for name, photo in zip(found.names, found):
        wanted = np.asarray(image.open(io.BytesIO(FILES[name])))
        assert torch.equal(photo, torch.from_numpy(wanted.copy()).permute(2, 0, 1))
    assert photos(source, only=("b/*", "*/3.png")).names == [
        "a/3.png", *(f"b/{i}.png" for i in range(10))
    ]  # fmt: skip


def test_one_photo_at_a_time(source):
    with pytest.raises(TypeError, match="'slice' object cannot be interpreted as an integer"):
        photos(source)[0:1]


def test_a_list_of_files(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(picture(i))
    assert photos(paths).names == [str(path) for path in paths]


def test_photos_are_upright(tmp_path):
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24] = 255
    lying = image.fromarray(pixels)
    exif = lying.getexif()
    exif[0x112] = 6  # to be turned by 90 degrees, clockwise
    lying.save(tmp_path / "a.png", exif=exif)
    expected = np.rot90(pixels, -1).transpose(2, 0, 1).copy()
    assert torch.equal(photos(tmp_path / "a.png")[0], torch.from_numpy(expected))


def test_grey_of_16_bits(tmp_path):
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    image.fromarray(values).save(tmp_path / "a.png")
    found = photos(tmp_path / "a.png")[0]
    assert torch.equal(found, torch.from_numpy((values // 257).astype(np.uint8)).expand(3, -1, -1))


def test_what_is_kept_decoded_is_bounded(tmp_path):
    reads = []

    def reader(i):
        return lambda: (reads.append(i), picture(i))[1]

    found = Photos(["a", "b"], [reader(0), reader(1)], keep=40 * 48 * 3)
    for _ in range(2):
        assert [photo.shape for photo in found] == [(3, 40, 48)] * 2
    assert reads == [0, 1, 1]


def test_split_goes_by_name_alone():
    names = [f"{i}.png" for i in range(50)]

    def split(names, **options):
        rest, held_out = Photos(names, [lambda: b""] * len(names)).split(0.2, **options)
        assert sorted(rest.names + held_out.names) == sorted(names)
        return set(held_out.names)

    held_out = split(names)
    assert len(held_out) == 10
    assert split(names[::-1]) == held_out
    assert split(names, seed=1) != held_out
    # Photos of one name count once, and stay on one side.
    assert split([*names, *names[:25], *names[:25]]) == held_out


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no picture", "photo.png is damaged"), (picture(0, (8, 40)), "has 40 x 8 pixels")],
)
def test_a_damaged_photo_is_named(tmp_path, content, message):
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(RuntimeError, match=message):
        photos(tmp_path)[0]


def test_damaged_archives_and_empty_folders(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"no zip")
    with pytest.raises(RuntimeError, match=r"photos.zip is damaged"):
        photos(tmp_path / "photos.zip")
    with pytest.raises(FileNotFoundError, match="must have "):
        photos(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder, archive or photo"):
        photos(tmp_path / "absent")


# -------------------------------------------------------------------------------------------- pairs


@pytest.fixture
def clean(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(picture(40 * i))
    return photos(tmp_path)


def halved(x, generator):
    return x / 2 + 0.1 * torch.rand((), generator=generator)


def test_crops_are_parts_of_photos(clean):
    pairs = Pairs(clean, halved)
    degraded, truth = pairs.crops(8, 16, torch.Generator().manual_seed(3))
    assert degraded.shape == truth.shape == (8, 3, 16, 16)
    windows = {
        part.tobytes()
        for photo in clean
        for turned in (photo, photo.flip(2))
        for top in range(25)
        for left in range(33)
        for part in [turned[:, top : top + 16, left : left + 16].contiguous().numpy()]
    }
    for a, b in zip(degraded, truth):
        assert b.mul(255).round().byte().contiguous().numpy().tobytes() in windows
        lift = a - b / 2
        assert 0 <= float(lift.min()) <= float(lift.max()) < 0.1
        assert float(lift.max() - lift.min()) < 1e-6
    again = pairs.crops(8, 16, torch.Generator().manual_seed(3))
    assert torch.equal(degraded, again[0])
    assert not torch.equal(truth, pairs.crops(8, 16, torch.Generator().manual_seed(4))[1])


def test_a_picture_is_always_degraded_alike(clean):
    pairs = Pairs(clean, halved)
    degraded, truth = pairs.picture(1, largest=20)
    assert torch.equal(truth, clean[1][:, 10:30, 14:34] / 255)
    assert torch.equal(degraded, pairs.subset([1, 2]).picture(0, largest=20)[0])
    lifts = [float((a - b / 2).mean()) for a, b in (pairs.picture(i) for i in range(4))]
    assert len(set(lifts)) == 4


def test_the_margin_holds_what_the_photo_has(clean):
    """A shift by 5 pixels brings in what was outside of the crop."""

    def shifted(x, generator):
        return x.roll((5, 5), (1, 2))

    degraded, _ = Pairs(clean, shifted, margin=5).picture(0, largest=20)
    assert torch.equal(degraded, clean[0][:, 5:25, 9:29] / 255)
    degraded, _ = Pairs(clean, shifted, margin=5).picture(0)
    assert torch.equal(degraded[:, 5:, 5:], clean[0][:, :-5, :-5] / 255)
    assert torch.equal(degraded[:, :5, :5], (clean[0][:, :1, :1] / 255).expand(3, 5, 5))


def test_crops_larger_than_a_photo(clean):
    with pytest.raises(ValueError, match="must have 41 x 41 pixels or more, got 48 x 40"):
        Pairs(clean, halved).crops(1, 41, torch.Generator())


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["rain/1.png", "norain/1.png", "rain/2.png", "norain/2.png"], 2),
        (["rain/norain-1x2.png", "rain/norain-1.png", "norain/norain-1.png"], 2),  # RainTrainH
        (["rainy/rain-001.png", "norain-001.png", "rain-001.png"], 2),  # Rain100H
        (["rainy/1_1.png", "rainy/1_14.png", "truth/1.png"], 2),
        (["train/x/blur/01.png", "train/x/sharp/01.png", "train/y/blur/01.png"], 1),  # GoPro
        (["input/1_1.png", "target/1_1.png", "target/1.png"], 1),
    ],
)
def test_pairs_by_name(tmp_path, names, count):
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(i))
    pairs = paired_photos(tmp_path)
    assert len(pairs) == count
    for rainy, truth in zip(pairs.degraded.names, pairs.names):
        assert rainy != truth
        assert any(part in truth for part in ("norain", "truth", "sharp", "target"))
    assert "target/1.png" not in pairs.names
    degraded, truth = pairs.crops(2, 16, torch.Generator().manual_seed(0))
    assert not torch.equal(degraded, truth)


def test_folders_without_pairs(tmp_path):
    (tmp_path / "rain").mkdir()
    (tmp_path / "rain" / "1.png").write_bytes(picture(0))
    with pytest.raises(FileNotFoundError, match="got 1 degraded and 0 clean ones"):
        paired_photos(tmp_path)


# --------------------------------------------------------------------------------------------- rain


def test_a_streak():
    """Upright, 5 pixels long, thin: a column of ones, and halves where it ends."""
    streak = streak_kernel(5, 0.05, 0)
    column = streak[:, streak.shape[1] // 2]
    assert column.tolist() == [0, 1, 1, 1, 1, 1, 0]
    assert float(streak.sum()) == 5
    flat = streak_kernel(4, 0.05, 90).sum(0)
    torch.testing.assert_close(flat, torch.tensor([0, 0.5, 1, 1, 1, 0.5, 0]))
    lean = streak_kernel(21, 0.5, 30)
    y, x = np.nonzero(lean.numpy() > 0.5)
    slope = np.polyfit(y, x, 1)[0]
    assert slope == pytest.approx(np.tan(np.radians(30)), abs=0.05)


def test_rain_falls_as_its_seed_says():
    rain = Rain((1, 2), density=(0.01, 0.01), length=(5, 9), brightness=(0.2, 0.2))
    clean = torch.full((3, 64, 80), 0.25)

    def fall(seed):
        return rain(clean, torch.Generator().manual_seed(seed))

    rainy = fall(0)
    assert torch.equal(rainy, fall(0))
    assert not torch.equal(rainy, fall(1))
    assert torch.equal(rainy[0], rainy[1])  # white light
    assert float(rainy.min()) >= 0.25
    assert 0.3 < float(rainy.max()) <= 1
    # Streaks reach in from outside: it rains as much at the edges.
    rainy = torch.stack([fall(seed) for seed in range(60)])[:, 0]
    middle = float(rainy[:, 20:-20, 20:-20].mean()) - 0.25
    for side in (rainy[:, 0], rainy[:, -1], rainy[:, :, 0], rainy[:, :, -1]):
        assert float(side.mean()) - 0.25 == pytest.approx(middle, rel=0.25)


def test_mixed_rain_is_one_of_both():
    clean = torch.full((3, 96, 96), 0.3)
    wet = [
        float((RAIN["mixed"](clean, torch.Generator().manual_seed(seed)) - clean).mean())
        for seed in range(40)
    ]
    light = sum(value < 0.04 for value in wet)
    assert 10 < light < 30


@pytest.mark.parametrize(
    ("name", "decibels", "similarity"),
    [("light", (24, 29), (0.75, 0.92)), ("heavy", (12, 18), (0.25, 0.55))],
)
def test_presets(name, decibels, similarity):
    """Near the inputs of Rain100L (26.9 dB, 0.84) and Rain100H (about 15 dB here)."""
    data = pytest.importorskip("skimage.data")
    clean = torch.from_numpy(data.astronaut()[128:384, 128:384].copy()).permute(2, 0, 1) / 255
    rainy = torch.stack(
        [RAIN[name](clean, torch.Generator().manual_seed(seed)) for seed in range(8)]
    )
    truth = clean.expand_as(rainy)
    assert decibels[0] < float(psnr(rainy, truth).mean()) < decibels[1]
    assert similarity[0] < float(ssim(rainy, truth, "valid").mean()) < similarity[1]
