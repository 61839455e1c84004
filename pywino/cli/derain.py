# SPDX-License-Identifier: BSD-3-Clause
"""``pywino derain IN OUT``: SAPNet on a picture, a folder of them, or a video.

A picture larger than a tile is derained in overlapping tiles that fade into one another, which
bounds the memory. The network's attention sees one tile's means then, not the whole picture's.
"""

import contextlib
import json
import os
import struct
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from pywino import models

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm"}
TILE = 640  # SAPNet keeps about 1.5 KB a pixel: 0.6 GB a tile
OVERLAP = 96
# PyTorch's threads and buffers aside, what a picture costs is some floats a pixel: 16 bytes.
PIXELS = 200_000_000


class Refused(Exception):
    """A file that is skipped, with the reason."""


# --- pictures ---


@dataclass
class Picture:
    """RGB in 0..1, (3, H, W), and what else a file holds."""

    rgb: Tensor
    grey: bool = False
    alpha: np.ndarray | None = None  # (H, W), as it was
    depth: int = 8  # bits a channel
    metadata: dict = field(default_factory=dict)  # EXIF and ICC, as Pillow saves them


def read_picture(path: Path) -> Picture:
    """A picture upright, whatever its EXIF orientation."""
    if _is_deep_colour_png(path):
        return _read_deep(path)
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # PIXELS says it
            with Image.open(path) as image:
                if image.width * image.height > PIXELS:
                    raise Refused(f"it has {image.width} x {image.height} pixels, more than 2e8")
                image.load()
                image = ImageOps.exif_transpose(image)
                return _picture_of(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, struct.error) as error:
        raise Refused(f"it cannot be read ({_first_line(error)})") from error


def _picture_of(image) -> Picture:
    metadata = {"exif": image.getexif().tobytes()} if image.getexif() else {}
    icc = image.info.get("icc_profile")
    if icc and image.mode in ("L", "LA", "RGB", "RGBA", "P"):
        metadata["icc_profile"] = icc
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.float32) / 65535
        return Picture(_tensor(np.stack([values] * 3, -1)), True, None, 16, metadata)
    grey = image.mode in ("1", "L", "LA")
    has_alpha = image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info
    pixels = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    alpha = np.ascontiguousarray(pixels[..., 3]) if has_alpha else None
    return Picture(_tensor(pixels[..., :3].astype(np.float32) / 255), grey, alpha, 8, metadata)


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def write_picture(path: Path, picture: Picture) -> None:
    """In the format of the name's suffix, whole or not at all."""
    full = 2**picture.depth - 1
    values = picture.rgb.clamp(0, 1).mul(full).round().permute(1, 2, 0).numpy()
    values = values.astype(np.uint16 if picture.depth == 16 else np.uint8)
    if picture.grey:
        values = values[..., 0]
    suffix = path.suffix.lower()
    if picture.depth == 16 and suffix not in (".png", ".tif", ".tiff"):
        raise Refused(f"{suffix} holds no 16-bit channels; give a name that ends in .png")
    if picture.alpha is not None and suffix in (".jpg", ".jpeg", ".bmp"):
        raise Refused(f"{suffix} holds no alpha channel; give a name that ends in .png")
    with _whole(path) as temporary:
        if picture.depth == 16 and not picture.grey:
            _write_deep(temporary, values, picture.alpha)
            return
        from PIL import Image

        if picture.alpha is not None:
            values = np.dstack([values, picture.alpha])
        options = dict(picture.metadata)
        if suffix in (".jpg", ".jpeg", ".webp"):
            options["quality"] = 95
        Image.fromarray(values).save(temporary, **options)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name beside `path` that takes its place when everything went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=path.suffix, prefix=f".{path.stem}-", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's are the owner's alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _is_deep_colour_png(path: Path) -> bool:
    """16-bit RGB, with alpha or without: Pillow would take their lower eight bits away."""
    try:
        head = path.open("rb").read(26)
    except OSError:
        return False
    return head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 26 and head[24] == 16 and head[25] != 0


