# SPDX-License-Identifier: BSD-3-Clause
"""The convolutions that skip, what is outside of a mask and what a pruned weight has no more: each
backend's kernel against PyTorch's dense convolution of the same tensors, for which nothing is
masked. A weight of the Winograd domain has none: its peer has as many channels, and is a measure of
time alone. Dilation 1 in every layer."""

import torch
from gpu import timing
from gpu.calls import LAYOUTS, MODES, ends
from layers import Layer
from masks import clusters, streaks
from torch.nn import functional as F

import pywino
from pywino import backends
from pywino.reference.winograd import winograd_domain_conv2d, winograd_transform_filter
from pywino.testing import relative_l2

LAYER_NAMES = ("sap-32x481x321-d1", "resnet-64x56-b32", "vgg-256x56-b32")
SHAPES = {"masked clusters 25 %": clusters, "masked streaks 25 %": streaks}
BLOCKS = {"blocks 75 %": 0.25, "blocks 90 %": 0.1}  # zeros, and what is kept
TWO_OF_FOUR, LISTS = "2:4", "lists 95 %"
DOMAIN = "winograd "  # what a kind begins with whose weight is in the domain of F(4x4,3x3)
KINDS = (
    *SHAPES,
    *(f"sparse {zeros}" for zeros in (*BLOCKS, TWO_OF_FOUR, LISTS)),
    *(f"{DOMAIN}{zeros}" for zeros in (*BLOCKS, TWO_OF_FOUR)),
)
BLOCK = (64, 32)  # output and input channels
TILE = 4
# Relative L2 error of fp32 sums; 16-bit outputs are rounded once beside that. F(4x4,3x3) may have
# more, as much more as its formula in PyTorch has.
LIMITS = {torch.float32: 1.5e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def tensors(layer: Layer, kind: str, mode: str, layout: str, device: str):
    """(x, weight, bias), and with a mask, another for each image."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = layer.tensors(MODES[mode][0], LAYOUTS[layout], device=device)
    if kind in SHAPES:
        masks = [SHAPES[kind](layer.h, layer.w, 0.25, generator) for _ in range(layer.n)]
        return x, w, b, torch.stack(masks)[:, None].to(device)
    if kind.startswith(DOMAIN):
        w = winograd_transform_filter(w, TILE)
    return x, w * kept(w.shape, kind.partition(" ")[2], generator).to(w), b


def kept(size: torch.Size, zeros: str, generator) -> torch.Tensor:
    """What a weight keeps: (k, c, height, width). Of blocks at least one."""
    k, c, *positions = size
    if zeros == LISTS:
        return torch.rand(size, generator=generator) < 0.05
    if zeros == TWO_OF_FOUR:
        fours = torch.rand(k, -(-c // 4), 4, *positions, generator=generator)
        return (fours.argsort(2).argsort(2) < 2).flatten(1, 2)[:, :c]
    grid = [-(-channels // block) for channels, block in zip((k, c), BLOCK)]
    scores = torch.rand(*grid, *positions, generator=generator)
    count = max(1, round(BLOCKS[zeros] * scores.numel()))
    blocks = scores <= scores.flatten().kthvalue(count).values
    for axis, block in enumerate(BLOCK):
        blocks = blocks.repeat_interleave(block, axis)
    return blocks[:k, :c]


def candidates(layer: Layer, kind: str, mode: str, layout: str, device: str) -> list[str]:
    """Backends with a kernel for the call."""
    sizes = (layer.n, layer.c, layer.h, layer.w, layer.k)
    last = layout == "channels_last"
    op = "masked_conv2d" if kind in SHAPES else "sparse_conv2d"
    op = "winograd_domain_conv2d" if kind.startswith(DOMAIN) else op
    dtype = MODES[mode][0]
    call = backends.Call(op, *sizes, (1, 1), (1, 1), dtype, last, device)
    able = backends.able(call)
    if device == "cuda" and kind.endswith((TWO_OF_FOUR, LISTS)):  # dense for anything else
        bits = 16 if kind.endswith(TWO_OF_FOUR) else 32
        able = [name for name in able if name == "cuda" and 8 * dtype.itemsize == bits]
    return able


def ours(kind: str, backend: str, arguments):
    """(function, its tensors): a layer's weight is packed before."""
    x, w, b, *masks = arguments
    if masks:
        return lambda x, w, b, m: pywino.masked_conv2d(x, m, w, b, backend=backend), arguments
    conv = torch.nn.Conv2d(w.shape[1], w.shape[0], 3, padding=1)
    w, conv.bias = (torch.nn.Parameter(t, requires_grad=False) for t in (w, b))
    if kind.startswith(DOMAIN):
        layer = pywino.WinogradConv2d.from_dense(conv).to_winograd_domain_(TILE)
        layer.winograd_weight = w
    else:
        conv.weight = w
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
        if kind.startswith(DOMAIN):
            return winograd_domain_conv2d(x, w, b, 1, 1, TILE)
        return dense(torch.where(mask, x, 0) if masks else x, w, b) * mask

    exact = between(torch.float64)
    function, own = ours(kind, backend, first)
    return relative_l2(function(*own), exact), relative_l2(between(x.dtype), exact)


def measure(clock, layer, kind, mode, layout, backend, samples) -> dict:
    """A row: the error, then the times in turn."""
    arguments = tensors(layer, kind, mode, layout, clock.device)
    error, theirs = errors(kind, backend, arguments)
    limit = max(LIMITS[MODES[mode][0]], 2.5 * theirs)
    found = {"error": error, "eager_error": theirs, "limit": limit, "wrong": not error <= limit}
    if found["wrong"]:
        return found
    peer = arguments
    if kind.startswith(DOMAIN):
        peer = layer.tensors(MODES[mode][0], LAYOUTS[layout], device=clock.device)
    contenders = {"ours": ours(kind, backend, arguments), "dense": (dense, peer)}
    return {**found, "times": timing.compare(clock, contenders, samples)}
