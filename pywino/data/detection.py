# SPDX-License-Identifier: BSD-3-Clause
"""Pictures with boxes: folders in YOLO's format, and scenes of cut-outs pasted on photos.

A sample is a pair: the image (3, size, size), float32 RGB in 0..1, and its boxes (M, 5) as x1, y1,
x2, y2 in pixels and the class. It depends on the seed, the epoch and the index alone."""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from pywino.data.drawing import to_image
from pywino.data.folder import SUFFIXES, decoded

_GREY = 0.5  # around letterboxed images
_LARGEST_LABELS = 4 << 20  # bytes of a label file
_MOST_CLASSES = 10_000  # of a folder that names none
_STICKS_OUT = 0.01  # of a side: less is rounding
_LEAST_VISIBLE = 0.3  # of a box after a random crop
_STAMP_SIDE = (48, 256)  # pixels: smaller cut-outs are left out, larger ones are scaled down
_STAMP_SCALE = (0.15, 0.6)  # of the scene's side
_MOST_COVERED = 0.1  # of the smaller of two boxes


class Letterboxed(NamedTuple):
    """An image on a canvas, and how it came there: x on the canvas is x * scale[0] + offset[0]."""

    image: Tensor
    scale: tuple[float, float]
    offset: tuple[int, int]

    def place(self, boxes: Tensor) -> Tensor:
        """Boxes (M, 4) of the image, on the canvas."""
        return boxes * boxes.new_tensor(self.scale * 2) + boxes.new_tensor(self.offset * 2)

    def take_back(self, boxes: Tensor) -> Tensor:
        """Boxes (M, 4) of the canvas, in the image."""
        return (boxes - boxes.new_tensor(self.offset * 2)) / boxes.new_tensor(self.scale * 2)


def letterbox(image: Tensor, height: int, width: int) -> Letterboxed:
    """(3, H, W) uint8, or float in 0..1 -> the same, as large as fits into the middle of a grey
    (3, height, width) float32."""
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    ratio = min(height / image.shape[1], width / image.shape[2])
    h, w = (max(1, round(side * ratio)) for side in image.shape[1:])
    scale = (w / image.shape[2], h / image.shape[1])
    offset = ((width - w) // 2, (height - h) // 2)
    canvas = image.new_full((3, height, width), _GREY)
    canvas[:, offset[1] : offset[1] + h, offset[0] : offset[0] + w] = _resized(image, h, w)
    return Letterboxed(canvas, scale, offset)


def _resized(image, height, width):
    size = (height, width)
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)


# ---------------------------------------------------------------------------------- YOLO's folders


def read_labels(path: Path, num_classes: int | None = None) -> tuple[Tensor, list[str]]:
    """(boxes, problems) of a file with a line `class cx cy w h` an object, relative to the image's
    sides. Boxes (M, 5) are x1, y1, x2, y2 in 0..1 and the class; lines that are none are left out
    and named, boxes that stick out are cut and named."""
    if path.stat().st_size > _LARGEST_LABELS:
        return torch.zeros(0, 5), [f"{path}: {path.stat().st_size} bytes are no label file"]
    boxes, problems = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            box, note = _box_of(line.split(), num_classes)
        except ValueError as error:
            problems.append(f"{path}, line {number}: left out: {error}")
            continue
        boxes.append(box)
        if note:
            problems.append(f"{path}, line {number}: {note}")
    return torch.tensor(boxes, dtype=torch.float32).view(-1, 5), problems


def _box_of(columns, num_classes):
    if len(columns) != 5:
        raise ValueError(f"it must have 5 columns (class cx cy w h), got {len(columns)}")
    try:
        label, *box = map(float, columns)
    except ValueError:
        raise ValueError(f"it must have 5 numbers, got {' '.join(columns)[:60]!r}") from None
    if not all(math.isfinite(value) for value in (label, *box)):
        raise ValueError("its numbers must be finite")
    classes = _MOST_CLASSES if num_classes is None else num_classes
    if label != int(label) or not 0 <= label < classes:
        raise ValueError(f"its class must be an integer in [0, {classes}), got {columns[0][:20]}")
    cx, cy, w, h = box
    if w <= 0 or h <= 0:
        raise ValueError(f"width and height must be above 0, got {w:g} and {h:g}")
    corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    cut = [min(max(corner, 0.0), 1.0) for corner in corners]
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        raise ValueError("its box lies outside of the image")
    far = max(abs(a - b) for a, b in zip(corners, cut)) > _STICKS_OUT
    return [*cut, label], "cut: its box sticks out of the image" if far else None


