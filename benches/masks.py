# SPDX-License-Identifier: BSD-3-Clause
"""Masks that are measured: bool (h, w), a part `density` of the pixels."""

import torch


def clusters(h, w, density, generator):
    """Discs with radii of 2 to 10 % of the height, until so much is covered."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    mask = torch.zeros(h, w, dtype=torch.bool)
    while mask.float().mean() < density:
        top, left, size = torch.rand(3, generator=generator).tolist()
        mask |= (y - top * h) ** 2 + (x - left * w) ** 2 < ((0.02 + 0.08 * size) * h) ** 2
    return mask


def streaks(h, w, density, generator):
    """Rain: lines two pixels wide and 10 to 40 long, within 17 degrees of the vertical."""
    mask = torch.zeros(h, w, dtype=torch.bool)
    while mask.float().mean() < density:
        top, left, slope, length = torch.rand(4, generator=generator).tolist()
        for t in range(10 + int(30 * length)):
            y, x = int(top * h) + t, int(left * w + t * (slope - 0.5) * 0.6)
            if y < h:
                mask[y, max(0, x) : max(0, x + 2)] = True
    return mask


def scattered(h, w, density, generator):
    return torch.rand(h, w, generator=generator) < density
