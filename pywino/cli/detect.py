# SPDX-License-Identifier: BSD-3-Clause
"""``pywino detect IN``: YOLOv3 or the small detector on pictures, folders and videos."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from pywino.cli.pictures import (
    PICTURES,
    Picture,
    Refused,
    first_line,
    opencv,
    read_picture,
    tensor_of,
    whole,
    write_json,
    write_picture,
)
from pywino.cli.restore import VIDEOS
from pywino.data.detection import letterbox, read_labels
from pywino.data.drawing import color_of, draw_boxes, to_image
from pywino.metrics import average_precision
from pywino.models import YOLO, Detections, small_yolo, yolov3
from pywino.models.yolo import COCO_CLASSES, STRIDE
from pywino.swap import swap_

_FOR_PRECISION = 0.01  # the least score that counts there: it wants the whole curve
_SIZES = {"small": 320, "yolov3": 416}


# --- the model ---


def _beside(weights: Path) -> tuple[dict, list[str] | None]:
    """(recipe, names of the classes) of the training run that the weights are of, if they are."""
    recipe, names = {}, None
    if (weights.parent / "recipe.json").is_file():
        try:
            recipe = json.loads((weights.parent / "recipe.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise click.ClickException(
                f"{weights.parent / 'recipe.json'} cannot be read ({error}); remove it, and give "
                "--model and --size"
            ) from error
    if (weights.parent / "classes.txt").is_file():
        names = _names(weights.parent / "classes.txt")
    return recipe if isinstance(recipe, dict) else {}, names


def _names(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def load(
    weights: Path, model: str | None = None, classes: Path | None = None, size: int | None = None
) -> tuple[YOLO, list[str], int]:
    """(the network in eval mode, the names of its classes, the longer side that it takes). What is
    not given is taken from the files beside the weights; `.weights` files are YOLOv3's."""
    recipe, names = _beside(weights)
    if model is None:
        model = recipe.get("model", "yolov3" if weights.suffix == ".weights" else None)
    if model not in _SIZES:
        raise click.UsageError(
            f"--model must be given ({' or '.join(_SIZES)}): {weights} has no recipe.json beside it"
        )
    if classes is not None:
        names = _names(classes)
    if names is None and model == "yolov3":
        names = list(COCO_CLASSES)
    if not names:
        raise click.UsageError(
            "--classes must be a file with a name a line: "
            + (f"{classes} has none" if classes else f"there is no classes.txt beside {weights}")
        )
    size = recipe.get("size", _SIZES[model]) if size is None else size
    if not isinstance(size, int) or size < STRIDE:
        raise click.UsageError(f"--size must be at least {STRIDE}, got {size!r}")
    build = {"small": small_yolo, "yolov3": yolov3}[model]
    try:
        network = build(num_classes=len(names), weights=weights)
    except (RuntimeError, FileNotFoundError) as error:
        raise click.ClickException(str(error)) from error
    return swap_(network).to(memory_format=torch.channels_last).eval(), names, size


