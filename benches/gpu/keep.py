# SPDX-License-Identifier: BSD-3-Clause
"""Puts what gpu-check wrote into benches/results/<gpu>, to be committed.

    python benches/gpu/keep.py OUT [--results benches/results]

machine.json, cudnn.json, ours.json, tables.md, tests.txt and profile.txt are kept as they are. Of
our kernels' rows it makes one table a pass and precision, `gpu_<pass>_<precision>`, for
benches/tables.py and the marked places of pages. A dry run, or one without its machine, is refused.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tables
from gpu import report
from gpu.rows import load

KEPT = ("machine.json", "cudnn.json", "ours.json", "tables.md", "tests.txt", "profile.txt")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def row_of(row: dict, machine: dict) -> dict:
    """A row as benches/tables.py wants it."""
    times = row["times"]
    peers = {name: 1e-3 * report.main_time(times[name]) for name in times if name[:4] != "ours"}
    ms = 1e-3 * report.main_time(times["ours"])
    against = min(peers, key=peers.get)
    pytorchs_error = row.get("cudnn_error", row.get("eager_error"))
    return {
        "algorithm": f"{row['backend']} {row['algorithm']}",
        "ms": ms,
        "peers_ms": peers,
        "against": against,
        "ratios": {name: peer / ms for name, peer in peers.items()},
        "ratio": peers[against] / ms,
        "error": row["error"],
        "peers_error": {against: pytorchs_error},
        "rounds": times["ours"]["eager"]["samples"],
        "clean": times["ours"]["eager"]["samples"],
        "note": "",
        "environment": {"date": machine["date"], "torch": machine["torch"]},
        "suspect": False,
    }


def keep(out: Path, results: Path) -> Path:
    machine = report.machine_of(out)
    if "name" not in machine or "run" not in machine:
        sys.exit(f"keep: {out} has no machine.json of gpu-check, with a name and a run")
    if machine["run"]["dry_run"]:
        sys.exit(f"keep: {out} is a dry run; its numbers measure nothing")
    folder = results / slug(machine["name"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (out / name).exists():
            shutil.copyfile(out / name, folder / name)
    timed = [
        row
        for row in report.timed(load(out / "ours.json"))
        if row["backend"] == "auto" or row["pass"].startswith("winograd-relu")
    ]
    for (kind, mode), group in report.by(timed, "pass", "mode").items():
        best = {
            layer: row_of(min(rows, key=lambda r: report.main_time(r["times"]["ours"])), machine)
            for (layer,), rows in report.by(group, "layer").items()
        }
        name = f"gpu_{slug(kind).replace('-', '_')}_{mode}"
        title = f"{kind}, {mode}, what `auto` picks, the better layout, against cuDNN's best"
        if kind.startswith("winograd-relu"):
            title = f"{kind}, {mode}, the better tile, against the same formula in PyTorch"
        line = report.machine_line(machine).removesuffix(".")
        tables.update(folder, name, title, {"gpu": line}, best)
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder that gpu-check wrote")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results")
    options = parser.parse_args(arguments)
    folder = keep(options.out, options.results)
    print(f"kept in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
