# SPDX-License-Identifier: BSD-3-Clause
"""`pywino detect`: boxes in the pictures' own pixels, every kind of file, scores where labels are
given, and nothing half written."""

import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import pywino.cli
from pywino.cli import detect
from pywino.models import Detections, small_yolo

Image = pytest.importorskip("PIL.Image")


class Bright(nn.Module):
    """Finds the box of the bright pixels, class 1, and a box of class 0 of score 0.1."""

    def detect(self, images, *, threshold, overlap):
        (image,) = images
        assert image.shape[1] % 32 == image.shape[2] % 32 == 0
        rows, columns = ((image[0] > 0.75).any(axis).nonzero().flatten() for axis in (1, 0))
        if not len(rows):
            return [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long())]
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        boxes = torch.tensor([box, [0, 0, 9, 9]]).float()
        scores, classes = torch.tensor([0.9, 0.1]), torch.tensor([1, 0])
        seen = scores > threshold
        return [Detections(boxes[seen], scores[seen], classes[seen])]


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    torch.manual_seed(0)
    torch.save(small_yolo(2).state_dict(), folder / "best.pth")
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "recipe.json").write_text(json.dumps({"model": "small", "size": 64}))
    return folder / "best.pth"


@pytest.fixture
def run(weights, monkeypatch):
    """The command, with a network that finds bright pixels."""
    monkeypatch.setattr(detect, "swap_", lambda network: Bright())

    def invoke(*arguments, code=0):
        arguments = ["detect", *map(str, arguments), "--weights", str(weights)]
        result = CliRunner().invoke(pywino.cli.main, arguments)
        assert result.exit_code == code, result.output
        return result.output

    return invoke


def write(path, box, height=90, width=120):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((height, width, 3), 20, np.uint8)
    if box:
        x1, y1, x2, y2 = box
        pixels[y1:y2, x1:x2] = 255
    Image.fromarray(pixels).save(path)
    return path


BOX = (40, 30, 80, 75)


def test_a_picture(run, tmp_path):
    path = write(tmp_path / "a.png", BOX)
    output = run(path, tmp_path / "out", "--json", tmp_path / "a.json")
    assert "a.png: 1 dog;" in output
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["classes"] == ["cat", "dog"]
    (row,) = report["files"]
    assert (row["width"], row["height"]) == (120, 90)
    (found,) = row["detections"]
    assert (found["class"], found["score"]) == ("dog", 0.9)
    assert np.abs(np.subtract(found["box"], BOX)).max() < 2.5  # pixels of 64 of 120
    before, after = (np.asarray(Image.open(p)).astype(int) for p in (path, row["output"]))
    changed = np.abs(before - after).max(2) > 0
    rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
    assert abs(columns[0] - BOX[0]) < 3
    assert abs(rows[-1] + 1 - BOX[3]) < 3
    assert not changed[50:70, 50:70].any()  # an outline
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]


def test_boxes_stay_inside_and_follow_orientation(run, tmp_path):
    path = write(tmp_path / "a.jpg", (0, 0, 60, 50), 50, 200)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees to the right
    Image.open(path).save(path, exif=exif, quality=95)
    run(path, "--json", tmp_path / "a.json")
    (row,) = json.loads((tmp_path / "a.json").read_text())["files"]
    assert (row["width"], row["height"]) == (50, 200)
    x1, y1, x2, y2 = row["detections"][0]["box"]
    assert (x1, y1, x2) == (0, 0, 50)
    assert abs(y2 - 60) < 4


def test_a_folder_with_broken_files(run, tmp_path):
    data = tmp_path / "in"
    write(data / "deep" / "b.png", BOX)
    write(data / "c.png", None)
    (data / "a.jpg").write_bytes(b"no picture")
    (data / "notes.txt").write_text("not looked at")
    output = run(data, tmp_path / "out", "--json", tmp_path / "all.json", code=1)
    assert "a.jpg: skipped: it cannot be read" in output
    assert "c.png: nothing" in output
    assert "1 of 3 skipped" in output
    assert {
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")
    } == {
        "deep/b.png",
        "c.png",
    }
    rows = json.loads((tmp_path / "all.json").read_text())["files"]
    assert ["skipped" in row for row in rows] == [True, False, False]


