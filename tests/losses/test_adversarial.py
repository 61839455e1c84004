# SPDX-License-Identifier: BSD-3-Clause
"""The relativistic average GAN: its formulas by hand, its pools, what learns from what."""

import pytest
import torch
from torch import nn

from pywino.losses import RelativisticCritic


def critic(pool=2):
    return RelativisticCritic(nn.Conv2d(3, 1, 1), pool)


def batch(*values):
    return torch.tensor(values).view(-1, 1, 1, 1)


def test_formulas_by_hand():
    judge = critic()
    # Before any prediction the inner means are 0: ((2 - 1)^2 + (3 + 1)^2) / 2.
    assert float(judge.generator_loss(batch(3.0), batch(2.0))) == pytest.approx(8.5)
    # Means 2 and 0: E over (1, 3) of (x - 0 - 1)^2 is 2, over (0, 0) of (z - 2 + 1)^2 is 1.
    assert float(judge.loss(batch(1.0, 3.0), batch(0.0, 0.0))) == pytest.approx(1.5)
    # (1 - 2 - 1)^2 = 4 and (4 - 0 + 1)^2 = 25.
    assert float(judge.generator_loss(batch(4.0), batch(1.0))) == pytest.approx(14.5)


def test_pools_keep_the_last_batches():
    judge = critic(pool=2)
    for real, made in ((5.0, 1.0), (7.0, 3.0), (9.0, 8.0)):
        judge.loss(batch(real), batch(made))
    # Means of the last two: 8 and 5.5. (0 - 8 - 1)^2 = 81 and (0 - 5.5 + 1)^2 = 20.25.
    assert float(judge.generator_loss(batch(0.0), batch(0.0))) == pytest.approx(101.25 / 2)
    again = critic(pool=2)
    again.load_state_dict(judge.state_dict())
    assert float(again.generator_loss(batch(0.0), batch(0.0))) == pytest.approx(101.25 / 2)


def test_gradients():
    """Each side lowers its own loss; the pools hold no graph."""
    torch.manual_seed(0)
    judge, real, made = critic(), 0.5 + torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    for _ in range(3):
        loss = judge.loss(judge(real), judge(made))
        judge.zero_grad()
        loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in judge.parameters() if p.ndim == 4)
    made.requires_grad_()
    judge.generator_loss(judge(real), judge(made)).backward()
    assert made.grad.abs().sum() > 0
    optimizer = torch.optim.Adam(judge.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = judge.loss(judge(real), judge(made.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_refusals():
    with pytest.raises(ValueError, match="RelativisticCritic: pool must be"):
        critic(0)
