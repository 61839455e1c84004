# SPDX-License-Identifier: BSD-3-Clause
"""`pywino demo`: whole models on photographs, before and after one line, layer by layer.

Writes to one folder: demo.md and demo.json (the tables), <model>.png (bars before and after) and
sapnet_photo.png (input and output). Every number is measured in this run.
"""

import copy
import datetime
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import pywino
from pywino import _native, models, planner
from pywino.ops import _layout

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
_GREY, _BLUE = "#9aa5b1", "#2a6f97"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Job:
    """A model, the photograph that it sees, and its size in pixels (height, width)."""

    name: str
    title: str
    build: Callable[[], nn.Module]
    photo: str
    size: tuple[int, int]
    weights: str = "random weights, seed 0"
    normalised: bool = True  # as ImageNet's networks want it; else RGB in 0..1
    rain: bool = False
    others: str = "PyTorch"  # what computes all else after the swap


@dataclass
class LayerRow:
    """One swapped layer. Times are milliseconds of all its calls in one pass of the model."""

    name: str
    size: str
    calls: int
    algorithm: str
    before_ms: float
    after_ms: float
    error: float  # relative L2 against float64, on the input of the layer's first call
    torch_error: float

    @property
    def ratio(self) -> float:
        return self.before_ms / self.after_ms


@dataclass
class Result:
    """One model. `before_ms` and `after_ms` are of whole passes, by memory format."""

    name: str
    title: str
    input: str
    before_ms: dict[str, float]
    after_ms: dict[str, float]
    error: float  # of the model's output, against float64
    torch_error: float
    layers: list[LayerRow] = field(default_factory=list)
    others: str = "PyTorch"

    @property
    def before(self) -> float:
        return min(self.before_ms.values())

    @property
    def after(self) -> float:
        return min(self.after_ms.values())

    @property
    def ratio(self) -> float:
        return self.before / self.after

    @property
    def layers_before(self) -> float:
        return sum(row.before_ms for row in self.layers)

    @property
    def layers_after(self) -> float:
        return sum(row.after_ms for row in self.layers)

    @property
    def share(self) -> float:
        """The part of the time before that these layers take; a sum of medians may exceed it."""
        return min(1.0, self.layers_before / self.before)

    @property
    def ceiling(self) -> float:
        """Amdahl's: the ratio of the whole model if these layers took no time at all; infinite
        where all else is not PyTorch's, before and after."""
        bounded = self.share < 1 and self.others == "PyTorch"
        return 1 / (1 - self.share) if bounded else float("inf")

    def as_json(self) -> dict:
        numbers = ("ratio", "before", "after", "layers_before", "layers_after", "share", "ceiling")
        derived = {name: getattr(self, name) for name in numbers}
        if self.ceiling == float("inf"):  # which JSON has not
            derived["ceiling"] = None
        layers = [asdict(row) | {"ratio": row.ratio} for row in self.layers]
        return asdict(self) | derived | {"layers": layers}


# -------------------------------------------------------------------------------------- photographs


def _photo(job: Job) -> Tensor:
    """The photograph as (1, 3, height, width) RGB in 0..1. All are inside the packages: no
    download."""
    try:
        import skimage.data
        from skimage.transform import resize
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise click.ClickException(
            f"the demo's photographs need {error.name}: pip install 'pywino[demo]'"
        ) from error
    pixels = (
        load_sample_image(job.photo)
        if job.photo.endswith(".jpg")
        else getattr(skimage.data, job.photo)()
    )
    pixels = resize(pixels, job.size, anti_aliasing=True)  # to float64 in 0..1
    return torch.from_numpy(pixels).float().permute(2, 0, 1)[None].contiguous()


