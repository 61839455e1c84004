# SPDX-License-Identifier: BSD-3-Clause
"""MobileNetV2: torchvision's names, count and function."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pywino.models import mobilenet_v2


@pytest.fixture(scope="module")
def published():
    """torchvision's ImageNet weights, which are not part of the project."""
    path = os.environ.get("PYWINO_MOBILENET")
    if path is None or not Path(path).is_file():
        pytest.skip("set PYWINO_MOBILENET to torchvision's mobilenet_v2-b0353104.pth")
    return path


def test_count_and_names():
    with torch.device("meta"):
        model = mobilenet_v2()
        state = model.state_dict()
        assert sum(p.numel() for p in model.parameters()) == 3_504_872
        assert len(state) == 314
        assert state["features.1.conv.1.weight"].shape == (16, 32, 1, 1)
        assert state["features.2.conv.1.0.weight"].shape == (96, 1, 3, 3)
        assert state["features.17.conv.3.running_var"].shape == (320,)
        assert state["features.18.0.weight"].shape == (1280, 320, 1, 1)
        assert state["classifier.1.weight"].shape == (1000, 1280)


def test_slices_of_the_trunk():
    with torch.device("meta"):
        features, x = mobilenet_v2().features, torch.empty(2, 3, 96, 64)
        shapes = []
        for start, end in ((0, 2), (2, 4), (4, 7), (7, 14), (14, 18), (18, 19)):
            x = features[start:end](x)
            shapes.append((x.shape[1], 96 // x.shape[2], 64 // x.shape[3]))
    assert [channels for channels, *_ in shapes] == [16, 24, 32, 96, 320, 1280]
    assert [scale for _, *scale in shapes] == [[s, s] for s in (2, 4, 8, 16, 32, 32)]


def reference(state, x):
    """The network once more from the paper's table, on a state_dict, in eval mode."""

    def conv_bn(x, conv, bn, **options):
        x = F.conv2d(x, state[f"{conv}.weight"], **options)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{bn}.{name}"] for name in names))

    x = F.relu6(conv_bn(x, "features.0.0", "features.0.1", stride=2, padding=1))
    strides = [1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]
    for block, stride in enumerate(strides, 1):
        name, y, first = f"features.{block}.conv", x, 0
        if block > 1:
            y, first = F.relu6(conv_bn(y, f"{name}.0.0", f"{name}.0.1")), 1
        depthwise = {"stride": stride, "padding": 1, "groups": y.shape[1]}
        y = F.relu6(conv_bn(y, f"{name}.{first}.0", f"{name}.{first}.1", **depthwise))
        y = conv_bn(y, f"{name}.{first + 1}", f"{name}.{first + 2}")
        x = x + y if x.shape == y.shape else y
    x = F.relu6(conv_bn(x, "features.18.0", "features.18.1")).mean((2, 3))
    return x @ state["classifier.1.weight"].T + state["classifier.1.bias"]


def test_it_is_the_papers_table():
    torch.manual_seed(0)
    model = mobilenet_v2(num_classes=7).double()
    x = torch.randn(2, 3, 75, 64, dtype=torch.float64)
    with torch.no_grad():
        model(x)  # running statistics that are not 0 and 1
        for module in model.eval().modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.mul_(3)  # so that some values are above 6
        torch.testing.assert_close(model(x), reference(model.state_dict(), x))


def test_it_trains():
    model = mobilenet_v2(num_classes=3)
    model(torch.rand(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_published_weights(published):
    """ImageNet's classes of a photograph: a cat is a cat (classes 281 to 285, and the lynx)."""
    data = pytest.importorskip("skimage.data")
    model = mobilenet_v2(weights=published).eval()
    pixels = torch.from_numpy(data.chelsea().astype(np.float32) / 255).permute(2, 0, 1)[None]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = F.interpolate((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1), (224, 320), mode="area")
    with torch.no_grad():
        probabilities = model(x).softmax(1)[0]
    assert float(probabilities[281:288].sum()) > 0.7
