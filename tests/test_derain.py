# SPDX-License-Identifier: BSD-3-Clause
"""`pywino derain`: tiles that add up, every kind of file, nothing lost and nothing half written."""

import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import pywino.cli
from pywino.cli import derain, pictures, restore
from pywino.models import sapnet

Image = pytest.importorskip("PIL.Image")


class Identity(torch.nn.Module):
    def forward(self, y):
        return y


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    torch.save(sapnet().state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def run(weights, monkeypatch):
    """The command with a network that changes nothing, so that files can be compared."""
    monkeypatch.setattr(derain.models, "sapnet", lambda **_: Identity())

    def invoke(*arguments, code=0):
        arguments = ["derain", *map(str, arguments), "--weights", str(weights)]
        result = CliRunner().invoke(pywino.cli.main, arguments)
        assert result.exit_code == code, result.output
        return result.output

    return invoke


def picture(height=20, width=30, channels=3, dtype=np.uint8):
    full = np.iinfo(dtype).max
    pixels = np.random.default_rng(0).integers(0, full, (height, width, channels), endpoint=True)
    return pixels.astype(dtype).squeeze()


# --- tiles ---


@pytest.mark.parametrize("size", [1, 7, 64, 65, 100, 104, 127, 128, 129, 1000])
def test_tiles_cover_and_add_up(size):
    spans = restore.spans(size, 64, 24)
    assert spans[0][0] == 0
    assert spans[-1][1] == size
    assert all(end - start == min(size, 64) for start, end in spans)
    assert all(a[1] - b[0] >= 24 for a, b in itertools.pairwise(spans))
    total = torch.zeros(size)
    for i, (start, end) in enumerate(spans):
        weights = restore._ramp(spans, i)
        assert weights.min() >= -1e-6
        total[start:end] += weights
    torch.testing.assert_close(total, torch.ones(size))


@pytest.mark.parametrize("size", [1, 64, 65, 127, 129, 150, 1000, 1023])
def test_tiles_start_on_the_grid(size):
    spans = restore.spans(size, 70, 20, 16)
    assert spans[0][0] == 0
    assert spans[-1][1] == size
    assert all(start % 16 == 0 and 0 < end - start <= 70 for start, end in spans)
    assert all(a[1] - b[0] >= 20 for a, b in itertools.pairwise(spans))


def test_a_tiled_picture_is_whole_and_advance_hears_of_all():
    rgb, heard = torch.rand(3, 150, 210), []
    output = restore.Tiled(Identity(), 64, 24)(rgb, heard.append)
    torch.testing.assert_close(output, rgb)
    assert len(heard) > 4
    assert max(heard) == 64 * 64


def test_small_pictures_are_one_tile():
    torch.manual_seed(0)
    model, rgb = sapnet(stages=1).eval(), torch.rand(3, 33, 21)
    with torch.no_grad():
        torch.testing.assert_close(
            restore.Tiled(model, derain.TILE, derain.OVERLAP)(rgb), model(rgb[None])[0]
        )


def test_tiles_of_a_network_agree_where_its_gates_do():
    """Without attention a tile's result depends on its surroundings alone: past the receptive
    field of one stage with undilated blocks, 13 pixels each side, it is the whole picture's."""
    torch.manual_seed(0)
    model, rgb = sapnet(None, (1, 1, 1, 1, 1), stages=1).eval(), torch.rand(3, 40, 150)
    assert restore.spans(150, 80, 40) == [(0, 80), (35, 115), (70, 150)]
    tiled = restore.Tiled(model, 80, 40)(rgb)
    with torch.no_grad():
        whole = model(rgb[None])[0]
    # 13 away from the borders of every tile that has a weight there.
    same = [*range(0, 35), *range(48, 67), *range(83, 102), *range(115, 150)]
    torch.testing.assert_close(tiled[..., same], whole[..., same], rtol=1e-4, atol=1e-5)


# --- files ---


FILES = {
    "rgb.png": (picture(), {}),
    "grey.png": (picture(channels=1), {}),
    "alpha.png": (picture(channels=4), {}),
    "grey-alpha.png": (picture(channels=2), {}),
    "deep-grey.png": (picture(channels=1, dtype=np.uint16), {}),
    "rgb.bmp": (picture(), {}),
    "rgb.tif": (picture(), {}),
}


@pytest.mark.parametrize("name", FILES)
def test_lossless_formats_come_back(run, tmp_path, name):
    pixels, options = FILES[name]
    Image.fromarray(pixels).save(tmp_path / name, **options)
    run(tmp_path / name, tmp_path / "out")
    result = Image.open(tmp_path / "out" / name)
    assert result.mode == Image.open(tmp_path / name).mode
    assert np.array_equal(np.asarray(result), pixels)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour(run, tmp_path, channels):
    cv2 = pytest.importorskip("cv2")
    pixels = picture(channels=channels, dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), pixels)
    run(tmp_path / "deep.png", tmp_path / "out.png")
    assert np.array_equal(cv2.imread(str(tmp_path / "out.png"), cv2.IMREAD_UNCHANGED), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_colour_orientation_and_profile(run, tmp_path, orientation):
    """As Pillow turns and keeps it for the same picture in eight bits."""
    cv2 = pytest.importorskip("cv2")
    shallow, exif = picture(), Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "maker"
    Image.fromarray(shallow).save(tmp_path / "8.png", exif=exif, icc_profile=b"profile")
    cv2.imwrite(str(tmp_path / "16.png"), shallow[..., ::-1].astype(np.uint16) * 257)
    metadata = {"exif": exif.tobytes(), "icc_profile": b"profile"}
    pictures._insert_metadata(tmp_path / "16.png", metadata)
    for name in ("8.png", "16.png"):
        run(tmp_path / name, tmp_path / "out" / name)
    expected, deep = (Image.open(tmp_path / "out" / name) for name in ("8.png", "16.png"))
    pixels = cv2.imread(str(tmp_path / "out" / "16.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(pixels[..., ::-1], np.asarray(expected).astype(np.uint16) * 257)
    for result in (expected, deep):
        assert result.getexif().get(0x0112, 1) == 1
        assert result.getexif()[0x010F] == "maker"
        assert result.info["icc_profile"] == b"profile"


def test_16_bit_grey_keeps_its_profile(run, tmp_path):
    pixels = picture(channels=1, dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "in.png", icc_profile=b"profile")
    run(tmp_path / "in.png", tmp_path / "out.png")
    result = Image.open(tmp_path / "out.png")
    assert np.array_equal(np.asarray(result), pixels)
    assert result.info["icc_profile"] == b"profile"


def test_16_bit_colour_without_opencv_is_refused_and_not_cut(run, tmp_path, monkeypatch):
    header = b"\x89PNG\r\n\x1a\n" + bytes([0, 0, 0, 13]) + b"IHDR"
    (tmp_path / "deep.png").write_bytes(header + bytes([0, 0, 0, 9, 0, 0, 0, 9, 16, 2, 0, 0, 0]))
    monkeypatch.setitem(sys.modules, "cv2", None)
    output = run(tmp_path / "deep.png", tmp_path / "out.png", code=1)
    assert "needs OpenCV: pip install opencv-python-headless" in output
    assert not (tmp_path / "out.png").exists()


def test_jpeg_orientation_profile_and_quality(run, tmp_path):
    image = Image.fromarray(np.full((8, 16, 3), 90, np.uint8))
    image.paste((200, 30, 30), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"  # turn by 90 degrees to see it upright
    image.save(tmp_path / "in.jpg", exif=exif, icc_profile=b"profile", quality=100)
    run(tmp_path / "in.jpg", tmp_path / "out.jpg")
    result = Image.open(tmp_path / "out.jpg")
    assert result.size == (8, 16)
    assert result.getexif().get(0x0112, 1) == 1
    assert result.getexif()[0x010F] == "maker"
    assert result.info["icc_profile"] == b"profile"
    assert result.getpixel((4, 3))[0] > 150  # the red half is above
    ours, best = result.quantization[0][0], Image.open(tmp_path / "in.jpg").quantization[0][0]
    assert (best, ours) == (1, 2)  # quality 95's first step is 2


def test_palettes(run, tmp_path):
    Image.fromarray(picture()).quantize(7).save(tmp_path / "in.png")
    run(tmp_path / "in.png", tmp_path / "out.png")
    expected = Image.open(tmp_path / "in.png").convert("RGB")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(expected))


def test_folders_are_mirrored_kept_and_go_on(run, tmp_path):
    source, target = tmp_path / "in", tmp_path / "in" / "out"
    (source / "sub").mkdir(parents=True)
    Image.fromarray(picture()).save(source / "a.png")
    Image.fromarray(picture()).save(source / "sub" / "b.bmp")
    (source / "notes.txt").write_text("no picture")
    run(source, target, "--report", tmp_path / "report.json")
    written = {p.relative_to(target) for p in target.rglob("*") if p.is_file()}
    assert {str(p) for p in written} == {"a.png", "sub/b.bmp"}
    rows = json.loads((tmp_path / "report.json").read_text())
    assert [row["input"].endswith(name) for row, name in zip(rows, ("a.png", "b.bmp"))] == [
        True
    ] * 2
    (target / "a.png").write_bytes(b"mine")
    assert "kept" in run(source, target)
    assert (target / "a.png").read_bytes() == b"mine"
    run(source, target, "--overwrite")
    assert Image.open(target / "a.png").size == (30, 20)


def test_broken_files_are_named_and_the_others_done(run, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    Image.fromarray(picture()).save(source / "good.png")
    data = (source / "good.png").read_bytes()
    (source / "cut.png").write_bytes(data[: len(data) // 2])
    (source / "empty.jpg").write_bytes(b"")
    (source / "text.bmp").write_text("BMnot at all")
    Image.new("1", (20001, 10001)).save(source / "huge.png")
    output = run(source, tmp_path / "out", code=1)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.png"]
    for name in ("cut.png", "empty.jpg", "text.bmp"):
        assert f"{name}: skipped: it cannot be read" in output
    assert "huge.png: skipped: it" in output
    assert "4 of 5 skipped" in output


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    made = pictures.Picture(torch.rand(3, 4, 4))

    def fail(self, *_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        pictures.write_picture(tmp_path / "a.png", made)
    assert not list(tmp_path.iterdir())


def test_what_a_format_cannot_hold_is_refused(run, tmp_path):
    Image.fromarray(picture(channels=4)).save(tmp_path / "a.png")
    assert "holds no alpha channel" in run(tmp_path / "a.png", tmp_path / "a.jpg", code=1)
    Image.fromarray(picture(channels=1, dtype=np.uint16)).save(tmp_path / "d.png")
    assert "holds no 16-bit channels" in run(tmp_path / "d.png", tmp_path / "d.jpg", code=1)
    assert "OUT is the input" in run(tmp_path / "a.png", tmp_path / "a.png", "--overwrite", code=1)
    assert "another folder" in run(tmp_path, tmp_path, code=2)
    (tmp_path / "void").mkdir()
    assert "no picture or video" in run(tmp_path / "void", tmp_path / "out", code=1)


def test_compare_and_scores(run, tmp_path):
    pixels = picture(40, 50)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    truth = np.clip(pixels.astype(int) + 16, 0, 255).astype(np.uint8)
    Image.fromarray(truth).save(tmp_path / "truth.png")
    report = tmp_path / "report.json"
    run(tmp_path / "a.png", tmp_path / "b.png", "--compare", "--truth", tmp_path / "truth.png",
        "--report", report)  # fmt: skip
    side = np.asarray(Image.open(tmp_path / "b-compare.png"))
    assert np.array_equal(side, np.hstack([pixels, pixels, truth]))
    (row,) = json.loads(report.read_text())
    mean = np.mean((truth.astype(float) - pixels) ** 2)
    assert math.isclose(row["psnr_rgb"], 10 * math.log10(255**2 / mean), rel_tol=1e-4)
    assert 0.9 < row["ssim_rgb"] < 1
    assert 20 < row["laplacian_psnr"] < 40
    assert row["psnr_y"] > row["psnr_rgb"]  # Y has 219 steps of 256
    Image.fromarray(truth[:9]).save(tmp_path / "small.png")
    assert "its truth is 50 x 9, it is 50 x 40" in run(
        tmp_path / "a.png", tmp_path / "c.png", "--truth", tmp_path / "small.png", code=1
    )
    assert "it is 50 x 9, and SSIM needs 11 x 11 pixels" in run(
        tmp_path / "small.png", tmp_path / "c.png", "--truth", tmp_path / "small.png", code=1
    )
    assert not (tmp_path / "c.png").exists()


def test_equal_pictures_in_json(run, tmp_path):
    """Infinitely many decibels, which JSON has no word for."""
    Image.fromarray(picture(20, 30)).save(tmp_path / "a.png")
    said = run(tmp_path / "a.png", tmp_path / "b.png", "--truth", tmp_path / "a.png",
        "--json", tmp_path / "report.json")  # fmt: skip
    assert "PSNR inf dB" in said
    (row,) = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert row["psnr_rgb"] is None
    assert row["ssim_rgb"] == 1


def test_video(run, tmp_path):
    cv2 = pytest.importorskip("cv2")
    fourcc = cv2.VideoWriter_fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(tmp_path / "in.avi"), fourcc, 12, (32, 24))
    for level in (0, 60, 120, 180):
        writer.write(np.full((24, 32, 3), level, np.uint8))
    writer.release()
    run(tmp_path / "in.avi", tmp_path / "out.avi")
    video, levels = cv2.VideoCapture(str(tmp_path / "out.avi")), []
    assert video.get(cv2.CAP_PROP_FPS) == 12
    while (read := video.read())[0]:
        levels.append(read[1].mean())
    assert np.abs(np.array(levels) - [0, 60, 120, 180]).max() < 4
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert "OpenCV finds no video" in run(tmp_path / "broken.mp4", tmp_path / "x.mp4", code=1)
    assert not (tmp_path / "x.mp4").exists()


def test_stages_and_weights_reach_the_network(tmp_path, weights, monkeypatch):
    Image.fromarray(picture(12, 14)).save(tmp_path / "a.png")
    outputs = []
    for stages in ("1", "2"):
        out = tmp_path / f"out{stages}.png"
        arguments = ["derain", str(tmp_path / "a.png"), str(out), "--weights", str(weights)]
        result = CliRunner().invoke(pywino.cli.main, [*arguments, "--stages", stages])
        assert result.exit_code == 0, result.output
        outputs.append(np.asarray(Image.open(out)))
    assert not np.array_equal(*outputs)
    (tmp_path / "bad.pth").write_bytes(b"none")
    arguments[-1] = str(tmp_path / "bad.pth")
    result = CliRunner().invoke(pywino.cli.main, arguments)
    assert result.exit_code == 1
    assert "cannot be read as a file of tensors" in result.output


def test_without_weights_they_are_our_own(tmp_path):
    """With as many stages as in their training."""
    pixels = picture(24, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    arguments = ["derain", str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    result = CliRunner().invoke(pywino.cli.main, arguments)
    assert result.exit_code == 0, result.output
    rainy = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        clean = sapnet(weights="pywino-rain").eval()(rainy)[0].clamp(0, 1)
    got = torch.from_numpy(np.asarray(Image.open(tmp_path / "b.png")).copy()).permute(2, 0, 1) / 255
    assert (clean - rainy[0]).abs().max() > 4 / 255
    assert (got - clean).abs().max() <= 0.51 / 255
