# SPDX-License-Identifier: BSD-3-Clause
"""What pruning brought, layer by layer: a table, and a picture."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pywino import planner
from pywino.nn.winograd import WinogradConv2d, WinogradReLUConv2d
from pywino.ops import _winograd_domain as domain_ops
from pywino.pruning.specs import NM, Block

CALLS = 5  # of each contender, in turns; the fastest counts


@dataclass
class Layer:
    """One row. Times are seconds of one call, None where nothing was measured.

    sparsity: the part of the weights that is zero.
    blocks: the part of the 16 x 1 blocks that is zero.
    pattern: "dense", "2:4", "16x1 blocks" or "unstructured": the most regular that holds.
    dense: the same layer with every weight: PyTorch's convolution in the spatial domain, pywino's
        dense kernel in the Winograd domain.
    pruned: the layer as it is.
    """

    name: str
    kind: str
    domain: str
    shape: tuple[int, ...]
    sparsity: float
    blocks: float
    pattern: str
    dense: float | None = None
    pruned: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.dense / self.pruned if self.dense and self.pruned else None


class Report:
    """Rows of `Layer`. Prints as a table; `to_dict()` is for JSON, `plot(path)` draws it."""

    def __init__(self, layers: list[Layer]):
        self.layers = layers

    def __iter__(self):
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def to_dict(self) -> dict:
        return {"layers": [asdict(layer) | {"ratio": layer.ratio} for layer in self.layers]}

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        head = ("layer", "kind", "weight", "zeros", "zero blocks", "pattern")
        head += ("dense", "pruned", "ratio")
        table = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
        for row in self.layers:
            cells = (
                row.name or "(root)",
                row.kind,
                "x".join(map(str, row.shape)),
                f"{row.sparsity:.1%}",
                f"{row.blocks:.1%}",
                row.pattern,
                _ms(row.dense),
                _ms(row.pruned),
                f"{row.ratio:.2f}x" if row.ratio else "",
            )
            table.add_row(*map(Text, cells))  # Text: "[0]" in a name is no markup
        out = io.StringIO()
        Console(file=out, width=160, color_system=None).print(table)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def plot(self, path: str) -> None:
        """Draws sparsity, and ratios where they were measured, as bars into a PNG, PDF or SVG."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "pywino.pruning.Report.plot: matplotlib must be installed, got "
                f"{error}; type `pip install matplotlib`"
            ) from error
        measured = any(row.ratio for row in self.layers)
        figure = Figure(figsize=(8, 1 + 0.3 * len(self.layers)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2 if measured else 1, sharey=True, squeeze=False)[0]
        names = [row.name or "(root)" for row in self.layers]
        axes[0].barh(names, [row.sparsity for row in self.layers])
        axes[0].invert_yaxis()
        axes[0].set(xlabel="zeros", xlim=(0, 1))
        if measured:
            axes[1].barh(names, [row.ratio or 0 for row in self.layers])
            axes[1].axvline(1, color="black", linewidth=0.8)
            axes[1].set(xlabel="dense time / pruned time")
        figure.savefig(path)


def report(model: nn.Module, example: Any = None) -> Report:
    """Sparsity and pattern of every convolution of `model`, and with an example what it brings.

    example: an input of the model (a tensor, a tuple of arguments or a dict of keyword arguments).
        The model is called once in eval mode without gradients, then each layer on the input that
        it got. Times of layers that the example does not reach stay None.
    """
    kinds = (nn.Conv2d, WinogradReLUConv2d)
    layers = {m: name for name, m in model.named_modules() if isinstance(m, kinds)}
    rows = {module: _describe(module, name) for module, name in layers.items()}
    if example is None:
        return Report(list(rows.values()))
    inputs = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args: inputs.setdefault(module, args[0]))
        for module in layers
    ]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            if isinstance(example, dict):
                model(**example)
            else:
                model(*example if isinstance(example, (tuple, list)) else (example,))
            for hook in hooks:
                hook.remove()
            for module, input in inputs.items():
                row = rows[module]
                row.dense, row.pruned = _time(
                    _dense(module, input),
                    lambda: module(input),  # noqa: B023
                    input.device.type,
                )
    finally:
        for hook in hooks:
            hook.remove()
        for module, was in training.items():
            module.training = was
    return Report(list(rows.values()))


def _is_spatial(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and getattr(module, "domain", "spatial") == "spatial"


def _describe(module: nn.Module, name: str) -> Layer:
    domain = "spatial" if _is_spatial(module) else "winograd"
    weight = _weight(module).detach()
    kept = weight.count_nonzero().item() / max(1, weight.numel())
    blocks = Block(0)._means((weight != 0).float(), domain).ne(0).float().mean().item()
    if kept > 0.999:
        pattern = "dense"
    elif NM(2, 4).violation(weight, domain) is None and kept > 0.4:
        pattern = "2:4"
    elif kept > 0.9 * blocks:  # what is kept fills its blocks
        pattern = "16x1 blocks"
    else:
        pattern = "unstructured"
    kind = type(module).__name__
    return Layer(name, kind, domain, tuple(weight.shape), 1 - kept, 1 - blocks, pattern)


def _weight(module: nn.Module) -> Tensor:
    in_domain = isinstance(module, WinogradConv2d) and module.domain == "winograd"
    return module.winograd_weight if in_domain else module.weight


def _dense(module: nn.Module, input: Tensor):
    """The call of the layer with all its weights."""
    weight = _weight(module)
    if _is_spatial(module):
        return lambda: nn.Conv2d.forward(module, input)
    # A twin with the same weight, packed once with its zeros.
    relu = isinstance(module, WinogradReLUConv2d)
    return domain_ops.dense_call(input, weight, module.bias, module.padding, module.dilation, relu)


def _time(dense, pruned, device: str) -> tuple[float | None, float]:
    runs = {"dense": dense, "pruned": pruned} if dense else {"pruned": pruned}
    for run in runs.values():
        run()
    best = planner.race(runs, CALLS, device)
    return best.get("dense"), best["pruned"]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f} ms"
