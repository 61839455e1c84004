# SPDX-License-Identifier: BSD-3-Clause
"""Boxes (x1, y1, x2, y2): how much they overlap, and which of them are one object."""

import math

import torch
from torch import Tensor

_EPS = 1e-9


def area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...); a box with a negative side has none."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    return (high - low).clamp(min=0).prod(-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of a (..., A, 4) with b (..., B, 4), each with each: (..., A, B)."""
    common = _intersection(a[..., :, None, :], b[..., None, :, :])
    return common / (area(a)[..., :, None] + area(b)[..., None, :] - common + _EPS)


def complete_iou(a: Tensor, b: Tensor) -> Tensor:
    """CIoU (Zheng et al., AAAI 2020) of a (N, 4) with b (N, 4), one by one: (N,).

    IoU - d² / c² - alpha v, with d the distance of the centres, c the diagonal of the least box
    around both, v = 4 / pi² (atan(w_b / h_b) - atan(w_a / h_a))² and alpha = v / (1 - IoU + v), a
    constant for the gradient. It still has one where the boxes do not meet."""
    common = _intersection(a, b)
    overlap = common / (area(a) + area(b) - common + _EPS)
    distance = ((a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]) / 2).square().sum(1)
    hull = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    angles = [torch.atan2(t[:, 2] - t[:, 0], t[:, 3] - t[:, 1] + _EPS) for t in (a, b)]
    v = 4 / math.pi**2 * (angles[1] - angles[0]).square()
    with torch.no_grad():
        alpha = v / (1 - overlap + v + _EPS)
    return overlap - distance / (hull.square().sum(1) + _EPS) - alpha * v


def non_maximum_suppression(
    boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float
) -> Tensor:
    """The indices, by falling score, of the boxes that stay: in that order, a box goes when its IoU
    with one of its class that stays is above `threshold`.

    boxes (K, 4), scores (K,), classes (K,). Takes K² numbers of memory.

    The greedy loop, all boxes at once: kept[j] = no i < j with over[i, j] and kept[i] has one
    solution, and each pass makes at least one more entry final, so that repeating it until nothing
    changes ends there; a few passes, in practice."""
    order = scores.argsort(descending=True, stable=True)
    boxes, classes = boxes[order], classes[order]
    over = (iou(boxes, boxes) > threshold) & (classes[:, None] == classes)
    over = over.triu(1)
    kept = torch.ones_like(order, dtype=torch.bool)
    while True:
        before, kept = kept, ~(over & kept[:, None]).any(0)
        if torch.equal(kept, before):
            return order[kept]
