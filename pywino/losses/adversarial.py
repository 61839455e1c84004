# SPDX-License-Identifier: BSD-3-Clause
"""The relativistic average least-squares GAN (Jolicoeur-Martineau, ICLR 2019), as DeblurGAN-v2 and
Deblur-YOLO use it.

A discriminator D says by how much an image is more real than the other kind is on average. With
real images x, made ones z, and E the mean:

    L_D = (E (D(x) - E D(z) - 1)^2 + E (D(z) - E D(x) + 1)^2) / 2
    L_G = (E (D(z) - E D(x) - 1)^2 + E (D(x) - E D(z) + 1)^2) / 2

The inner means are those of the last 50 batches, from a pool. (The slides of Deblur-YOLO print L_G
with the generator in the place of D; this is what is meant.)
"""

import torch
from torch import Tensor, nn


class RelativisticCritic(nn.Module):
    """A discriminator and the pools of its predictions; all of it is in the state_dict.

    discriminator: (N, 3, H, W) -> any shape. pool: batches that an inner mean is taken over."""

    def __init__(self, discriminator: nn.Module, pool: int = 50):
        super().__init__()
        if not isinstance(pool, int) or pool < 1:
            raise ValueError(
                f"pywino.losses.RelativisticCritic: pool must be an integer >= 1, got {pool!r}"
            )
        self.discriminator = discriminator
        self.register_buffer("real", torch.zeros(pool))
        self.register_buffer("made", torch.zeros(pool))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        """The predictions."""
        return self.discriminator(images)

    def loss(self, real: Tensor, made: Tensor) -> Tensor:
        """L_D of two batches' predictions, which the pools take first."""
        with torch.no_grad():
            place = int(self.seen) % len(self.real)
            self.real[place], self.made[place] = real.mean(), made.mean()
            self.seen += 1
        mean_real, mean_made = self._means()
        return ((real - mean_made - 1).square().mean() + (made - mean_real + 1).square().mean()) / 2

    def generator_loss(self, real: Tensor, made: Tensor) -> Tensor:
        """L_G of two batches' predictions. Until the pools have some, the inner means are 0."""
        mean_real, mean_made = self._means()
        return ((made - mean_real - 1).square().mean() + (real - mean_made + 1).square().mean()) / 2

    def _means(self):
        count = max(1, min(int(self.seen), len(self.real)))
        return self.real[:count].mean(), self.made[:count].mean()
