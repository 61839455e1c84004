# SPDX-License-Identifier: BSD-3-Clause
"""What each backend can run, and why it cannot run the rest."""

import importlib
import math
from typing import NamedTuple

import torch

from pywino import _native as native

BACKENDS = ("cuda", "triton", "cpu", "aten")
ALGORITHMS = ("direct", "f2", "f4", "f6", "f4x1")
PRECISIONS = ("default", "fast")
TILES = {"f2": 2, "f4": 4, "f6": 6}
WORKSPACE_LIMIT = 256 << 20  # bytes beside a GPU call's tensors; a larger call runs in parts
_OF_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

_ELEMENTWISE = ("channel_residual_attention", "conv_lstm_cell")  # ops without a convolution

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
    tf32: bool = False  # on a GPU: PyTorch may round float32 to TF32 in convolutions

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


def of_device(device):
    """The backends with kernels of our own for a device type, the preferred one first."""
    return _OF_DEVICE.get(device, ())


def able(call, algorithm="auto"):
    """The backends with a kernel of our own that can run `call` by `algorithm`, the preferred one
    first."""
    return [n for n in of_device(call.device) if can_run(n, call, algorithm) is None]


def covers(call, algorithm="auto"):
    """Whether a kernel of our own can run `call` by `algorithm`."""
    return bool(able(call, algorithm))


def lacks_gradient(backend, call, algorithm="auto"):
    """Whether `backend`, which ran the forward, has no kernel for this gradient; any may do it."""
    if backend in ("auto", "aten") or "_backward_" not in call.op:
        return False
    return can_run(backend, call, algorithm) is not None


def allows_tf32(tensor):
    """Whether PyTorch may round this tensor's numbers to TF32 in a convolution."""
    return (
        tensor.is_cuda
        and tensor.dtype == torch.float32
        and torch.backends.cudnn.conv.fp32_precision == "tf32"
    )


def is_strict(call, algorithm):
    """Whether a GPU kernel must compute in float32 (3xTF32) to stay in the call's error class.

    Otherwise V, U and M are fp16 with powers of two for range, summed in float32: as accurate as
    TF32, whose mantissa is as long (F4 loses more, docs/winograd.md)."""
    if call.dtype != torch.float32 or call.precision == "fast":
        return False
    return not (call.tf32 and algorithm in ("direct", "f2"))


def loses_accuracy(call, algorithm):
    """None where `algorithm` stays in the error class of a GPU call, else the reason why `auto`
    leaves it out."""
    if algorithm == "f6" and call.precision != "fast":
        return 'F6 is outside of the error class; algorithm="f6" takes it all the same'
    if algorithm == "f4" and call.dtype == torch.float16 and call.precision != "fast":
        return 'F4 has 4 to 6 times the error of float16; precision="fast" allows it'
    return None


