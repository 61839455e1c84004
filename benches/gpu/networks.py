# SPDX-License-Identifier: BSD-3-Clause
"""SAPNet whole and one of its residual blocks: on pywino's layers, with what `auto` chooses for
each, against the same network on PyTorch's layers, eager and compiled."""

import copy

import torch
from gpu import timing
from gpu.calls import LAYOUTS, MODES
from layers import Layer

import pywino
from pywino import backends
from pywino.models import sapnet
from pywino.testing import relative_l2

LAYER_NAMES = ("sap-32x481x321-d4",)  # its picture; the block has dilation 4
WHOLE, COMPILED, BLOCK = "SAPNet", "SAPNet against compiled", "SAPNet block"
KINDS = (WHOLE, COMPILED, BLOCK)
# Relative L2 error of a hundred layers, of float32 and TF32's own kind of rounding.
LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def candidates(layer: Layer, kind: str, mode: str, layout: str, device: str) -> list[str]:
    sizes = (layer.n, layer.c, layer.h, layer.w, layer.k)
    last = layout == "channels_last"
    call = backends.Call("winograd_conv2d", *sizes, (1, 1), (1, 1), MODES[mode][0], last, device)
    # Without kernels of ours both sides would be PyTorch's. Compiling takes a C++ compiler and
    # Triton, and long; the dry run has no time for it.
    if not backends.covers(call) or (kind == COMPILED and device == "cpu"):
        return []
    return ["layers"]


def networks(layer: Layer, kind: str, mode: str, layout: str, device: str):
    """(on pywino's layers, on PyTorch's, in float64, the input)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exact = pywino.restore_(sapnet().eval().double())
        x = torch.rand(1, 32 if kind == BLOCK else 3, layer.h, layer.w)
    dtype, format = MODES[mode][0], LAYOUTS[layout]
    ours = sapnet().eval()
    ours.load_state_dict(exact.state_dict())
    ours = ours.to(device, dtype, memory_format=format)
    plain = pywino.restore_(copy.deepcopy(ours))
    own = (ours, plain, exact.to(device))
    if kind == BLOCK:
        own = tuple(net.res_conv3 for net in own)
    return *own, x.to(device, dtype).contiguous(memory_format=format)


def measure(clock, layer, kind, mode, layout, backend, samples) -> dict:
    """A row: the error, then the times in turn."""
    ours, plain, exact, x = networks(layer, kind, mode, layout, clock.device)
    expected = exact(x.double())
    error, theirs = (relative_l2(net(x), expected) for net in (ours, plain))
    limit = max(LIMITS[MODES[mode][0]], 2.5 * theirs)
    found = {"error": error, "eager_error": theirs, "limit": limit, "wrong": not error <= limit}
    if found["wrong"]:
        return found
    peer = {"compiled": torch.compile(plain)} if kind == COMPILED else {"eager": plain}
    contenders = {name: (net, (x,)) for name, net in ({"ours": ours} | peer).items()}
    return {**found, "times": timing.compare(clock, contenders, samples)}
