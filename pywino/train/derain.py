# SPDX-License-Identifier: BSD-3-Clause
"""How SAPNet is trained (`pywino train derain`)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pywino import losses, models
from pywino.data.rain import RAIN
from pywino.train.fields import option
from pywino.train.restoration import Learner, RestorationRecipe


class _Term(nn.Module):
    """A function of the restored and the clean picture as a module."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, restored: Tensor, clean: Tensor, degraded: Tensor) -> Tensor:
        return self.function(restored, clean)


# Name of a term -> (function of the recipe that builds it, the papers' weight).
TERMS: dict[str, tuple[Callable[..., nn.Module], float]] = {
    "ssim": (lambda recipe: _Term(losses.ssim_loss), 1.0),
    "l1": (lambda recipe: _Term(nn.functional.l1_loss), 1.0),
    "edge": (lambda recipe: losses.EdgeLoss(faithful=recipe.faithful), 0.05),
    "urss": (
        lambda recipe: losses.SegmentationLoss(
            recipe.trunk, on="residual", faithful=recipe.faithful
        ),
        1.0,
    ),
    "ubs": (lambda recipe: losses.SegmentationLoss(recipe.trunk, faithful=recipe.faithful), 0.1),
    "pcl": (lambda recipe: losses.PerceptualContrastiveLoss(recipe.vgg, recipe.faithful), 0.1),
    "lpisl": (lambda recipe: losses.PerceptualSimilarityLoss(recipe.vgg, recipe.faithful), 0.1),
}


@dataclass(frozen=True)
class DerainRecipe(RestorationRecipe):
    """SAPNet on clean photos with synthetic rain, or on pairs.

    loss: terms, with weights where they are not the papers', as in ("ssim", "l1:0.5"): ssim, l1,
    edge, urss and ubs (segmentation of the residual and of the image), pcl (perceptual contrastive)
    and lpisl (learned perceptual similarity). faithful: as the published code has them."""

    rain: str = option("heavy", f"What falls on clean photos: {', '.join(RAIN)}.")
    attention: str = option("cra", "cra, ca, se or none.")
    dilation: tuple[int, ...] = option((1, 2, 4, 8, 16), "Of the residual blocks.")
    stages: int = option(6, "How often the weights are used.")
    loss: tuple[str, ...] = option(("ssim",), f"Terms, TERM or TERM:WEIGHT: {', '.join(TERMS)}.")
    vgg: str | None = option(None, "VGG-16's weights for pcl and lpisl; stlpips-pytorch's if not.")
    trunk: str | None = option(None, "ResNet-101's weights for urss and ubs.")
    faithful: bool = option(False, "Losses as the published code has them.")

    def __post_init__(self):
        super().__post_init__()
        if self.rain not in RAIN:
            self.refuse("rain", f"one of {', '.join(RAIN)}")
        if self.attention not in ("cra", "ca", "se", "none"):
            self.refuse("attention", "cra, ca, se or none")
        names = [name for name, _ in self.terms()]
        if not names or len(set(names)) < len(names) or not set(names) <= set(TERMS):
            self.refuse("loss", f"terms (TERM or TERM:WEIGHT) among {', '.join(TERMS)}, each once")
        if self.trunk is None and {"urss", "ubs"} & set(names):
            self.refuse("trunk", "a file of ResNet-101's weights for urss and ubs")

    def terms(self) -> list[tuple[str, float]]:
        """(name, weight) of each term of the loss."""
        found = []
        for term in self.loss:
            name, _, weight = term.partition(":")
            try:
                found.append((name, float(weight or TERMS.get(name, (None, 1.0))[1])))
            except ValueError:
                self.refuse("loss", "terms, TERM or TERM:WEIGHT")
        return found

    def degrade(self):
        return (RAIN[self.rain],)

    def metadata(self):
        return {"stages": str(self.stages)}

    def build(self) -> Learner:
        attention = None if self.attention == "none" else self.attention
        net = self.started(models.sapnet(attention, self.dilation, self.stages))
        net = net.to(memory_format=torch.channels_last)
        return Learner(net, _Sum(self), self.optimize(net))


class _Sum(nn.Module):
    """The terms of a recipe's loss, weighted."""

    def __init__(self, recipe: DerainRecipe):
        super().__init__()
        self.weights = dict(recipe.terms())
        self.functions = nn.ModuleDict({name: TERMS[name][0](recipe) for name in self.weights})

    def forward(self, restored: Tensor, clean: Tensor, degraded: Tensor) -> dict[str, Tensor]:
        return {
            name: weight * self.functions[name](restored, clean, degraded)
            for name, weight in self.weights.items()
        }
