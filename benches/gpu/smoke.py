# SPDX-License-Identifier: BSD-3-Clause
"""Stage 3: one small call of each of our CUDA ops, under compute-sanitizer.

python -m gpu.smoke --tool memcheck     starts itself under the tool
python -m gpu.smoke                     only the calls
"""

import argparse
import functools
import itertools
import math
import os
import shutil
import subprocess
import sys
import time

import torch
from gpu import elementwise, skipping
from gpu.calls import LAYOUTS, MODES, PASSES, Setting, exact, tensors
from gpu.ours import AUTO, candidates, function_of, limit_of
from layers import Layer

import pywino
from pywino.reference.winograd import winograd_relu_conv2d, winograd_transform_filter
from pywino.testing import relative_l2

RELU = "winograd-relu training"
SKIPPED = 77  # what check.py takes for "there was nothing to do"; the last line says why
FOUND = 9  # compute-sanitizer's exit status where it found something
# Odd sizes, in which tiles stick out and channels fill no vector; then dilation.
ODD = Layer("small-40x13x11-b2-k24", 2, 40, 13, 11, 24)
DILATED = Layer("small-64x16x16-b1-d2", 1, 64, 16, 16, 64, 2)
WIDE = Layer("small-24x48x48-b1-k136", 1, 24, 48, 48, 136)  # enough tiles and outputs for wgmma


def calls(device: str):
    """(layer, kind, mode, layout, choice) of every call: everything once, then less so."""
    odd = itertools.product((ODD,), PASSES, MODES, ("channels_last",))
    dilated = itertools.product((DILATED,), ("forward",), MODES, ("nchw",))
    relu = itertools.product((ODD,), (RELU,), ("bf16", "fp32"), ("channels_last",))
    wide = ((WIDE, "forward", "bf16", "channels_last"),)
    for layer, kind, mode, layout in itertools.chain(odd, relu, dilated, wide):
        Setting(layer, kind, mode, layout).apply()
        for choice in candidates(layer, kind, mode, layout, device):
            if choice != AUTO and (kind != RELU or choice[1:] == ("f2", "default")):
                yield layer, kind, mode, layout, choice
    for room in (elementwise, skipping):
        for kind, mode, layout in itertools.product(room.KINDS, ("bf16", "fp32"), LAYOUTS):
            for backend in room.candidates(ODD, kind, mode, layout, device):
                yield ODD, kind, mode, layout, (backend, "direct", "default")


def check(device: str, layer, kind, mode, layout, choice) -> None:
    """Runs one op and checks its error. The CPU computes what it is compared with, so that the tool
    sees few kernels but ours."""
    Setting(layer, kind, mode, layout).apply()
    if kind == RELU:
        return check_relu(device, layer, mode, choice[0])
    for room in (elementwise, skipping):
        if kind in room.KINDS:
            return check_room(device, room, layer, kind, mode, layout, choice[0])
    arguments = tensors(layer, kind, mode, layout, "cpu")
    view, result = exact(layer, kind, arguments)
    output = function_of(layer, kind, choice)(*(t.to(device) for t in arguments)).cpu()
    rounding = relative_l2(result.to(output.dtype), result)
    # Generous: numerics are the matter of another stage.
    agrees(view(output), result, 4 * limit_of(kind, mode, choice, rounding))


def check_relu(device: str, layer: Layer, mode: str, backend: str) -> None:
    """Winograd-ReLU with all its gradients. Rounding may turn a ReLU's input that is almost 0, so
    its gradients agree less well."""
    x, w, b = tensors(layer, "forward", mode, "channels_last", "cpu")
    w = winograd_transform_filter(w, 2)
    outputs = {}
    for name, function, where in (
        ("exact", winograd_relu_conv2d, lambda t: t.double()),
        ("ours", functools.partial(pywino.winograd_relu_conv2d, backend=backend), None),
    ):
        place = where or (lambda t: t.to(device))
        leaves = [place(t).requires_grad_() for t in (x, w, b)]
        with torch.enable_grad():
            y = function(*leaves, tile=2)
            outputs[name] = [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]
    for actual, expected in zip(outputs["ours"], outputs["exact"]):
        agrees(actual.cpu(), expected, 2e-2)


def check_room(device: str, room, layer: Layer, kind: str, mode: str, layout: str, backend: str):
    arguments = room.tensors(layer, kind, mode, layout, device)
    error, theirs = room.errors(kind, backend, arguments)
    limit = 4 * max(room.LIMITS[MODES[mode][0]], theirs)
    assert error <= limit, f"relative error {error:.3g}, more than {limit:.3g}"


def agrees(actual, expected, limit: float) -> None:
    error = relative_l2(actual, expected)
    assert error <= limit, f"relative error {error:.3g}, more than {limit:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", choices=("memcheck", "racecheck"))
    parser.add_argument("--until", type=float, default=math.inf, help="as time.time() counts")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    device = "cpu" if options.dry_run else "cuda"
    found = list(calls(device))
    if not found:
        print(f"no kernel of pywino runs on {device} in this build: nothing to check")
        sys.exit(SKIPPED)
    if options.tool and not options.dry_run:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            print("compute-sanitizer is not on PATH")
            sys.exit(SKIPPED)
        command = [tool, "--tool", options.tool, "--error-exitcode", str(FOUND)]
        command += [sys.executable, "-m", "gpu.smoke", "--until", str(options.until)]
        # Every tensor in memory of its own, or an access beyond one would hit another.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        sys.exit(subprocess.run(command, env=environment).returncode)

    failures = done = 0
    with torch.no_grad():
        for call in found:
            if time.time() > options.until:
                break
            done += 1
            name = " | ".join(map(str, [*call[:4], *call[4]]))
            try:
                check(device, *call)
                print(f"ok: {name}", flush=True)
            except Exception as error:
                failures += 1
                print(f"FAILED: {name}: {type(error).__name__}: {error}", flush=True)
    left_out = len(found) - done
    print(f"{done - failures} of {done} calls are right, {left_out} left out for lack of time")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