class LabelledPictures(Dataset):
    """The pictures below `root/images` with the boxes of the files of the same names below
    `root/labels` (a picture without one has no object), or of one folder with both.

    size: of the square samples, a multiple of 32. classes: their names; None reads
    `root/classes.txt`, a name a line, and without that numbers them. augment: mirrored, zoomed,
    shifted, brighter or darker by chance. `problems` lists what was left out of the files, and why.
    Raises FileNotFoundError where there is no picture that can be used; a picture that turns out to
    be damaged when it is decoded raises RuntimeError with its name. Needs Pillow."""

    def __init__(
        self,
        root: str | os.PathLike,
        size: int = 416,
        *,
        classes: Sequence[str] | None = None,
        augment: bool = False,
        seed: int = 0,
    ):
        root = Path(root)
        self.size, self.augment, self.seed = size, augment, seed
        images = root / "images" if (root / "images").is_dir() else root
        labels = root / "labels" if (root / "labels").is_dir() else root
        if classes is None and (root / "classes.txt").is_file():
            classes = (root / "classes.txt").read_text(encoding="utf-8").split("\n")
            classes = [name.strip() for name in classes if name.strip()]
        self.problems: list[str] = []
        self.paths: list[Path] = []
        self.boxes: list[Tensor] = []
        unused = {path for path in labels.rglob("*.txt") if path.name != "classes.txt"}
        for path in sorted(images.rglob("*")):
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                continue
            label = (labels / path.relative_to(images)).with_suffix(".txt")
            unused.discard(label)
            if (why := _unreadable(path)) is not None:
                self.problems.append(f"{path}: left out: {why}")
                continue
            boxes = torch.zeros(0, 5)
            if label.is_file():
                boxes, problems = read_labels(label, None if classes is None else len(classes))
                self.problems += problems
            self.paths.append(path)
            self.boxes.append(boxes)
        self.problems += [f"{path}: left out: it has no picture" for path in sorted(unused)]
        if not self.paths:
            left_out = f"; left out: {self.problems[0]}" if self.problems else ""
            raise FileNotFoundError(
                f"pywino.data.detection: {images} must have pictures ({', '.join(SUFFIXES)})"
                + left_out
            )
        if classes is None:
            most = max((int(boxes[:, 4].max()) for boxes in self.boxes if len(boxes)), default=0)
            classes = [str(i) for i in range(most + 1)]
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.paths)

    def split(self, fraction: float) -> tuple["LabelledPictures", "LabelledPictures"]:
        """(the rest, round(N * fraction) held-out pictures, without chance), by their names."""
        held_out = held_out_by_name([path.name for path in self.paths], fraction)
        parts = []
        for wanted in (False, True):
            part = object.__new__(LabelledPictures)
            part.__dict__ = self.__dict__ | {"augment": self.augment and not wanted}
            chosen = [i for i, path in enumerate(self.paths) if (path.name in held_out) == wanted]
            part.paths = [self.paths[i] for i in chosen]
            part.boxes = [self.boxes[i] for i in chosen]
            parts.append(part)
        return parts[0], parts[1]

    def sample(self, index: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
        path, boxes = self.paths[index], self.boxes[index].clone()
        pixels = decoded(path, path.read_bytes())
        image = torch.from_numpy(pixels.copy())
        boxes[:, :4] *= boxes.new_tensor((image.shape[2], image.shape[1]) * 2)
        if self.augment:
            rng = np.random.default_rng((self.seed, epoch, index))
            return _augmented(image.float() / 255, boxes, self.size, rng)
        placed = letterbox(image, self.size, self.size)
        boxes[:, :4] = placed.place(boxes[:, :4])
        return placed.image, boxes


def _unreadable(path: Path) -> str | None:
    """Why a picture cannot be opened, by its header alone."""
    try:
        from PIL import Image
    except ImportError as error:
        raise RuntimeError(
            "pywino.data.detection: decoding pictures needs Pillow; type `pip install pillow`"
        ) from error
    try:
        with Image.open(path) as image:
            if image.width * image.height > 200_000_000:
                return f"it has {image.width} x {image.height} pixels, more than 2e8"
    except Exception as error:  # decoders raise almost anything
        return (str(error) or type(error).__name__).splitlines()[0]
    return None


def _augmented(image, boxes, size, rng):
    """On a canvas, 0.7 to 1.4 times as large as fits, at a random place, mirrored or not."""
    ratio = size / max(image.shape[1:]) * math.exp(rng.uniform(math.log(0.7), math.log(1.4)))
    h, w = (max(1, round(side * ratio)) for side in image.shape[1:])
    boxes[:, 0:4:2] *= w / image.shape[2]
    boxes[:, 1:4:2] *= h / image.shape[1]
    image = _resized(image, h, w)
    if rng.random() < 0.5:
        image = image.flip(2)
        boxes[:, [0, 2]] = w - boxes[:, [2, 0]]
    left, top = (round(rng.uniform(min(0, size - n), max(0, size - n))) for n in (w, h))
    canvas = image.new_full((3, size, size), _GREY)
    to = (slice(max(0, top), min(size, top + h)), slice(max(0, left), min(size, left + w)))
    rows, columns = (slice(s.start - n, s.stop - n) for s, n in zip(to, (top, left)))
    canvas[:, to[0], to[1]] = (image[:, rows, columns] * rng.uniform(0.7, 1.3)).clamp(0, 1)
    whole = (boxes[:, 2:4] - boxes[:, :2]).prod(1)
    boxes[:, :4] = (boxes[:, :4] + boxes.new_tensor((left, top) * 2)).clamp(0, size)
    visible = (boxes[:, 2:4] - boxes[:, :2]).prod(1)
    return canvas, boxes[visible > _LEAST_VISIBLE * whole]


def held_out_by_name(names: Sequence[str], fraction: float) -> set[str]:
    """round(fraction) of the names, at least one where the fraction is above 0: those of the
    smallest hashes."""
    if not 0 <= fraction < 1:
        raise ValueError(f"pywino.data.detection: fraction must be in [0, 1), got {fraction!r}")
    names = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(names[: max(round(len(names) * fraction), int(fraction > 0))])


# ------------------------------------------------------------------------------------------ scenes


class Stamps:
    """Cut-outs by class: pictures with an alpha channel below `root/<class>`.

    classes: the folders to take; None takes all. Each is cut to its opaque pixels and kept in
    memory, at most 256 pixels a side. `problems` names those that were left out: damaged, without
    transparent pixels, smaller than 48 pixels. Raises FileNotFoundError for a class without any.
    Needs Pillow."""

    def __init__(self, root: str | os.PathLike, classes: Sequence[str] | None = None):
        root = Path(root)
        if classes is None:
            classes = sorted(path.name for path in root.glob("*/") if path.name[0] != ".")
        self.classes = tuple(classes)
        self.problems: list[str] = []
        self.names: list[list[str]] = []
        self.pixels: list[list[np.ndarray]] = []  # (H, W, 4) uint8
        for label in self.classes:
            names, pixels = [], []
            for path in sorted((root / label).rglob("*.png")):
                try:
                    pixels.append(_cut_out(path))
                    names.append(path.relative_to(root).as_posix())
                except ValueError as error:
                    self.problems.append(f"{path}: left out: {error}")
            if not names:
                left_out = f"; left out: {self.problems[-1]}" if self.problems else ""
                raise FileNotFoundError(
                    f"pywino.data.detection: {root / label} must have .png files with an alpha "
                    f"channel{left_out}"
                )
            self.names.append(names)
            self.pixels.append(pixels)
        if not self.classes:
            raise FileNotFoundError(f"pywino.data.detection: {root} must have a folder a class")

    def split(self, fraction: float) -> tuple["Stamps", "Stamps"]:
        """(the rest, the held-out part of each class), by their names."""
        parts = []
        held_out = [held_out_by_name(names, fraction) for names in self.names]
        for wanted in (False, True):
            part = object.__new__(Stamps)
            part.classes, part.problems = self.classes, self.problems
            chosen = [
                [i for i, name in enumerate(names) if (name in out) == wanted]
                for names, out in zip(self.names, held_out)
            ]
            part.names = [[names[i] for i in c] for names, c in zip(self.names, chosen)]
            part.pixels = [[pixels[i] for i in c] for pixels, c in zip(self.pixels, chosen)]
            parts.append(part)
        return parts[0], parts[1]


def _cut_out(path):
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.width * image.height > 64_000_000:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than 6.4e7")
            image = image.convert("RGBA")
    except Exception as error:  # decoders raise almost anything
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from error
    alpha = np.asarray(image)[..., 3] >= 128
    if alpha.all():
        raise ValueError("it has no transparent pixels")
    rows, columns = (np.flatnonzero(alpha.any(axis)) for axis in (1, 0))
    least, most = _STAMP_SIDE
    if not len(rows) or max(np.ptp(rows), np.ptp(columns)) + 1 < least:
        raise ValueError(f"it is smaller than {least} pixels")
    image = image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    image.thumbnail((most, most))
    return np.asarray(image)


class Scenes(Dataset):
    """`count` scenes an epoch: 1 to `objects` cut-outs on a random crop of a photo, each mirrored,
    scaled to 0.15 to 0.6 of the side, turned by up to 15 degrees, brighter or darker.

    Boxes are those of the pixels (alpha at least 1/2) that are seen in the end; cut-outs hardly
    cover one another. photos: a sequence of (3, H, W) uint8. size: a multiple of 32. frozen: the
    same scenes in each epoch. Needs Pillow."""

    def __init__(
        self,
        photos: Sequence[Tensor],
        stamps: Stamps,
        size: int = 320,
        *,
        count: int = 1000,
        objects: int = 4,
        seed: int = 0,
        frozen: bool = False,
    ):
        if len(photos) < 1:
            raise ValueError("pywino.data.detection: photos must be one or more, got none")
        self.photos, self.stamps, self.size = photos, stamps, size
        self.count, self.objects, self.seed, self.frozen = count, objects, seed, frozen
        self.classes = stamps.classes
        self.problems = stamps.problems

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, 0 if self.frozen else epoch, index))
        canvas = self._background(rng)
        owner = np.zeros(canvas.shape[:2], np.int64)  # which object a pixel shows, from 1
        placed, labels = [], []
        for _ in range(rng.integers(1, self.objects + 1)):
            label = int(rng.integers(len(self.classes)))
            stamp = self._stamp(label, rng)
            h, w = stamp.shape[:2]
            for _ in range(8):  # tries
                top, left = (int(rng.integers(0, self.size - n + 1)) for n in (h, w))
                if all(_hardly_covered((left, top, left + w, top + h), box) for box in placed):
                    break
            else:
                continue
            placed.append((left, top, left + w, top + h))
            labels.append(label)
            here = (slice(top, top + h), slice(left, left + w))
            alpha = stamp[..., 3:]
            canvas[here] += alpha * (stamp[..., :3] - canvas[here])
            owner[here][alpha[..., 0] >= 0.5] = len(labels)
        canvas = np.clip(canvas * rng.uniform(0.8, 1.2), 0, 1)
        return torch.from_numpy(canvas.transpose(2, 0, 1).copy()), _boxes(owner, labels)

    def _background(self, rng):
        """A square of half to all of a photo's shorter side, as (size, size, 3) float32."""
        photo = self.photos[int(rng.integers(len(self.photos)))]
        side = round(min(photo.shape[1:]) * rng.uniform(0.5, 1))
        top, left = (int(rng.integers(0, n - side + 1)) for n in photo.shape[1:])
        crop = photo[:, top : top + side, left : left + side].float() / 255
        pixels = _resized(crop, self.size, self.size).permute(1, 2, 0).numpy()
        return np.ascontiguousarray(pixels[:, ::-1] if rng.random() < 0.5 else pixels)

    def _stamp(self, label, rng):
        """(H, W, 4) float32, scaled and turned."""
        from PIL import Image

        choice = self.stamps.pixels[label]
        image = Image.fromarray(choice[int(rng.integers(len(choice)))])
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        low, high = map(math.log, _STAMP_SCALE)
        side = self.size * math.exp(rng.uniform(low, high))
        ratio = side / max(image.size)
        image = image.resize([max(1, round(n * ratio)) for n in image.size])
        image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True)
        image.thumbnail((self.size, self.size))
        pixels = np.asarray(image).astype(np.float32) / 255
        pixels[..., :3] = np.clip(pixels[..., :3] * rng.uniform(0.7, 1.3), 0, 1)
        return pixels


