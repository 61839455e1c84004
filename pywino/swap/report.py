# SPDX-License-Identifier: BSD-3-Clause
"""What `plan` and the functions that change a model have to say, layer by layer."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict, dataclass, field


@dataclass
class Layer:
    """One row. Times are seconds of all calls that the example made to this layer, or None.

    action: "swap", "update", "convert", "fuse", "restore", "already" or "leave".
    reason: why it is left, or what is fused or converted.
    before: PyTorch's kernel on the inputs as they came.
    after: the chosen kernel on them.
    channels_last: the chosen kernel, had the inputs been channels_last (as `after` where they are).
    candidates: every algorithm with its time or its reason.
    """

    fqn: str
    kind: str
    action: str
    reason: str = ""
    shape: str = ""
    calls: int = 0
    chosen: str | None = None
    before: float | None = None
    after: float | None = None
    channels_last: float | None = None
    candidates: list[dict] = field(default_factory=list)


class Report:
    """Rows of `Layer`. Prints as a table; `to_dict()` is for JSON, `to_markdown()` for a page."""

    def __init__(self, layers: list[Layer], title: str, notes: list[str] | None = None):
        self.layers = layers
        self.title = title
        self.notes = notes or []

    def __iter__(self):
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, fqn: str) -> Layer:
        for layer in self.layers:
            if layer.fqn == fqn:
                return layer
        raise KeyError(fqn)

    def changed(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.action not in ("leave", "already")]

    def left(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.action == "leave"]

    def summary(self) -> str:
        """One line: how many layers go which way, and what it brings in total."""
        counts = Counter(layer.action for layer in self.layers)
        text = ", ".join(f"{count} {action}" for action, count in counts.items()) or "no layers"
        total = self.totals()
        if total["after"]:
            ratio = total["before"] / total["after"]
            text += f"; {_ms(total['before'])} -> {_ms(total['after'])} ({ratio:.2f}x)"
            if total["channels_last"] != total["after"]:
                text += f", channels_last {_ms(total['channels_last'])}"
        return text

    def totals(self) -> dict[str, float]:
        """Sums over the layers that were measured."""
        rows = [
            row for row in self.layers if None not in (row.before, row.after, row.channels_last)
        ]
        return {
            name: sum(getattr(row, name) for row in rows)
            for name in ("before", "after", "channels_last")
        }

    def to_dict(self) -> dict:
        return {
            "title": self.title,
            "summary": self.summary(),
            "layers": [asdict(layer) for layer in self.layers],
            "totals": self.totals(),
            "notes": list(self.notes),
        }

    def to_markdown(self) -> str:
        head, rows = self._table()
        lines = [f"**{self.title}**: {self.summary()}", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        lines += [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
        ]
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Columns that nothing was said in are left out."""
        columns = [
            ("layer", [row.fqn or "(root)" for row in self.layers]),
            ("kind", [row.kind for row in self.layers]),
            ("shape", [row.shape for row in self.layers]),
            ("action", [row.action for row in self.layers]),
            ("reason", [row.reason for row in self.layers]),
            ("algorithm", [row.chosen or "" for row in self.layers]),
            ("before", [_ms(row.before) for row in self.layers]),
            ("after", [_ms(row.after) for row in self.layers]),
            ("ratio", [_ratio(row.before, row.after) for row in self.layers]),
            ("channels_last", [_ms(row.channels_last) for row in self.layers]),
        ]
        columns = [
            (name, cells) for name, cells in columns if any(cells) or name in ("layer", "action")
        ]
        return [name for name, _ in columns], [
            list(row) for row in zip(*(cells for _, cells in columns))
        ]

    def __str__(self) -> str:
        head, rows = self._table()
        body = _rich_table(head, rows) or _plain_table(head, rows)
        return "\n".join([f"{self.title}: {self.summary()}", body, *self.notes])

    def __repr__(self) -> str:
        return f"<pywino {self.title}: {self.summary()}; print() it for the table>"


def reasons(rows: list, limit: int = 20) -> str:
    """Names and reasons in one line."""
    text = "; ".join(f"{row.fqn or '(root)'}: {row.reason}" for row in rows[:limit])
    return text + (f"; and {len(rows) - limit} more" if len(rows) > limit else "")


class Explanation(str):
    """The text of `explain`. `.report` holds the same as data."""

    report: Report

    def __new__(cls, text: str, report: Report):
        self = super().__new__(cls, text)
        self.report = report
        return self

    def __repr__(self) -> str:  # a prompt shows lines, not "\n"
        return str(self)

    def to_dict(self) -> dict:
        return self.report.to_dict()


def explanation(report: Report) -> Explanation:
    lines = []
    for row in report:
        lines.append(f"{row.fqn or '(root)'}: {row.kind} {row.shape}".rstrip())
        if row.reason:
            lines.append(f"    {row.action}: {row.reason}")
        for candidate in row.candidates:
            name = candidate["algorithm"]
            if candidate.get("layout"):
                name += f" {candidate['layout']}"
            said = _ms(candidate["seconds"]) or candidate["reason"] or "not measured"
            lines.append(f"  {'>' if candidate['chosen'] else ' '} {name:<20} {said}")
    return Explanation("\n".join([*lines, *report.notes]), report)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f} ms"


def _ratio(before: float | None, after: float | None) -> str:
    return f"{before / after:.2f}x" if before and after else ""


def _rich_table(head: list[str], rows: list[list[str]]) -> str | None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return None
    table = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: "[0]" in a name is no markup
    # As wide as the words need: a report that is cut off is none.
    width = sum(max(map(len, column)) + 3 for column in zip(head, *rows)) + 4
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _plain_table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in [head, *rows]
    )
    return "\n".join(line.rstrip() for line in lines)
