# SPDX-License-Identifier: BSD-3-Clause
"""Tables from measured JSON, for the terminal and for the marked places of Markdown files.

    python benches/tables.py README.md docs/*.md [--results benches/results/<cpu>] [--check]

fills everything between `<!-- table: NAME -->` and `<!-- end table -->`. NAME is a table's (a file
of the results folder), or `summary`: one line a table. Nothing in these places is typed by hand.
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path

_PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end table -->)", re.S)


def write_whole(path: Path, text: str) -> None:
    """Write a file such that a reader or an interruption sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
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
    head = [
        "layer",
        "algorithm",
        "ms",
        *(f"{name} ms" for name in peers),
        "ratio",
        "error",
        "PyTorch's error",
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


def fill(text: str, folder: Path | None) -> str:
    """`text` with every marked place filled from the results in `folder`, or saying that nothing
    was measured."""

    def table(match: re.Match) -> str:
        name = match[2]
        contents = (
            [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
            if folder
            else []
        )
        # A GPU's folder has what gpu-check wrote, too.
        contents = [content for content in contents if "table" in content]
        if name == "summary":
            contents = [content for content in contents if _timed(content)]
        else:
            contents = [content for content in contents if content["table"] == name]
        if not contents:
            body = "Not measured yet: `pytest benches/ --benchmark-only` does it, then "
            body += "`python benches/tables.py` on this file."
        else:
            body = summary(contents) if name == "summary" else markdown(contents[0])
        return f"{match[1]}{body}\n{match[3]}"

    return _PLACE.sub(table, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument(
        "--results",
        type=Path,
        help="a folder of results (default: a processor's newest under benches/results)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 where a table is out of date",
    )
    options = parser.parse_args(arguments)
    folders = [
        path
        for path in (Path(__file__).parent / "results").glob("*")
        if any(path.glob("*.json")) and not (path / "machine.json").exists()  # not a GPU's
    ]
    newest = max(
        folders, key=lambda f: max(p.stat().st_mtime for p in f.glob("*.json")), default=None
    )
    stale = False
    for path in options.files:
        old = path.read_text(encoding="utf-8")
        new = fill(old, options.results or newest)
        if new != old:
            stale = True
            print(f"{path}: {'out of date' if options.check else 'filled'}")
            if not options.check:
                write_whole(path, new)
    return int(options.check and stale)


if __name__ == "__main__":
    sys.exit(main())
