# SPDX-License-Identifier: BSD-3-Clause
"""The weighted average of probabilities: by hand, chosen on a grid, saved as one model."""

import pytest
import torch
from torch import nn

from pywino.models import WeightedAverageStack, load_weights
from pywino.models.stack import _simplex


class Fixed(nn.Module):
    """Logits that do not depend on the input but for its number."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits[x.long().flatten()]


P = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
Q = torch.tensor([[0.1, 0.3, 0.6], [0.5, 0.4, 0.1]])


def stack():
    return WeightedAverageStack([Fixed(P.log().tolist()), Fixed(Q.log().tolist())])


def test_probabilities_are_averaged():
    model = stack()
    x = torch.arange(2)
    torch.testing.assert_close(model(x).exp(), (P + Q) / 2)
    model.weights.copy_(torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(model(x).exp(), 0.25 * P + 0.75 * Q)
    model.weights.copy_(torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(model(x).exp(), P)


def test_fit_finds_the_right_member():
    model = stack()
    x = torch.arange(2)
    assert model.fit_([(x[:1], torch.tensor([0])), (x[1:], torch.tensor([2]))]) == 1.0
    assert model.weights.tolist() == [1.0, 0.0]
    assert model.fit_([(x, torch.tensor([2, 0]))]) == 1.0
    assert model.weights.tolist() == [0.0, 1.0]


def test_fit_prefers_accuracy_and_then_probability():
    """True class 0. Image 0 is right for 0.3 + 0.3 w > 0.5, w > 2/3, and image 1 for
    0.7 - 0.3 w > 0.5, w < 2/3. Image 1 counts twice, so w < 2/3 is better; among these
    log(0.3 + 0.3 w) + 2 log(0.7 - 0.3 w) is highest at w = 1/9, on the grid at 0.1."""
    first = torch.tensor([[0.6, 0.4], [0.4, 0.6]])
    second = torch.tensor([[0.3, 0.7], [0.7, 0.3]])
    model = WeightedAverageStack([Fixed(first.log().tolist()), Fixed(second.log().tolist())])
    labels = torch.zeros(3, dtype=torch.long)
    assert model.fit_([(torch.tensor([0, 1, 1]), labels)]) == pytest.approx(2 / 3)
    assert model.weights.tolist() == [0.1, 0.9]
    assert model.fit_([(torch.tensor([0, 0, 1]), labels)]) == pytest.approx(2 / 3)
    assert model.weights[0] > 2 / 3


def test_simplex():
    assert list(_simplex(1, 20)) == [[1.0]]
    assert list(_simplex(2, 2)) == [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    grid = list(_simplex(3, 20))
    assert len(grid) == 231
    assert len({tuple(weights) for weights in grid}) == 231
    assert all(sum(weights) == pytest.approx(1) for weights in grid)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_saves_and_loads_as_one_model(tmp_path, suffix):
    from safetensors.torch import save_file

    model = stack()
    model.weights.copy_(torch.tensor([0.35, 0.65]))
    path = tmp_path / f"stack{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    loaded = WeightedAverageStack([Fixed([[0.0] * 3] * 2), Fixed([[0.0] * 3] * 2)])
    load_weights(loaded, path)
    assert torch.equal(loaded(torch.arange(2)), model(torch.arange(2)))


def test_fit_leaves_the_mode():
    model = WeightedAverageStack([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))])
    model.train()
    model.members[0][1].eval()
    before = model.members[0][1].running_mean.clone()
    model.fit_([(torch.randn(3, 2), torch.zeros(3, dtype=torch.long))])
    assert model.training
    assert not model.members[0][1].training
    assert torch.equal(model.members[0][1].running_mean, before)


def test_refusals():
    with pytest.raises(ValueError, match="members must be one network or more"):
        WeightedAverageStack([])
    with pytest.raises(ValueError, match=r"step must be 1 divided by a whole number, got 0\.3"):
        stack().fit_([], step=0.3)
    with pytest.raises(ValueError, match="batches must have images"):
        stack().fit_([])
