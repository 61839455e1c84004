# SPDX-License-Identifier: BSD-3-Clause
"""The weighted average of several networks' probabilities."""

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class WeightedAverageStack(nn.Module):
    """log(sum_i w_i softmax(member_i(x))), with weights w_i >= 0 that add up to 1.

    The members are trained on their own; `fit_` then chooses the weights on images that none of
    them was trained on. The output, log-probabilities (N, num_classes), stands where one network's
    logits do: argmax and cross_entropy mean the same. Weights are part of the `state_dict`, so a
    stack is saved and loaded (`load_weights`) as one model."""

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        if len(members) < 1:
            raise ValueError("WeightedAverageStack: members must be one network or more, got none")
        self.members = nn.ModuleList(members)
        count = len(members)
        self.register_buffer("weights", torch.full((count,), 1 / count, dtype=torch.float64))

    def forward(self, input: Tensor) -> Tensor:
        return self._mix([member(input) for member in self.members])

    def _mix(self, outputs):
        together = torch.stack([output.log_softmax(1) for output in outputs])
        weights = self.weights.to(together).log().view(-1, 1, 1)
        return torch.logsumexp(together + weights, 0)

    @torch.no_grad()
    def fit_(self, batches: Iterable[tuple[Tensor, Tensor]], step: float = 0.05) -> float:
        """Chooses the weights from the grid of multiples of `step` (which divides 1) on the
        simplex, and returns the accuracy that they reach.

        batches: (input, labels) of held-out images. Among weights of equal accuracy the higher mean
        log-probability of the true class decides. The members run once, in eval mode."""
        count = round(1 / step) if step > 0 else 0
        if count < 1 or abs(count * step - 1) > 1e-9:
            raise ValueError(
                "WeightedAverageStack.fit_: step must be 1 divided by a whole number, "
                f"got {step!r}; use 0.05"
            )
        was_training = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            pairs = [
                ([member(x).softmax(1).double() for member in self.members], y) for x, y in batches
            ]
        finally:
            for module, training in was_training:
                module.training = training
        if not pairs:
            raise ValueError("WeightedAverageStack.fit_: batches must have images, got none")
        probabilities = [torch.cat(outputs) for outputs in zip(*(outputs for outputs, _ in pairs))]
        labels = torch.cat([y for _, y in pairs])

        def quality(weights):
            mixed = sum(w * p for w, p in zip(weights, probabilities))
            true = mixed.gather(1, labels[:, None]).clamp_min(1e-300)
            right = mixed.argmax(1) == labels
            return float(right.double().mean()), float(true.log().mean())

        best = max(_simplex(len(self.members), count), key=quality)
        self.weights.copy_(torch.tensor(best, dtype=torch.float64))
        return quality(best)[0]


def _simplex(members, count):
    """All weights of `members` that are multiples of 1 / count and add up to 1: the places of
    members - 1 bars among count stars."""
    for bars in itertools.combinations(range(count + members - 1), members - 1):
        edges = (-1, *bars, count + members - 1)
        yield [(b - a - 1) / count for a, b in itertools.pairwise(edges)]
