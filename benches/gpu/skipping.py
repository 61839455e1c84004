# SPDX-License-Identifier: BSD-3-Clause
"""The convolutions that skip what is outside of a mask: each backend's kernel against PyTorch's
dense convolution of the same tensors, for which nothing is masked. Dilation 1 in every layer."""

import torch
from gpu import timing
from gpu.calls import LAYOUTS, MODES, ends
from layers import Layer
from masks import clusters, streaks
from torch.nn import functional as F

import pywino
from pywino import backends
from pywino.reference import masked_conv as masked_reference
from pywino.testing import relative_l2

LAYER_NAMES = ("sap-32x481x321-d1", "resnet-64x56-b32", "vgg-256x56-b32")
SHAPES = {"masked clusters 25 %": clusters, "masked streaks 25 %": streaks}
KINDS = tuple(SHAPES)
# Relative L2 error of fp32 sums; 16-bit outputs are rounded once beside that.
LIMITS = {torch.float32: 1.5e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def tensors(layer: Layer, kind: str, mode: str, layout: str, device: str):
    """(x, weight, bias, mask), with another mask for each image."""
    generator = torch.Generator().manual_seed(0)
    masks = [SHAPES[kind](layer.h, layer.w, 0.25, generator) for _ in range(layer.n)]
    made = layer.tensors(MODES[mode][0], LAYOUTS[layout], device=device)
    return *made, torch.stack(masks)[:, None].to(device)


def candidates(layer: Layer, kind: str, mode: str, layout: str, device: str) -> list[str]:
    """Backends with a kernel for the call."""
    sizes = (layer.n, layer.c, layer.h, layer.w, layer.k)
    last = layout == "channels_last"
    call = backends.Call("masked_conv2d", *sizes, (1, 1), (1, 1), MODES[mode][0], last, device)
    return [name for name in backends.of_device(device) if backends.can_run(name, call) is None]


def ours(backend: str):
    """A function of `tensors(…)`."""
    return lambda x, w, b, mask: pywino.masked_conv2d(x, mask, w, b, backend=backend)


def dense(x, w, b, *_):
    return F.conv2d(x, w, b, padding=1)


def errors(kind: str, backend: str, arguments) -> tuple[float, float]:
    """Ours and PyTorch's, of the first and the last image."""
    x, w, b, mask = arguments
    x, mask = ends(x), ends(mask)
    exact = masked_reference.masked_conv2d(x.double(), mask, w.double(), b.double())
    between = dense(torch.where(mask, x, 0), w, b) * mask
    return relative_l2(ours(backend)(x, w, b, mask), exact), relative_l2(between, exact)


def measure(clock, layer, kind, mode, layout, backend, samples) -> dict:
    """A row: the error, then the times in turn."""
    arguments = tensors(layer, kind, mode, layout, clock.device)
    error, theirs = errors(kind, backend, arguments)
    limit = max(LIMITS[MODES[mode][0]], 2.5 * theirs)
    found = {"error": error, "eager_error": theirs, "limit": limit, "wrong": not error <= limit}
    if found["wrong"]:
        return found
    contenders = {"ours": (ours(backend), arguments), "dense": (dense, arguments)}
    return {**found, "times": timing.compare(clock, contenders, samples)}
