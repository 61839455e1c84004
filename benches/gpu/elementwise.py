# SPDX-License-Identifier: BSD-3-Clause
"""The ops without a convolution of their own, channel attention and the LSTM cell: each backend's
kernel against PyTorch's composition, eager and compiled."""

import torch
from gpu import timing
from gpu.calls import LAYOUTS, MODES, ends
from layers import Layer

import pywino
from pywino import backends
from pywino.reference import channel_attention as attention_reference
from pywino.reference import conv_lstm as cell_reference
from pywino.testing import relative_l2

# The tensor is (n, c, h, w) of the layer, c channels of a state for the cell.
LAYER_NAMES = ("sap-32x481x321-d4", "resnet-64x56-b32", "vgg-512x28-b32")
ATTENTION, CELL = "channel attention", "LSTM cell"
KINDS = tuple(f"{op} {step}" for op in (ATTENTION, CELL) for step in ("forward", "training"))
# Relative L2 error of sums and gates in fp32; 16-bit tensors are rounded once beside that.
LIMITS = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def tensors(layer: Layer, kind: str, mode: str, layout: str, device: str):
    """(x, w1, w2, w3, residual), or (gates, cell)."""
    dtype, _ = MODES[mode]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):
        x = torch.randn(size, generator=generator, device=device).to(dtype)
        return x.contiguous(memory_format=LAYOUTS[layout]) if len(size) == 4 else x

    n, c, h, w = layer.n, layer.c, layer.h, layer.w
    if kind.startswith(CELL):
        return normal(n, 4 * c, h, w), normal(n, c, h, w)
    r = max(c // 16, 2)
    weights = (normal(*size) / c**0.5 for size in ((r, c), (c, r), (c, c)))
    return normal(n, c, h, w), *weights, normal(n, c, h, w)


def candidates(layer: Layer, kind: str, mode: str, layout: str, device: str) -> list[str]:
    """Backends with a kernel for the call."""
    op = "conv_lstm_cell" if kind.startswith(CELL) else "channel_residual_attention"
    sizes = (layer.n, layer.c, layer.h, layer.w, layer.c)
    last = layout == "channels_last"
    call = backends.Call(op, *sizes, (0, 0), (1, 1), MODES[mode][0], last, device, kernel=(1, 1))
    return [name for name in backends.of_device(device) if backends.can_run(name, call) is None]


def ours(kind: str, backend: str):
    """A function of `tensors(…)`."""
    if kind.startswith(CELL):
        return lambda a, c: torch.ops.pywino.conv_lstm_cell(a, c, backend)[0]
    return lambda x, w1, w2, w3, residual: pywino.channel_residual_attention(
        x, w1, w2, w3, activation="relu", residual=residual, residual_activation="relu",
        backend=backend,
    )  # fmt: skip


def composed(kind: str):
    """The same in PyTorch."""
    if kind.startswith(CELL):
        return lambda a, c: cell_reference.pointwise(a, c)[0]
    return lambda x, w1, w2, w3, residual: attention_reference.channel_residual_attention(
        x, w1, w2, w3, None, None, residual, "relu", "relu"
    )


def trained(function):
    """All gradients of a function."""

    def run(*arguments):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in arguments]
            y = function(*leaves)
            return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return run


def errors(kind: str, backend: str, arguments) -> tuple[float, float]:
    """Ours and PyTorch's, of the output and, for training, of the input's gradient; the first and
    the last image."""
    first = [ends(t) if t.dim() == 4 else t for t in arguments]
    functions = [ours(kind, backend), composed(kind)]
    if kind.endswith("training"):
        functions = [lambda *a, f=f: trained(f)(*a)[0] for f in functions]
    exact = functions[1](*(t.double() for t in first))
    return tuple(relative_l2(function(*first), exact) for function in functions)


def measure(clock, layer, kind, mode, layout, backend, samples) -> dict:
    """A row: the error, then the times in turn."""
    arguments = tensors(layer, kind, mode, layout, clock.device)
    error, theirs = errors(kind, backend, arguments)
    limit = max(LIMITS[MODES[mode][0]], 2.5 * theirs)
    found = {"error": error, "eager_error": theirs, "limit": limit}
    if not error <= limit:
        return {**found, "wrong": True}
    functions = {"ours": ours(kind, backend), "eager": composed(kind)}
    # Compiling takes a C++ compiler and Triton, and long; the dry run has no time for it.
    if clock.device == "cuda":
        functions["compiled"] = torch.compile(functions["eager"])
    training = kind.endswith("training")
    if training:
        functions = {name: trained(function) for name, function in functions.items()}
    contenders = {name: (function, arguments) for name, function in functions.items()}
    times = timing.compare(clock, contenders, samples, graphs=not training)
    return {**found, "wrong": False, "times": times}
