# SPDX-License-Identifier: BSD-3-Clause
"""Overlaps by hand, and suppression against the loop that it stands for."""

import math

import pytest
import torch

from pywino.models import boxes as box


def test_iou_by_hand():
    a = torch.tensor([[0.0, 0, 4, 4], [10, 10, 12, 11], [3, 3, 1, 5]])
    b = torch.tensor([[2.0, 2, 6, 6], [0, 0, 4, 4], [10, 10, 12, 11]])
    expected = torch.tensor([[4 / 28, 1, 0], [0, 0, 1], [0, 0, 0]])
    torch.testing.assert_close(box.iou(a, b), expected)


def test_complete_iou_by_hand():
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 4, 2]])
    b = torch.tensor([[0.0, 0, 2, 2], [4, 0, 6, 2], [0, 0, 2, 4]])
    # Apart: no overlap, centres 4 apart, a hull of 6 x 2. Turned: 4 of 12, centres (1, -1) apart, a
    # hull of 4 x 4, angles atan 2 and atan 1/2.
    v = 4 / math.pi**2 * (math.atan(2) - math.atan(0.5)) ** 2
    turned = 1 / 3 - 2 / 32 - v / (1 - 1 / 3 + v) * v
    torch.testing.assert_close(box.complete_iou(a, b), torch.tensor([1.0, -16 / 40, turned]))


def test_complete_iou_has_a_gradient_where_boxes_do_not_meet():
    a = torch.tensor([[0.0, 0, 2, 2]], requires_grad=True)
    box.complete_iou(a, torch.tensor([[8.0, 0, 10, 2]])).sum().backward()
    assert a.grad[0, 0] + a.grad[0, 2] > 0  # a step to the right
    assert a.grad.isfinite().all()


def greedy(boxes, scores, classes, threshold):
    left, kept = sorted(range(len(scores)), key=lambda i: -float(scores[i])), []
    while left:
        first, *left = left
        kept.append(first)
        overlap = box.iou(boxes[first][None], boxes)[0]
        left = [i for i in left if classes[i] != classes[first] or overlap[i] <= threshold]
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_suppression_is_the_greedy_loop(count, threshold):
    corner, size = torch.rand(count, 2) * 60, torch.rand(count, 2) * 40
    boxes = torch.cat((corner, corner + size), 1)
    scores, classes = torch.rand(count), torch.randint(3, (count,))
    kept = box.non_maximum_suppression(boxes, scores, classes, threshold)
    assert kept.tolist() == greedy(boxes, scores, classes, threshold)


def test_a_chain_of_boxes():
    """Each overlaps the next: every second one goes, and it takes a pass an entry to see it."""
    left = torch.arange(20.0)
    boxes = torch.stack((left, 0 * left, left + 2, 0 * left + 2), 1)
    kept = box.non_maximum_suppression(boxes, -left, torch.zeros(20), 0.3)
    assert kept.tolist() == list(range(0, 20, 2))
