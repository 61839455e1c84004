# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA forward pass in its fp16 domain, whose products are wgmma's on Hopper, against the same
with mma.sync. Elsewhere there is nothing to compare."""

import torch
from gpu import timing
from gpu.calls import LAYOUTS, MODES, ends
from layers import Layer
from torch.nn import functional as F

import pywino
from pywino import _native, backends
from pywino.testing import relative_l2

# The last one has too few outputs for wgmma: it is for the dry run.
LAYER_NAMES = ("vgg-128x112-b32", "vgg-256x56-b32", "vgg-512x28-b32", "resnet-256x14-b32",
               "resnet-64x56-b32")  # fmt: skip
KINDS = ("products by wgmma",)
LIMIT = 3e-3  # of F4 in bf16


def candidates(layer: Layer, kind: str, mode: str, layout: str, device: str) -> list[str]:
    """The backend, where it has both kinds of products."""
    backend = "cuda" if device == "cuda" else "cpu"
    sizes = (layer.n, layer.c, layer.h, layer.w, layer.k)
    dilation = (layer.dilation,) * 2
    call = backends.Call(
        "winograd_conv2d", *sizes, dilation, dilation, MODES[mode][0], True, device
    )
    if mode != "bf16" or layout != "channels_last" or backends.can_run(backend, call, "f4"):
        return []
    if device == "cuda" and (layer.k <= 64 or _native.host.why_no_wgmma() is not None):
        return []
    return [backend]


def forward(layer: Layer, backend: str):
    """A layer that keeps its filter, as a function of the input."""
    d = layer.dilation
    conv = torch.nn.Conv2d(layer.c, layer.k, 3, padding=d, dilation=d).eval()
    x, w, b = layer.tensors(MODES["bf16"][0], LAYOUTS["channels_last"], device=device_of(backend))
    conv.weight, conv.bias = (torch.nn.Parameter(t, requires_grad=False) for t in (w, b))
    module = pywino.WinogradConv2d.from_dense(conv, algorithm="f4")
    module.backend = backend
    return module, x


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def by_mma(function):
    def run(x):
        with _native.without_wgmma():
            return function(x)

    return run


def measure(clock, layer, kind, mode, layout, backend, samples) -> dict:
    """A row: the error, then the times in turn."""
    module, x = forward(layer, backend)
    other = by_mma(module) if clock.device == "cuda" else module
    first, d = ends(x), layer.dilation
    exact = F.conv2d(first.double(), module.weight.double(), module.bias.double(), 1, d, d)
    error, theirs = (relative_l2(function(first), exact) for function in (module, other))
    found = {"error": error, "eager_error": theirs, "limit": LIMIT, "wrong": not error <= LIMIT}
    if found["wrong"]:
        return found
    contenders = {"ours": (module, (x,)), "mma.sync": (other, (x,))}
    return {**found, "times": timing.compare(clock, contenders, samples)}
