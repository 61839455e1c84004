# SPDX-License-Identifier: BSD-3-Clause
"""Stage 6: every kernel of ours that can run a layer: its error first, then its time in turn with
the best setting of cuDNN that stage 5 found."""

import argparse
import functools
import itertools
from pathlib import Path

import torch
from gpu import elementwise, networks, products, skipping, timing
from gpu.calls import (
    GRADIENTS,
    LAYOUTS,
    MODES,
    Setting,
    ends,
    exact,
    extra_memory,
    facts,
    pytorch,
    tensors,
    tiny,
)
from gpu.rows import Journal, load
from layers import GPU_AIMS, GPU_LAYERS, Layer

import pywino
from pywino import backends
from pywino.reference.winograd import winograd_relu_conv2d, winograd_transform_filter
from pywino.testing import relative_l2

OPS = {
    "forward": "winograd_conv2d",
    "input gradient": "winograd_conv2d_backward_input",
    "weight gradient": "winograd_conv2d_backward_weight",
    "winograd-relu forward": "winograd_relu_conv2d",
    "winograd-relu training": "winograd_relu_conv2d",
}
AUTO = ("auto", "auto", "default")
# Relative L2 errors that a forward and its input gradient may have, about 1.5 times those of the
# algorithms simulated in float64. A row may always have 2.5 times PyTorch's own error.
LIMITS = {
    "fp32": {"f2": 7e-7, "f4": 2.5e-6, "f6": 7e-6},
    "tf32": {"f2": 7e-4, "f4": 2e-3, "f6": 8e-3},
    "fp16": {"f2": 8e-4, "f4": 2e-3, "f6": 8e-3},
    "bf16": {"f2": 2.6e-3, "f4": 3e-3, "f6": 8e-3},
}
# precision="fast": 16-bit products, bfloat16 ones among them, whatever the tensors are.
FAST = {"f2": 6e-3, "f4": 1.5e-2, "f6": 1.5e-2}
RELU_LAYERS = ("resnet-64x56-b32", "vgg-256x56-b32", "vgg-512x28-b32")


def candidates(layer: Layer, kind: str, mode: str, layout: str, device: str) -> list[tuple]:
    """(backend, algorithm, precision) of all that can run the call, `auto` behind them; nothing
    where there is none."""
    pads = (layer.dilation,) * 2
    found = []
    dtype, tf32 = MODES[mode]
    call = backends.Call(
        OPS[kind],
        *(layer.n, layer.c, layer.h, layer.w, layer.k, pads, pads),
        dtype=dtype,
        channels_last=layout == "channels_last",
        device=device,
        tf32=tf32 and device == "cuda",
    )
    for choice in itertools.product(
        backends.of_device(device), backends.ALGORITHMS, backends.PRECISIONS
    ):
        backend, algorithm, precision = choice
        if backends.can_run(backend, call._replace(precision=precision), algorithm) is None:
            found.append(choice)
    return [*found, AUTO] if found else []


def is_outside(mode: str, choice: tuple, device: str) -> bool:
    """Whether an algorithm that somebody asked for by name leaves the error class of its call."""
    _, algorithm, precision = choice
    call = backends.Call(*("", 1, 1, 1, 1, 1, (1, 1), (1, 1)), dtype=MODES[mode][0])
    call = call._replace(precision=precision, tf32=MODES[mode][1])
    return device == "cuda" and backends.loses_accuracy(call, algorithm) is not None


def function_of(layer: Layer, kind: str, choice: tuple):
    """A function of `calls.tensors(…)`, like `calls.pytorch`'s."""
    backend, algorithm, precision = choice
    pads = (layer.dilation,) * 2
    if kind == "forward":
        named = {"backend": backend, "algorithm": algorithm, "precision": precision}
        return lambda x, w, b: pywino.conv2d(x, w, b, padding=pads, dilation=pads, **named)
    op = getattr(torch.ops.pywino, OPS[kind])
    if kind == "input gradient":
        return lambda g, x, w: op(g, w, pads, pads, algorithm, backend, precision)
    return lambda g, x, w: op(g, x, pads, pads, algorithm, backend, precision)


def with_kept_filter(layer: Layer, choice: tuple, w, b):
    """The layer, which transforms its filter once: a function of `calls.tensors(…)`."""
    backend, algorithm, precision = choice
    conv = torch.nn.Conv2d(layer.c, layer.k, 3, padding=layer.dilation, dilation=layer.dilation)
    conv.eval()
    conv.weight, conv.bias = (torch.nn.Parameter(t, requires_grad=False) for t in (w, b))
    module = pywino.WinogradConv2d.from_dense(conv, algorithm=algorithm, precision=precision)
    module.backend = backend
    return lambda x, w, b: module(x)


