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
import pathlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. They are imported at first use, so that `import pywino` stays quick.
_HOMES = {
    "channel_residual_attention": "pywino.functional",
    "conv2d": "pywino.functional",
    "conv_lstm_cell": "pywino.functional",
    "dilated_conv2d": "pywino.functional",
    "masked_conv2d": "pywino.functional",
    "sparse_conv2d": "pywino.functional",
    "winograd_relu_conv2d": "pywino.functional",
    "ChannelResidualAttention": "pywino.nn",
    "ConvLSTMCell": "pywino.nn",
    "DilatedConv2d": "pywino.nn",
    "MaskedConv2d": "pywino.nn",
    "SparseConv2d": "pywino.nn",
    "WinogradConv2d": "pywino.nn",
    "WinogradReLUConv2d": "pywino.nn",
    "freeze_": "pywino.nn.winograd",
    "invalidate_": "pywino.nn.winograd",
    "Attention": "pywino.swap",
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
    | {"data", "metrics", "optim", "pruning", "train"}
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
    from pywino.functional import (
        channel_residual_attention,
        conv2d,
        conv_lstm_cell,
        dilated_conv2d,
        masked_conv2d,
        sparse_conv2d,
        winograd_relu_conv2d,
    )
    from pywino.nn import (
        ChannelResidualAttention,
        ConvLSTMCell,
        DilatedConv2d,
        MaskedConv2d,
        SparseConv2d,
        WinogradConv2d,
        WinogradReLUConv2d,
    )
    from pywino.nn.winograd import freeze_, invalidate_
    from pywino.pruning import prune_
    from pywino.swap import (
        Attention,
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


def _find_kernels() -> None:
    """In a checkout the Triton kernels lie beside this package, in a folder without __init__.py
    (docs/adding_an_op.md says why); a wheel has them inside."""
    folder = pathlib.Path(__file__).resolve().parent.parent / "kernels"
    if not (folder.parent / "pywino" / "kernels").is_dir() and (folder / "winograd.py").is_file():
        package = types.ModuleType("pywino.kernels")
        package.__path__ = [str(folder)]
        sys.modules.setdefault(package.__name__, package)


def _register_ops() -> None:
    """Makes torch.ops.pywino.* exist. Without torch nothing works but `pywino doctor`."""
    try:
        import torch
    except (ImportError, OSError):
        return  # every public name raises torch's own error
    importlib.import_module("pywino.ops")


_find_kernels()
_register_ops()
