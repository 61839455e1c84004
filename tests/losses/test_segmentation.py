# SPDX-License-Identifier: BSD-3-Clause
"""The segmentation loss: its formula, its network's size and gradients."""

import math

import pytest
import torch
from torch import nn

from pywino.losses import SegmentationFPN, SegmentationLoss, focal_self_label_loss


def test_the_formula_by_hand():
    """Two pixels with p = 3/4 and 1/2."""
    scores = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]).T.reshape(1, 2, 1, 2)
    terms = [0.25**2 * -math.log(0.75), 0.5**2 * -math.log(0.5)]
    assert float(focal_self_label_loss(scores)) == pytest.approx(sum(terms) / 2)
    plain = focal_self_label_loss(scores, gamma=0, alpha=0.25)
    assert float(plain) == pytest.approx(-0.25 * (math.log(0.75) + math.log(0.5)) / 2)
    sure = torch.tensor([1e6, 0.0]).reshape(1, 2, 1, 1)
    assert 0 < float(focal_self_label_loss(sure)) < 1e-6


def test_its_gradient():
    scores = torch.randn(
        1, 5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    assert torch.autograd.gradcheck(focal_self_label_loss, scores.requires_grad_())


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return SegmentationFPN().eval()


def test_the_network_has_the_published_size(network):
    trunk = sum(p.numel() for p in network.trunk.parameters())
    assert trunk == 42_500_160
    assert sum(p.numel() for p in network.parameters()) == 47_121_493


def test_levels_are_scaled_and_summed(network, monkeypatch):
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64)
        trunk, levels = network.trunk, []
        y = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(x))))
        for layer in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
            y = layer(y)
            levels.append(y)
        p = [network.lateral[3](levels[3])]
        for i in (2, 1, 0):
            up = nn.Upsample(tuple(levels[i].shape[2:]), mode="bilinear", align_corners=True)
            p.insert(0, network.lateral[i](levels[i]) + up(p[0]))
        up = nn.Upsample((16, 16), mode="bilinear", align_corners=True)
        wanted = network.classify(torch.cat([up(s(q)) for s, q in zip(network.smooth, p)], 1))
        torch.testing.assert_close(network(x), wanted)
        assert wanted.shape == (1, 21, 16, 16)


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(2)
    return torch.rand(2, 2, 3, 64, 64, generator=generator)


def with_network(network, **options):
    """A loss on the network that is there, which takes seconds to build."""
    with pytest.MonkeyPatch.context() as patch:
        module = __import__("sys").modules[SegmentationLoss.__module__]
        patch.setattr(module, "SegmentationFPN", lambda trunk: network)
        return SegmentationLoss(**options)


def test_on_the_image(network, pictures):
    x, y = pictures
    loss = with_network(network)
    x.requires_grad_()
    got = loss.train()(x, None, y)
    got.backward()
    assert float(x.grad.abs().sum()) > 0
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    wanted = focal_self_label_loss(network.eval()((x.detach() - mean) / std))
    torch.testing.assert_close(got.detach(), wanted)
    assert all(p.grad is None for p in network.parameters())


def test_on_the_residual(network, pictures):
    x, y = pictures
    loss = with_network(network, on="residual")
    x.requires_grad_()
    got = loss(x, None, y)
    got.backward()
    grown = x.grad.abs().amax((0, 1)) > 0
    assert bool(grown.any())
    assert not bool((x.grad != 0)[(y - x.detach()) < 0].any())  # clamped there
    with torch.no_grad():
        torch.testing.assert_close(loss((y - (y - x).clamp(0, 1)), None, y), got.detach())


def test_as_published(network, pictures):
    x, y = pictures
    statistics = network.trunk.bn1.running_mean.clone()
    image = with_network(network, faithful=True)
    first, second = (float(image(x, None, y)) for _ in range(2))
    assert first != second  # the head is drawn anew
    assert not torch.equal(network.trunk.bn1.running_mean, statistics)
    residual = with_network(network, on="residual", faithful=True)
    assert not network.training
    assert not residual(x.requires_grad_(), None, y).requires_grad
    shift = torch.tensor([0.48109378172, 0.4575245789, 0.4078705409]).view(3, 1, 1)
    wanted = focal_self_label_loss(network((y - x.detach()).clamp(0, 1) - shift))
    torch.testing.assert_close(residual(x, None, y), wanted)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="on must be 'image' or 'residual', got 'edges'"):
        SegmentationLoss(on="edges")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        SegmentationFPN(tmp_path / "absent.pth")
