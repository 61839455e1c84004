# SPDX-License-Identifier: BSD-3-Clause
"""How SAPNet is trained (`pywino train derain`)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pywino import models
from pywino.data.rain import RAIN
from pywino.losses import ssim_loss
from pywino.train.restoration import Learner, RestorationRecipe, option

# Name -> term(restored, clean, degraded).
TERMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ssim": lambda restored, clean, degraded: ssim_loss(restored, clean),
    "l1": lambda restored, clean, degraded: (restored - clean).abs().mean(),
}


@dataclass(frozen=True)
class DerainRecipe(RestorationRecipe):
    """SAPNet on clean photos with synthetic rain, or on pairs. loss: terms, with weights where
    they are not 1, as in ("ssim", "l1:0.5")."""

    rain: str = option("heavy", f"What falls on clean photos: {', '.join(RAIN)}.")
    attention: str = option("cra", "cra, ca, se or none.")
    dilation: tuple[int, ...] = option((1, 2, 4, 8, 16), "Of the residual blocks.")
    stages: int = option(6, "How often the weights are used.")
    loss: tuple[str, ...] = option(("ssim",), f"Terms, TERM or TERM:WEIGHT: {', '.join(TERMS)}.")

    def __post_init__(self):
        super().__post_init__()
        if self.rain not in RAIN:
            self.refuse("rain", f"one of {', '.join(RAIN)}")
        if self.attention not in ("cra", "ca", "se", "none"):
            self.refuse("attention", "cra, ca, se or none")
        if not self.loss or any(name not in TERMS for name, _ in self.terms()):
            self.refuse("loss", f"terms (TERM or TERM:WEIGHT) among {', '.join(TERMS)}")

    def terms(self) -> list[tuple[str, float]]:
        """(name, weight) of each term of the loss."""
        parts = (term.partition(":") for term in self.loss)
        try:
            return [(name, float(weight or 1)) for name, _, weight in parts]
        except ValueError:
            self.refuse("loss", "terms, TERM or TERM:WEIGHT")

    def degrade(self):
        return (RAIN[self.rain],)

    def build(self) -> Learner:
        attention = None if self.attention == "none" else self.attention
        net = self.started(models.sapnet(attention, self.dilation, self.stages))
        net = net.to(memory_format=torch.channels_last)

        def loss(restored, clean, degraded):
            return {n: w * TERMS[n](restored, clean, degraded) for n, w in self.terms()}

        return Learner(net, loss, torch.optim.Adam(net.parameters(), self.lr))
