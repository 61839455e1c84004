# SPDX-License-Identifier: BSD-3-Clause
"""Stage 7: hardware counters of a few kernels by Nsight Compute, clocks left alone.

python -m gpu.counters --out OUT --until T      starts itself under ncu, writes profile.txt
"""

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tables
import torch
from gpu.calls import Setting, pytorch, shrunk, tensors
from gpu.ours import best_setting, function_of
from gpu.rows import load
from gpu.smoke import SKIPPED
from layers import GPU_LAYERS

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables",
    "LaunchStats",
    "Occupancy",
)
# (title, pattern of a counter's name): the first counter that fits, of those that the chip has.
COLUMNS = (
    ("time", r"^gpu__time_duration\.sum$"),
    ("tensor pipe", r"pipe_tensor.*\.pct"),
    ("SM", r"^sm__throughput.*\.pct"),
    ("DRAM", r"dram__throughput.*\.pct"),
    ("DRAM read", r"^dram__bytes_read\.sum$"),
    ("DRAM written", r"^dram__bytes_write\.sum$"),
    ("shared-memory wavefronts", r"wavefronts_mem_shared\.sum$"),
    ("registers", r"^launch__registers_per_thread$"),
    ("warps active", r"^sm__warps_active.*\.pct"),
)
# Layers and modes that are looked at first, with our best kernel and cuDNN's for each.
CASES = (
    ("vgg-256x56-b32", "bf16"),
    ("vgg-512x28-b32", "fp32"),
    ("vgg-128x112-b32", "tf32"),
    ("vgg-64x224-b32", "bf16"),
    ("resnet-256x14-b32", "fp16"),
    ("sap-32x481x321-d4", "bf16"),
)
MOST = 6  # calls
LAUNCHES = 24  # kernels


def cases(out: Path) -> list[dict]:
    """What to run: cuDNN's best setting of a layer, and our fastest kernel where there is one."""
    cudnn, ours = load(out / "cudnn.json"), load(out / "ours.json")
    layers = {layer.name: layer for layer in GPU_LAYERS}
    found = []
    for name, mode in CASES:
        rows = [
            row
            for row in ours
            if (row["layer"], row["pass"], row["mode"]) == (name, "forward", mode)
            and row["failed"] is None
            and row["step"] == "time"
            and row["backend"] != "auto"
        ]
        if rows:
            best = min(rows, key=lambda row: row["times"]["ours"]["eager"]["us"])
            choice = [best["backend"], best["algorithm"], best["precision"]]
            found.append({"layer": name, "mode": mode, "layout": best["layout"], "choice": choice})
        setting = best_setting(cudnn, layers[name], "forward", mode)
        case = {"layer": name, "mode": mode, "layout": setting.layout, "choice": None}
        found.append({**case, "benchmark": setting.benchmark})
    return found[:MOST]


def run(found: list[dict], device: str, small: bool) -> None:
    """The profiled program: each call once before, and once for the counters."""
    layers = {layer.name: layer for layer in GPU_LAYERS}
    profiled = torch.cuda.profiler if device == "cuda" else None
    with torch.no_grad():
        for case in found:
            layer = shrunk(layers[case["layer"]]) if small else layers[case["layer"]]
            mode, layout = case["mode"], case["layout"]
            Setting(layer, "forward", mode, layout, case.get("benchmark", False)).apply()
            arguments = tensors(layer, "forward", mode, layout, device)
            function = pytorch(layer, "forward")
            if case["choice"]:
                function = function_of(layer, "forward", tuple(case["choice"]))
            function(*arguments)
            if profiled:
                torch.cuda.synchronize()
                profiled.start()
            function(*arguments)
            if profiled:
                torch.cuda.synchronize()
                profiled.stop()
            print(f"ran {case}", flush=True)


def table(text: str) -> str:
    """A Markdown table of ncu's raw CSV page: a line with names, one with units, then a kernel a
    line."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return "ncu printed no counters"
    head, units, *kernels = csv.reader(lines)
    columns = []
    for title, pattern in COLUMNS:
        index = next((i for i, name in enumerate(head) if re.search(pattern, name)), None)
        if index is not None:
            columns.append((f"{title} ({units[index]})" if units[index] else title, index))
    name = head.index("Kernel Name")
    rows = [f"| kernel | {' | '.join(title for title, _ in columns)} |"]
    rows.append("|---" * (len(columns) + 1) + "|")
    for kernel in kernels:
        cells = [kernel[name][:90], *(kernel[index] for _, index in columns)]
        rows.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--until", type=float, help="as time.time() counts")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--inside", help="JSON list of cases: the profiled program")
    options = parser.parse_args()
    if options.inside:
        run(json.loads(options.inside), "cuda", small=False)
        return
    found = cases(options.out)
    if options.dry_run:
        run(found, "cpu", small=True)
        return
    tool = shutil.which("ncu")
    if tool is None:
        print("ncu is not on PATH")
        sys.exit(SKIPPED)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [tool, "--clock-control", "none", "--profile-from-start", "off"]
        command += ["--launch-count", str(LAUNCHES), "--csv", "--page", "raw", "--log-file", log]
        for section in SECTIONS:
            command += ["--section", section]
        command += [sys.executable, "-m", "gpu.counters", "--inside", json.dumps(found)]
        try:
            status = subprocess.run(command, timeout=options.until - time.time()).returncode
        except subprocess.TimeoutExpired:
            status = "stopped: its time was up"
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    listed = "\n".join(map(json.dumps, found))
    whole = f"{listed}\n\n{table(text)}\n\nncu: {status}\n\n{text}"
    tables.write_whole(options.out / "profile.txt", whole)
    print(table(text))
    sys.exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    main()
