# SPDX-License-Identifier: BSD-3-Clause
"""`pywino deblur`: the network in tiles, and both kinds of weights. Files, formats and videos are
those of tests/test_derain.py."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import pywino
import pywino.cli
from pywino.cli import deblur, restore
from pywino.models import deblur_yolo

Image = pytest.importorskip("PIL.Image")


def a_network(dilation=2):
    torch.manual_seed(0)
    model = deblur_yolo(dilation=dilation, trim=True)
    with torch.no_grad():
        model.final.weight *= 5  # so that it does much
        model.train()(torch.rand(4, 3, 64, 64))  # statistics
    return model.eval()


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def invoke(*arguments):
    result = CliRunner().invoke(pywino.cli.main, ["deblur", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def pixels_of(path):
    return torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1).float() / 255


def test_a_picture_is_the_networks(picture, tmp_path):
    model = a_network()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    invoke(
        tmp_path / "in.png", tmp_path / "out.png", "--weights", tmp_path / "weights.pth",
        "--truth", tmp_path / "in.png", "--report", tmp_path / "report.json",
    )  # fmt: skip
    with torch.no_grad():
        wanted = model(picture[None])[0]
    assert (wanted - picture).abs().max() > 0.05
    assert (pixels_of(tmp_path / "out.png") - wanted).abs().max() <= 0.51 / 255
    (row,) = json.loads((tmp_path / "report.json").read_text())
    mse = (pixels_of(tmp_path / "out.png") - picture).square().mean()
    assert row["psnr_rgb"] == pytest.approx(float(-10 * mse.log10()), abs=0.1)


def test_deblurganv2s_weights_run_as_its_authors_run_them(picture, tmp_path):
    """Undilated, on the statistics of the picture."""
    model = a_network(dilation=1)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.h5")
    invoke(
        tmp_path / "in.png", tmp_path / "out.png", "--weights", tmp_path / "weights.h5",
        "--deblurgan-v2",
    )  # fmt: skip
    with torch.no_grad():
        # Statistics of six values amplify rounding: in the command's memory format.
        model = model.to(memory_format=torch.channels_last)
        x = picture[None].contiguous(memory_format=torch.channels_last)
        kept, own = model(x)[0], model.train()(x)[0]
    assert (kept - own).abs().max() > 4 / 255
    assert (pixels_of(tmp_path / "out.png") - own).abs().max() <= 0.51 / 255


def test_a_picture_without_statistics_is_named(tmp_path):
    """In 32 x 32 pixels the deepest features are one value each."""
    torch.save(a_network(dilation=1).state_dict(), tmp_path / "weights.h5")
    Image.new("RGB", (20, 20)).save(tmp_path / "in.png")
    arguments = ["deblur", tmp_path / "in.png", tmp_path / "out.png", "--deblurgan-v2"]
    arguments += ["--weights", tmp_path / "weights.h5"]
    result = CliRunner().invoke(pywino.cli.main, list(map(str, arguments)))
    assert result.exit_code == 1
    assert "in.png: skipped: Expected more than 1 value per channel" in result.output
    assert not (tmp_path / "out.png").exists()


def test_a_video(tmp_path):
    """Frame by frame, as the pictures; codecs lose a little."""
    cv2 = pytest.importorskip("cv2")
    model = a_network()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    coarse = np.random.default_rng(1).integers(60, 200, (3, 3, 4, 3), np.uint8)
    frames = coarse.repeat(16, 1).repeat(16, 2)
    writer = cv2.VideoWriter(
        str(tmp_path / "in.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 12, (64, 48)
    )
    for frame in frames:
        writer.write(frame)
    writer.release()
    invoke(tmp_path / "in.avi", tmp_path / "out.avi", "--weights", tmp_path / "weights.pth")

    def read(name):
        video, found = cv2.VideoCapture(str(tmp_path / name)), []
        while (frame := video.read())[0]:
            found.append(torch.from_numpy(frame[1]).flip(2).permute(2, 0, 1).float() / 255)
        return torch.stack(found)

    before, after = read("in.avi"), read("out.avi")
    with torch.no_grad():
        wanted = model(before)
    assert (wanted - before).abs().mean() > 0.03
    assert after.shape == wanted.shape
    assert (after - wanted).abs().mean() < 0.01


def test_tiles_agree_with_the_whole_picture():
    """On the grid of the deepest features a tile has the whole picture's, but for what its borders
    reach; the further in, the less that is. At any other offset the encoder sees other pixels."""
    model, rgb = a_network(), torch.rand(3, 96, 800)
    with torch.no_grad():
        whole = model(rgb[None])[0]
    network = restore.Tiled(model, 480, deblur.OVERLAP, deblur.GRID)
    assert restore.spans(800, 480, deblur.OVERLAP, deblur.GRID) == [(0, 480), (320, 800)]
    difference = (network(rgb) - whole).abs().amax((0, 1))
    shifted = restore.Tiled(model, 470, deblur.OVERLAP, 1)
    assert shifted._spans(800) == [(0, 470), (330, 800)]
    other = (shifted(rgb) - whole).abs().amax((0, 1))
    assert difference[:200].max() < 0.1 * other[500:].max()
    assert difference[600:].max() < 0.1 * other[500:].max()
    assert difference.max() < 0.5 * (whole - rgb).abs().max()


def test_weights_that_do_not_fit_are_named(picture, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "weights.pth")
    arguments = ["deblur", tmp_path / "in.png", tmp_path / "out.png", "--weights"]
    arguments.append(tmp_path / "weights.pth")
    result = CliRunner().invoke(pywino.cli.main, list(map(str, arguments)))
    assert result.exit_code == 1
    assert "does not fit DeblurYOLO" in result.output
    assert not (tmp_path / "out.png").exists()


def test_without_weights_they_are_our_own(picture, tmp_path):
    invoke(tmp_path / "in.png", tmp_path / "out.png")
    with torch.no_grad():
        wanted = deblur_yolo("pywino-blur", trim=True).eval()(picture[None])[0]
    assert (wanted - picture).abs().max() > 4 / 255
    assert (pixels_of(tmp_path / "out.png") - wanted).abs().max() <= 0.51 / 255
