# SPDX-License-Identifier: BSD-3-Clause
"""The layer that skips the zeros of its weight."""

import torch.nn.functional as F
from torch import nn

from pywino.functional.sparse_conv import run_sparse_conv2d
from pywino.nn.winograd import Cached, FilterCache


class SparseConv2d(Cached, nn.Conv2d):
    """A drop-in `torch.nn.Conv2d` with one group, for weights with zeros (`pywino.prune_`).

    Args: those of nn.Conv2d, then
        backend: "auto" (PyTorch's kernel where that is the faster one) | "cpu" | "aten" | "cuda" |
            "triton".
        gradients: "all", or "kept": weights that are zero get none, and whole blocks of them cost
            none on the CPU. For masks that stay (`pywino.pruning.Pruner` holds them).

    Parameters, state_dict and hooks are those of nn.Conv2d: the zeros are in `weight`. Without
    gradients the packed weight is kept until the weight changes."""

    def __init__(self, *args, backend="auto", gradients="all", **kwargs):
        super().__init__(*args, **kwargs)
        self._set_up(backend, gradients)

    def _set_up(self, backend="auto", gradients="all"):
        if self.groups != 1:
            raise RuntimeError(
                f"pywino.SparseConv2d: groups must be 1, got {self.groups}; use torch.nn.Conv2d "
                "for this layer"
            )
        self.backend = backend
        self.gradients = gradients
        self._filters = FilterCache()

    @classmethod
    def from_dense(cls, conv, spec=None):
        """A layer that shares the Parameter objects, hooks and settings of an `nn.Conv2d`.

        spec: a pattern of `pywino.pruning` that the weight must have, or None for any.

        Raises RuntimeError, which names the first offending filter, where it does not have it."""
        found = None if spec is None else spec.violation(conv.weight, "spatial")
        if found is not None:
            raise RuntimeError(
                f"pywino.SparseConv2d.from_dense: the weight must have the pattern of {spec}, got "
                f"filter {found[0]} without it: {found[1]}; prune it with pywino.prune_"
            )
        layer = cls.__new__(cls)
        layer.__dict__.update(conv.__dict__)
        layer._set_up()
        return layer

    def to_dense(self):
        """The `nn.Conv2d` that shares this layer's Parameter objects, hooks and settings."""
        conv = nn.Conv2d.__new__(nn.Conv2d)
        own = ("backend", "gradients", "_filters")
        conv.__dict__.update(
            {name: value for name, value in self.__dict__.items() if name not in own}
        )
        return conv

    def forward(self, input):
        """(N, C, H, W) or (C, H, W) -> nn.Conv2d's output."""
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return run_sparse_conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.backend,
            self.gradients,
            self._filters,
        )

    def extra_repr(self):
        parts = [super().extra_repr()]
        if self.backend != "auto":
            parts.append(f"backend={self.backend}")
        if self.gradients != "all":
            parts.append(f"gradients={self.gradients}")
        return ", ".join(parts)
