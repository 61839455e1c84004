# SPDX-License-Identifier: BSD-3-Clause
"""Weights without their zeros, as the kernels of a GPU read them: blocks, two of four, and zeros
anywhere. Spatial weights and those of the Winograd domain are packed alike. The host waits for the
device to know sizes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# A block of a GPU: so many input and output channels of one tap. Why they are so many is in
# csrc/core/sparse_conv/README.md.
CHANNELS = 32
GROUPS = (128, 64)
_ROWS = 128  # output pixels, or tiles, that share a block


class Blocks(NamedTuple):
    """A filter without its blocks of zeros: those of a group of output channels behind one another,
    by tap and then input channels; by_tap: lists of one tap each, taps first."""

    values: Tensor  # (blocks, output channels of a group, CHANNELS), zeros in what sticks out
    # (blocks,) int32: tap * ceil(C / CHANNELS) + number of its input channels; by_tap: the number
    entries: Tensor
    starts: Tensor  # (lists + 1,) int32: where each list begins, and the number of blocks


class TwoOfFour(NamedTuple):
    """A filter of which at most two of every four neighbouring input channels are not zero, for
    sparse tensor cores (csrc/core/common/sparse_gemm.cuh). Steps are taps, and in them 64 input
    channels each."""

    values: Tensor  # (steps, K', 32): the two of each four; K' is K rounded up to 128
    metadata: Tensor  # (steps, K' / 16, 32) int32: their places


class Csr(NamedTuple):
    """A filter without its zeros, one by one: those of an output channel behind one another, by
    input channel and tap. For float32."""

    values: Tensor  # (numbers,)
    entries: Tensor  # (numbers,) int32: input channel * taps + tap
    starts: Tensor  # (K + 1,) int32: where each output channel begins, and how many numbers


# Tensor cores do so many products of blocks, three TF32 ones each, while ordinary cores do one of
# those that are loaded for it alone (an H200: 58 to 82 against 7.4 a picosecond).
_TF32X3 = 8


def pack(weight, by_tap=False, strict=False):
    """The `TwoOfFour` of a 16-bit weight that is one and has more than half of its blocks, the
    `Csr` of a strict float32 one with few numbers in its blocks, else its `Blocks`; and the part of
    the blocks that is kept."""
    blocks = pack_blocks(weight, by_tap)
    group = blocks.values.shape[1]
    taps = weight[0, 0].numel()
    every = -(-len(weight) // group) * -(-weight.shape[1] // CHANNELS) * taps
    part = len(blocks.values) / every
    # Sparse tensor cores do twice as much: more than blocks where half of them are kept.
    if part > 0.5 and weight.element_size() == 2:
        return pack_two_of_four(weight) or blocks, part
    if strict and _TF32X3 * weight.count_nonzero().item() < part * weight.numel():
        return pack_csr(weight), part
    return blocks, part


def pack_csr(weight):
    """The `Csr` of a weight."""
    rows = weight.flatten(1)
    keep = rows != 0
    starts = F.pad(keep.sum(1).cumsum(0), (1, 0)).int()
    return Csr(rows[keep], keep.nonzero()[:, 1].int(), starts)


def pack_blocks(weight, by_tap=False, groups=GROUPS):
    """The `Blocks` of a (K, C, height, width) weight, in groups of 64 or 128 output channels,
    whichever cost less.

    A block of G output channels is read for every _ROWS pixels, and its input once: it costs
    1 / G + 1 / _ROWS bytes an operation."""
    cut = {group: _cut(weight, group) for group in groups}
    kept = {group: blocks.flatten(3).ne(0).any(3) for group, blocks in cut.items()}
    cost = {g: k.sum().item() * g * (1 / g + 1 / _ROWS) for g, k in kept.items()}
    group = min(cost, key=cost.get)
    if by_tap:
        blocks, keep = (t[group].transpose(0, 1).flatten(0, 1) for t in (cut, kept))
    else:
        blocks, keep = (t[group].flatten(1, 2) for t in (cut, kept))
    starts = F.pad(keep.sum(1).cumsum(0), (1, 0)).int()
    return Blocks(blocks[keep].contiguous(), keep.nonzero()[:, 1].int(), starts)


def _cut(weight, group):
    """(groups, taps, chunks, output channels of a group, CHANNELS) of a (K, C, height, width)
    weight."""
    k, c = weight.shape[:2]
    taps = F.pad(weight.flatten(2), (0, 0, 0, -c % CHANNELS, 0, -k % group))
    taps = taps.unflatten(0, (-1, group)).unflatten(2, (-1, CHANNELS))
    return taps.permute(0, 4, 2, 1, 3)


def pack_two_of_four(weight):
    """The `TwoOfFour` of a weight, None where one of its fours has three numbers or four."""
    fours = F.pad(weight.flatten(2), (0, 0, 0, -weight.shape[1] % 64, 0, -len(weight) % 128))
    fours = fours.unflatten(1, (-1, 16, 4)).permute(4, 1, 0, 2, 3).flatten(0, 1)
    kept = fours != 0
    if (kept.sum(-1) > 2).any():
        return None
    places = kept.byte().sort(dim=-1, descending=True, stable=True).indices[..., :2].sort(-1).values
    values = fours.gather(-1, places).flatten(2)
    # 16 bits for every 16 channels, two a place. Word 4 g + 2 s + h: rows g and g + 8, channels
    # 32 s + 16 h and on.
    halves = places.unflatten(2, (2, 2, 4)).flatten(4) << 2 * torch.arange(8, device=places.device)
    low, high = halves.sum(-1).unflatten(1, (-1, 2, 8)).unbind(2)
    return TwoOfFour(values, (low | high << 16).flatten(2).int())


def describe(filter, weight):
    """What of a filter decides how long it takes: its form, and how much of the weight it has, in
    steps of 5 %."""
    part = 100 * filter.values.numel() / weight.numel()
    form = type(filter).__name__
    if isinstance(filter, Blocks):
        form += f" of {filter.values.shape[1]}"
    return f"{form} {math.ceil(part / 5) * 5}%"
