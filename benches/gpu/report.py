# SPDX-License-Identifier: BSD-3-Clause
"""Tables from what the stages wrote. A row that loses stays."""

import json
from collections import defaultdict
from pathlib import Path

from gpu.rows import load
from tables import geometric_mean

MODES = ("bf16", "fp16", "tf32", "fp32")
# Ratios to the best cuDNN setting that the project set itself, over the layers of the aims at
# N = 32: mode -> input channels -> ratio; strict fp32 by whatever kernel, the others by `auto`.
AIMS = {
    "fp32": {64: 1.7, 128: 2.0, 256: 2.8, 512: 3.5},
    "bf16": {256: 1.1, 512: 1.4},
    "fp16": {256: 1.1, 512: 1.4},
    "tf32": {256: 1.1, 512: 1.4},
}


def table(head: list[str], lines: list[list]) -> str:
    text = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    text += [f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines]
    return "\n".join(text)


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}g}" if abs(value) < 100 else f"{value:.0f}"


def microseconds(times: dict | None) -> str:
    return f"{number(times['us'])} ± {number(times['iqr_us'], 2)}" if times else ""


def main_time(times: dict) -> float:
    """µs: of a graph's replay on the same tensors; of eager calls where there are no graphs."""
    return (times["hot"] or times["eager"])["us"]


def ratio(times: dict, ours: str, theirs: str, kind: str | None = None) -> float | None:
    """How many times `theirs` takes as long as `ours`."""
    if kind is None:
        return main_time(times[theirs]) / main_time(times[ours])
    pair = times[theirs][kind], times[ours][kind]
    return pair[0]["us"] / pair[1]["us"] if all(pair) else None