def test_outputs_that_exist_are_kept(run, tmp_path):
    path = write(tmp_path / "a.png", BOX)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_bytes(b"mine")
    output = run(path, tmp_path / "out")
    assert "kept; --overwrite writes it again" in output
    assert "1 dog" in output
    assert (tmp_path / "out" / "a.png").read_bytes() == b"mine"
    run(path, tmp_path / "out", "--overwrite")
    assert Image.open(tmp_path / "out" / "a.png").size == (120, 90)
    assert "has the input itself" in run(path, tmp_path, "--overwrite", code=1)


def test_average_precision_with_labels(run, tmp_path):
    """Of three dogs two are found; the cats of score 0.1 count, though they are not in the list."""
    pytest.importorskip("faster_coco_eval", reason="needs pywino[detect]")
    data = tmp_path / "data"
    for name, box in (("a", BOX), ("b", BOX), ("c", None)):
        write(data / "images" / f"{name}.png", box)
    (data / "labels").mkdir()
    line = f"1 {60 / 120} {52.5 / 90} {40 / 120} {45 / 90}\n"
    # The cats' box, 9 x 9 on the canvas of 64 x 64: scale 64 / 120, 8 rows of grey above.
    cat = f"0 {4.5 / 64} {0.5 / 48} {9 / 64} {1 / 48}\n"
    (data / "labels" / "a.txt").write_text(line + cat + "1 0.1 0.1 0.1 0.1\n")
    (data / "labels" / "b.txt").write_text(line + cat + "1 2 3\n")
    output = run(data, "--json", tmp_path / "r.json")
    assert "b.txt, line 3: left out: it must have 5 columns" in output
    report = json.loads((tmp_path / "r.json").read_text())
    scores = report["average_precision"]
    assert scores["objects"] == 5
    assert scores["classes"] == {"cat": 1, "dog": pytest.approx(67 / 101)}
    assert all(len(row["detections"]) <= 1 for row in report["files"])
    assert f"mAP@.5 {(1 + 67 / 101) / 2:.4f}" in output
    (data / "labels" / "b.txt").write_text(line)
    (data / "labels" / "a.txt").write_text(line)
    output = run(data / "images", "--labels", data / "labels", "--json", tmp_path / "r.json")
    assert "mAP@.5 1.0000" in output
    scores = json.loads((tmp_path / "r.json").read_text())["average_precision"]
    assert scores["classes"] == {"cat": None, "dog": 1}


def test_labels_without_the_library_that_scores(run, tmp_path, monkeypatch):
    write(tmp_path / "in" / "a.png", BOX)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    output = run(tmp_path / "in", tmp_path / "out", "--labels", tmp_path, code=1)
    assert "pip install 'pywino[detect]'" in output
    assert not (tmp_path / "out").exists()


