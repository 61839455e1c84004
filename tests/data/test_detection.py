# SPDX-License-Identifier: BSD-3-Clause
"""Boxes that are where the pixels are, whatever happens to an image, and label files with every
kind of mistake."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pywino.data import detection
from pywino.data.detection import LabelledPictures, Scenes, Stamps, collate, letterbox, read_labels

Image = pytest.importorskip("PIL.Image")


def seen_box(image, least=0.75):
    """The box of the pixels that are bright in the first channel."""
    rows, columns = (np.flatnonzero((image[0] > least).any(axis)) for axis in (1, 0))
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def bright(height, width, box):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[:, y1:y2, x1:x2] = 255
    return image


# --- letterboxes ---


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (64, 64), (640, 480), (7, 300)])
def test_letterbox(size):
    height, width = size
    placed = letterbox(bright(height, width, (0, 0, width, height)), 64, 96)
    assert placed.image.shape == (3, 64, 96)
    whole = torch.tensor([[0.0, 0, width, height]])
    box = placed.place(whole)
    torch.testing.assert_close(seen_box(placed.image).float(), box[0])
    assert box[0, 2] - box[0, 0] == 96 or box[0, 3] - box[0, 1] == 64
    torch.testing.assert_close(placed.take_back(box), whole)
    margins = box[0] - torch.tensor([0, 0, 96, 64])
    assert (margins[:2] + margins[2:]).abs().max() <= 1
    assert ((placed.image == 0.5) | (placed.image > 0.999)).all()


# --- label files ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2", "must have 5 columns .* got 4"),
        ("0 0.5 0.5 0.2 0.2 0.9", "must have 5 columns .* got 6"),
        ("cat 0.5 0.5 0.2 0.2", "must have 5 numbers"),
        ("0 0.5 nan 0.2 0.2", "must be finite"),
        ("0 inf 0.5 0.2 0.2", "must be finite"),
        ("-1 0.5 0.5 0.2 0.2", r"an integer in \[0, 3\), got -1"),
        ("3 0.5 0.5 0.2 0.2", r"an integer in \[0, 3\), got 3"),
        ("1.5 0.5 0.5 0.2 0.2", "an integer"),
        ("0 0.5 0.5 -0.2 0.2", "width and height must be above 0"),
        ("0 0.5 0.5 0.2 0", "width and height must be above 0"),
        ("0 1.5 0.5 0.2 0.2", "outside of the image"),
        ("0 0.5 -0.2 0.2 0.2", "outside of the image"),
        ("\x00\xff\xfe", "must have 5 columns"),
    ],
)
def test_lines_that_are_left_out(tmp_path, line, message):
    path = tmp_path / "a.txt"
    path.write_bytes(f"1 0.5 0.5 0.5 0.5\n\n{line}\n2 0.25 0.5 0.5 1\n".encode("latin-1"))
    boxes, (problem,) = read_labels(path, 3)
    assert boxes.tolist() == [[0.25, 0.25, 0.75, 0.75, 1], [0, 0, 0.5, 1, 2]]
    assert problem.startswith(f"{path}, line 3: left out: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(problem)


def test_boxes_that_stick_out_are_cut(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("0 0.1 0.5 0.4 0.5\n0 0.5 0.5 1.001 0.5\n")
    boxes, (problem,) = read_labels(path)
    torch.testing.assert_close(
        boxes[:, :4], torch.tensor([[0, 0.25, 0.3, 0.75], [0.0, 0.25, 1, 0.75]])
    )
    assert problem == f"{path}, line 1: cut: its box sticks out of the image"


def test_classes_without_names_are_bounded(tmp_path):
    (tmp_path / "a.txt").write_text("9999 0.5 0.5 0.4 0.5\n10000000000 0.5 0.5 0.4 0.5\n")
    boxes, (problem,) = read_labels(tmp_path / "a.txt")
    assert boxes[:, 4].tolist() == [9999]
    assert "an integer in [0, 10000), got 10000000000" in problem


def test_a_label_file_of_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(1 << 32)
    boxes, (problem,) = read_labels(tmp_path / "a.txt")
    assert len(boxes) == 0
    assert "4294967296 bytes are no label file" in problem


# --- folders ---


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "labels" / "deep").mkdir(parents=True)
    for name, (height, width), box in (
        ("a.png", (80, 120), (30, 20, 90, 60)),
        ("deep/b.png", (90, 40), (0, 30, 20, 60)),
        ("c.png", (50, 50), None),
    ):
        pixels = bright(height, width, box or (0, 0, 0, 0)).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / name)
        if box:
            x1, y1, x2, y2 = box
            text = f"2 {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} "
            text += f"{(x2 - x1) / width} {(y2 - y1) / height}\n"
            (tmp_path / "labels" / name).with_suffix(".txt").write_text(text)
    return tmp_path


def test_folder(folder):
    pictures = LabelledPictures(folder, 64)
    assert [path.name for path in pictures.paths] == ["a.png", "c.png", "b.png"]
    assert pictures.classes == ("0", "1", "2")
    assert not pictures.problems
    for i in (0, 2):
        image, boxes = pictures.sample(i)
        assert image.shape == (3, 64, 64)
        assert boxes[:, 4].tolist() == [2]
        assert (seen_box(image) - boxes[0, :4]).abs().max() <= 1
    assert pictures.sample(1)[1].shape == (0, 5)
    (folder / "classes.txt").write_text("cat\ndog\nfox\n\n")
    assert LabelledPictures(folder).classes == ("cat", "dog", "fox")
    assert LabelledPictures(folder, classes=("x",)).problems[0].endswith("got 2")


def test_pictures_and_labels_in_one_folder(folder):
    flat = folder / "flat"
    flat.mkdir()
    for path in (*folder.glob("images/a.png"), *folder.glob("labels/a.txt")):
        path.rename(flat / path.name)
    assert len(LabelledPictures(flat, 64).sample(0)[1]) == 1


@pytest.mark.parametrize("seed", range(8))
def test_augmented_boxes_are_where_the_pixels_are(folder, seed):
    pictures = LabelledPictures(folder, 160, augment=True, seed=seed)
    for epoch in range(5):
        image, boxes = pictures.sample(0, epoch)
        if len(boxes) and image.max() > 0.8:
            assert (seen_box(image, 0.66) - boxes[0, :4]).abs().max() <= 2
        again = pictures.sample(0, epoch)
        assert torch.equal(image, again[0])
        assert torch.equal(boxes, again[1])
    assert not torch.equal(pictures.sample(0, 0)[0], pictures.sample(0, 1)[0])


def test_boxes_that_a_crop_leaves_are_kept_and_others_go():
    """A bright left half: whatever stays of it within the canvas, and only then a box."""
    kept = []
    for seed in range(60):
        boxes = torch.tensor([[0.0, 0, 10, 100, 0]])
        image = bright(100, 100, (0, 0, 10, 100)).float() / 255
        rng = np.random.default_rng(seed)
        canvas, left = detection._augmented(image, boxes.clone(), 64, rng)
        kept.append(len(left))
        if len(left):
            assert left[0, :4].min() >= 0
            assert left[0, :4].max() <= 64
            assert (seen_box(canvas, 0.66) - left[0, :4]).abs().max() <= 2
    assert 0 < sum(kept) < 60


def test_unusable_pictures_are_named(folder):
    (folder / "images" / "x.jpg").write_bytes(b"no picture")
    (folder / "images" / "d.png").write_bytes((folder / "images" / "a.png").read_bytes()[:90])
    pictures = LabelledPictures(folder)
    assert len(pictures) == 4
    (problem,) = pictures.problems
    assert problem.startswith(f"{folder / 'images' / 'x.jpg'}: left out: cannot identify")
    with pytest.raises(RuntimeError, match=r"d\.png is damaged"):  # its header was good
        pictures.sample(2)


def test_labels_without_a_picture_are_named(folder):
    (folder / "labels" / "z.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    assert LabelledPictures(folder).problems == [
        f"{folder / 'labels' / 'z.txt'}: left out: it has no picture"
    ]


def test_coco128():
    """128 photos, of which two have no label file; two label files have no photo."""
    shared = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("PYWINO_DATA", shared)) / "coco128"
    if not folder.is_dir():
        pytest.skip(f"COCO128 is not in {folder}; set PYWINO_DATA")
    pictures = LabelledPictures(folder)
    assert (len(pictures), len(pictures.classes)) == (128, 80)
    assert sum(len(boxes) for boxes in pictures.boxes) == 929
    assert [problem.split("/")[-1] for problem in pictures.problems] == [
        "000000000656.txt: left out: it has no picture",
        "000000000659.txt: left out: it has no picture",
    ]


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_folders_without_pictures(tmp_path, content):
    if content:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(FileNotFoundError, match="must have pictures"):
        LabelledPictures(tmp_path)


def test_split_by_name():
    names = [f"{i}.jpg" for i in range(50)]
    held_out = detection.held_out_by_name(names, 0.2)
    assert len(held_out) == 10
    assert held_out == detection.held_out_by_name(reversed(names), 0.2)
    assert len(detection.held_out_by_name(names[:2], 0.1)) == 1
    assert detection.held_out_by_name(names, 0) == set()
    with pytest.raises(ValueError, match="fraction must be in"):
        detection.held_out_by_name(names, 1.0)


def test_folders_split(folder):
    rest, held_out = LabelledPictures(folder, augment=True).split(0.34)
    assert len(rest) == 2
    assert len(held_out) == 1
    assert not {path.name for path in rest.paths} & {path.name for path in held_out.paths}
    assert (rest.augment, held_out.augment) == (True, False)


# --- scenes ---


def disc(side, color, alpha=255):
    """A filled circle of one colour, transparent around."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    pixels = np.zeros((side, side, 4), np.uint8)
    pixels[..., :3] = color
    pixels[x**2 + y**2 < (side / 2) ** 2, 3] = alpha
    return Image.fromarray(pixels)


