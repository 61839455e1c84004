# SPDX-License-Identifier: BSD-3-Clause
"""What is to be pruned: one frozen dataclass a pattern.

A weight is (K, C, r, r): output channels, input channels, then the positions of a filter, spatial
ones or those of the Winograd domain. A mask is a bool tensor of its shape, True where the weight is
kept. A spec makes masks (`masks`) and finds the first filter that lacks its pattern (`violation`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

DOMAINS = ("spatial", "winograd")


def _check_sparsity(spec: str, sparsity: object) -> None:
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not number or not 0 <= sparsity < 1:
        raise RuntimeError(
            f"pywino.pruning.{spec}: sparsity must be a number in [0, 1), got {sparsity!r}; "
            "0.8 prunes 80 %"
        )


def _lowest(scores: Tensor, sparsity: float) -> Tensor:
    """True but at the `sparsity` of all entries with the lowest scores, the first of equal ones. At
    least one entry stays."""
    flat = scores.flatten()
    count = min(round(sparsity * flat.numel()), flat.numel() - 1)
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[flat.argsort(stable=True)[:count]] = False
    return keep.reshape(scores.shape)


def _scores(weight: Tensor, mask: Tensor | None) -> Tensor:
    """|w|, and -1 where the mask has pruned already: what is pruned stays so."""
    scores = weight.detach().abs().float()
    return scores if mask is None else scores.masked_fill(~mask, -1)


def _too_dense(weight: Tensor, sparsity: float) -> str | None:
    zeros = weight.numel() - int(weight.count_nonzero())
    wanted = min(round(sparsity * weight.numel()), weight.numel() - 1)
    if zeros < wanted:
        return f"{zeros} of {weight.numel()} weights are zero, fewer than {wanted}"
    return None


@dataclass(frozen=True)
class Magnitude:
    """The smallest weights, wherever they are (Han et al., NeurIPS 2015).

    sparsity: the part that is pruned, in [0, 1).
    scope: "layer" prunes that part of every layer, "global" of all layers together, so that some
        layers lose more than others.
    """

    sparsity: float
    scope: str = "layer"

    def __post_init__(self):
        _check_sparsity("Magnitude", self.sparsity)
        if self.scope not in ("layer", "global"):
            raise RuntimeError(
                "pywino.pruning.Magnitude: scope must be 'layer' or 'global', "
                f"got {self.scope!r}; use 'layer'"
            )

    def masks(self, weights: dict[str, Tensor], masks: dict[str, Tensor], domain: str):
        scores = {name: _scores(w, masks.get(name)) for name, w in weights.items()}
        if self.scope == "layer":
            return {name: _lowest(s, self.sparsity) for name, s in scores.items()}
        every = torch.cat([s.flatten() for s in scores.values()])
        parts = _lowest(every, self.sparsity).split([s.numel() for s in scores.values()])
        return {name: part.reshape(s.shape) for (name, s), part in zip(scores.items(), parts)}

    def violation(self, weight: Tensor, domain: str) -> tuple[int, str] | None:
        if self.scope == "global":
            return None  # nothing holds for one layer
        text = _too_dense(weight, self.sparsity)
        if text is None:
            return None
        densest = weight.flatten(1).count_nonzero(1).argmax()
        return int(densest), text


@dataclass(frozen=True)
class NM:
    """At most n of every m consecutive input channels, the largest (2:4 is `NM(2, 4)`; Mishra et
    al., 2021).

    Groups start at input channel 0 of each output channel and filter position; where C is no
    multiple of m, the last group is shorter.
    """

    n: int
    m: int

    def __post_init__(self):
        integers = isinstance(self.n, int) and isinstance(self.m, int)
        if not integers or not 1 <= self.n < self.m:
            raise RuntimeError(
                "pywino.pruning.NM: n and m must be integers with 1 <= n < m, "
                f"got {self.n!r} and {self.m!r}; NM(2, 4) keeps two of four"
            )

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def _groups(self, values: Tensor, fill: float) -> Tensor:
        """(K, C, r, r) -> (K, r, r, groups, m)"""
        values = values.permute(0, 2, 3, 1)
        values = F.pad(values, (0, -values.shape[-1] % self.m), value=fill)
        return values.unflatten(-1, (-1, self.m))

    def masks(self, weights: dict[str, Tensor], masks: dict[str, Tensor], domain: str):
        return {name: self._mask(_scores(w, masks.get(name))) for name, w in weights.items()}

    def _mask(self, scores: Tensor) -> Tensor:
        groups = self._groups(scores, -2)
        order = groups.sort(dim=-1, descending=True, stable=True).indices
        keep = torch.zeros_like(groups, dtype=torch.bool)
        keep.scatter_(-1, order[..., : self.n], True)
        return keep.flatten(-2)[..., : scores.shape[1]].permute(0, 3, 1, 2).contiguous()

    def violation(self, weight: Tensor, domain: str) -> tuple[int, str] | None:
        kept = self._groups((weight.detach() != 0).float(), 0).sum(-1)
        over = (kept > self.n).nonzero()
        if not len(over):
            return None
        k, i, j, group = over[0].tolist()
        return k, (
            f"{int(kept[k, i, j, group])} of the {self.m} input channels from {group * self.m} at "
            f"position ({i}, {j}) are not zero, more than {self.n}"
        )


@dataclass(frozen=True)
class Block:
    """Whole blocks of weights, those of the smallest mean square.

    sparsity: the part of the blocks that is pruned, in [0, 1).
    block: (output channels, input channels). In the spatial domain a block has their whole r x r
        filters, in the Winograd domain one position of each. Blocks at the ends are smaller where
        the channels are no multiple.
    """

    sparsity: float
    block: tuple[int, int] = (16, 1)

    def __post_init__(self):
        _check_sparsity("Block", self.sparsity)
        good = isinstance(self.block, tuple) and len(self.block) == 2
        if not good or not all(isinstance(b, int) and b >= 1 for b in self.block):
            raise RuntimeError(
                "pywino.pruning.Block: block must be two integers >= 1, "
                f"got {self.block!r}; the kernels skip blocks of (16, 1)"
            )

    def _means(self, values: Tensor, domain: str) -> Tensor:
        """Means over blocks: (K', C', 1, 1), in the Winograd domain (K', C', a, a)."""
        if domain == "spatial":
            values = values.mean((2, 3), keepdim=True)
        columns = values.permute(2, 3, 0, 1)
        pooled = F.avg_pool2d(
            columns.flatten(0, 1).unsqueeze(1),
            self.block,
            self.block,
            ceil_mode=True,
            count_include_pad=False,
        )
        return pooled.reshape(*columns.shape[:2], *pooled.shape[2:]).permute(2, 3, 0, 1)

    def _spread(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        for axis, size in enumerate(self.block):
            blocks = blocks.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
        return blocks.expand(shape).contiguous()

    def masks(self, weights: dict[str, Tensor], masks: dict[str, Tensor], domain: str):
        return {name: self._mask(w, masks.get(name), domain) for name, w in weights.items()}

    def _mask(self, weight: Tensor, mask: Tensor | None, domain: str) -> Tensor:
        scores = self._means(weight.detach().float().square(), domain)
        if mask is not None:
            scores = scores.masked_fill(self._means(mask.float(), domain) == 0, -1)
        return self._spread(_lowest(scores, self.sparsity), weight.shape)

    def violation(self, weight: Tensor, domain: str) -> tuple[int, str] | None:
        zero = self._means((weight.detach() != 0).float(), domain) == 0
        wanted = min(round(self.sparsity * zero.numel()), zero.numel() - 1)
        if int(zero.sum()) >= wanted:
            return None
        densest = int(zero.flatten(1).sum(1).argmin()) * self.block[0]
        size = "x".join(map(str, self.block))
        return densest, (
            f"{int(zero.sum())} of {zero.numel()} {size} blocks are zero, fewer than {wanted}"
        )


SPECS = (Magnitude, NM, Block)


def check_spec(op: str, spec: object) -> None:
    if not isinstance(spec, SPECS):
        names = ", ".join(f"pywino.pruning.{kind.__name__}(...)" for kind in SPECS)
        hint = " (an instance, not the class)" if isinstance(spec, type) else ""
        raise TypeError(f"pywino.{op}: spec must be one of {names}, got {spec!r}{hint}")


def check_domain(op: str, domain: object) -> None:
    if domain not in DOMAINS:
        raise RuntimeError(
            f"pywino.{op}: domain must be 'spatial' or 'winograd', got {domain!r}; use 'spatial'"
        )
