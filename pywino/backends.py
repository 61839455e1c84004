# SPDX-License-Identifier: BSD-3-Clause
"""What each backend can run, and why it cannot run the rest."""

from typing import NamedTuple

import torch

from pywino import _native as native

BACKENDS = ("cuda", "triton", "cpu", "aten")
ALGORITHMS = ("direct", "f2", "f4", "f6", "f4x1")
PRECISIONS = ("default", "fast")
TILES = {"f2": 2, "f4": 4, "f6": 6}

_CHECKS = {}  # (backend, op) -> predicate(call, algorithm) -> str | None


class Call(NamedTuple):
    """The signature of one convolution: what a plan, a predicate and an operation count depend on.

    n, c, h, w are those of the convolution's input and k its output channels, for the gradients
    too."""

    op: str
    n: int
    c: int
    h: int
    w: int
    k: int
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    device: str = "cpu"
    precision: str = "default"
    cached: bool = False  # the filter was transformed before the call
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def output_size(self):
        """(height, width) of the convolution's output."""
        sizes = zip((self.h, self.w), self.padding, self.dilation, self.kernel, self.stride)
        return tuple((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, p, d, k, s in sizes)


def register(backend, op, predicate):
    """Says that `backend` has a kernel for `op`, which runs a `Call` by an algorithm where
    `predicate(call, algorithm)` is None; a text says why it does not."""
    _CHECKS[backend, op] = predicate


def can_run(backend, call, algorithm="auto"):
    """None where `backend` can run `call` by `algorithm`, else the reason why not."""
    if backend not in BACKENDS:
        return f"there is no backend {backend!r}; there are {_listed(BACKENDS)}"
    if algorithm != "auto" and algorithm not in ALGORITHMS:
        return f"there is no algorithm {algorithm!r}; there are auto, {_listed(ALGORITHMS)}"
    if backend == "aten":
        return None if algorithm == "auto" else "PyTorch chooses its own algorithm"
    check = _CHECKS.get((backend, call.op))
    if check is None:
        return f"it has no kernel for {call.op} in this version"
    return check(call, algorithm)


def is_channels_last(tensor):
    """The layout rule of every op: its output is channels_last iff this holds for its input."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def uses_fast_products(precision, tile):
    """Whether the products of F(tile x tile, 3 x 3) are taken in bf16: asked for, within the
    promise of precision="fast" (F6 would lose 5 %), and in the instruction set in force."""
    if precision != "fast" or tile == 6:
        return False
    return native.loaded and native.host.isa() == "avx512bf16"


def _winograd_cpu(call, algorithm):
    if call.device != "cpu":
        return f"the tensors are on {call.device}"
    if not native.loaded:
        return f"the native library is not loaded: {native.reason}"
    if algorithm not in ("auto", *TILES):
        return f"it has f2, f4 and f6, not {algorithm}"
    if call.kernel != (3, 3):
        return f"it covers 3x3 kernels, not {call.kernel[0]}x{call.kernel[1]}"
    if call.stride != (1, 1):
        return f"it covers stride 1, not {call.stride}"
    if call.groups != 1:
        return f"it covers groups=1, not {call.groups}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        dtype = str(call.dtype).removeprefix("torch.")
        return f"it computes float32, bfloat16 and float16, not {dtype}"
    if min(call.n, call.c, call.k, *call.output_size) < 1:
        return "the call is empty"
    if call.op == "winograd_conv2d_backward_input" and (
        call.padding[0] > 2 * call.dilation[0] or call.padding[1] > 2 * call.dilation[1]
    ):
        return "the padding is wider than the kernel, so its gradient is a cropped convolution"
    return None


def _sparse_conv_cpu(call, algorithm):
    if call.device != "cpu":
        return f"the tensors are on {call.device}"
    if not native.loaded:
        return f"the native library is not loaded: {native.reason}"
    if algorithm not in ("auto", "direct"):
        return f"it is direct, not {algorithm}"
    if call.groups != 1:
        return f"it covers groups=1, not {call.groups}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        dtype = str(call.dtype).removeprefix("torch.")
        return f"it computes float32, bfloat16 and float16, not {dtype}"
    if min(call.n, call.c, call.k, *call.output_size) < 1:
        return "the call is empty"
    return None


def _listed(names):
    return ", ".join(names)


for _op in ("", "_backward_input", "_backward_weight"):
    register("cpu", "winograd_conv2d" + _op, _winograd_cpu)
    register("cpu", "winograd_relu_conv2d" + _op, _winograd_cpu)
    register("cpu", "winograd_domain_conv2d" + _op, _winograd_cpu)
register("cpu", "sparse_conv2d", _sparse_conv_cpu)