def _rain(photo: Tensor, seed: int = 0) -> Tensor:
    """Bright slanted streaks over a photograph: random drops, smeared along a line."""
    generator = torch.Generator().manual_seed(seed)
    height, width = photo.shape[2:]
    drops = (torch.rand(height, width, generator=generator) > 0.993).float()
    streaks = sum(torch.roll(drops, (step, -step // 5), (0, 1)) for step in range(18))
    return (photo + 0.35 * streaks.clamp(max=1.5)).clamp(0, 1)


def _input(job: Job) -> Tensor:
    x = _photo(job)
    if job.rain:
        x = _rain(x)
    if job.normalised:
        mean, deviation = (torch.tensor(values)[:, None, None] for values in _IMAGENET)
        x = (x - mean) / deviation
    return x


# ---------------------------------------------------------------------------------------- measuring


class Timed:
    """A model and its input; a call runs one pass and gives the milliseconds of it and its layers.

    The layers are timed inside the pass, with the caches as the layer before left them, so that
    their sum is a part of the whole. The key "" is the whole pass.
    """

    def __init__(self, model: nn.Module, x: Tensor, names: Iterable[str]):
        self.model, self.x = model, x
        self.ms: dict[str, float] = dict.fromkeys(names, 0.0)
        for name in self.ms:
            self._watch(name, model.get_submodule(name))

    def _watch(self, name: str, layer: nn.Module) -> None:
        start = 0.0

        def before(module, args):
            nonlocal start
            start = time.perf_counter()

        def after(module, args, output):
            self.ms[name] += 1e3 * (time.perf_counter() - start)

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    def __call__(self) -> dict[str, float]:
        self.ms = dict.fromkeys(self.ms, 0.0)
        start = time.perf_counter()
        self.output = self.model(self.x)
        return {"": 1e3 * (time.perf_counter() - start), **self.ms}


def interleaved(
    passes: dict[Hashable, Callable[[], dict[str, float]]], budget_s: float, least: int = 5
) -> dict[Hashable, dict[str, float]]:
    """Medians of what each pass measures. A round goes through all of them, after one to warm up,
    so that a busy moment of the machine meets all."""
    samples: dict[Hashable, list[dict[str, float]]] = {key: [] for key in passes}
    end = time.perf_counter() + budget_s
    rounds = -1
    while rounds < least or (time.perf_counter() < end and rounds < 50):
        for key, run in passes.items():
            samples[key].append(run())
        rounds += 1
    return {
        key: {name: statistics.median(sample[name] for sample in taken[1:]) for name in taken[0]}
        for key, taken in samples.items()
    }


def _relative_error(output: Tensor, exact: Tensor) -> float:
    return float((output.double() - exact).norm() / exact.norm())


def _twin(model: nn.Module) -> nn.Module:
    """A second model on the same parameters: VGG-16's are half a gigabyte."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _calls(model: nn.Module, x: Tensor) -> dict[str, tuple[nn.Module, Tensor, int]]:
    """name -> (layer, input of its first call, number of calls), all pywino layers of one pass."""
    seen: dict[str, tuple[nn.Module, Tensor, int]] = {}

    def hook_of(name):
        def hook(module, args):
            _, first, count = seen.get(name, (module, args[0], 0))
            seen[name] = (module, first, count + 1)

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, pywino.WinogradConv2d)]
    hooks = [module.register_forward_pre_hook(hook_of(name)) for name, module in layers]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _algorithm(layer: nn.Module, x: Tensor) -> str:
    call = planner.describe(
        "winograd_conv2d",
        _layout.following(x, layer.weight),
        layer.weight,
        layer.padding,
        layer.dilation,
        precision=layer.precision,
        cached=True,
    )
    tile = planner.choose(call, layer.algorithm, layer.backend).tile
    return f"F({tile}×{tile},3×3)" if tile else "PyTorch"


def _size(layer: nn.Module, x: Tensor) -> str:
    text = f"{layer.in_channels}→{layer.out_channels}, {x.shape[2]}×{x.shape[3]}"
    return text if layer.dilation == (1, 1) else f"{text}, d {layer.dilation[0]}"


def _in_float64(layer: nn.Module, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return F.conv2d(x.double(), layer.weight.double(), bias, 1, layer.padding, layer.dilation)


def measure(
    job: Job,
    progress: Callable[[str, float], None] = lambda text, done: None,
    budget_s: float = 12.0,
) -> tuple[Result, dict[str, Tensor]]:
    """Everything about one model: (result, pictures of input, output before and output after).

    The budget is for the timed passes; five rounds are always made.
    """
    progress("building", 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = job.build().eval()
    x = _input(job)
    inputs = {key: x.contiguous(memory_format=form) for key, form in FORMATS.items()}
    swapped = {"nchw": built}
    swapped["channels_last"] = copy.deepcopy(built).to(memory_format=torch.channels_last)
    # SAPNet is built on pywino's layers.
    plain = {key: pywino.restore_(_twin(net)) for key, net in swapped.items()}
    for key, net in swapped.items():
        progress(f"choosing kernels, {key}", 0.1)
        swapped[key] = pywino.swap_(net, pywino.Winograd(), example=inputs[key], progress=False)

    with torch.inference_mode():
        progress("timing", 0.25)
        calls = _calls(swapped["nchw"], inputs["nchw"])
        passes = {
            (when, key): Timed(nets[key], inputs[key], calls)
            for when, nets in (("before", plain), ("after", swapped))
            for key in FORMATS
        }
        ms = interleaved(passes, budget_s)
        before, after = ({key: ms[when, key] for key in FORMATS} for when in ("before", "after"))
        best_before = min(FORMATS, key=lambda key: before[key][""])
        best_after = min(FORMATS, key=lambda key: after[key][""])

        rows = []
        calls = _calls(swapped[best_after], inputs[best_after])
        for index, (name, (layer, first, count)) in enumerate(calls.items()):
            progress(f"{name} in float64", 0.6 + 0.2 * index / len(calls))
            exact = _in_float64(layer, first)
            same = first.contiguous(memory_format=FORMATS[best_before])
            torch_output = plain[best_before].get_submodule(name)(same)
            rows.append(
                LayerRow(
                    name=name,
                    size=_size(layer, first),
                    calls=count,
                    algorithm=_algorithm(layer, first),
                    before_ms=before[best_before][name],
                    after_ms=after[best_after][name],
                    error=_relative_error(layer(first), exact),
                    torch_error=_relative_error(torch_output, exact),
                )
            )

    progress("the model in float64", 0.8)
    outputs = {
        "before": passes["before", best_before].output,
        "after": passes["after", best_after].output,
    }
    with torch.no_grad():
        exact = copy.deepcopy(plain["nchw"]).double()(x.double())
    size = f"{job.size[0]}×{job.size[1]} (height × width)"
    result = Result(
        name=job.name,
        title=job.title,
        input=f"{job.photo}, {size}, batch 1, {job.weights}",
        before_ms={key: times[""] for key, times in before.items()},
        after_ms={key: times[""] for key, times in after.items()},
        error=_relative_error(outputs["after"], exact),
        torch_error=_relative_error(outputs["before"], exact),
        layers=rows,
        others=job.others,
    )
    progress("done", 1)
    return result, {"input": x, **outputs}


# ---------------------------------------------------------------------------------------- reporting


def environment() -> dict:
    """What the numbers belong to."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": planner.machine()["cpu"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _native.host.isa() if _native.host else None,
        "torch": torch.__version__,
        "pywino": pywino.__version__,
        "system": platform.platform(),
        "allocator": "default"
        if not os.environ.get("GLIBC_TUNABLES")
        else os.environ["GLIBC_TUNABLES"],
        "native": _native.reason or "loaded",
    }


_HEAD = ("layer", "size", "algorithm", "before ms", "after ms", "ratio", "error", "torch's")


def _rows(result: Result) -> list[tuple[str, ...]]:
    """The cells of one model's table: a row a layer, then the sums and the whole model."""

    def line(name, size, algorithm, before, after, ratio, *errors):
        numbers = (f"{before:.2f}", f"{after:.2f}", ratio and f"{ratio:.2f}")
        return (name, size, algorithm, *numbers, *(e and f"{e:.1e}" for e in errors))

    rows = []
    for row in result.layers:
        name = row.name if row.calls == 1 else f"{row.name} ({row.calls} calls)"
        errors = (row.error, row.torch_error)
        times = (row.before_ms, row.after_ms, row.ratio)
        rows.append(line(name, row.size, row.algorithm, *times, *errors))
    before, after = result.layers_before, result.layers_after
    rows.append(line("these layers", "", "", before, after, before / after, "", ""))
    # A difference of two measurements: no ratio is made of it.
    before, after = max(0.0, result.before - before), max(0.0, result.after - after)
    rows.append(line("all else", "", result.others, before, after, "", "", ""))
    errors = (result.error, result.torch_error)
    rows.append(line("whole model", "", "", result.before, result.after, result.ratio, *errors))
    return rows


def _footer(result: Result) -> str:
    def formats(ms):
        return ", ".join(f"{key} {value:.1f} ms" for key, value in ms.items())

    if result.others == "PyTorch":
        ceiling = "none" if result.share == 1 else f"{result.ceiling:.2f}×"
        rest = f"before, so the whole model's ceiling is {ceiling}; it"
    else:
        rest = f"before; all else is {result.others} after the swap. The whole model"
    return (
        f"{result.input}. Before: {formats(result.before_ms)}; after: {formats(result.after_ms)}; "
        f"the better one of each counts. These layers take {100 * result.share:.0f} % of the time "
        f"{rest} reached {result.ratio:.2f}×."
    )


def _header(about: dict) -> str:
    text = (
        f"{about['cpu']}, {about['threads']} threads on {about['cores']} cores, "
        f"{about['isa'] or 'no native library'}, torch {about['torch']}, "
        f"{about['allocator']} memory allocator, {about['date'][:10]}. Medians of interleaved "
        "runs; fp32; errors are relative L2 errors against float64, torch's before the swap."
    )
    if about["native"] != "loaded":
        text += f" pywino's native library is missing, so all ratios are near 1: {about['native']}."
    return text


def markdown(results: list[Result], about: dict) -> str:
    """The tables as Markdown."""
    lines = ["# pywino demo", "", _header(about)]
    for result in results:
        lines += ["", f"## {result.title}: {result.ratio:.2f}×", "", f"| {' | '.join(_HEAD)} |"]
        lines.append("|" + "---|" * len(_HEAD))
        lines += [f"| {' | '.join(cells)} |" for cells in _rows(result)]
        lines += ["", _footer(result), "", f"![before and after]({result.name}.png)"]
    return "\n".join(lines) + "\n"


def _table(result: Result, width: int) -> Table:
    """One model's table for a terminal of so many characters: a narrow one gets no sizes."""
    title = f"{result.title}: {result.ratio:.2f}×"
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE)
    shown = [index for index, name in enumerate(_HEAD) if width >= 105 or name != "size"]
    for index in shown:
        left = _HEAD[index] in ("layer", "size", "algorithm")
        table.add_column(_HEAD[index], justify="left" if left else "right", no_wrap=True)
    rows = _rows(result)
    for index, cells in enumerate(rows):
        last = index == len(result.layers) - 1
        style = "bold" if cells is rows[-1] else None
        table.add_row(*(cells[i] for i in shown), end_section=last, style=style)
    table.caption = _footer(result)
    return table


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there is complete: an interruption leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _figure(widths: tuple[float, ...], size: tuple[float, float]):
    """A figure and its axes side by side, without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise click.ClickException(
            f"the demo's pictures need {error.name}: pip install 'pywino[demo]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, len(widths), width_ratios=widths)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def draw_bars(result: Result) -> bytes:
    """PNG: a pair of bars a layer, and the whole model beside them."""
    rows = result.layers
    figure, (left, right) = _figure((4, 1), (11, 1.6 + 0.28 * len(rows)))
    places = list(range(len(rows)))
    for offset, label, color in ((-0.2, "before", _GREY), (0.2, "after", _BLUE)):
        lengths = [getattr(row, f"{label}_ms") for row in rows]
        left.barh([place + offset for place in places], lengths, 0.4, color=color, label=label)
    for place, row in zip(places, rows, strict=True):
        longest = max(row.before_ms, row.after_ms)
        left.text(longest, place, f" {row.ratio:.2f}×  {row.algorithm}", va="center", fontsize=8)
    left.set_yticks(places, [f"{row.name}  ({row.size})" for row in rows], fontsize=8)
    left.invert_yaxis()
    left.margins(x=0.25)
    left.set_xlabel("ms of all its calls in one pass")
    left.legend(loc="lower right", fontsize=8)
    bars = right.bar(["before", "after"], [result.before, result.after], color=[_GREY, _BLUE])
    right.bar_label(bars, fmt="%.1f ms", fontsize=8)
    right.margins(y=0.15)
    right.set_title(f"whole model: {result.ratio:.2f}×", fontsize=10)
    figure.suptitle(result.title)
    return _png(figure)


def draw_photos(result: Result, images: dict[str, Tensor], weights: str) -> bytes:
    """PNG: the input, the output of the swapped network, and how far it is from the output before
    the swap."""

    def pixels(image):
        return image[0].clamp(0, 1).permute(1, 2, 0).numpy()

    difference = (images["after"] - images["before"]).abs()[0].amax(0)
    figure, (first, second, third) = _figure((1, 1, 1.1), (15, 4.2))
    first.imshow(pixels(images["input"]))
    first.set_title("input: a photograph with drawn rain")
    second.imshow(pixels(images["after"]))
    learnt = ", so the rain stays" if weights.startswith("random") else ""
    second.set_title(f"output after the swap ({weights}{learnt})")
    shown = third.imshow(difference.numpy(), cmap="magma")
    third.set_title(f"largest difference to the output before: {float(difference.max()):.1e}")
    figure.colorbar(shown, ax=third)
    for axes in (first, second, third):
        axes.set_axis_off()
    figure.suptitle(result.title)
    return _png(figure)


# ------------------------------------------------------------------------------------------ command


def jobs(quick: bool = False, sapnet_weights: str | None = None) -> list[Job]:
    """VGG-16, ResNet-50 and SAPNet; quick: small pictures and two of SAPNet's six stages."""
    side = 96 if quick else 224
    stages = 2 if quick else 6
    given = (
        f"weights of {Path(sapnet_weights).name}" if sapnet_weights else "random weights, seed 0"
    )
    return [
        Job("vgg16", "VGG-16", models.vgg16, "chelsea", (side, side)),
        Job("resnet50", "ResNet-50", models.resnet50, "coffee", (side, side)),
        Job(
            "sapnet",
            "SAPNet" + (f", {stages} stages" if quick else ""),
            lambda: models.sapnet(stages=stages, weights=sapnet_weights),
            "china.jpg",
            (160, 240) if quick else (321, 481),
            weights=given,
            normalised=False,
            rain=True,
            others="fused",
        ),
    ]


def run(chosen: list[Job], out: Path, console: Console, budget_s: float = 12.0) -> list[Result]:
    """Measure the jobs, print their tables and write all files into `out`."""
    about = environment()
    console.print(_header(about), highlight=False)
    results = []
    files: dict[str, bytes] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    for job in chosen:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(job.title, total=1.0)

            def show(text, done, job=job, progress=progress, task=task):
                progress.update(task, description=f"{job.title}: {text}", completed=done)

            result, images = measure(job, show, budget_s)
        results.append(result)
        console.print(_table(result, console.width))
        files[f"{job.name}.png"] = draw_bars(result)
        if job.rain:
            files[f"{job.name}_photo.png"] = draw_photos(result, images, job.weights)
    content = {"environment": about, "models": [result.as_json() for result in results]}
    files["demo.json"] = (json.dumps(content, indent=1) + "\n").encode()
    files["demo.md"] = markdown(results, about).encode()
    for name, data in files.items():
        write_whole(out / name, data)
    console.print(f"Written to {out}: {', '.join(sorted(files))}", highlight=False)
    return results


@click.command()
@click.option(
    "--out",
    default="demo",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write to.",
)
@click.option(
    "--quick", is_flag=True, help="Small pictures, few rounds: shows that it works, not how fast."
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of both sides (default: torch's)."
)
@click.option(
    "--sapnet-weights",
    type=click.Path(exists=True, dir_okay=False),
    help="Weights of SAPNet, .pth or .safetensors (default: random).",
)
def demo(out: Path, quick: bool, threads: int | None, sapnet_weights: str | None) -> None:
    """Swap the convolutions of VGG-16, ResNet-50 and SAPNet, and show what changed.

    Prints a table layer by layer, and writes it with pictures to a folder. About two minutes.
    """
    if threads:
        torch.set_num_threads(threads)
    start = time.perf_counter()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    try:
        run(jobs(quick, sapnet_weights), out, console, budget_s=1.0 if quick else 12.0)
    except (RuntimeError, FileNotFoundError) as error:
        if sapnet_weights and "load_weights" in str(error):
            raise click.ClickException(str(error)) from error
        raise
    console.print(f"Took {time.perf_counter() - start:.0f} s.", highlight=False)