def is_channels_last(tensor):
    """The layout rule of every op: its output is channels_last iff this holds for its input."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def uses_fast_products(precision, tile, in_channels):
    """Whether the products of F(tile x tile, 3 x 3) are taken in bf16: asked for, within the
    promise of precision="fast" (F6 would lose 5 %), and in the instruction set in force. AMX fills
    channels up to 32 with zeros: 16 are faster in fp32."""
    if precision != "fast" or tile == 6 or not native.loaded:
        return False
    isa = native.host.isa()
    return isa == "avx512bf16" or (isa == "amx" and in_channels > 16)


def _no_cpu_library(call):
    if call.device != "cpu":
        return f"the tensors are on {call.device}"
    if not native.loaded:
        return f"the native library is not loaded: {native.reason}"
    return None


def _winograd_cpu(call, algorithm):
    reason = _no_cpu_library(call)
    if reason is not None:
        return reason
    if algorithm not in ("auto", *TILES):
        return f"it has f2, f4 and f6, not {algorithm}"
    return _winograd(call)


def _no_cuda_library(call):
    if call.device != "cuda":
        return f"the tensors are on {call.device}"
    return native.why_no_cuda()


def _no_triton(call):
    if call.device != "cuda":
        return f"the tensors are on {call.device}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return importlib.import_module("pywino.kernels.launch").why_not()


def _winograd_cuda(call, algorithm):
    reason = _no_cuda_library(call)
    if reason is not None:
        return reason
    if algorithm not in ("auto", "direct", *TILES):
        return f"it has direct, f2, f4 and f6, not {algorithm}"
    if algorithm == "direct":
        if (reason := _direct_gpu(call)) is not None:
            return reason
        c = call.k if call.op.endswith("_backward_input") else call.c
        if not call.channels_last:
            return "its direct kernel reads channels_last tensors"
        if c * call.dtype.itemsize % 16:
            return f"its direct kernel reads pixels of whole 16 bytes, not {c} channels"
    return _winograd(call) or _workspace(call, algorithm)


def _winograd_triton(call, algorithm):
    reason = _no_triton(call)
    if reason is not None:
        return reason
    if algorithm not in ("auto", "direct", *TILES):
        return f"it has direct, f2, f4 and f6, not {algorithm}"
    if algorithm == "direct":
        return _direct_gpu(call) or _winograd(call)
    return _winograd(call) or _workspace(call, algorithm)


def _workspace(call, algorithm):
    """Whether V and M of the least part of a GPU call, 128 tiles, are more than the limit."""
    if algorithm not in TILES:
        return None
    tile = TILES[algorithm]
    sides = zip(call.output_size, call.dilation)
    tiles = call.n * math.prod(min(d, s) * math.ceil(math.ceil(s / d) / tile) for s, d in sides)
    size = 4 if is_strict(call, algorithm) else 2
    nbytes = (tile + 2) ** 2 * min(128, tiles) * (call.c + call.k) * size
    if nbytes <= WORKSPACE_LIMIT:
        return None
    return (
        f"{algorithm} of {call.c} and {call.k} channels takes {nbytes >> 20} MB for the least part "
        f"of the call, more than the limit of {WORKSPACE_LIMIT >> 20} MB; take a smaller tile"
    )


def _direct_gpu(call):
    """What no direct kernel of a GPU covers."""
    if call.op.startswith(("winograd_relu_conv2d", "winograd_domain_conv2d")):
        return "a weight in the Winograd domain has no direct convolution"
    if call.op.endswith("_backward_weight"):
        return "it has f2, f4 and f6 for this gradient, not direct"
    return _counts_pixels(call, math.prod(call.output_size))


def _winograd(call):
    """What no Winograd kernel covers."""
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


def _elementwise(call, algorithm):
    """What no kernel without a convolution covers. Its one algorithm has the planner's name for
    that on a GPU."""
    if algorithm != "auto" and (algorithm != "direct" or call.device == "cpu"):
        return f"it has one algorithm, not {algorithm}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        dtype = str(call.dtype).removeprefix("torch.")
        return f"it computes float32, bfloat16 and float16, not {dtype}"
    if min(call.n, call.c, call.h, call.w) < 1:
        return "the call is empty"
    return None


def _sparse_gpu(call, algorithm):
    return _direct(call, algorithm) or _counts_pixels(call, math.prod(call.output_size))


def _counts_pixels(call, of_output):
    # The last block of pixels goes a little further.
    if call.n * max(call.h * call.w, of_output) > 2**31 - 2**10:
        return "it counts pixels in 31 bits"
    return None


def _masked_gpu(call, algorithm):
    return _direct(call, algorithm) or _counts_pixels(call, call.h * call.w)


def _direct(call, algorithm):
    """What no kernel that convolves directly covers, any kernel size."""
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


def _where_there(absent, uncovered):
    """The predicate of kernels in a library that may be absent."""
    return lambda call, algorithm: absent(call) or uncovered(call, algorithm)


for _op in ("", "_backward_input", "_backward_weight"):
    register("cpu", "winograd_conv2d" + _op, _winograd_cpu)
    register("cpu", "winograd_relu_conv2d" + _op, _winograd_cpu)
    register("cpu", "winograd_domain_conv2d" + _op, _winograd_cpu)
for _op in _ELEMENTWISE:
    register("cpu", _op, _where_there(_no_cpu_library, _elementwise))
    register("cuda", _op, _where_there(_no_cuda_library, _elementwise))
    register("triton", _op, _where_there(_no_triton, _elementwise))
for _op in ("", "_backward_input", "_backward_weight"):
    register("cuda", "winograd_conv2d" + _op, _winograd_cuda)
    register("cuda", "winograd_relu_conv2d" + _op, _winograd_cuda)
    register("cuda", "winograd_domain_conv2d" + _op, _winograd_cuda)
    register("triton", "winograd_conv2d" + _op, _winograd_triton)
    register("triton", "winograd_relu_conv2d" + _op, _winograd_triton)
register("cpu", "sparse_conv2d", _where_there(_no_cpu_library, _direct))
register("cpu", "sparse_conv2d_backward_weight", _where_there(_no_cpu_library, _direct))
register("cuda", "sparse_conv2d", _where_there(_no_cuda_library, _sparse_gpu))
register("triton", "sparse_conv2d", _where_there(_no_triton, _sparse_gpu))
register("cpu", "masked_conv2d", _where_there(_no_cpu_library, _direct))
register("cuda", "masked_conv2d", _where_there(_no_cuda_library, _masked_gpu))
register("triton", "masked_conv2d", _where_there(_no_triton, _masked_gpu))
