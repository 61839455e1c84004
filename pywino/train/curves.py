# SPDX-License-Identifier: BSD-3-Clause
"""The rows of a run as files: JSON lines, CSV, a picture; and its kernels as one."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from torch import nn

from pywino.train.checkpoint import write_whole

_COLORS = ("#2a6f97", "#9aa5b1", "#d1883f", "#7d5a9c")


def write_curves(
    folder: Path, rows: list[dict], title: str, panels: dict[str, tuple[str, ...]]
) -> None:
    """log.jsonl, curves.csv and, where matplotlib is installed, curves.png. panels: label of each
    part of the picture -> columns that it shows."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(folder / "log.jsonl", lines.encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "curves.csv", text.getvalue().encode())
    picture = draw(rows, title, panels)
    if picture is not None:
        write_whole(folder / "curves.png", picture)


def write_kernels(folder: Path, net: nn.Module) -> None:
    """kernels.png: kernels of the second layer with kernels larger than 1 x 1, a panel a sparsity
    that `folder` has weights of, or the last weights alone. Needs matplotlib.

    Rows are output channels, columns input channels, twelve of each; blue is positive, red
    negative, white zero."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    key = [name for name, weight in net.named_parameters() if weight.shape[2:].numel() > 1][1]
    files = {
        float(path.stem.removeprefix("sparsity-")): path
        for path in folder.glob("sparsity-*.safetensors")
    }
    files = dict(sorted(files.items())) or {None: folder / "last.safetensors"}
    figure = Figure(figsize=(5 * len(files), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(files), squeeze=False).flat
    colors = colormaps["RdBu"].with_extremes(bad="0.6")
    for axes, (per_cent, path) in zip(panels, files.items()):
        kernels = load_file(path)[key][:12, :12].float().numpy()
        k, c, height, width = kernels.shape
        # Kernels stand one pixel apart; NaN has a colour of its own.
        sheet = np.full((k, height + 1, c, width + 1), np.nan)
        sheet[:, :height, :, :width] = kernels.transpose(0, 2, 1, 3)
        most = np.abs(kernels).max() or 1
        pixels = sheet.reshape(k * (height + 1), -1)[:-1, :-1]
        axes.imshow(pixels, colors, vmin=-most, vmax=most)
        axes.set_axis_off()
        axes.set_title(key if per_cent is None else f"{key}, {per_cent:g} % zeros", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    write_whole(folder / "kernels.png", buffer.getvalue())


def draw(rows: list[dict], title: str, panels: dict[str, tuple[str, ...]]) -> bytes | None:
    """PNG of the panels over the epochs; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    columns = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(5 * columns, 6), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [row["epoch"] + 1 for row in rows]
    for axes, (label, names) in zip(figure.subplots(2, columns).flat, panels.items()):
        for name, color in zip(names, _COLORS):
            axes.plot(epochs, [row[name] for row in rows], ".-", color=color, label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        if len(names) > 1:
            axes.legend(fontsize=8)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