def limit_of(kind: str, mode: str, choice: tuple, pytorchs_error: float) -> float:
    _, algorithm, precision = choice
    limits = FAST if precision == "fast" else LIMITS[mode]
    own, times = limits.get(algorithm, 0.0), 2.5
    if choice == AUTO and pytorchs_error < 1e-5:
        own = LIMITS["fp32"]["f4"]  # strict fp32 admits F4, which is still 300 times below TF32
    if kind == "weight gradient":  # sums over all tiles of the batch
        own, times = 2 * own, 6.0
    return max(own, times * pytorchs_error)


def best_setting(rows: list[dict], layer: Layer, kind: str, mode: str) -> Setting:
    """cuDNN's fastest setting without the switch `deterministic`; a good guess where none was
    measured."""
    same = [
        row
        for row in rows
        if (row["layer"], row["pass"], row["mode"]) == (layer.name, kind, mode)
        and not row["deterministic"]
        and row["failed"] is None
    ]
    if not same:
        return Setting(layer, kind, mode, "channels_last", benchmark=True)
    best = min(same, key=lambda row: (row["hot"] or row["eager"])["us"])
    return Setting(layer, kind, mode, best["layout"], best["benchmark"])


@functools.lru_cache(maxsize=1)
def judged(setting: Setting, device: str):
    """(view, exact result, PyTorch's own error) of a call; the candidates of one come together."""
    layer, kind = setting.layer, setting.kind
    arguments = tensors(layer, kind, setting.mode, setting.layout, device)
    output = pytorch(layer, kind)(*arguments)
    view, result = exact(layer, kind, arguments)
    return view, result, relative_l2(view(output), result)


def check(clock, setting: Setting, layout: str, choice: tuple) -> dict:
    """A candidate's error, and roughly its time."""
    layer, kind, mode = setting.layer, setting.kind, setting.mode
    setting.apply()
    view, result, theirs = judged(setting, clock.device)
    function = function_of(layer, kind, choice)
    arguments = tensors(layer, kind, mode, layout, clock.device)
    error = relative_l2(view(function(*arguments)), result)
    limit = limit_of(kind, mode, choice, theirs)
    found = {"error": error, "cudnn_error": theirs, "limit": limit, "wrong": not error <= limit}
    found["outside"] = is_outside(mode, choice, clock.device)
    if not found["wrong"]:
        run = functools.partial(function, *arguments)
        found["workspace_bytes"] = extra_memory(clock, run)
        found["rough_us"] = 1e6 * timing.once(clock, run)
    return found


def measure(clock, setting: Setting, layout: str, choice: tuple, samples: int) -> dict:
    """The times of a candidate in `layout`, in turn with PyTorch's in `setting`, and with those of
    the layer that keeps its filter, where it can."""
    layer, kind, mode = setting.layer, setting.kind, setting.mode
    setting.apply()
    theirs = pytorch(layer, kind), tensors(layer, kind, mode, setting.layout, clock.device)
    ours = function_of(layer, kind, choice), tensors(layer, kind, mode, layout, clock.device)
    contenders, why = {"ours": ours, "cudnn": theirs}, None
    if kind == "forward" and choice[1] in backends.TILES:
        try:
            kept = with_kept_filter(layer, choice, *ours[1][1:])
            kept(*ours[1])
            contenders["ours, filter kept"] = kept, ours[1]
        except RuntimeError as error:
            if clock.is_lost():
                raise
            why = str(error)[:400]
    return {"times": timing.compare(clock, contenders, samples), "no_filter_kept": why}


def finalists(rows: dict[str, dict], keys: list[str]) -> list[dict]:
    """Of the checked candidates of a call: `auto`, and the fastest of each precision that stays in
    the class of error it promises."""
    right = [rows[key] for key in keys if rows.get(key, {}).get("wrong") is False]
    right = [row for row in right if not row["outside"]]
    found = [row for row in right if row["backend"] == "auto"]
    for precision in backends.PRECISIONS:
        same = [r for r in right if r["backend"] != "auto" and r["precision"] == precision]
        found += sorted(same, key=lambda row: row["rough_us"])[:1]
    return found


def measure_relu(clock, layer: Layer, kind: str, mode: str, choice: tuple, samples: int) -> dict:
    """A row of the Winograd-ReLU layer: ours against its formula in PyTorch, eager and compiled."""
    backend, algorithm, _ = choice
    tile, d = backends.TILES[algorithm], layer.dilation
    x, w, b = tensors(layer, "forward", mode, "channels_last", clock.device)
    w = winograd_transform_filter(w, tile)
    functions = {
        "ours": lambda x, w, b: pywino.winograd_relu_conv2d(
            x, w, b, padding=d, dilation=d, tile=tile, backend=backend
        ),
        "eager": lambda x, w, b: winograd_relu_conv2d(x, w, b, d, d, tile),
    }
    # Compiling takes a C++ compiler and Triton, and long; the dry run has no time for it.
    if clock.device == "cuda":
        functions["compiled"] = torch.compile(functions["eager"])
    result = functions["eager"](ends(x).double(), w.double(), b.double())
    found = {
        "error": relative_l2(ends(functions["ours"](x, w, b)), result),
        "eager_error": relative_l2(ends(functions["eager"](x, w, b)), result),
    }
    found["limit"] = max(LIMITS[mode][algorithm], 2.5 * found["eager_error"])
    if not found["error"] <= found["limit"]:
        return {**found, "wrong": True}
    if kind == "winograd-relu training":
        functions = {name: _trained(function) for name, function in functions.items()}
    contenders = {name: (function, (x, w, b)) for name, function in functions.items()}
    # Eager calls only: the formula makes its matrices on the CPU, which no graph can hold.
    times = timing.compare(clock, contenders, samples, graphs=False)
    return {**found, "wrong": False, "times": times}


