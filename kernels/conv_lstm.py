# SPDX-License-Identifier: BSD-3-Clause
"""The pointwise part of a convolutional LSTM cell in Triton: c' = sigma(a_f) c + sigma(a_i)
tanh(a_g), h' = sigma(a_o) tanh(c'), and its gradients. The maths is in docs/conv_lstm.md.

One pass, a thread for each number of a state: 4 gates and c are read, h' and c' written, 7 e bytes
for elements of e; backward reads 7 (the gates, c, dh', dc') and writes 5. The eager composition is
22 e forward. No time of these kernels was measured on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pywino.kernels.launch import jit, on_device_of

try:
    import triton
    import triton.language as tl
except ImportError:  # the module can be imported; its functions say what is missing
    triton = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 1024


@jit
def _tanh(x):
    """1 - 2 / (e^2x + 1), which cancels near 0: there an odd polynomial (Cephes)."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return tl.where(z < 0.390625, p * z * x + x, 1 - 2 / (tl.exp(2 * x) + 1))


@jit
def _places(inner, count, BLOCK: tl.constexpr):
    """(numbers of the states, those of a_i, mask). `inner` numbers of a gate lie side by side: C in
    channels_last, else C H W."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at // inner * (4 * inner) + at % inner, at < count


@jit
def _load(tensor, at, within):
    return tl.load(tensor + at, mask=within, other=0).to(tl.float32)


@jit
def _activations(gates, at, inner, within):
    i = tl.sigmoid(_load(gates, at, within))
    f = tl.sigmoid(_load(gates, at + inner, within))
    g = _tanh(_load(gates, at + 2 * inner, within))
    o = tl.sigmoid(_load(gates, at + 3 * inner, within))
    return i, f, g, o


@jit
def _store(tensor, at, x, within):
    tl.store(tensor + at, x.to(tensor.dtype.element_ty), mask=within)


@jit
def _cell(gates, cell, hidden, next_cell, inner, count, BLOCK: tl.constexpr):
    at, gate, within = _places(inner, count, BLOCK)
    i, f, g, o = _activations(gates, gate, inner, within)
    c = i * g
    if cell is not None:
        c += f * _load(cell, at, within)
    _store(next_cell, at, c, within)
    _store(hidden, at, o * _tanh(c), within)


@jit
def _cell_gradient(
    grad_hidden, grad_next_cell, gates, cell, grad_gates, grad_cell, inner, count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at, gate, within = _places(inner, count, BLOCK)
    i, f, g, o = _activations(gates, gate, inner, within)
    if cell is None:
        c = tl.zeros((BLOCK,), tl.float32)
    else:
        c = _load(cell, at, within)
    t = _tanh(f * c + i * g)
    dh = _load(grad_hidden, at, within)
    e = _load(grad_next_cell, at, within) + dh * o * (1 - t * t)
    _store(grad_gates, gate, e * g * i * (1 - i), within)
    _store(grad_gates, gate + inner, e * c * f * (1 - f), within)
    _store(grad_gates, gate + 2 * inner, e * i * (1 - g * g), within)
    _store(grad_gates, gate + 3 * inner, dh * t * o * (1 - o), within)
    _store(grad_cell, at, e * f, within)


# --- launching ---


def _launch(kernel, grid, *arguments, warps=4, **constants):
    kernel[grid](*arguments, **constants, num_warps=warps)


def _state(gates):
    """(an empty state, how many numbers of a gate lie side by side)."""
    n, c, h, w = gates.shape
    last = not gates.is_contiguous() and gates.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    size = (n, c // 4, h, w)
    state = torch.empty(size, dtype=gates.dtype, device=gates.device, memory_format=memory_format)
    return state, c // 4 if last else c // 4 * h * w


def forward(gates: Tensor, cell: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h', c') of gates (N, 4 C, H, W), a_i, a_f, a_g, a_o, and c (N, C, H, W), None for zeros:
    float32, float16 or bfloat16, both contiguous or both channels_last, which the states are too.
    Shi et al., NIPS 2015, without peepholes.
    """
    hidden, inner = _state(gates)
    next_cell = torch.empty_like(hidden)
    with on_device_of(gates):
        arguments = (gates, cell, hidden, next_cell, inner, hidden.numel())
        _launch(_cell, (triton.cdiv(hidden.numel(), BLOCK),), *arguments, BLOCK=BLOCK)
    return hidden, next_cell


def backward(
    grad_hidden: Tensor, grad_cell: Tensor, gates: Tensor, cell: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(gradient of the gates, gradient of c), for those of h' and c': all in one memory format."""
    by_cell, inner = _state(gates)
    by_gates = torch.empty_like(gates)
    with on_device_of(gates):
        arguments = (grad_hidden, grad_cell, gates, cell, by_gates, by_cell, inner)
        grid = (triton.cdiv(by_cell.numel(), BLOCK),)
        _launch(_cell_gradient, grid, *arguments, by_cell.numel(), BLOCK=BLOCK)
    return by_gates, by_cell
