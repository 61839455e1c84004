# SPDX-License-Identifier: BSD-3-Clause
"""Stage 0: what this machine is, and the ceilings that every time is read against."""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import tables
import torch
from gpu import timing

QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,"
QUERY += "temperature.gpu,ecc.mode.current"


def output_of(*command: str) -> str | None:
    """What a tool prints, None where it is not there or fails."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else None


def clocks() -> dict | None:
    """What nvidia-smi says of the first GPU. It is asked, never told: no clock is locked."""
    text = output_of("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0")
    if text is None:
        return None
    return dict(zip(QUERY.split(","), (value.strip() for value in text.split(","))))


def facts(device: str) -> dict:
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "name": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": None,
        "nvcc": "".join((output_of("nvcc", "--version") or "").splitlines()[-2:-1]) or None,
        "nvidia_smi": clocks(),
        "tools": {t: shutil.which(t) for t in ("nvcc", "ncu", "compute-sanitizer", "cuobjdump")},
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found |= {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": getattr(p, "L2_cache_size", None),
        }
    return found


def ceilings(clock, small: bool):
    """(name, values) of rates that no kernel exceeds or, where nothing reaches the ceiling, that
    PyTorch's own kernels reach."""

    def rate(name, unit, amount, run, count=1):
        """`count` runs in a graph; amount: bytes or operations of one."""
        run()
        run = clock.graph([run] * count) if clock.graph else run
        seconds = timing.once(clock, run)
        samples = timing.interleaved(clock, [run], 3 if small else timing.rounds_for(seconds))
        times = timing.summary(samples[0], count if clock.graph else 1)
        return name, {"rate": amount / (1e-6 * times["us"]), "unit": unit, **times}

    device = clock.device
    x = torch.randn(2**12 if small else 2**28, device=device)  # 1 GiB
    y = torch.empty_like(x)
    yield rate("copy, bytes read and written", "B/s", 2 * x.numel() * 4, lambda: y.copy_(x))
    # 16 MiB stay in the L2 of every GPU with tensor cores but the smallest.
    x = torch.randn(2**12 if small else 2**22, device=device)
    yield rate("L2, read by torch.amax", "B/s", x.numel() * 4, lambda: x.amax(), 1 if small else 50)
    n = 64 if small else 8192
    for mode, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        size = n if mode != "fp32" else n // 2
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        yield rate(f"GEMM {mode}", "FLOP/s", 2 * size**3, lambda a=a, b=b: a @ b)
    tiny, count = torch.zeros(1, device=device), 20 if small else 200

    def launches():
        for _ in range(count):
            tiny.add_(1)

    kinds = {"eager": launches}
    if clock.graph:
        kinds["graph"] = clock.graph([launches])
    for kind, run in kinds.items():
        samples = timing.interleaved(clock, [run], 3 if small else 20)
        yield f"launch, {kind}", timing.summary(samples[0], count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    device = "cpu" if options.dry_run else "cuda"
    content = facts(device) | {"ceilings": {}}
    for name, values in ceilings(timing.clock_of(device), options.dry_run):
        content["ceilings"][name] = values
        tables.write_whole(options.out / "machine.json", json.dumps(content, indent=1) + "\n")
    content["nvidia_smi_after"] = clocks()
    tables.write_whole(options.out / "machine.json", json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