def _trained(function):
    """Forward and all gradients."""

    def run(x, w, b):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, w, b)]
            y = function(*leaves)
            return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return run


def plan(layers: tuple[Layer, ...]):
    """(pass, layer, mode, layout) of every call, the more important first."""
    aims = {layer.name for layer in GPU_AIMS}
    with_gradients = {layer.name for layer in GRADIENTS}
    first = [layer for layer in layers if layer.name in aims]
    rest = [layer for layer in layers if layer.name not in aims]
    for layout in LAYOUTS:
        for kind, chosen in (
            ("forward", first),
            ("input gradient", first),
            ("weight gradient", first),
            ("forward", rest),
            ("input gradient", rest),
            ("weight gradient", rest),
        ):
            for layer, mode in itertools.product(chosen, MODES):
                if kind == "forward" or layer.name in with_gradients:
                    yield kind, layer, mode, layout


def run_all(clock, journal: Journal, layers: tuple[Layer, ...], cudnn: list, samples: int) -> None:
    """Rows with the step "check" for every candidate, and with the step "time" for the finalists of
    each call."""
    for kind, layer, mode, layout in plan(layers):
        setting = best_setting(cudnn, layer, kind, mode)
        setting.apply()  # what can run may depend on PyTorch's switches
        told = facts(layer, kind, mode, layout) | {"peer": setting.way}
        keys = []
        for choice in candidates(layer, kind, mode, layout, clock.device):
            keys.append(" | ".join(["check", layer.name, kind, mode, layout, *choice]))
            run = functools.partial(check, clock, setting, layout, choice)
            journal.run(keys[-1], run, step="check", **told, **named(choice))
        for row in finalists(journal.rows, keys):
            choice = row["backend"], row["algorithm"], row["precision"]
            errors = {name: row[name] for name in ("error", "cudnn_error", "workspace_bytes")}
            run = functools.partial(measure, clock, setting, layout, choice, samples)
            key = row["key"].replace("check", "time", 1)
            journal.run(key, run, step="time", **told, **named(choice), **errors)
    for kind in ("winograd-relu forward", "winograd-relu training"):
        for layer, mode in itertools.product(layers, ("bf16", "fp32")):
            if layer.name not in RELU_LAYERS:
                continue
            Setting(layer, kind, mode, "channels_last").apply()
            told = facts(layer, kind, mode, "channels_last")
            told["peer"] = "the same formula in PyTorch"
            for choice in candidates(layer, kind, mode, "channels_last", clock.device):
                if choice[1] in ("f2", "f4") and choice[2] == "default":
                    run = functools.partial(measure_relu, clock, layer, kind, mode, choice, samples)
                    key = " | ".join(["time", layer.name, kind, mode, "channels_last", *choice])
                    journal.run(key, run, step="time", **told, **named(choice))
    for room, peer in (
        (elementwise, "the same formula in PyTorch"),
        (skipping, "PyTorch's dense convolution"),
        (products, "the same call by mma.sync"),
        (networks, "the same network on PyTorch's layers"),
    ):
        chosen = [layer for layer in layers if layer.name in room.LAYER_NAMES]
        for call in itertools.product(chosen, room.KINDS, ("bf16", "fp32"), LAYOUTS):
            layer = call[0]
            told = facts(*call) | {"peer": peer}
            for backend in room.candidates(*call, clock.device):
                run = functools.partial(room.measure, clock, *call, backend, samples)
                key = " | ".join(["time", layer.name, *call[1:], backend])
                journal.run(key, run, step="time", **told, **named((backend, "direct", "default")))


def named(choice: tuple) -> dict:
    return dict(zip(("backend", "algorithm", "precision"), choice))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()

    clock = timing.clock_of("cpu" if options.dry_run else "cuda")
    samples = 2 if options.dry_run else timing.SAMPLES
    layers = tiny(GPU_LAYERS) if options.dry_run else GPU_LAYERS
    journal = Journal(options.journal, options.until, clock.is_lost)
    with torch.no_grad():
        run_all(clock, journal, layers, load(options.out / "cudnn.json"), samples)
    if not journal.rows and not journal.left_out:
        print(f"no kernel of pywino runs on {clock.device} in this build: nothing to compare")
    journal.close("rows")


if __name__ == "__main__":
    main()
