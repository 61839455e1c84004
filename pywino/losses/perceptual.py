# SPDX-License-Identifier: BSD-3-Clause
"""SAPNet's losses on features V_1 ... V_5 of VGG-16: relu1_2, 2_2, 3_3, 4_3, 5_3."""

import io
import os
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STLPIPS = "stlpips_pytorch/weights/vST0.0/vgg_shift_tolerant.pth"


class VGG16Features(nn.Module):
    """(N, 3, H, W), RGB in 0..1 -> the features V_1 ... V_count, frozen.

    weights: a file of torchvision's VGG-16, or that of stlpips-pytorch (its wheel, or the .pth in
    it); None takes the latter from where pip has installed it (`pip install --no-deps
    stlpips-pytorch`). stlpips' network is a stand-in for the papers' VGG-16: it was trained on for
    LPIPS, and its pools are shift-tolerant: the largest of 2 x 2 pixels at every place, reflected
    by 2 pixels at the sides, under [1 2 1] x [1 2 1] / 16 at every second one. It has weights theta
    of LPIPS (`theta`, a tensor a block; None in torchvision's file).

    Images are normalised by ImageNet's mean and standard deviation unless normalise=False."""

    def __init__(
        self,
        weights: str | os.PathLike | None = None,
        count: int = 5,
        normalise: bool = True,
    ):
        super().__init__()
        state = _read(weights)
        self.blur = any(name.endswith(".filt") for name in state)
        self.normalise = normalise
        convolutions = [
            (state[name], state[name.replace("weight", "bias")])
            for name in state
            if name.startswith(("features.", "net.slice")) and name.endswith(".weight")
        ]
        shapes = [tuple(weight.shape) for weight, _ in convolutions]
        outputs = [n for block in _BLOCKS for n in block]
        if shapes != [(o, i, 3, 3) for i, o in zip((3, *outputs), outputs)]:
            raise RuntimeError(
                "pywino.losses.VGG16Features: weights must be those of VGG-16's 13 convolutions, "
                f"got {len(shapes)} others; give torchvision's file or stlpips-pytorch's"
            )
        self.blocks = nn.ModuleList()
        given = iter(convolutions)
        for block in _BLOCKS[:count]:
            layers = nn.Sequential()
            for _ in block:
                weight, bias = next(given)
                convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
                convolution.load_state_dict({"weight": weight, "bias": bias})
                layers.extend((convolution, nn.ReLU()))
            self.blocks.append(layers)
        thetas = [state.get(f"lin{i}.model.1.weight") for i in range(count)]
        self.theta = None if thetas[0] is None else thetas
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filter", line[:, None] * line, persistent=False)
        for name, values in (("mean", _MEAN), ("std", _STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = (images - self.mean) / self.std if self.normalise else images
        features = []
        for i, block in enumerate(self.blocks):
            if i:
                x = self._blur_pool(x) if self.blur else F.max_pool2d(x, 2)
            x = block(x)
            features.append(x)
        return features

    def _blur_pool(self, x: Tensor) -> Tensor:
        x = F.pad(F.max_pool2d(x, 2, stride=1), (2, 2, 2, 2), mode="reflect")
        filters = self.filter.expand(x.shape[1], 1, 3, 3)
        return F.conv2d(x, filters, stride=2, groups=x.shape[1])


def _read(weights) -> dict[str, Tensor]:
    if weights is None:
        found = find_spec("stlpips_pytorch")
        if found is None:
            raise FileNotFoundError(
                "pywino.losses: weights must name a file of VGG-16, or stlpips-pytorch must be "
                "installed; type `pip install --no-deps stlpips-pytorch`"
            )
        weights = Path(found.submodule_search_locations[0]).parent / _STLPIPS
    path = Path(weights)
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                content = io.BytesIO(wheel.read(_STLPIPS))
        else:
            content = path
        return torch.load(content, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file makes the readers raise almost anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"pywino.losses: {path} cannot be read as weights of VGG-16 ({reason})"
        ) from error


class PerceptualContrastiveLoss(nn.Module):
    """loss(restored x, clean gt, degraded y), each (N, 3, H, W) in 0..1:

        L = sum over i of  w_i L1(V_i(x), V_i(gt)) / (L1(V_i(x), V_i(y)) + 10^-7)

    with w = 1/32, 1/16, 1/8, 1/4 for the first four features and L1 the mean absolute difference.
    It draws x to gt and pushes it from y (Wu et al., CVPR 2021).

    faithful: as published, images are not normalised, and the sum is taken 4 times."""

    WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)

    def __init__(self, weights: str | os.PathLike | None = None, faithful: bool = False):
        super().__init__()
        self.features = VGG16Features(weights, len(self.WEIGHTS), normalise=not faithful)
        self.factor = 4 if faithful else 1

    def forward(self, restored: Tensor, clean: Tensor, degraded: Tensor) -> Tensor:
        of_restored = self.features(restored)
        with torch.no_grad():
            of_clean, of_degraded = self.features(clean), self.features(degraded)
        terms = [
            weight * F.l1_loss(x, gt) / (F.l1_loss(x, y) + 1e-7)
            for weight, x, gt, y in zip(self.WEIGHTS, of_restored, of_clean, of_degraded)
        ]
        return self.factor * sum(terms)


class PerceptualSimilarityLoss(nn.Module):
    """Learned perceptual image similarity: loss(restored x, clean gt, degraded); the third is not
    used.

        L = sum over i of  mean over h, w of  sum over c of  theta_ic (n_i(x) - n_i(gt))^2

    with n_i(x) = V_i(x) / |V_i(x)|, the norm over channels; the mean over images. theta are the
    weights of LPIPS (Zhang et al., CVPR 2018), or 1 / channels where the file of the network has
    none. The value is LPIPS.

    faithful: as the published code, of the first image alone, as a number without a gradient, times
    10, with both images turned into (max - x) / (max - min) and scaled to 256 x 256. The code takes
    LPIPS's AlexNet there; VGG-16 stands in for it."""

    def __init__(self, weights: str | os.PathLike | None = None, faithful: bool = False):
        super().__init__()
        self.features = VGG16Features(weights)
        self.faithful = faithful
        thetas = self.features.theta
        for i, block in enumerate(_BLOCKS):
            channels = block[-1]
            theta = torch.full((channels,), 1 / channels) if thetas is None else thetas[i].flatten()
            self.register_buffer(f"theta{i}", theta.view(-1, 1, 1), persistent=False)

    def forward(self, restored: Tensor, clean: Tensor, degraded: Tensor | None = None) -> Tensor:
        if not self.faithful:
            return self._distance(restored, clean)
        with torch.no_grad():
            images = [
                F.interpolate(_turned(x[:1]), (256, 256), mode="bilinear")
                for x in (restored, clean)
            ]
            return 10 * self._distance(*images)

    def _distance(self, x: Tensor, gt: Tensor) -> Tensor:
        of_x = self.features(x)
        with torch.no_grad():
            of_gt = self.features(gt)
        total = x.new_zeros(())
        for i, pair in enumerate(zip(of_x, of_gt)):
            a, b = (f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in pair)
            theta = getattr(self, f"theta{i}")
            total = total + (theta * (a - b) ** 2).sum(1).mean()
        return total


def _turned(x: Tensor) -> Tensor:
    return (x.max() - x) / (x.max() - x.min()).clamp_min(1e-7)