@pytest.fixture
def stamps(tmp_path):
    for label, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / label / "deep").mkdir(parents=True)
        for i in range(5):
            disc(60 + 10 * i, color).save(tmp_path / label / "deep" / f"{i}.png")
    return tmp_path


def test_stamps(stamps):
    Image.new("RGB", (80, 80)).save(stamps / "red" / "opaque.png")
    disc(40, (255, 0, 0)).save(stamps / "red" / "small.png")
    disc(80, (255, 0, 0), alpha=20).save(stamps / "red" / "faint.png")
    disc(900, (0, 0, 255)).save(stamps / "blue" / "large.png")
    (stamps / "blue" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    found = Stamps(stamps)
    assert found.classes == ("blue", "red")
    assert [len(names) for names in found.names] == [6, 5]
    large = found.pixels[0][found.names[0].index("blue/large.png")]
    assert large.shape == (256, 256, 4)
    text = "\n".join(found.problems)
    for name, why in (
        ("opaque", "no transparent pixels"),
        ("small", "smaller than 48"),
        ("faint", "smaller than 48"),
        ("broken", "left out"),
    ):
        assert any(f"{name}.png" in line and why in line for line in text.splitlines())
    assert Stamps(stamps, ("red",)).classes == ("red",)
    rest, held_out = found.split(0.2)
    for mine, theirs, whole in zip(rest.names, held_out.names, found.names):
        assert sorted(mine + theirs) == whole
        assert len(theirs) == 1


@pytest.mark.parametrize("classes", [("green",), (), None])
def test_stamps_that_are_not_there(tmp_path, classes):
    with pytest.raises(FileNotFoundError, match="must have"):
        Stamps(tmp_path, classes)


PHOTOS = [torch.full((3, 90, 130), 60, dtype=torch.uint8)]


def test_scenes(stamps):
    """Every pixel of a cut-out's colour is inside of a box of its class, and every box is tight."""
    scenes = Scenes(PHOTOS, Stamps(stamps, ("red", "blue")), 96, count=12)
    counts = []
    for index in range(12):
        image, boxes = scenes.sample(index)
        assert image.shape == (3, 96, 96)
        assert image.dtype == torch.float32
        grey = image.amax(0) - image.amin(0) < 0.02
        covered = torch.zeros(96, 96, dtype=torch.bool)
        for x1, y1, x2, y2, label in boxes.int().tolist():
            covered[y1 - 1 : y2 + 1, x1 - 1 : x2 + 1] = True
            color = image[2 * label] - image[2 - 2 * label] > 0.2
            color = color[y1:y2, x1:x2]
            for edge in (color[0], color[-1], color[:, 0], color[:, -1]):
                assert edge.any()
        assert (grey | covered).all()
        counts.append(len(boxes))
    assert min(counts) >= 1
    assert max(counts) >= 3


def test_hidden_pixels_do_not_count():
    owner = np.zeros((10, 10), np.int64)
    owner[2:8, 2:8] = 1
    owner[2:8, 6:9] = 2
    assert detection._boxes(owner, [4, 0]).tolist() == [[2, 2, 6, 8, 4], [6, 2, 9, 8, 0]]
    assert detection._boxes(np.zeros((4, 4)), [1]).shape == (0, 5)


def test_scenes_follow_seed_epoch_and_index(stamps):
    def scene(index, epoch, **options):
        image, boxes = Scenes(PHOTOS, Stamps(stamps), 64, **options).sample(index, epoch)
        return [*image.flatten().tolist(), *boxes.flatten().tolist()]

    assert scene(1, 2) == scene(1, 2)
    assert scene(1, 2) != scene(1, 3)
    assert scene(1, 2) != scene(2, 2)
    assert scene(1, 2) != scene(1, 2, seed=1)
    assert scene(1, 2, frozen=True) == scene(1, 3, frozen=True)


def test_scenes_without_photos(stamps):
    with pytest.raises(ValueError, match="photos must be one or more"):
        Scenes([], Stamps(stamps))


def test_a_folder_of_scenes(stamps, tmp_path):
    """Written and read again they are the same, to the pixels' eight bits."""
    scenes = Scenes(PHOTOS, Stamps(stamps), 96, count=3)
    detection.write_folder(scenes, tmp_path / "out", 2, lambda image, index: image / (1 + index))
    pictures = LabelledPictures(tmp_path / "out", 96)
    assert pictures.classes == ("blue", "red")
    assert len(pictures) == 2
    for i in range(2):
        image, boxes = scenes.sample(i)
        got, got_boxes = pictures.sample(i)
        torch.testing.assert_close(got, image / (1 + i), rtol=0, atol=0.0021)
        torch.testing.assert_close(got_boxes, boxes, rtol=0, atol=1e-3)


def test_collate():
    images, targets = collate(
        [(torch.zeros(3, 4, 4), torch.ones(2, 5)), (torch.ones(3, 4, 4), torch.zeros(0, 5))]
    )
    assert images.shape == (2, 3, 4, 4)
    assert targets[0].tolist() == [[1] * 5] * 2
    assert targets[1].tolist() == [[0, 0, 0, 0, -1]] * 2
