# SPDX-License-Identifier: BSD-3-Clause
"""Stage 5: every layer in every setting of cuDNN, with the names of the kernels that it picks.

PyTorch keeps the plan that it found for a signature without regard to `cudnn.benchmark`, so a
process has that switch either on or off. The profiler makes later launches slower, so it runs when
all times are taken.
"""

import argparse
import time
from pathlib import Path

import torch
from gpu import timing
from gpu.calls import (
    GRADIENTS,
    LAYOUTS,
    MODES,
    PASSES,
    Setting,
    error_of,
    extra_memory,
    pytorch,
    tensors,
    tiny,
)
from gpu.rows import Journal
from layers import GPU_LAYERS
from torch.profiler import ProfilerActivity, profile, record_function

FOR_TIMES = 0.75  # of the stage's time; the rest is the profiler's


def settings(benchmark: bool, small: bool) -> list[Setting]:
    """What is measured, the more important first: forward, then gradients of a subset, then forward
    again under cudnn.deterministic."""
    layers = tiny(GPU_LAYERS) if small else GPU_LAYERS
    with_gradients = {layer.name for layer in GRADIENTS}
    ways = [
        {"mode": mode, "layout": layout, "benchmark": benchmark}
        for mode in MODES
        for layout in LAYOUTS
    ]
    found = [Setting(layer, "forward", **way) for layer in layers for way in ways]
    for layer in layers:
        if layer.name in with_gradients:
            found += [Setting(layer, kind, **way) for kind in PASSES[1:] for way in ways]
    return found + [
        Setting(layer, "forward", deterministic=True, **way) for layer in layers for way in ways
    ]


def measure(clock, setting: Setting, samples: int) -> dict:
    setting.apply()
    arguments = tensors(setting.layer, setting.kind, setting.mode, setting.layout, clock.device)
    function = pytorch(setting.layer, setting.kind)
    error = None
    if setting.kind == "forward":
        error = error_of(setting.layer, setting.kind, arguments, function(*arguments))
    memory = extra_memory(clock, lambda: function(*arguments))
    times = timing.compare(clock, {"cudnn": (function, arguments)}, samples)["cudnn"]
    return {**times, "workspace_bytes": memory, "error": error}


def kernels(clock, chosen: list[Setting]) -> dict[str, list]:
    """key -> [[kernel's name, µs], …] of one call of each setting. On a CPU, of PyTorch's innermost
    operators."""
    activities = [ProfilerActivity.CPU]
    if clock.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    runs = []
    for s in chosen:
        arguments = tensors(s.layer, s.kind, s.mode, s.layout, clock.device)
        function = pytorch(s.layer, s.kind)
        runs.append((s, lambda f=function, a=arguments: f(*a)))
    for s, run in runs:
        s.apply()
        run()
    clock.wait()
    with profile(activities=activities) as profiler:
        for s, run in runs:
            s.apply()
            with record_function(s.key):
                run()
        clock.wait()
    keys = {s.key for s in chosen}
    found = {}
    for event in profiler.events():
        on_the_host = event.device_type == torch.autograd.DeviceType.CPU
        if event.name in keys and on_the_host:
            launched = _launched(event, clock.device)
            found[event.name] = [pair for pair in launched if pair[0] not in keys]
    return found


def _launched(event, device: str) -> list:
    """[name, µs] of the kernels that an event and those inside it launched; on a CPU, of the
    innermost events."""
    if device == "cpu" and not event.cpu_children:
        return [[event.name, event.cpu_time_total]]
    found = [[kernel.name, kernel.duration] for kernel in event.kernels]
    for child in event.cpu_children:
        found += _launched(child, device)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--benchmark", action="store_true", help="cudnn.benchmark on")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()

    clock = timing.clock_of("cpu" if options.dry_run else "cuda")
    samples = 2 if options.dry_run else timing.SAMPLES
    chosen = settings(options.benchmark, options.dry_run)
    now = time.time()
    journal = Journal(options.journal, now + FOR_TIMES * (options.until - now), clock.is_lost)
    for setting in chosen:
        journal.run(setting.key, lambda s=setting: measure(clock, s, samples), **setting.facts())
    journal.until = options.until
    measured = [s for s in chosen if journal.rows.get(s.key, {"failed": ""})["failed"] is None]
    for layer in dict.fromkeys(s.layer for s in measured):  # its tensors are in memory together
        if not journal.is_over():
            try:
                names = kernels(clock, [s for s in measured if s.layer == layer])
            except RuntimeError as error:
                print(f"no kernel names of {layer}: {error}", flush=True)
                continue
            for key, pairs in names.items():
                journal.write(key, kernels=pairs)
    journal.close("settings")


if __name__ == "__main__":
    main()
