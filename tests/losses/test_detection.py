# SPDX-License-Identifier: BSD-3-Clause
"""A detector's loss on restored images."""

import torch

from pywino.losses import DetectionLoss
from pywino.models import small_yolo
from pywino.models.yolo import as_targets


def a_detector():
    """Random, but sure of many things."""
    torch.manual_seed(0)
    detector = small_yolo(4)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if name.endswith("bias") and parameter.numel() == 3 * 9:
                parameter.add_(torch.randn_like(parameter) * 10)
    return detector


def test_targets_are_what_the_sharp_image_shows(monkeypatch):
    loss = DetectionLoss(a_detector(), threshold=0.3)
    detector = loss.detector
    sharp = torch.rand(2, 3, 64, 64)
    restored = torch.rand(2, 3, 64, 64, requires_grad=True)
    found = detector.detect(sharp, threshold=0.3)
    assert sum(len(one.scores) for one in found) > 0
    seen, detect = [], detector.detect
    monkeypatch.setattr(detector, "detect", lambda x, **o: (seen.append(x), detect(x, **o))[1])
    value = loss(restored, sharp)
    assert len(seen) == 1
    assert seen[0] is sharp
    wanted = detector.loss(detector(restored), as_targets(found))
    torch.testing.assert_close(value, wanted)
    value.backward()
    assert restored.grad.abs().sum() > 0
    nothing = loss(restored, sharp, torch.full((2, 1, 5), -1.0))
    assert float(nothing.detach()) != float(value.detach())


def test_the_detector_is_frozen():
    loss = DetectionLoss(a_detector().train())
    loss.train()
    assert not any(module.training for module in loss.detector.modules())
    assert not any(p.requires_grad for p in loss.detector.parameters())
