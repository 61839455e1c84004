# SPDX-License-Identifier: BSD-3-Clause
"""Distance in VGG's features: the layer that it says, normalised images, gradients to one side."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pywino.losses import FeatureLoss


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """torchvision's names, random weights."""
    torch.manual_seed(0)
    state, channels, place = {}, 3, 0
    for block in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
        for width in block:
            conv = nn.Conv2d(channels, width, 3)
            state |= {f"features.{place}.{k}": v for k, v in conv.state_dict().items()}
            channels, place = width, place + 2
        place += 1
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path, state


def conv3_3(state, images):
    x = images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    x = x / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for place in (0, 2, 5, 7, 10, 12, 14):
        if place in (5, 10):
            x = F.max_pool2d(x, 2)
        x = F.conv2d(
            x, state[f"features.{place}.weight"], state[f"features.{place}.bias"], padding=1
        )
        if place < 14:
            x = x.relu()
    return x


def test_it_is_the_mean_square_of_conv3_3(vgg):
    path, state = vgg
    x, y = torch.rand(2, 2, 3, 16, 20).requires_grad_()
    loss = FeatureLoss(path)
    value = loss(x, y)
    wanted = (conv3_3(state, x) - conv3_3(state, y)).square().mean()
    torch.testing.assert_close(value, wanted, rtol=1e-3, atol=0)
    negative = conv3_3(state, x).clamp_max(0)
    assert negative.abs().max() > 0  # which a ReLU would have cut
    to_x, to_y = torch.autograd.grad(value, (x, y), allow_unused=True)
    assert to_x.abs().sum() > 0
    assert to_y is None
    assert not any(p.requires_grad for p in loss.parameters())


def test_trained_features_tell_blur():
    path = os.environ.get("PYWINO_VGG")
    if path is None or not Path(path).is_file():
        pytest.skip("set PYWINO_VGG to stlpips-pytorch's vgg_shift_tolerant.pth")
    data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(data.astronaut()[:256, :256].copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        loss = FeatureLoss(path)
        values = [
            float(loss(F.avg_pool2d(image, k, 1, k // 2, count_include_pad=False), image))
            for k in (1, 3, 5, 9)
        ]
    assert values == sorted(values)
    assert values[0] == 0