def by(rows: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """Rows by the values of these fields, in the order of the first of each."""
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return dict(found)


# --------------------------------------------------------------------------------------- machine


def machine_of(out: Path) -> dict:
    path = out / "machine.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def machine_line(machine: dict) -> str:
    if "name" not in machine:
        return "The machine stage wrote nothing."
    smi = machine.get("nvidia_smi") or {}
    parts = [
        machine["name"],
        f"driver {smi['driver_version']}" if smi else "no NVIDIA driver",
        f"torch {machine['torch']}",
        f"cuDNN {machine['cudnn']}",
        f"Triton {machine['triton']}",
        f"{machine['cores']} cores",
        machine["date"][:10],
    ]
    return ", ".join(parts) + "."


def stages_table(machine: dict) -> str:
    lines = [
        [s["stage"], s["status"], f"{s['seconds']:.0f}", s["starts"], s["clocks"] or ""]
        for s in machine.get("run", {}).get("stages", [])
    ]
    return table(["stage", "result", "s", "starts", "clocks before it"], lines)


def ceilings_table(machine: dict) -> str:
    scale = {"B/s": (1e12, "TB/s"), "FLOP/s": (1e12, "TFLOP/s")}
    lines = []
    for name, found in machine.get("ceilings", {}).items():
        if "rate" in found:
            factor, unit = scale[found["unit"]]
            lines.append([name, f"{number(found['rate'] / factor)} {unit}", microseconds(found)])
        else:
            lines.append([name, "", microseconds(found)])
    return table(["ceiling", "rate", "µs ± IQR"], lines)


# ----------------------------------------------------------------------------------------- cuDNN


def cudnn_tables(rows: list[dict], ceilings: dict) -> list[str]:
    good = [row for row in rows if row.get("failed", "") is None]
    texts = []
    for (kind, mode), group in by(good, "pass", "mode").items():
        lines = []
        gemm = ceilings.get(f"GEMM {mode}", {}).get("rate")
        for (layer,), settings in by(group, "layer").items():
            free = [row for row in settings if not row["deterministic"]]
            fixed = [row for row in settings if row["deterministic"]]
            if not free:
                continue
            best = min(free, key=main_time)
            plain = [row for row in free if row["layout"] == "nchw" and not row["benchmark"]]
            rate = best["flops"] / (1e-6 * main_time(best))
            names = "; ".join(name for name, _ in best.get("kernels", []))
            lines.append(
                [
                    layer,
                    microseconds(best["hot"]),
                    microseconds(best["cold"]),
                    microseconds(best["eager"]),
                    number(rate / 1e12),
                    f"{100 * rate / gemm:.0f}" if gemm else "",
                    f"{best['layout']}, benchmark={int(best['benchmark'])}",
                    number(main_time(plain[0]) / main_time(best)) if plain else "",
                    number(min(map(main_time, fixed)) / main_time(best)) if fixed else "",
                    number(best.get("error"), 2),
                    names[:160],
                ]
            )
        head = ["layer", "graph, hot µs", "graph, cold µs", "eager µs", "TFLOP/s", "% of GEMM"]
        head += ["best setting", "NCHW default ÷ best", "deterministic ÷ best", "error", "kernels"]
        texts.append(f"### cuDNN, {kind}, {mode}\n\n{table(head, lines)}")
    return texts


# ------------------------------------------------------------------------------------------ ours


def timed(rows: list[dict]) -> list[dict]:
    """Rows with times, of kernels whose error is within its limit."""
    return [row for row in rows if row.get("failed", "") is None and row.get("times")]


def best_of(rows: list[dict], precision: str = "default") -> dict | None:
    """The fastest kernel of ours that keeps the dtype's class of error (or is `fast`)."""
    fit = [r for r in rows if r["backend"] != "auto" and r["precision"] == precision]
    return min(fit, key=lambda r: main_time(r["times"]["ours"]), default=None)


def ours_tables(rows: list[dict]) -> list[str]:
    texts = []
    for (kind, mode), group in by(timed(rows), "pass", "mode").items():
        peers = [name for name in group[0]["times"] if not name.startswith("ours")]
        lines = []
        for (layer,), candidates in by(group, "layer").items():
            autos = [row for row in candidates if row["backend"] == "auto"]
            auto = min(autos, key=lambda r: main_time(r["times"]["ours"]), default=None)
            for best in filter(None, (auto, best_of(candidates), best_of(candidates, "fast"))):
                times = best["times"]
                kept = None
                if "ours, filter kept" in times:
                    kept = ratio(times, "ours, filter kept", "cudnn")
                lines.append(
                    [
                        layer,
                        f"{best['backend']} {best['algorithm']} {best['precision']}",
                        best["layout"],
                        microseconds(times["ours"]["hot"] or times["ours"]["eager"]),
                        *(number(main_time(times[peer])) for peer in peers),
                        *(f"{ratio(times, 'ours', peer):.2f}" for peer in peers),
                        number(kept),
                        number(ratio(times, "ours", peers[0], "cold")),
                        number(ratio(times, "ours", peers[0], "eager")),
                        number(best["error"], 2),
                        number(best.get("cudnn_error", best.get("eager_error")), 2),
                    ]
                )
        head = ["layer", "ours", "layout", "µs ± IQR", *(f"{peer} µs" for peer in peers)]
        head += [f"ratio to {peer}" for peer in peers]
        head += ["filter kept", "cold", "eager", "error", "PyTorch's error"]
        texts.append(f"### Ours, {kind}, {mode}\n\n{table(head, lines)}")
    return texts


def means(rows: list[dict]) -> str:
    """Geometric means of the ratio to the best cuDNN setting, by pass, precision, batch and
    channels, of all layers of the group."""
    groups = defaultdict(lambda: defaultdict(list))
    for (kind, mode, _), candidates in by(timed(rows), "pass", "mode", "layer").items():
        if "cudnn" not in candidates[0]["times"]:  # its peer is a formula in PyTorch
            continue
        autos = [row for row in candidates if row["backend"] == "auto"]
        chosen = {
            "auto": min(autos, key=lambda r: main_time(r["times"]["ours"]), default=None),
            "best": best_of(candidates),
            "fast": best_of(candidates, "fast"),
        }
        where = "VGG, ResNet" if candidates[0]["aims"] else "other"
        for which, row in chosen.items():
            if row is not None:
                value = ratio(row["times"], "ours", "cudnn")
                for channels in (row["c"], "all"):
                    groups[kind, mode, row["n"], where, channels][which].append(value)
    lines = []
    for (kind, mode, n, where, channels), found in groups.items():
        aim = AIMS[mode].get(channels) if where != "other" and kind == "forward" else None
        cells = [
            f"{geometric_mean(found[w]):.2f} ({len(found[w])})" if found[w] else ""
            for w in ("auto", "best", "fast")
        ]
        least = min(found["auto"] or found["best"] or found["fast"])
        lines.append([kind, mode, n, where, channels, *cells, f"{least:.2f}", number(aim)])
    head = ["pass", "precision", "N", "layers", "C", "auto (layers)", "best", "fast", "least"]
    return table([*head, "aim"], lines)


def troubles(rows: list[dict]) -> list[list]:
    found = []
    for row in rows:
        if row.get("failed") is not None:
            found.append([row["stage"], row["key"], row["failed"]])
        elif row.get("wrong"):
            text = f"error {row['error']:.3g} is above {row['limit']:.3g}; it was not timed"
            found.append([row["stage"], row["key"], text])
    return found


# ------------------------------------------------------------------------------------------ pages


def left_out(out: Path) -> list[str]:
    lines = []
    for name in ("cudnn.json", "ours.json"):
        if (out / name).exists():
            content = json.loads((out / name).read_text(encoding="utf-8"))
            for stage, keys in content["left_out"].items():
                if keys:
                    lines.append(f"- {stage}: {len(keys)} for lack of time, from `{keys[0]}` on")
    return lines


def summary(out: Path) -> str:
    """The machine, the stages, the ceilings and the means."""
    machine = machine_of(out)
    parts = ["# gpu-check", machine_line(machine)]
    if machine.get("run", {}).get("dry_run"):
        parts.append("**Dry run: tiny sizes on the CPU. No number here is a measurement.**")
    parts += [stages_table(machine), ceilings_table(machine)]
    ours = load(out / "ours.json")
    if timed(ours):
        parts += ["## Best cuDNN setting ÷ ours, geometric means", means(ours)]
    else:
        parts.append("No kernel of pywino was timed.")
    found = left_out(out)
    return "\n\n".join([*parts, "## Left out", "\n".join(found) or "Nothing."]) + "\n"


def page(out: Path) -> str:
    """tables.md."""
    cudnn, ours = load(out / "cudnn.json"), load(out / "ours.json")
    ceilings = machine_of(out).get("ceilings", {})
    parts = [summary(out)]
    bad = troubles(cudnn) + troubles(ours)
    parts.append(
        "## Failed or wrong\n\n" + (table(["stage", "row", "why"], bad) if bad else "None.")
    )
    parts.append("## Ours\n\n" + ("\n\n".join(ours_tables(ours)) or "Nothing was timed."))
    parts.append("## cuDNN\n\n" + ("\n\n".join(cudnn_tables(cudnn, ceilings)) or "Not measured."))
    return "\n\n".join(parts) + "\n"
