# SPDX-License-Identifier: BSD-3-Clause
"""Average precision on cases small enough to work out."""

import math
import sys

import pytest
import torch

from pywino.metrics import average_precision

pytest.importorskip("faster_coco_eval", reason="needs pywino[detect]")

BOX = [10.0, 20, 50, 60]
FAR = [200.0, 200, 260, 280]


def found(*rows):
    """Rows of (box, score, class)."""
    return (
        torch.tensor([row[0] for row in rows]).view(-1, 4),
        torch.tensor([row[1] for row in rows]),
        torch.tensor([row[2] for row in rows], dtype=torch.long),
    )


def truth(*rows):
    return torch.tensor([[*box, label] for box, label in rows]).view(-1, 5)


def score(answers, targets, classes=("a", "b")):
    return average_precision(answers, targets, classes)


def test_right_answers():
    answers = [found((BOX, 0.9, 0)), found((FAR, 0.3, 1), (BOX, 0.2, 0)), found()]
    targets = [truth((BOX, 0)), truth((BOX, 0), (FAR, 1)), truth()]
    got = score(answers, targets)
    assert got == {
        "map50": pytest.approx(1),
        "map": pytest.approx(1),
        "images": 3,
        "objects": 3,
        "classes": {"a": pytest.approx(1), "b": pytest.approx(1)},
    }


def test_a_false_answer_above_a_right_one():
    """Precision 1/2 at every recall."""
    got = score([found((FAR, 0.9, 0), (BOX, 0.5, 0))], [truth((BOX, 0))])
    assert got["map50"] == pytest.approx(0.5)


def test_half_is_found():
    """Precision 1 at recalls 0 … 0.5, of 0 … 1: 51 of 101."""
    got = score([found((BOX, 0.9, 0))], [truth((BOX, 0), (FAR, 0))])
    assert got["classes"]["a"] == pytest.approx(51 / 101)


def test_the_other_class_is_no_answer():
    got = score([found((BOX, 0.9, 1))], [truth((BOX, 0))])
    assert got["map50"] == 0
    assert math.isnan(got["classes"]["b"])


def test_twice_the_same_object_is_once_false():
    """The second answer comes after full recall, and costs nothing; before, it does."""
    assert score([found((BOX, 0.9, 0), (BOX, 0.8, 0))], [truth((BOX, 0))])["map50"] == 1
    got = score([found((BOX, 0.9, 0), (BOX, 0.8, 0), (FAR, 0.7, 0))], [truth((BOX, 0), (FAR, 0))])
    assert got["map50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


@pytest.mark.parametrize(("shift", "map50", "thresholds"), [(4, 1, 7), (12, 1, 1), (16, 0, 0)])
def test_iou_thresholds(shift, map50, thresholds):
    """A box of 40 x 40 shifted by s has an IoU of (40 - s) / (40 + s): 0.82, 0.54, 0.43; of the
    thresholds 0.5, 0.55, … 0.95 it reaches 7, 1 and none."""
    moved = [BOX[0] + shift, BOX[1], BOX[2] + shift, BOX[3]]
    got = score([found((moved, 0.9, 0))], [truth((BOX, 0))])
    assert got["map50"] == map50
    assert got["map"] == pytest.approx(thresholds / 10)


def test_padding_and_nothing():
    padded = torch.tensor([[*BOX, 0], [*FAR, -1]])
    assert score([found((BOX, 0.9, 0))], [padded])["map50"] == 1
    assert score([found()], [truth((BOX, 0))])["map50"] == 0
    assert math.isnan(score([found((BOX, 0.9, 0))], [truth()])["map50"])
    assert math.isnan(score([], [])["map"])


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match=r"found must be one an image \(1\), got 0"):
        score([], [truth()])
    with pytest.raises(ValueError, match=r"targets\[1\] must have classes in 0 to 1, got 2"):
        score([found(), found()], [truth((BOX, 1)), truth((BOX, 2))])
    with pytest.raises(ValueError, match=r"found\[0\] must have classes in 0 to 1, got -1"):
        score([found((BOX, 0.9, -1))], [truth((BOX, 0))])
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(RuntimeError, match="needs faster-coco-eval"):
        score([found()], [truth()])