def _opencv(what: str):
    try:
        import cv2
    except ImportError as error:
        raise Refused(f"{what} needs OpenCV: pip install opencv-python-headless") from error
    return cv2


def _read_deep(path: Path) -> Picture:
    cv2 = _opencv("a 16-bit colour PNG")
    values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if values is None or values.ndim != 3:
        raise Refused("it cannot be read (OpenCV finds no picture in it)")
    alpha = values[..., 3] if values.shape[2] == 4 else None
    return Picture(_tensor(values[..., 2::-1].astype(np.float32) / 65535), False, alpha, 16)


def _write_deep(path: Path, rgb: np.ndarray, alpha: np.ndarray | None) -> None:
    bgr = rgb[..., ::-1] if alpha is None else np.dstack([rgb[..., ::-1], alpha])
    if not _opencv("a 16-bit colour picture").imwrite(str(path), bgr):
        raise Refused(f"OpenCV cannot write {path.suffix}")


# --- the network on any size ---


def spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """[start, end) of the tiles along one axis: as few as cover it, equally long, and at least
    `overlap` in common with the next."""
    count = 1 if size <= tile else -(-(size - overlap) // (tile - overlap))
    length = min(size, tile)
    starts = [round(i * (size - length) / max(1, count - 1)) for i in range(count)]
    return [(start, start + length) for start in starts]


def _ramp(all_spans: list[tuple[int, int]], index: int) -> Tensor:
    """Weights of one tile along an axis: they rise and fall where it overlaps its neighbours, and
    add up to 1 with theirs."""
    start, end = all_spans[index]
    weights = torch.ones(end - start)
    if index:
        width = all_spans[index - 1][1] - start
        weights[:width] = (torch.arange(width) + 0.5) / width
    if index + 1 < len(all_spans):
        width = end - all_spans[index + 1][0]
        weights[end - start - width :] -= (torch.arange(width) + 0.5) / width
    return weights


def derain(
    model: torch.nn.Module,
    rgb: Tensor,
    tile: int = TILE,
    overlap: int = OVERLAP,
    advance: Callable[[int], None] = lambda pixels: None,
) -> Tensor:
    """(3, H, W) -> the same without rain; `advance` hears of each tile's pixels."""
    _, height, width = rgb.shape
    rows, columns = spans(height, tile, overlap), spans(width, tile, overlap)
    output = torch.zeros_like(rgb, memory_format=torch.contiguous_format)
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            part = rgb[None, :, top:bottom, left:right]
            with torch.inference_mode():
                clean = model(part.contiguous(memory_format=torch.channels_last))[0]
            weights = _ramp(rows, i)[:, None] * _ramp(columns, j)
            output[:, top:bottom, left:right] += clean * weights
            advance((bottom - top) * (right - left))
    return output


def _work(height: int, width: int, tile: int) -> int:
    """The pixels that all tiles of a picture have together."""
    return sum(
        (bottom - top) * (right - left)
        for top, bottom in spans(height, tile, OVERLAP)
        for left, right in spans(width, tile, OVERLAP)
    )


# --- scores ---


def scores(clean: Tensor, truth: Tensor) -> dict[str, float]:
    """PSNR and SSIM, on RGB and on Y of ITU-R BT.601 as papers on deraining report them."""
    from skimage.color import rgb2ycbcr
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a, b = (t.clamp(0, 1).permute(1, 2, 0).double().numpy() for t in (clean, truth))
    ya, yb = (rgb2ycbcr(t)[..., 0] for t in (a, b))
    # The window of Wang et al., 2004.
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    with np.errstate(divide="ignore"):  # equal pictures: infinitely many decibels
        return {
            "psnr_rgb": float(peak_signal_noise_ratio(b, a, data_range=1)),
            "ssim_rgb": float(structural_similarity(b, a, data_range=1, channel_axis=2, **window)),
            "psnr_y": float(peak_signal_noise_ratio(yb, ya, data_range=255)),
            "ssim_y": float(structural_similarity(yb, ya, data_range=255, **window)),
        }


# --- files ---


def _inputs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """(input, output) pairs; sub-folders are mirrored."""
    if source.is_file():
        into_folder = target.is_dir() or not target.suffix
        return [(source, target / source.name if into_folder else target)]
    found = [
        path
        for path in sorted(source.rglob("*"))
        if path.suffix.lower() in PICTURES | VIDEOS
        and not path.name.startswith(".")
        and target.resolve() not in path.resolve().parents
    ]
    return [(path, target / path.relative_to(source)) for path in found]


def _truth_of(truth: Path | None, source: Path, path: Path) -> Path | None:
    if truth is None or truth.is_file():
        return truth
    return truth / (path.relative_to(source) if source.is_dir() else path.name)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class Job:
    """What the options say, and what was done."""

    def __init__(self, model, tile: int, overwrite: bool, compare: bool, progress: Progress):
        self.model, self.tile, self.overwrite, self.compare = model, tile, overwrite, compare
        self.progress = progress
        self.rows: list[dict] = []

    def run(self, path: Path, output: Path, truth: Path | None) -> None:
        row = {"input": str(path), "output": str(output)}
        self.rows.append(row)
        if output.exists() and not self.overwrite:
            row["kept"] = True
            return
        task = self.progress.add_task(path.name, total=None)
        start = time.perf_counter()
        try:
            if path.resolve() == output.resolve():
                raise Refused("OUT is the input itself; give another name")
            if path.suffix.lower() in VIDEOS:
                self._video(path, output, task)
            else:
                row.update(self._picture(path, output, truth, task))
            row["seconds"] = round(time.perf_counter() - start, 3)
        except (Refused, OSError, MemoryError) as error:
            row["skipped"] = _first_line(error)
        finally:
            self.progress.remove_task(task)

    def _derain(self, rgb: Tensor, task) -> Tensor:
        return derain(self.model, rgb, self.tile, OVERLAP, lambda n: self.progress.advance(task, n))

    def _picture(self, path: Path, output: Path, truth: Path | None, task) -> dict[str, float]:
        picture = read_picture(path)
        expected = None if truth is None else read_picture(truth).rgb
        if expected is not None and expected.shape != picture.rgb.shape:
            sizes = [f"{t.shape[2]} x {t.shape[1]}" for t in (expected, picture.rgb)]
            raise Refused(f"its truth is {sizes[0]}, it is {sizes[1]}")
        self.progress.update(task, total=_work(*picture.rgb.shape[1:], self.tile))
        rainy = picture.rgb
        picture.rgb = self._derain(rainy, task)
        if picture.grey:
            picture.rgb = picture.rgb.mean(0, keepdim=True).expand(3, -1, -1)
        write_picture(output, picture)
        if self.compare:
            sides = [rainy, picture.rgb, *([] if expected is None else [expected])]
            beside = output.with_name(f"{output.stem}-compare.png")
            write_picture(beside, Picture(torch.cat(sides, 2)))
        return {} if expected is None else scores(picture.rgb, expected)

    def _video(self, path: Path, output: Path, task) -> None:
        cv2 = _opencv("a video")
        video = cv2.VideoCapture(str(path))
        size = [int(video.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
        if not video.isOpened() or min(size) < 1:
            raise Refused("it cannot be read (OpenCV finds no video in it)")
        frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        if frames > 0:
            self.progress.update(task, total=frames * _work(size[1], size[0], self.tile))
        codec = cv2.VideoWriter_fourcc(*("MJPG" if output.suffix.lower() == ".avi" else "mp4v"))
        try:
            with _whole(output) as temporary:
                rate = video.get(cv2.CAP_PROP_FPS) or 25
                writer = cv2.VideoWriter(str(temporary), codec, rate, size)
                if not writer.isOpened():
                    raise Refused(f"OpenCV cannot write {output.suffix}")
                written = 0
                while (read := video.read())[0]:
                    rgb = _tensor(read[1][..., ::-1].astype(np.float32) / 255)
                    clean = self._derain(rgb, task).clamp(0, 1).mul(255).round()
                    frame = clean.permute(1, 2, 0).numpy().astype(np.uint8)
                    writer.write(np.ascontiguousarray(frame[..., ::-1]))
                    written += 1
                writer.release()
                if not written:
                    raise Refused("it has no frames")
        finally:
            video.release()


# --- command ---


@click.command()
@click.argument("source", metavar="IN", type=click.Path(exists=True, path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--weights",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="SAPNet's weights, .pth (the authors' file) or .safetensors.",
)
@click.option(
    "--truth", type=click.Path(exists=True, path_type=Path),
    help="The picture without rain, or a folder of them by the same names: prints PSNR and SSIM.",
)  # fmt: skip
@click.option("--compare", is_flag=True, help="Also write both side by side, NAME-compare.png.")
@click.option(
    "--stages", type=click.IntRange(1, 6), default=6, show_default=True, help="Fewer are faster."
)
@click.option(
    "--tile", type=click.IntRange(min=2 * OVERLAP), default=TILE, show_default=True,
    help="Larger pictures are derained in tiles of at most this many pixels a side.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Write outputs that exist again.")
@click.option(
    "--report", type=click.Path(dir_okay=False, path_type=Path), help="Write what was done as JSON."
)
@click.option("--threads", type=click.IntRange(min=1), help="Default: torch's.")
def command(source, target, weights, truth, compare, stages, tile, overwrite, report, threads):
    """Take the rain out of a picture, of all pictures and videos of a folder, or of a video.

    Sub-folders are mirrored, names and formats stay. Outputs that exist are kept, so an interrupted
    folder goes on. What cannot be read is named and skipped; the exit code is 1 then.
    """
    if threads:
        torch.set_num_threads(threads)
    console = Console(stderr=True)
    if source.is_dir() and target.resolve() == source.resolve():
        raise click.UsageError("OUT must be another folder than IN")
    if truth is not None and truth.is_file() and source.is_dir():
        raise click.UsageError("--truth must be a folder where IN is one")
    try:
        model = models.sapnet(stages=stages, weights=weights).eval()
    except (RuntimeError, FileNotFoundError) as error:
        raise click.ClickException(str(error)) from error
    model = model.to(memory_format=torch.channels_last)
    pairs = _inputs(source, target)
    if not pairs:
        raise click.ClickException(f"there is no picture or video in {source}")

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        whole = progress.add_task("all", total=len(pairs), visible=len(pairs) > 1)
        job = Job(model, tile, overwrite, compare, progress)
        for path, output in pairs:
            job.run(path, output, _truth_of(truth, source, path))
            progress.console.print(
                _line(job.rows[-1]), highlight=False, markup=False, soft_wrap=True
            )
            progress.advance(whole)
    if report is not None:
        with _whole(report) as temporary:
            temporary.write_text(json.dumps(job.rows, indent=1) + "\n", encoding="utf-8")
    skipped = sum("skipped" in row for row in job.rows)
    if skipped:
        console.print(f"{skipped} of {len(pairs)} skipped", highlight=False)
        raise SystemExit(1)


def _line(row: dict) -> str:
    if "skipped" in row:
        return f"{row['input']}: skipped: {row['skipped']}"
    if "kept" in row:
        return f"{row['output']}: kept; --overwrite writes it again"
    line = f"{row['output']}: {row['seconds']:.1f} s"
    if "psnr_rgb" in row:
        line += (
            f"; PSNR {row['psnr_rgb']:.2f} dB (Y {row['psnr_y']:.2f}), "
            f"SSIM {row['ssim_rgb']:.4f} (Y {row['ssim_y']:.4f})"
        )
    return line