def test_a_video(run, tmp_path):
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (96, 64))
    for x in (0, 30, 60):
        frame = np.zeros((64, 96, 3), np.uint8)
        frame[20:50, x : x + 30, 2] = 255  # red
        writer.write(frame)
    writer.release()
    output = run(tmp_path / "v.avi", tmp_path / "out", "--json", tmp_path / "v.json")
    assert "3 dog in 3 frames" in output
    (row,) = json.loads((tmp_path / "v.json").read_text())["files"]
    left = [frame[0]["box"][0] for frame in row["frames"]]
    assert np.abs(np.subtract(left, (0, 30, 60))).max() < 4
    video = cv2.VideoCapture(str(tmp_path / "out" / "v.avi"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    blue, _, red = video.read()[1][40, 25]
    assert red > 200 > 60 > blue


def test_a_video_without_opencv_or_frames(run, tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"no video")
    output = run(tmp_path / "v.mp4", tmp_path / "out", code=1)
    assert "needs OpenCV" in output or "finds no video" in output
    assert not list((tmp_path / "out").glob("*") if (tmp_path / "out").exists() else [])


def test_nothing_to_do(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "there is no picture or video in" in run(tmp_path / "empty", code=1)
    write(tmp_path / "in" / "a.png", BOX)
    assert "OUT must be outside of IN" in run(tmp_path / "in", tmp_path / "in" / "out", code=2)
    assert "OUT must be a folder" in run(tmp_path / "in", tmp_path / "in" / "a.png", code=2)


# --- the model ---


def test_the_network_itself(weights, tmp_path):
    """With the weights' own recipe and names; the same as `YOLO.detect` on a picture that needs no
    scaling."""
    network, names, size = detect.load(weights)
    assert (names, size) == (["cat", "dog"], 64)
    rgb = torch.rand(3, 64, 32)
    found = detect.find(network, rgb, 64, 0.002, 0.45)
    (wanted,) = small_yolo(2, weights).eval().detect(rgb[None], threshold=0.002)
    assert len(found.scores) > 3
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.boxes, wanted.boxes, rtol=1e-3, atol=1e-3)


def test_images_of_every_size(weights):
    network, _, _ = detect.load(weights)
    for height, width in ((1, 1), (7, 300), (64, 64), (65, 33)):
        found = detect.find(network, torch.rand(3, height, width), 64, 0.0, 0.45)
        if len(found.boxes):
            assert found.boxes.min() >= 0
            assert (found.boxes.amax(0) <= torch.tensor([width, height] * 2)).all()


def usage(weights, *arguments):
    arguments = ["detect", str(weights.parent), "--weights", str(weights), *map(str, arguments)]
    write(weights.parent / "a.png", BOX)
    result = CliRunner().invoke(pywino.cli.main, arguments)
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def test_weights_that_do_not_fit(weights):
    (weights.parent / "classes.txt").write_text("a\nb\nc\n")
    code, output = usage(weights)
    assert code == 1
    assert "does not fit YOLO" in output
    (weights.parent / "classes.txt").write_text("\n")
    assert usage(weights) == (2, usage(weights)[1])
    assert "--classes must be a file with a name a line" in usage(weights)[1]
    (weights.parent / "classes.txt").unlink()
    assert "there is no classes.txt beside" in usage(weights)[1]
    (weights.parent / "names").write_text("x\ny\n")
    assert usage(weights, "--classes", weights.parent / "names")[0] == 0


def test_recipes_that_do_not_help(weights):
    (weights.parent / "recipe.json").write_text("{")
    assert "recipe.json cannot be read" in usage(weights)[1]
    (weights.parent / "recipe.json").write_text("[1]")
    assert "--model must be given" in usage(weights)[1]
    (weights.parent / "recipe.json").write_text('{"model": "small", "size": "large"}')
    assert "--size must be at least 32, got 'large'" in usage(weights)[1]
    (weights.parent / "recipe.json").unlink()
    assert usage(weights, "--model", "small", "--size", 64)[0] == 0


def test_darknets_weights_are_yolov3s(weights, tmp_path):
    path = tmp_path / "y.weights"
    path.write_bytes(bytes(16))
    code, output = usage(path, "--json", tmp_path / "x.json")
    assert code == 1
    assert "too short" in output
    assert "YOLO has 62001757 numbers" in output
    assert not (tmp_path / "x.json").exists()


def test_help():
    result = CliRunner().invoke(pywino.cli.main, ["detect", "--help"])
    assert result.exit_code == 0
    assert "--labels" in result.output
    assert "detect" in CliRunner().invoke(pywino.cli.main, ["--help"]).output
