# SPDX-License-Identifier: BSD-3-Clause
"""Hand-written convolution kernels for PyTorch.

    import pywino
    pywino.swap_(model, pywino.Winograd())          # your model, faster
    layer = pywino.WinogradConv2d(64, 64, 3, padding=1)
    y = pywino.conv2d(x, weight, bias, padding=1)   # takes what F.conv2d takes

``python -m pywino`` says what runs on this machine, and why the rest does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. They are imported at first use, so that `import pywino` stays quick.
_HOMES = {
    "conv2d": "pywino.functional",
    "sparse_conv2d": "pywino.functional",
    "winograd_relu_conv2d": "pywino.functional",
    "SparseConv2d": "pywino.nn",
    "WinogradConv2d": "pywino.nn",
    "WinogradReLUConv2d": "pywino.nn",
    "freeze_": "pywino.nn.winograd",
    "invalidate_": "pywino.nn.winograd",
    "Sparse": "pywino.swap",
    "Winograd": "pywino.swap",
    "WinogradReLU": "pywino.swap",
    "convert_": "pywino.swap",
    "explain": "pywino.swap",
    "fuse_": "pywino.swap",
    "plan": "pywino.swap",
    "prune_": "pywino.pruning",
    "restore_": "pywino.swap",
    "swap_": "pywino.swap",
}
_MODULES = frozenset(
    {"backends", "functional", "models", "nn", "ops", "planner", "reference", "swap", "testing"}
    | {"pruning"}
)

__all__ = [*sorted(_HOMES), "__version__", "backends", "testing"]

if TYPE_CHECKING:
    from pywino import (
        backends,
        functional,
        models,
        nn,
        ops,
        planner,
        pruning,
        reference,
        swap,
        testing,
    )
    from pywino.functional import conv2d, sparse_conv2d, winograd_relu_conv2d
    from pywino.nn import SparseConv2d, WinogradConv2d, WinogradReLUConv2d
    from pywino.nn.winograd import freeze_, invalidate_
    from pywino.pruning import prune_
    from pywino.swap import (
        Sparse,
        Winograd,
        WinogradReLU,
        convert_,
        explain,
        fuse_,
        plan,
        restore_,
        swap_,
    )


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        importlib.import_module("pywino._native").warn_once()
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value  # the next access does not come here
        return value
    if name in _MODULES:
        return importlib.import_module(f"pywino.{name}")
    raise AttributeError(f"module 'pywino' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})


def _register_ops() -> None:
    """Makes torch.ops.pywino.* exist. Without torch nothing works but `pywino doctor`."""
    try:
        import torch
    except (ImportError, OSError):
        return  # every public name raises torch's own error
    importlib.import_module("pywino.ops")


_register_ops()
