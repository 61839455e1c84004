# SPDX-License-Identifier: BSD-3-Clause
"""What the commands that restore pictures share: a picture, a folder of them, or a video; in tiles;
against the truth.

A picture larger than a tile is restored in overlapping tiles that fade into one another, which
bounds the memory.
"""

import time
from collections.abc import Callable
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
from pywino.metrics import laplacian_psnr

VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm"}


# --- the network on any size ---


def spans(size: int, tile: int, overlap: int, multiple: int = 1) -> list[tuple[int, int]]:
    """[start, end) of the tiles along one axis: as few as cover it with at most `tile` pixels each
    and at least `overlap` in common with the next. They start at multiples of `multiple`."""
    last = max(0, -(-(size - tile) // multiple))  # where the last one starts, in multiples
    step = (tile - overlap) // multiple  # at most, from one to the next
    count = 1 + -(-last // step)
    starts = [i * last // max(1, count - 1) * multiple for i in range(count)]
    return [(start, min(start + tile, size)) for start in starts]


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


class Tiled:
    """A network (1, 3, h, w) -> the same, on pictures of any size.

    multiple: of pixels, by which the network's grid of features repeats. Tiles start there, so that
    they have the features of the whole picture."""

    def __init__(self, model: torch.nn.Module, tile: int, overlap: int, multiple: int = 1):
        self.model, self.tile, self.overlap, self.multiple = model, tile, overlap, multiple

    def __call__(self, rgb: Tensor, advance: Callable[[int], None] = lambda pixels: None) -> Tensor:
        """(3, H, W) -> the same, restored; `advance` hears of each tile's pixels."""
        rows, columns = map(self._spans, rgb.shape[1:])
        output = torch.zeros_like(rgb, memory_format=torch.contiguous_format)
        for i, (top, bottom) in enumerate(rows):
            for j, (left, right) in enumerate(columns):
                part = rgb[None, :, top:bottom, left:right]
                with torch.inference_mode():
                    clean = self.model(part.contiguous(memory_format=torch.channels_last))[0]
                weights = _ramp(rows, i)[:, None] * _ramp(columns, j)
                output[:, top:bottom, left:right] += clean * weights
                advance((bottom - top) * (right - left))
        return output

    def work(self, height: int, width: int) -> int:
        """The pixels that all tiles of a picture have together."""
        return sum(
            (bottom - top) * (right - left)
            for top, bottom in self._spans(height)
            for left, right in self._spans(width)
        )

    def _spans(self, size):
        return spans(size, self.tile, self.overlap, self.multiple)


# --- scores ---

SSIM_WINDOW = 11  # pixels


def scores(restored: Tensor, truth: Tensor) -> dict[str, float]:
    """PSNR and SSIM, on RGB and on Y of ITU-R BT.601 as papers on restoration report them, and the
    PSNR of the Laplacians."""
    from skimage.color import rgb2ycbcr
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a, b = (t.clamp(0, 1).permute(1, 2, 0).double().numpy() for t in (restored, truth))
    ya, yb = (rgb2ycbcr(t)[..., 0] for t in (a, b))
    # The window of Wang et al., 2004.
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    with np.errstate(divide="ignore"):  # equal pictures: infinitely many decibels
        return {
            "psnr_rgb": float(peak_signal_noise_ratio(b, a, data_range=1)),
            "ssim_rgb": float(structural_similarity(b, a, data_range=1, channel_axis=2, **window)),
            "psnr_y": float(peak_signal_noise_ratio(yb, ya, data_range=255)),
            "ssim_y": float(structural_similarity(yb, ya, data_range=255, **window)),
            "laplacian_psnr": float(laplacian_psnr(restored.clamp(0, 1)[None], truth[None])),
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


class _Job:
    """What the options say, and what was done."""

    def __init__(self, network: Tiled, overwrite: bool, compare: bool, progress: Progress):
        self.network, self.overwrite, self.compare = network, overwrite, compare
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
        # ValueError: torch's, of a picture that is too small for statistics of its own.
        except (Refused, OSError, MemoryError, ValueError) as error:
            row["skipped"] = first_line(error)
        finally:
            self.progress.remove_task(task)

    def _restored(self, rgb: Tensor, task) -> Tensor:
        return self.network(rgb, lambda pixels: self.progress.advance(task, pixels))

    def _picture(self, path: Path, output: Path, truth: Path | None, task) -> dict[str, float]:
        picture = read_picture(path)
        expected = None if truth is None else read_picture(truth).rgb
        if expected is not None and expected.shape != picture.rgb.shape:
            sizes = [f"{t.shape[2]} x {t.shape[1]}" for t in (expected, picture.rgb)]
            raise Refused(f"its truth is {sizes[0]}, it is {sizes[1]}")
        if expected is not None and min(expected.shape[1:]) < SSIM_WINDOW:
            raise Refused(
                f"it is {expected.shape[2]} x {expected.shape[1]}, and SSIM needs "
                f"{SSIM_WINDOW} x {SSIM_WINDOW} pixels; leave out --truth"
            )
        self.progress.update(task, total=self.network.work(*picture.rgb.shape[1:]))
        before = picture.rgb
        picture.rgb = self._restored(before, task)
        if picture.grey:
            picture.rgb = picture.rgb.mean(0, keepdim=True).expand(3, -1, -1)
        write_picture(output, picture)
        if self.compare:
            sides = [before, picture.rgb, *([] if expected is None else [expected])]
            beside = output.with_name(f"{output.stem}-compare.png")
            write_picture(beside, Picture(torch.cat(sides, 2)))
        return {} if expected is None else scores(picture.rgb, expected)

    def _video(self, path: Path, output: Path, task) -> None:
        cv2 = opencv("a video")
        video = cv2.VideoCapture(str(path))
        size = [int(video.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
        if not video.isOpened() or min(size) < 1:
            raise Refused("it cannot be read (OpenCV finds no video in it)")
        frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        if frames > 0:
            self.progress.update(task, total=frames * self.network.work(size[1], size[0]))
        codec = cv2.VideoWriter_fourcc(*("MJPG" if output.suffix.lower() == ".avi" else "mp4v"))
        try:
            with whole(output) as temporary:
                rate = video.get(cv2.CAP_PROP_FPS) or 25
                writer = cv2.VideoWriter(str(temporary), codec, rate, size)
                if not writer.isOpened():
                    raise Refused(f"OpenCV cannot write {output.suffix}")
                written = 0
                while (read := video.read())[0]:
                    rgb = tensor_of(read[1][..., ::-1].astype(np.float32) / 255)
                    clean = self._restored(rgb, task).clamp(0, 1).mul(255).round()
                    frame = clean.permute(1, 2, 0).numpy().astype(np.uint8)
                    writer.write(np.ascontiguousarray(frame[..., ::-1]))
                    written += 1
                writer.release()
                if not written:
                    raise Refused("it has no frames")
        finally:
            video.release()


# --- command ---


def options(tile: int, overlap: int) -> Callable:
    """IN, OUT and the options that these commands have in common, for `run`."""
    listed = [
        click.argument("source", metavar="IN", type=click.Path(exists=True, path_type=Path)),
        click.argument("target", metavar="OUT", type=click.Path(path_type=Path)),
        click.option(
            "--truth", type=click.Path(exists=True, path_type=Path),
            help="The picture as it should be, or a folder of them by the same names: prints PSNR "
            "and SSIM.",
        ),
        click.option(
            "--compare", is_flag=True, help="Also write both side by side, NAME-compare.png."
        ),
        click.option(
            "--tile", type=click.IntRange(min=2 * overlap), default=tile, show_default=True,
            help="Larger pictures are worked on in tiles of at most this many pixels a side.",
        ),
        click.option("--overwrite", is_flag=True, help="Write outputs that exist again."),
        click.option(
            "--json", "--report", "report", type=click.Path(dir_okay=False, path_type=Path),
            help="Write what was done.",
        ),
        click.option("--threads", type=click.IntRange(min=1), help="Default: torch's."),
    ]  # fmt: skip

    def decorate(function):
        for option in reversed(listed):
            function = option(function)
        return function

    return decorate


def run(
    build: Callable[[], Tiled],
    *,
    source: Path,
    target: Path,
    truth: Path | None,
    compare: bool,
    overwrite: bool,
    report: Path | None,
    threads: int | None,
) -> None:
    """The command: checks, the network that `build` gives, every file, the report."""
    if threads:
        torch.set_num_threads(threads)
    console = Console(stderr=True)
    if source.is_dir() and target.resolve() == source.resolve():
        raise click.UsageError("OUT must be another folder than IN")
    if truth is not None and truth.is_file() and source.is_dir():
        raise click.UsageError("--truth must be a folder where IN is one")
    try:
        network = build()
    except (RuntimeError, FileNotFoundError) as error:
        raise click.ClickException(str(error)) from error
    pairs = _inputs(source, target)
    if not pairs:
        raise click.ClickException(f"there is no picture or video in {source}")

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        every = progress.add_task("all", total=len(pairs), visible=len(pairs) > 1)
        job = _Job(network, overwrite, compare, progress)
        for path, output in pairs:
            job.run(path, output, _truth_of(truth, source, path))
            progress.console.print(
                _line(job.rows[-1]), highlight=False, markup=False, soft_wrap=True
            )
            progress.advance(every)
    if report is not None:
        write_json(report, job.rows)
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
