# SPDX-License-Identifier: BSD-3-Clause
"""Weights of the Winograd domain as the CPU's kernels read them: whole, or without their zeros,
whichever is the less work."""

import math

import torch
from torch.nn import functional as F

_ops = torch.ops.pywino

# A vector of the block kernel holds 16 output channels at most; blocks of 16 are whole vectors in
# every instruction set.
BLOCK = 16
# The work of a product without zeros in units of the dense one, by the part of the weights (of
# blocks) that is not zero: slope and what it costs in any case (transposed tiles). Break-even at
# 91 and 45 %, about the worst of VGG's layers on Zen 4 (benches/bench_sparse_conv.py measures it).
_BLOCKS = (1.0, 0.04)
_UNSTRUCTURED = (1.8, 0.14)
# Below this part of the dense work the sparse kernel wins for certain.
_GAIN = 0.95


def densities(weight):
    """(part of the weights, part of the 16 x 1 blocks of a position) that are not zero."""
    kept = weight != 0
    blocks = F.pad(kept, (0, 0, 0, 0, 0, 0, 0, -len(kept) % BLOCK)).unflatten(0, (-1, BLOCK))
    return kept.float().mean().item(), blocks.any(1).float().mean().item()


def _is_full(weight):
    """Whether no zero is in a sample of at most 128 x 128 kernels: to count those of a weight in
    training would take longer than to pack it."""
    k, c = (max(1, size // 64) for size in weight.shape[:2])
    sample = weight[::k, ::c]
    return sample.count_nonzero().item() == sample.numel()


def pattern(weight, rotate=False):
    """How to pack a weight of the Winograd domain: "dense", "blocks" or "unstructured". `rotate`:
    for the input gradient. Blocks of output channels are none of the turned weight, so zeros are
    skipped one by one then."""
    if _is_full(weight):
        return "dense"
    single, blocks = densities(weight)
    work = {
        "dense": _GAIN,
        "blocks": math.inf if rotate else _BLOCKS[0] * blocks + _BLOCKS[1],
        "unstructured": _UNSTRUCTURED[0] * single + _UNSTRUCTURED[1],
    }
    return min(work, key=work.get)


def pack(weight, tile, how, rotate=False):
    """What `_winograd_forward` takes for W, `rotate`: `_winograd_domain_backward_input`: a float
    tensor, or an int32 one without the zeros. how: its `pattern`."""
    if how == "dense":
        return _ops._winograd_pack.default(weight, tile, rotate)
    return _ops._winograd_sparse_pack.default(weight, tile, rotate, how == "blocks")