def find(network: YOLO, rgb: Tensor, size: int, threshold: float, overlap: float) -> Detections:
    """What is in an image (3, H, W) in 0..1, in its own pixels. The longer side is scaled to
    `size`, and both are filled up with grey to multiples of 32."""
    ratio = size / max(rgb.shape[1:])
    height, width = (STRIDE * max(1, -(-round(n * ratio) // STRIDE)) for n in rgb.shape[1:])
    placed = letterbox(rgb, height, width)
    batch = placed.image[None].contiguous(memory_format=torch.channels_last)
    (found,) = network.detect(batch, threshold=threshold, overlap=overlap)
    corner = found.boxes.new_tensor((rgb.shape[2], rgb.shape[1]) * 2)
    boxes = torch.minimum(placed.take_back(found.boxes).clamp(min=0), corner)
    return Detections(boxes, found.scores, found.classes)


# --- files ---


def _inputs(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    return [
        path
        for path in sorted(source.rglob("*"))
        if path.suffix.lower() in PICTURES | VIDEOS and not path.name.startswith(".")
    ]


class _Job:
    """What the options say, and what was found."""

    def __init__(self, network, names, *, size, threshold, overlap, source, out, labels, overwrite):
        self.network, self.names, self.size = network, names, size
        self.threshold, self.overlap = threshold, overlap
        self.source, self.out, self.labels, self.overwrite = source, out, labels, overwrite
        self.rows: list[dict] = []
        self.problems: list[str] = []
        self.scored: list[tuple[Detections, Tensor]] = []  # and the truth

    def run(self, path: Path) -> None:
        row = {"input": str(path)}
        self.rows.append(row)
        start = time.perf_counter()
        try:
            if path.suffix.lower() in VIDEOS:
                self._video(path, row)
            else:
                self._picture(path, row)
            row["seconds"] = round(time.perf_counter() - start, 3)
        except (Refused, OSError, MemoryError) as error:
            row["skipped"] = first_line(error)

    def _output(self, path: Path, row: dict) -> Path | None:
        """Where the picture with boxes goes, if anywhere."""
        if self.out is None:
            return None
        name = path.name if self.source.is_file() else path.relative_to(self.source)
        output = self.out / name
        if output.resolve() == path.resolve():
            raise Refused("OUT has the input itself; give another folder")
        row["output"] = str(output)
        if output.exists() and not self.overwrite:
            row["kept"] = True
            return None
        return output

    def _picture(self, path: Path, row: dict) -> None:
        output = self._output(path, row)
        rgb = read_picture(path).rgb
        least = self.threshold if self.labels is None else min(self.threshold, _FOR_PRECISION)
        found = find(self.network, rgb, self.size, least, self.overlap)
        height, width = rgb.shape[1:]
        if self.labels is not None:
            self._score(path, found, width, height)
        shown = found.scores > self.threshold
        found = Detections(*(part[shown] for part in found))
        row |= {"width": width, "height": height, "detections": self._listed(found)}
        if output is not None:
            write_picture(output, Picture(self._drawn(rgb, found)))

    def _score(self, path: Path, found: Detections, width: int, height: int) -> None:
        name = path.name if self.source.is_file() else path.relative_to(self.source)
        file = (self.labels / name).with_suffix(".txt")
        truth = torch.zeros(0, 5)
        if file.is_file():
            truth, problems = read_labels(file, len(self.names))
            self.problems += problems
        truth[:, :4] *= truth.new_tensor((width, height) * 2)
        self.scored.append((found, truth))

    def _video(self, path: Path, row: dict) -> None:
        output = self._output(path, row)
        frames, rate, size = _frames(path)
        row |= {"width": size[0], "height": size[1], "frames": []}

        def drawn() -> Iterator[Tensor]:
            for rgb in frames:
                found = find(self.network, rgb, self.size, self.threshold, self.overlap)
                row["frames"].append(self._listed(found))
                yield self._drawn(rgb, found) if output is not None else rgb

        if output is None:
            for _ in drawn():
                pass
        else:
            _write_video(output, drawn(), rate, size)
        if not row["frames"]:
            raise Refused("it has no frames")

    def _listed(self, found: Detections) -> list[dict]:
        return [
            {
                "class": self.names[label],
                "score": round(score, 4),
                "box": [round(edge, 1) for edge in box],
            }
            for box, score, label in zip(*(part.tolist() for part in found))
        ]

    def _drawn(self, rgb: Tensor, found: Detections) -> Tensor:
        image = to_image(rgb)
        labels = found.classes.tolist()
        texts = [f"{self.names[c]} {s:.2f}" for c, s in zip(labels, found.scores.tolist())]
        draw_boxes(image, found.boxes.tolist(), texts, [color_of(label) for label in labels])
        return tensor_of(np.asarray(image).astype(np.float32) / 255)

    def precision(self) -> dict | None:
        if not self.scored:
            return None
        found, truth = zip(*self.scored)
        return average_precision(found, truth, self.names)


def _frames(path: Path) -> tuple[Iterator[Tensor], float, tuple[int, int]]:
    """(frames, frames a second, (width, height))."""
    cv2 = opencv("a video")
    video = cv2.VideoCapture(str(path))
    size = tuple(int(video.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if not video.isOpened() or min(size) < 1:
        raise Refused("it cannot be read (OpenCV finds no video in it)")

    def read() -> Iterator[Tensor]:
        try:
            while (frame := video.read())[0]:
                yield tensor_of(frame[1][..., ::-1].astype(np.float32) / 255)
        finally:
            video.release()

    return read(), video.get(cv2.CAP_PROP_FPS) or 25, size


def _write_video(path: Path, frames: Iterator[Tensor], rate: float, size: tuple[int, int]) -> None:
    cv2 = opencv("a video")
    codec = cv2.VideoWriter_fourcc(*("MJPG" if path.suffix.lower() == ".avi" else "mp4v"))
    with whole(path) as temporary:
        writer = cv2.VideoWriter(str(temporary), codec, rate, size)
        if not writer.isOpened():
            raise Refused(f"OpenCV cannot write {path.suffix}")
        written = False
        for rgb in frames:
            written = True
            values = rgb.mul(255).round().permute(1, 2, 0).numpy().astype(np.uint8)
            writer.write(np.ascontiguousarray(values[..., ::-1]))
        writer.release()
        if not written:
            raise Refused("it has no frames")


# --- command ---


@click.command()
@click.argument("source", metavar="IN", type=click.Path(exists=True, path_type=Path))
@click.argument("out", metavar="[OUT]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--weights",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Of `pywino train detect` (best.safetensors in its folder), or Darknet's yolov3.weights.",
)
@click.option("--model", type=click.Choice(list(_SIZES)), help="Default: of the weights' folder.")
@click.option(
    "--classes",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with a name a line. Default: of the weights' folder; COCO's for yolov3.",
)
@click.option("--size", type=int, help="Of the longer side. Default: as trained; 416 for yolov3.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=0.25,
    show_default=True,
    help="The least score.",
)
@click.option(
    "--overlap",
    type=click.FloatRange(0, 1),
    default=0.45,
    show_default=True,
    help="The most IoU of two boxes of a class.",
)
@click.option(
    "--labels",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of YOLO label files by the pictures' names: prints mAP. Default: IN/labels, where "
    "the pictures are in IN/images.",
)
@click.option(
    "--json",
    "--report",
    "report",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write everything that was found.",
)
@click.option("--overwrite", is_flag=True, help="Write pictures that exist again.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: torch's.")  # fmt: skip
def command(
    source, out, weights, model, classes, size, threshold, overlap, labels, report, overwrite,
    threads,
):  # fmt: skip
    """Find objects in a picture, in all pictures and videos of a folder, or in a video.

    With OUT, a folder, the pictures are written there with boxes drawn; sub-folders are mirrored,
    names stay. What cannot be read is named and skipped; the exit code is 1 then.
    """
    if threads:
        torch.set_num_threads(threads)
    console = Console(stderr=True)
    if source.is_dir() and (source / "images").is_dir():
        if labels is None and (source / "labels").is_dir():
            labels = source / "labels"
        source = source / "images"
    if out is not None and out.is_file():
        raise click.UsageError(f"OUT must be a folder, and {out} is a file")
    if out is not None and source.is_dir() and source.resolve() in (out / "x").resolve().parents:
        raise click.UsageError("OUT must be outside of IN")
    paths = _inputs(source)
    if not paths:
        raise click.ClickException(f"there is no picture or video in {source}")
    network, names, size = load(weights, model, classes, size)
    if labels is not None:
        try:
            average_precision([], [], names)  # before the work, not behind it
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
    job = _Job(
        network, names, size=size, threshold=threshold, overlap=overlap, source=source, out=out,
        labels=labels, overwrite=overwrite,
    )  # fmt: skip
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("detect", total=len(paths))
        for path in paths:
            job.run(path)
            _say(progress.console, _line(job.rows[-1]))
            progress.advance(task)
    for problem in job.problems:
        _say(console, problem)
    scores = job.precision()
    if scores is not None:
        of_classes = ", ".join(
            f"{n} {v:.3f}" for n, v in scores["classes"].items() if not math.isnan(v)
        )
        _say(console, f"mAP@.5 {scores['map50']:.4f}, mAP {scores['map']:.4f} ({of_classes})")
    if report is not None:
        content = {"classes": names, "size": size, "threshold": threshold, "files": job.rows}
        if scores is not None:
            content["average_precision"] = scores
        write_json(report, content)
    skipped = sum("skipped" in row for row in job.rows)
    if skipped:
        _say(console, f"{skipped} of {len(paths)} skipped")
        raise SystemExit(1)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _line(row: dict) -> str:
    if "skipped" in row:
        return f"{row['input']}: skipped: {row['skipped']}"
    found = row["detections"] if "detections" in row else [d for f in row["frames"] for d in f]
    counts = Counter(one["class"] for one in found)
    text = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"
    kept = f"; {row['output']} kept; --overwrite writes it again" if "kept" in row else ""
    frames = f" in {len(row['frames'])} frames" if "frames" in row else ""
    return f"{row['input']}: {text}{frames}; {row['seconds']:.1f} s{kept}"
