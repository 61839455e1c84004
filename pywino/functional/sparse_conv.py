# SPDX-License-Identifier: BSD-3-Clause
"""`sparse_conv2d`: a convolution that skips the zeros of its weight."""

import torch
from torch import get_autocast_dtype
from torch._C._functorch import is_batchedtensor
from torch.nn import functional as F

from pywino.functional._checks import (
    _refuse,
    autocasts,
    check_choice,
    check_geometry,
    check_tensors,
)
from pywino.functional._eager import is_plain, wants_gradients
from pywino.ops import _layout
from pywino.ops import sparse_conv as ops


def sparse_conv2d(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    *,
    backend="auto",
    gradients="all",
):
    """`torch.nn.functional.conv2d` with one group, by a kernel that skips the zeros of `weight`
    where that is the faster one here.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, bfloat16 or float16 have kernels (on the CPU
            computed in float32), everything else goes to F.conv2d.
        weight: (K, C, height, width), any size; zeros are skipped one by one, or in blocks of 16
            output channels and one input channel with its whole kernel; on a GPU in blocks of 64
            (or 128) output and 32 input channels of one tap, or, by "cuda" in 16 bits, two of every
            four input channels.
        bias: (K,) or None.
        stride, padding, dilation: as in F.conv2d, padding="same" and "valid" included.
        backend: "auto" | "aten" | "cpu", "cuda", "triton" (skip the zeros, however few). On a GPU
            "auto" is "aten" here: only a layer, which packs once, can know of zeros without
            waiting for the device.
        gradients: of the weight. "all" | "kept": a zero of the weight has none, and on the CPU
            blocks of 16 output channels and one input channel that are zero cost nothing.

    Returns:
        (N, K, H_out, W_out) or (K, H_out, W_out) in input's dtype, channels_last iff input or
        weight is. What a zero would multiply is not read, so NaN there does not spread.
        Differentiable twice.

    Raises:
        RuntimeError, TypeError: whatever F.conv2d refuses, and an explicit backend that cannot run.

    The weight is packed in every call: `pywino.SparseConv2d` keeps it packed.
    """
    return run_sparse_conv2d(input, weight, bias, stride, padding, dilation, backend, gradients)


def run_sparse_conv2d(
    input, weight, bias, stride, padding, dilation, backend, gradients, cache=None
):
    """`sparse_conv2d`, with packed filters kept in a layer's `FilterCache`."""
    op = "sparse_conv2d"
    check_choice(op, backend)
    if gradients not in ("all", "kept"):
        _refuse(op, f"gradients must be 'all' or 'kept', got {gradients!r}; use 'all'")
    kept = gradients == "kept"
    check_tensors(op, input, weight, bias)
    stride, pads, dilation = check_geometry(op, input, weight, stride, padding, dilation, 1)
    if padding == "same":
        both = [d * (r - 1) for d, r in zip(dilation, weight.shape[2:])]
        pads = tuple(total // 2 for total in both)
        # What an even kernel needs more comes behind the input, as in PyTorch.
        input = (
            F.pad(input, (0, both[1] % 2, 0, both[0] % 2)) if any(t % 2 for t in both) else input
        )
    if input.dim() == 3:
        batch = input.unsqueeze(0)
        choice = (backend, gradients, cache)
        output = run_sparse_conv2d(batch, weight, bias, stride, pads, dilation, *choice)
        return output.squeeze(0)
    where = (stride, pads, dilation)
    if torch.compiler.is_dynamo_compiling():
        if not (is_batchedtensor(input) or is_batchedtensor(weight)):
            input = _layout.following(input, weight)
        return torch.ops.pywino.sparse_conv2d(input, weight, bias, *where, backend, kept)
    if not is_plain(input, weight, bias):
        return F.conv2d(input, weight, bias, *where)
    input = _layout.following(input, weight)
    if cache is None or wants_gradients(input, weight, bias):
        return torch.ops.pywino.sparse_conv2d.default(input, weight, bias, *where, backend, kept)
    if autocasts(input):
        dtype = get_autocast_dtype(input.device.type)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    dtype, on_cpu = input.dtype, input.device.type == "cpu"

    def filter_of(pattern):
        make = lambda weight: ops.pack(weight if on_cpu else weight.to(dtype), pattern)  # noqa: E731
        if on_cpu:  # float32, whatever the call's dtype is
            return cache.derived(pattern, weight, make)
        name = pattern, dtype, ops.is_strict(input)
        if torch.cuda.is_current_stream_capturing():  # packing waits for the device
            return cache.kept(name, weight)
        return cache.derived(name, weight, make)

    own = weight.to(dtype)
    if on_cpu or backend != "auto":
        density = cache.derived("densities", weight, ops.densities) if on_cpu else None
        pattern = ops.choose(input, own, *where, backend, density)
    else:
        pattern = ops.choose_on_gpu(input, own, where, filter_of)
    if pattern == "dense":
        return ops.dense_forward(input, own, bias, *where)
    filter, size = filter_of(pattern), tuple(weight.shape[2:])
    if filter is None:
        raise RuntimeError(
            f"pywino.{op}: backend={backend!r} must have packed the weight before a CUDA graph is "
            "captured, got a new weight; call the layer once before"
        )
    return ops.run(pattern, input, filter, bias, len(weight), size, *where)
