# SPDX-License-Identifier: BSD-3-Clause
"""The convolutions that skip, what is outside of a mask and what a pruned weight has no more: each
backend's kernel against PyTorch's dense convolution of the same tensors, for which nothing is
masked. Dilation 1 in every layer."""

import torch
from gpu import timing
from gpu.calls import LAYOUTS, MODES, ends
from layers import Layer
from masks import clusters, streaks
from torch.nn import functional as F

import pywino
from pywino import backends
from pywino.testing import relative_l2

LAYER_NAMES = ("sap-32x481x321-d1", "resnet-64x56-b32", "vgg-256x56-b32")
SHAPES = {"masked clusters 25 %": clusters, "masked streaks 25 %": streaks}
DENSITIES = {"sparse blocks 75 %": 0.25, "sparse blocks 90 %": 0.1}  # zeros, and what is kept
TWO_OF_FOUR = "sparse 2:4"
KINDS = (*SHAPES, *DENSITIES, TWO_OF_FOUR)
BLOCK = (64, 32)  # output and input channels
# Relative L2 error of fp32 sums; 16-bit outputs are rounded once beside that.
LIMITS = {torch.float32: 1.5e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def tensors(layer: Layer, kind: str, mode: str, layout: str, device: str):
    """(x, weight, bias), and with a mask, another for each image."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = layer.tensors(MODES[mode][0], LAYOUTS[layout], device=device)
    if kind == TWO_OF_FOUR:
        fours = torch.rand(layer.k, -(-layer.c // 4), 4, 3, 3, generator=generator)
        two = fours.argsort(2).argsort(2) < 2
        return x, w * two.flatten(1, 2)[:, : layer.c].to(w), b
    if kind in DENSITIES:
        return x, w * kept(layer, DENSITIES[kind], generator).to(w), b
    masks = [SHAPES[kind](layer.h, layer.w, 0.25, generator) for _ in range(layer.n)]
    return x, w, b, torch.stack(masks)[:, None].to(device)


def kept(layer: Layer, density: float, generator) -> torch.Tensor:
    """So many of the blocks of all taps, at least one: (k, c, 3, 3)."""
    grid = [-(-size // block) for size, block in zip((layer.k, layer.c), BLOCK)]
    scores = torch.rand(*grid, 3, 3, generator=generator)
    count = max(1, round(density * scores.numel()))
    blocks = scores <= scores.flatten().kthvalue(count).values
    for axis, block in enumerate(BLOCK):
        blocks = blocks.repeat_interleave(block, axis)
    return blocks[: layer.k, : layer.c]


def candidates(layer: Layer, kind: str, mode: str, layout: str, device: str) -> list[str]:
    """Backends with a kernel for the call."""
    sizes = (layer.n, layer.c, layer.h, layer.w, layer.k)
    last = layout == "channels_last"
    op = "masked_conv2d" if kind in SHAPES else "sparse_conv2d"
    dtype = MODES[mode][0]
    call = backends.Call(op, *sizes, (1, 1), (1, 1), dtype, last, device)
    names = backends.of_device(device)
    if kind == TWO_OF_FOUR and device == "cuda":  # for anything else such a weight is dense
        names = ("cuda",) if dtype.itemsize == 2 else ()
    return [name for name in names if backends.can_run(name, call) is None]


def ours(backend: str, arguments):
    """(function, its tensors): a layer's weight is packed before."""
    x, w, b, *masks = arguments
    if masks:
        return lambda x, w, b, m: pywino.masked_conv2d(x, m, w, b, backend=backend), arguments
    conv = torch.nn.Conv2d(w.shape[1], w.shape[0], 3, padding=1)
    conv.weight, conv.bias = (torch.nn.Parameter(t, requires_grad=False) for t in (w, b))
    layer = pywino.SparseConv2d.from_dense(conv)
    layer.backend = backend
    return layer, (x,)


def dense(x, w, b, *_):
    return F.conv2d(x, w, b, padding=1)


def errors(kind: str, backend: str, arguments) -> tuple[float, float]:
    """Ours and PyTorch's, of the first and the last image."""
    x, w, b, *masks = arguments
    first = [ends(x), w, b, *map(ends, masks)]
    mask = first[3] if masks else 1

    def between(dtype):
        x, w, b = (t.to(dtype) for t in first[:3])
        return dense(torch.where(mask, x, 0) if masks else x, w, b) * mask

    exact = between(torch.float64)
    function, own = ours(backend, first)
    return relative_l2(function(*own), exact), relative_l2(between(x.dtype), exact)


def measure(clock, layer, kind, mode, layout, backend, samples) -> dict:
    """A row: the error, then the times in turn."""
    arguments = tensors(layer, kind, mode, layout, clock.device)
    error, theirs = errors(kind, backend, arguments)
    limit = max(LIMITS[MODES[mode][0]], 2.5 * theirs)
    found = {"error": error, "eager_error": theirs, "limit": limit, "wrong": not error <= limit}
    if found["wrong"]:
        return found
    contenders = {"ours": ours(backend, arguments), "dense": (dense, arguments)}
    return {**found, "times": timing.compare(clock, contenders, samples)}
