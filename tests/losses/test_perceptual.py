# SPDX-License-Identifier: BSD-3-Clause
"""Losses on VGG-16 with random weights, against its layers one by one and the formulas."""

import zipfile

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pywino.losses import PerceptualContrastiveLoss, PerceptualSimilarityLoss, VGG16Features

OUTPUTS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
LAST = (1, 3, 6, 9, 12)  # of a block's convolutions
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def convolutions():
    torch.manual_seed(0)
    layers = [nn.Conv2d(i, o, 3, padding=1) for i, o in zip((3, *OUTPUTS), OUTPUTS)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layers


@pytest.fixture(scope="module")
def files(convolutions, tmp_path_factory):
    """The same weights as torchvision and as stlpips-pytorch name them, and the latter's wheel."""
    folder = tmp_path_factory.mktemp("weights")
    plain, blurred, index, theta = {}, {}, 0, []
    for i, layer in enumerate(convolutions):
        block = sum(i > last for last in LAST)
        for name in ("weight", "bias"):
            plain[f"features.{index - block}.{name}"] = getattr(layer, name).detach()
            blurred[f"net.slice{block + 1}.{index}.{name}"] = getattr(layer, name).detach()
        index += 2
        if i in LAST:
            blurred[f"net.slice{block + 2}.{index + 1}.filt"] = torch.full((1, 1, 3, 3), 0.1)
            theta.append(torch.rand(1, OUTPUTS[i], 1, 1))
            blurred[f"lin{block}.model.1.weight"] = theta[-1]
            index += 2
    torch.save(plain, folder / "vgg16.pth")
    torch.save(blurred, folder / "stlpips.pth")
    with zipfile.ZipFile(folder / "stlpips.whl", "w") as wheel:
        wheel.write(folder / "stlpips.pth", "stlpips_pytorch/weights/vST0.0/vgg_shift_tolerant.pth")
    return folder, theta


def features_by_hand(x, convolutions, blur):
    line = torch.tensor([1.0, 2, 1])
    window = line[:, None] * line / 16
    found = []
    for i, layer in enumerate(convolutions):
        x = F.relu(layer(x))
        if i in LAST:
            found.append(x)
            if blur:
                x = F.pad(F.max_pool2d(x, 2, 1), (2,) * 4, mode="reflect")
                x = F.conv2d(x.flatten(0, 1)[:, None], window[None, None], stride=2)
                x = x.unflatten(0, found[-1].shape[:2]).squeeze(2)
            else:
                x = F.max_pool2d(x, 2)
    return found


def images(n=1, size=40):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, n, 3, size, size + 4, generator=generator)


@pytest.mark.parametrize("file", ["vgg16.pth", "stlpips.pth", "stlpips.whl"])
def test_features(files, convolutions, file):
    x = images()[0]
    with torch.no_grad():
        wanted = features_by_hand((x - MEAN) / STD, convolutions, "stlpips" in file)
        found = VGG16Features(files[0] / file)(x)
        raw = VGG16Features(files[0] / file, 1, normalise=False)(x)
    assert len(found) == 5
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(raw[0], features_by_hand(x, convolutions[:2], False)[0])


@pytest.mark.parametrize("faithful", [False, True])
def test_contrastive(files, convolutions, faithful):
    x, gt, y = images()
    loss = PerceptualContrastiveLoss(files[0] / "vgg16.pth", faithful)
    with torch.no_grad():
        fx, fgt, fy = (
            features_by_hand(t if faithful else (t - MEAN) / STD, convolutions, False)
            for t in (x, gt, y)
        )
        wanted = sum(
            w * (a - b).abs().mean() / ((a - c).abs().mean() + 1e-7)
            for w, a, b, c in zip((1 / 32, 1 / 16, 1 / 8, 1 / 4), fx, fgt, fy)
        )
    got = loss(x.requires_grad_(), gt, y)
    torch.testing.assert_close(got.detach(), (4 if faithful else 1) * wanted, rtol=1e-4, atol=0)
    got.backward()
    assert float(x.grad.abs().sum()) > 0
    assert all(p.grad is None for p in loss.parameters())
    assert float(loss(gt, gt, y)) == 0


@pytest.mark.parametrize("file", ["vgg16.pth", "stlpips.pth"])
def test_similarity(files, convolutions, file):
    x, gt, _ = images(2)
    loss = PerceptualSimilarityLoss(files[0] / file)
    wanted = torch.zeros(2)
    with torch.no_grad():
        pair = (features_by_hand((t - MEAN) / STD, convolutions, "st" in file) for t in (x, gt))
        for a, b, theta in zip(*pair, files[1]):
            if "st" not in file:
                theta = torch.full_like(theta, 1 / theta.numel())
            a, b = (t / t.square().sum(1, keepdim=True).sqrt() for t in (a, b))
            wanted += (theta * (a - b) ** 2).sum(1).mean((1, 2))
    torch.testing.assert_close(loss(x, gt), wanted.mean(), rtol=1e-4, atol=0)
    x.requires_grad_()
    loss(x, gt).backward()
    assert bool(x.grad.isfinite().all())
    assert float(x.grad.abs().sum()) > 0


def test_similarity_as_published(files):
    """Of the first image alone, without a gradient, times 10."""
    x, gt, _ = images(2)
    loss = PerceptualSimilarityLoss(files[0] / "stlpips.pth", faithful=True)
    got = loss(x.requires_grad_(), gt)
    assert not got.requires_grad
    turned = [
        F.interpolate((t.max() - t) / (t.max() - t.min()), (256, 256), mode="bilinear")
        for t in (x[:1], gt[:1])
    ]
    wanted = 10 * PerceptualSimilarityLoss(files[0] / "stlpips.pth")(*turned)
    torch.testing.assert_close(got, wanted.detach(), rtol=1e-4, atol=0)
    assert float(loss(x, torch.cat((gt[:1], x[1:])))) == float(got)


def test_weights_that_are_refused(tmp_path, monkeypatch):
    module = __import__("sys").modules[VGG16Features.__module__]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="stlpips-pytorch must be installed"):
        VGG16Features()
    with pytest.raises(FileNotFoundError, match="absent"):
        VGG16Features(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(RuntimeError, match=r"text.pth cannot be read as weights"):
        VGG16Features(tmp_path / "text.pth")
    torch.save({"features.0.weight": torch.zeros(8, 3, 3, 3)} | {"features.0.bias": torch.zeros(8)},
               tmp_path / "small.pth")  # fmt: skip
    with pytest.raises(RuntimeError, match="must be those of VGG-16's 13 convolutions"):
        VGG16Features(tmp_path / "small.pth")
