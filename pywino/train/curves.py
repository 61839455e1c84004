# SPDX-License-Identifier: BSD-3-Clause
"""The rows of a run as files: JSON lines, CSV, a picture."""

import csv
import io
import json
from pathlib import Path

from pywino.train.checkpoint import write_whole

_COLORS = ("#2a6f97", "#9aa5b1", "#d1883f", "#7d5a9c")


def write_curves(
    folder: Path, rows: list[dict], title: str, panels: dict[str, tuple[str, ...]]
) -> None:
    """log.jsonl, curves.csv and, where matplotlib is installed, curves.png. panels: label of each
    of the picture's four parts -> columns that it shows."""
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


def draw(rows: list[dict], title: str, panels: dict[str, tuple[str, ...]]) -> bytes | None:
    """PNG of the panels over the epochs; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [row["epoch"] + 1 for row in rows]
    for axes, (label, columns) in zip(figure.subplots(2, 2).flat, panels.items()):
        for name, color in zip(columns, _COLORS):
            axes.plot(epochs, [row[name] for row in rows], ".-", color=color, label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        if len(columns) > 1:
            axes.legend(fontsize=8)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
