# SPDX-License-Identifier: BSD-3-Clause
"""`conv_lstm_cell`: one convolution for all four gates, and one pass for the rest of the cell."""

import torch
from torch.overrides import is_tensor_like

from pywino import backends
from pywino.functional._checks import _refuse, autocasts, check_choice
from pywino.functional._eager import is_plain, wants_gradients
from pywino.functional.winograd import inference_kernel, run_conv2d
from pywino.ops import conv_lstm as ops
from pywino.reference import conv_lstm as reference

_OP = "conv_lstm_cell"


def conv_lstm_cell(
    input, state, weight, bias=None, *, backend="auto", algorithm="auto", precision="default"
):
    """One step of a convolutional LSTM (Shi et al., NIPS 2015, without peepholes):

        a = conv([input, h]);   i, f, g, o = sigma(a_i), sigma(a_f), tanh(a_g), sigma(a_o)
        c' = f c + i g;         h' = o tanh(c')

    Args:
        input: (N, I, H, W), float32, bfloat16, float16 (computed in float32) or float64.
        state: (h, c), each (N, C, H, W), or None for zeros.
        weight: (4 C, I + C, k, k') with odd k and k', the gates in the order i, f, g, o, the
            input's channels first. The convolution keeps H and W by zeros around them.
        bias: (4 C,) or None.
        backend, algorithm, precision: of the convolution, as in `pywino.conv2d`; backend is that
            of the rest, too.

    Returns:
        (h', c'); channels_last iff the input is. Differentiable once.

    Raises:
        RuntimeError, TypeError: arguments that do not fit, and an explicit choice that cannot run.
    """
    return run_conv_lstm_cell(input, state, weight, bias, backend, algorithm, precision)


def run_conv_lstm_cell(
    input, state, weight, bias, backend, algorithm, precision, cache=None, strict=True
):
    """`conv_lstm_cell`, with transformed filters kept in a layer's `FilterCache`."""
    check_choice(_OP, backend, algorithm, precision)
    hidden, cell = _states(state)
    _check(input, hidden, cell, weight, bias)
    if hidden is None:  # its part of the weight meets zeros
        weight = weight[:, : input.shape[1]]
    made = _fused(input, hidden, cell, weight, bias, (backend, algorithm, precision), cache)
    if made is not None:
        return made
    if hidden is not None:
        last = backends.is_channels_last(input)
        format = torch.channels_last if last else torch.contiguous_format
        input = torch.cat((input, hidden.contiguous(memory_format=format)), 1)
    gates = run_conv2d(
        input, weight, bias, None, 1, tuple(k // 2 for k in weight.shape[2:]), 1, 1, None, backend,
        algorithm, precision, cache, strict,
    )  # fmt: skip
    if cell is not None and autocasts(input):
        cell = cell.to(gates.dtype)
    return _pointwise(gates, cell, backend)


def _fused(input, hidden, cell, weight, bias, choice, cache):
    """The whole step in one kernel, which never writes the gates; None where there is none."""
    if tuple(weight.shape[2:]) != (3, 3):
        return None
    channels = len(weight) // 4
    tensors = (input, weight, bias, hidden, cell)
    kernel = inference_kernel(tensors, (1, 1), (1, 1), choice, cache is not None)
    if kernel is None or not kernel.takes_lstm(input, channels):
        return None
    if cache is None:
        filter = kernel.lstm_filter(weight)
    else:
        with torch.no_grad():
            filter = cache.derived(("lstm", kernel), weight, kernel.lstm_filter)
    return kernel.conv_lstm(input, hidden, cell, filter, bias, channels)


def _pointwise(gates, cell, backend):
    if torch.compiler.is_dynamo_compiling():
        return torch.ops.pywino.conv_lstm_cell(gates, cell, backend)
    if not is_plain(gates, cell):
        return reference.pointwise(gates, cell)
    if (
        backend != "aten"
        and not wants_gradients(gates, cell)
        and backends.can_run("cpu", ops.describe(gates)) is None
    ):
        return ops.native_forward(gates, cell)
    return torch.ops.pywino.conv_lstm_cell.default(gates, cell, backend)


def _states(state):
    if state is None:
        return None, None
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        got = f"{len(state)} of them" if isinstance(state, (tuple, list)) else type(state).__name__
        _refuse(_OP, f"state must be (h, c) or None, got {got}; pass both tensors", TypeError)
    return state


def _check(input, hidden, cell, weight, bias):
    tensors = {"input": input, "h": hidden, "c": cell, "weight": weight, "bias": bias}
    for name, tensor in tensors.items():
        if tensor is None and (name == "bias" or hidden is cell is None):
            continue
        if not is_tensor_like(tensor):
            got = f"got {type(tensor).__name__}; pass a torch.Tensor"
            _refuse(_OP, f"{name} must be a tensor, {got}", TypeError)
        if tensor.device != input.device:
            got = f"got {tensor.device}; move it: {name}.to(input.device)"
            _refuse(_OP, f"{name} must be on input's device {input.device}, {got}")
        if tensor.dtype != input.dtype and not autocasts(input):
            got = f"got {tensor.dtype}; convert it: {name}.to(input.dtype)"
            _refuse(_OP, f"{name} must be of input's dtype {input.dtype}, {got}")
    if input.dim() != 4:
        got = f"got {tuple(input.shape)}; reshape it"
        _refuse(_OP, f"input must be (N, C, H, W), {got}")
    if weight.dim() != 4 or weight.shape[0] % 4 or not all(k % 2 for k in weight.shape[2:]):
        got = f"got {tuple(weight.shape)}; pad the kernel with zeros or reshape it"
        _refuse(_OP, f"weight must be (4 C, I + C, k, k') with odd k and k', {got}")
    n, i, h, w = input.shape
    c = weight.shape[0] // 4
    if weight.shape[1] != i + c:
        got = f"got {tuple(weight.shape)}; change one of them"
        _refuse(_OP, f"weight must be of {i} + {c} input channels, {got}")
    for name, tensor, must in (
        ("h", hidden, (n, c, h, w)),
        ("c", cell, (n, c, h, w)),
        ("bias", bias, (4 * c,)),
    ):
        if tensor is not None and tuple(tensor.shape) != must:
            got = f"got {tuple(tensor.shape)}; change one of them"
            _refuse(_OP, f"{name} must be {must} for input {tuple(input.shape)}, {got}")