def _hardly_covered(a, b):
    width, height = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height <= _MOST_COVERED * smaller


def _boxes(owner: np.ndarray, labels: list[int]) -> Tensor:
    found = []
    for number, label in enumerate(labels, 1):
        mine = owner == number
        rows, columns = (np.flatnonzero(mine.any(axis)) for axis in (1, 0))
        if len(rows):
            found.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1, label))
    return torch.tensor(np.array(found), dtype=torch.float32).view(-1, 5)


def write_folder(
    data: Dataset,
    folder: str | os.PathLike,
    count: int | None = None,
    change: Callable[[Tensor, int], Tensor] = lambda image, index: image,
) -> None:
    """The first samples of a data set as a folder in YOLO's format: images/*.png, labels/*.txt and
    classes.txt. change(image, index) gives what is written in an image's place, with the same
    boxes: blurred, say. Needs Pillow."""
    folder = Path(folder)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(len(data) if count is None else min(count, len(data))):
        image, boxes = data.sample(index)
        height, width = image.shape[1:]
        lines = []
        for x1, y1, x2, y2, label in boxes.tolist():
            centre = f"{(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f}"
            size = f"{(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f}"
            lines.append(f"{int(label)} {centre} {size}\n")
        to_image(change(image, index)).save(folder / "images" / f"{index:05}.png")
        (folder / "labels" / f"{index:05}.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "classes.txt").write_text("\n".join(data.classes) + "\n", encoding="utf-8")


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W), and boxes (N, M, 5) padded with rows of class -1."""
    most = max((len(boxes) for _, boxes in samples), default=0)
    targets = torch.zeros(len(samples), most, 5)
    targets[..., 4] = -1
    for row, (_, boxes) in zip(targets, samples):
        row[: len(boxes)] = boxes
    return torch.stack([image for image, _ in samples]), targets
