# SPDX-License-Identifier: BSD-3-Clause
"""Tables from measured JSON, for the terminal and for the marked places of Markdown files.

    python benches/tables.py README.md docs/*.md [--results benches/results/<cpu>] [--check]

fills everything between `<!-- table: NAME -->` and `<!-- end table -->`. NAME is a table's (a file
of the results folder), `summary`: one line a table, one of benches/runs.py's, or `break_even`: from
how many zeros on kernels that skip them pay; `--picture FILE` draws that. `NAME of CPU` is from
that folder of benches/results, where --results names no other. Nothing in these places is typed by
hand.
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path

import runs

RESULTS = Path(__file__).parent / "results"
_PLACE = re.compile(r"(<!-- table: ([\w-]+)(?: of ([\w-]+))? -->\n).*?(<!-- end table -->)", re.S)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file such that a reader or an interruption sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def update(folder: Path, name: str, title: str, machine: dict, rows: dict[str, dict]) -> None:
    """Put rows into `folder/name.json`, in place of those of the same name, and rewrite
    `folder/name.md`."""
    path = folder / f"{name}.json"
    old = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    content = {"table": name, "title": title, "machine": machine, "rows": {**old["rows"], **rows}}
    write_whole(path, json.dumps(content, indent=1) + "\n")
    write_whole(folder / f"{name}.md", markdown(content) + "\n")


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}g}" if value < 100 else f"{value:.0f}"


def _summary_line(rows: dict[str, dict]) -> str:
    ratios = [row["ratio"] for row in rows.values()]
    losses = [name for name, row in rows.items() if row["ratio"] < 1]
    text = f"geometric mean {geometric_mean(ratios):.2f}×, "
    text += f"least {min(ratios):.2f}×, most {max(ratios):.2f}×, "
    text += f"rows {len(ratios)}, losses {len(losses)}"
    return text + (f" ({', '.join(losses)})" if losses else "")


def markdown(content: dict) -> str:
    """The table of one result file: a row a layer, losses kept, a line with the means below."""
    rows = content["rows"]
    if not _timed(content):
        return _of_cells(content)
    peers = list(dict.fromkeys(name for row in rows.values() for name in row["peers_ms"]))
    extra = list(dict.fromkeys(name for row in rows.values() for name in row.get("extra", ())))
    head = [
        "layer",
        "algorithm",
        "ms",
        *(f"{name} ms" for name in peers),
        "ratio",
        "error",
        "PyTorch's error",
        *extra,
    ]
    lines = [
        f"**{content['table']}**: {content['title']}",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for name, row in rows.items():
        ratio = (
            f"{row['ratio']:.2f}"
            + ("?" if row["suspect"] else "")
            + ("*" if row["clean"] < 3 else "")
        )
        against = row["peers_error"].get(row["against"])
        cells = [name, row["algorithm"], _number(row["ms"])]
        cells += [_number(row["peers_ms"].get(peer)) for peer in peers]
        cells += [ratio, _number(row["error"], 2), _number(against, 2)]
        cells += [row.get("extra", {}).get(name, "") for name in extra]
        lines.append(f"| {' | '.join(cells)} |")
    machine, environment = content["machine"], next(iter(rows.values()))["environment"]
    lines += ["", _summary_line(rows) + "."]
    for other in peers:
        ratios = [row["ratios"][other] for row in rows.values() if other in row["ratios"]]
        lines.append(
            f"Against {other}: geometric mean {geometric_mean(ratios):.2f}× of {len(ratios)}."
        )
    notes = dict.fromkeys(row["note"] for row in rows.values() if row["note"])
    lines += [*notes, f"{_machine_line(machine, environment)}."]
    if any(row["clean"] < 3 for row in rows.values()):
        lines.append(
            "`*`: the machine was busy; the lower quartile of all samples stands instead of the "
            "median of undisturbed ones."
        )
    if any(row["suspect"] for row in rows.values()):
        lines.append(
            "`?`: more than the algorithm's saving in multiplications: the measurement is broken."
        )
    return "\n".join(lines)


def _timed(content: dict) -> bool:
    return all("ratio" in row for row in content["rows"].values())


def _of_cells(content: dict) -> str:
    """The table of one result file whose rows say their own columns."""
    rows = content["rows"]
    columns = list(dict.fromkeys(name for row in rows.values() for name in row["cells"]))
    lines = [f"**{content['table']}**: {content['title']}", ""]
    lines += [f"| {' | '.join(['', *columns])} |", "|---" * (1 + len(columns)) + "|"]
    for name, row in rows.items():
        cells = (row["cells"].get(column, "") for column in columns)
        lines.append(f"| {' | '.join([name, *cells])} |")
    notes = dict.fromkeys(row["note"] for row in rows.values() if row["note"])
    environment = next(iter(rows.values()))["environment"]
    return "\n".join([*lines, "", *notes, f"{_machine_line(content['machine'], environment)}."])


def _machine_line(machine: dict, environment: dict) -> str:
    if "gpu" in machine:
        return machine["gpu"]
    return (
        f"{machine['cpu']}, {environment['threads']} threads, "
        f"{environment['isa'] or 'no native library'}, torch {environment['torch']}, "
        f"{environment['allocator']} allocator, {environment['date'][:10]}"
    )


def summary(contents: list[dict]) -> str:
    """One line a table."""
    lines = [
        "| table | what | rows | geometric mean | least | most | losses |",
        "|---|---|---|---|---|---|---|",
    ]
    for content in contents:
        ratios = [row["ratio"] for row in content["rows"].values()]
        losses = sum(ratio < 1 for ratio in ratios)
        cells = [content["table"], content["title"], len(ratios), f"{geometric_mean(ratios):.2f}×"]
        cells += [f"{min(ratios):.2f}×", f"{max(ratios):.2f}×", losses]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    rows = [(row, content["machine"]) for content in contents for row in content["rows"].values()]
    newest, machine = max(rows, key=lambda pair: pair[0]["environment"]["date"])
    return "\n".join([*lines, "", _machine_line(machine, newest["environment"]) + "."])


# What is skipped -> (table, pattern, the peer that does not skip; None: the better of F.conv2d's).
_CURVES = {
    "Winograd domain, blocks of 16×1": ("sparse_winograd_break_even", "blocks", "dense F(4x4,3x3)"),
    "Winograd domain, anywhere": ("sparse_winograd_break_even", "unstructured", "dense F(4x4,3x3)"),
    "spatial 3×3, blocks of 16×1": ("sparse_conv_break_even", "blocks", None),
    "spatial 3×3, anywhere": ("sparse_conv_break_even", "unstructured", None),
}


def _row(name: str) -> tuple[int, str, list[str]]:
    """(percentage, pattern, the layer's name) of a row's name, in which they come in any order."""
    parts = name.split("-")
    percent = next(part for part in parts if part.isdigit())
    pattern = next(part for part in parts if part in ("blocks", "unstructured"))
    return int(percent), pattern, [part for part in parts if part not in (percent, pattern)]


def break_even(contents: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Per line of `_CURVES` that was measured: (zeros in percent, geometric mean of the ratios)."""
    rows = {content["table"]: content["rows"] for content in contents}
    curves = {}
    for what, (table, pattern, peer) in _CURVES.items():
        ratios: dict[int, list[float]] = {}
        for name, row in rows.get(table, {}).items():
            percent, how, _ = _row(name)
            if how == pattern:
                ratio = row["ratio"] if peer is None else row["ratios"][peer]
                ratios.setdefault(percent, []).append(ratio)
        if ratios:
            curves[what] = [(x, geometric_mean(ratios[x])) for x in sorted(ratios)]
    return curves


def _pays_from(curve: list[tuple[int, float]]) -> str:
    """The zeros from which on a curve stays above 1, between the points on a straight line."""
    below = [i for i, (_, ratio) in enumerate(curve) if ratio < 1]
    if not below:
        return f"{curve[0][0]} %"
    if below[-1] == len(curve) - 1:
        return "never"
    (x0, y0), (x1, y1) = curve[below[-1]], curve[below[-1] + 1]
    return f"{x0 + (x1 - x0) * (1 - y0) / (y1 - y0):.0f} %"


def _break_even_table(contents: list[dict]) -> str:
    curves = break_even(contents)
    percents = sorted({x for curve in curves.values() for x, _ in curve})
    lines = [
        "| zeros | " + " | ".join(f"{x} %" for x in percents) + " | pays from |",
        "|---" * (len(percents) + 2) + "|",
    ]
    for what, curve in curves.items():
        values = dict(curve)
        cells = [f"{values[x]:.2f}×" if x in values else "" for x in percents]
        lines.append(f"| {what} | {' | '.join(cells)} | {_pays_from(curve)} |")
    used = [c for c in contents if c["table"] in {table for table, *_ in _CURVES.values()}]
    layers = dict.fromkeys("-".join(_row(name)[2]) for c in used for name in c["rows"])
    environment = next(iter(used[0]["rows"].values()))["environment"]
    lines += ["", f"Geometric means over {', '.join(layers)}."]
    return "\n".join([*lines, _machine_line(used[0]["machine"], environment) + "."])


def picture(contents: list[dict], path: Path) -> None:
    """The curves of `break_even`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (what, curve), style in zip(break_even(contents).items(), ("o-", "s-", "o--", "s--")):
        axes.plot(*zip(*curve), style, label=what)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="zeros (%)", ylabel="time of the dense kernel / time without zeros")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}×")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def newest() -> Path | None:
    """The folder under benches/results with the latest row of a processor."""
    dates = {
        path: max(
            (
                row["environment"]["date"]
                for file in path.glob("*.json")
                for row in json.loads(file.read_text())["rows"].values()
            ),
            default="",
        )
        for path in sorted(RESULTS.glob("*"))
        if any(path.glob("*.json")) and not (path / "machine.json").exists()  # not a GPU's
    }
    return max(dates, key=dates.get, default=None)


def fill(text: str, results: Path | None) -> str:
    """`text` with every marked place filled from `results` or, without, from the folder that it
    names or the newest; or saying that nothing was measured."""

    def table(match: re.Match) -> str:
        _, name, cpu, end = match.groups()
        if name in runs.TABLES:
            return f"{match[1]}{runs.markdown(name)}\n{end}"
        folder = results or (RESULTS / cpu if cpu else newest())
        contents = (
            [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
            if folder
            else []
        )
        # A GPU's folder has what gpu-check wrote, too.
        contents = [content for content in contents if "table" in content]
        if name == "break_even":
            contents = contents if break_even(contents) else []
        elif name == "summary":
            contents = [content for content in contents if _timed(content)]
        else:
            contents = [content for content in contents if content["table"] == name]
        if not contents:
            body = "Not measured yet: `pytest benches/ --benchmark-only` does it, then "
            body += "`python benches/tables.py` on this file."
        else:
            several = {"summary": summary, "break_even": _break_even_table}
            body = several[name](contents) if name in several else markdown(contents[0])
        return f"{match[1]}{body}\n{end}"

    return _PLACE.sub(table, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument(
        "--results",
        type=Path,
        help="a folder of results, for all places (default: the one that a place names, or the "
        "newest of a processor under benches/results)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 where a table is out of date",
    )
    parser.add_argument("--picture", type=Path, help="a file for the break-even curves")
    options = parser.parse_args(arguments)
    if options.picture:
        folder = options.results or newest()
        picture([json.loads(path.read_text()) for path in folder.glob("*.json")], options.picture)
    stale = False
    for path in options.files:
        old = path.read_text(encoding="utf-8")
        new = fill(old, options.results)
        if new != old:
            stale = True
            print(f"{path}: {'out of date' if options.check else 'filled'}")
            if not options.check:
                write_whole(path, new)
    return int(options.check and stale)


if __name__ == "__main__":
    sys.exit(main())
