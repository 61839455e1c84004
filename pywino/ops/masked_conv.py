# SPDX-License-Identifier: BSD-3-Clause
"""The ops of convolution of the pixels of a mask.

    pywino::masked_conv2d                  m (conv(m input, weight) + bias), of input's size
    pywino::masked_conv2d_backward_weight  its gradient by the weight
    pywino::_masked_…                      the native kernels, no gradient

A masked convolution's gradient by its input is a masked convolution again, of the turned filter.
What runs is chosen inside the kernels, on real tensors: the kernel that visits the mask's pixels
alone, or a dense convolution of the masked input (Winograd's where that pays), where it is the
faster one on this signature and density. On a GPU the host does not know how many pixels a mask
has, and waits to be told only where that costs little beside the convolution; elsewhere "auto" is
the dense one there. An output is channels_last iff the op's input is.
"""

import functools
import importlib

import torch
from torch.nn import functional as F

from pywino import _native as native
from pywino import backends, planner
from pywino.ops import _layout
from pywino.ops._library import autocast, define, differentiable

_ops = torch.ops.pywino
_choices = planner.memo()

# The kernel's time in units of PyTorch's dense convolution, by the part of the pixels that is in
# the mask: slope and what it costs in any case. Decides where nothing is measured, and whether it
# is worth measuring.
_SLOPE, _FIXED = 1.2, 0.1
_CALLS = 3  # of each contender, where it is measured


def front(kernel_size, dilation):
    """Zeros before the first row and column with padding="same"; what an even kernel needs more
    comes behind the image, as in PyTorch."""
    return tuple(d * (r - 1) // 2 for r, d in zip(kernel_size, dilation))


# --- what runs ---


def covers(input, weight, padding, dilation, backend):
    """Whether a kernel may run this call; an explicit backend that cannot raises the reason."""
    if backend == "aten":
        return False
    call = planner.describe("masked_conv2d", input, weight, padding, dilation)
    if backend != "auto":
        planner.require(backend, call)
        return True
    return backends.covers(call) and planner.mode() != "off"


def run(input, mask, weight, bias, padding, dilation, backend, filter_of):
    """The convolution, by what is chosen. filter_of(backend): the weight, packed for it."""
    if not covers(input, weight, padding, dilation, backend):
        return dense_forward(input, mask, weight, bias, padding, dilation)
    where = (padding, dilation)
    if backend in ("cuda", "triton") or input.device.type != "cpu":
        if backend == "auto":
            backend = choose_on_gpu(input, mask, weight, *where, filter_of)
        if backend == "dense":
            return dense_forward(input, mask, weight, bias, *where)
        return gpu_forward(input, mask, filter_of(backend), bias, *where, backend)
    list, place = pixels_of(mask, len(input))
    if choose(input, list, weight, *where, backend) == "dense":
        return dense_forward(input, mask, weight, bias, *where)
    size = tuple(weight.shape[2:])
    return native_forward(input, list, place, filter_of("cpu"), bias, len(weight), size, *where)


def choose(input, list, weight, padding, dilation, backend):
    """ "pixels" or "dense": what runs a call that is covered, on the CPU."""
    if backend != "auto":
        return "pixels"
    call = planner.describe("masked_conv2d", input, weight, padding, dilation)
    pixels = len(input) * input.shape[2] * input.shape[3]
    density = len(list) / pixels
    if density == 0:
        return "pixels"
    if not planner.may_measure():
        return "pixels" if _SLOPE * density + _FIXED < 1 else "dense"
    key = (planner.bucket(call), _steps(density), torch.get_num_threads(), native.host.isa())
    choice = _choices.get(key)
    if choice is None:
        filter, size = pack(weight), tuple(weight.shape[2:])
        where = (padding, dilation)
        pixels = lambda input, mask: native_forward(  # noqa: E731
            input, *_ops._masked_pixels(mask), filter, None, len(weight), size, *where
        )
        seconds = _race({"pixels": pixels}, input, density, weight, *where)
        choice = planner.remember(_choices, key, _winner(seconds))
    return choice


def choose_on_gpu(input, mask, weight, padding, dilation, filter_of):
    """ "dense", "cuda" or "triton": what runs a call that is covered.

    How many pixels the mask has is asked, and waited for, only where that is small beside the dense
    convolution; nothing is asked while a CUDA graph is captured."""
    if not planner.may_measure():
        return "dense"
    call = planner.describe("masked_conv2d", input, weight, padding, dilation)
    where, bucket = (padding, dilation), planner.bucket(call)
    asks = _choices.get(bucket)
    if asks is None:

        def asked(input, mask):
            _density(mask)
            return dense_forward(input, mask, weight, None, *where)

        seconds = _race({"asked": asked}, input, 1, weight, *where)
        asks = planner.MARGIN * seconds["asked"] < seconds["dense"]
        planner.remember(_choices, bucket, asks)
    if not asks:
        return "dense"
    density = _density(mask)
    key = bucket, _steps(density)
    choice = _choices.get(key)
    if choice is None:
        runs = {
            name: lambda input, mask, name=name: gpu_forward(
                input, mask, filter_of(name), None, *where, name
            )
            for name in backends.able(call)
        }
        seconds = _race(runs, input, density, weight, *where)
        choice = planner.remember(_choices, key, _winner(seconds))
    return choice


def _density(mask):
    """The part of its pixels that a mask has; waits for the device."""
    return mask.count_nonzero().item() / max(1, mask.numel())


def _steps(density):
    return -(-density // 0.05)


def _winner(seconds):
    best = min(seconds, key=seconds.get)
    return best if seconds[best] < planner.MARGIN * seconds["dense"] else "dense"


def _race(runs, input, density, weight, padding, dilation):
    """Seconds of functions of input and mask, and of the dense convolution, on a mask of this
    density in rows from the top: what lies where hardly matters to any."""
    device = input.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        input, weight = input.detach(), weight.detach()
        mask = torch.zeros(len(input), 1, *input.shape[2:], dtype=torch.bool, device=device)
        mask.view(-1)[: int(density * mask.numel())] = True
        dense = lambda: dense_forward(input, mask, weight, None, padding, dilation)  # noqa: E731
        own = {name: functools.partial(run, input, mask) for name, run in runs.items()}
        return planner.race({**own, "dense": dense}, _CALLS, device.type)


def pixels_of(mask, count):
    """(list, place) of the mask's pixels, for so many images."""
    return _ops._masked_pixels.default(mask.expand(count, -1, -1, -1).contiguous())


def pack(weight, backend="cpu"):
    """The weight for `_masked_forward`, or (K, height, width, C) for the kernels of a GPU; for
    "cuda" with zeros behind the channels, so that they are whole 16 bytes."""
    if backend == "cpu":
        return _ops._masked_pack.default(weight)
    filter = weight.permute(0, 2, 3, 1)
    if backend == "cuda":
        filter = F.pad(filter, (0, -weight.shape[1] % (16 // weight.element_size())))
    return filter.contiguous()


def native_forward(input, list, place, filter, bias, out_channels, kernel_size, padding, dilation):
    """`_masked_forward` on tensors as they come."""
    if bias is not None:
        bias = bias.float().contiguous()
    where = (kernel_size, padding, dilation)
    return _ops._masked_forward.default(
        _layout.dense(input), list, place, filter, bias, out_channels, *where
    )


def gpu_forward(input, mask, filter, bias, padding, dilation, backend):
    """A kernel that lists the mask's pixels on the device, on tensors as they come."""
    if bias is not None:
        bias = bias.float().contiguous()
    mask = mask.expand(len(input), -1, -1, -1).contiguous()
    strict = input.dtype == torch.float32 and not backends.allows_tf32(input)
    forward = _ops._masked_cuda_forward.default if backend == "cuda" else _triton().forward
    return forward(_layout.dense(input), mask, filter, bias, padding, dilation, strict)


def _triton():
    return importlib.import_module("pywino.kernels.masked_conv")


def dense_forward(input, mask, weight, bias, padding, dilation):
    """Every pixel, with the op's layout rule."""
    both = [d * (r - 1) for d, r in zip(dilation, weight.shape[2:])]
    back = [total - p for total, p in zip(both, padding)]
    seen = torch.where(mask, input, 0)
    if back != list(padding):
        seen = F.pad(seen, (padding[1], back[1], padding[0], back[0]))
        padding = (0, 0)
    if tuple(weight.shape[2:]) == (3, 3) and input.dtype in (
        torch.float32, torch.bfloat16, torch.float16
    ):  # fmt: skip
        output = _ops.winograd_conv2d(
            seen, weight, bias, None, padding, dilation, None, "auto", "auto", "default"
        )
    else:
        output = torch.conv2d(seen, weight, bias, 1, padding, dilation)
    return _layout.laid_as(torch.where(mask, output, 0), input)


# --- the op ---


def _check(input, mask, weight, padding, dilation):
    torch._check(
        input.dim() == 4
        and weight.dim() == 4
        and input.shape[1] == weight.shape[1]
        and input.dtype == weight.dtype
        and mask.dtype == torch.bool
        and mask.dim() == 4
        and mask.shape[0] in (1, input.shape[0])
        and mask.shape[1] == 1
        and mask.shape[2:] == input.shape[2:]
        and min(dilation) >= 1
        and all(0 <= p <= d * (r - 1) for p, d, r in zip(padding, dilation, weight.shape[2:])),
        lambda: (
            "pywino::masked_conv2d: input must be (N, C, H, W), mask (N or 1, 1, H, W) and bool, "
            f"weight (K, C, height, width) of input's dtype, got {tuple(input.shape)}, "
            f"{tuple(mask.shape)} {mask.dtype} and {tuple(weight.shape)} for "
            f"padding={padding}, dilation={dilation}; pywino.masked_conv2d says more"
        ),
    )


def _forward(input, mask, weight, bias, padding, dilation, backend):
    _check(input, mask, weight, padding, dilation)
    filter_of = lambda name: pack(weight, name)  # noqa: E731
    return run(input, mask, weight, bias, padding, dilation, backend, filter_of)


def _forward_fake(input, mask, weight, bias, padding, dilation, backend):
    _check(input, mask, weight, padding, dilation)
    return _layout.empty((input.shape[0], weight.shape[0], *input.shape[2:]), input)


def _backward_weight(grad, input, mask, kernel_size, padding, dilation):
    both = [d * (r - 1) for d, r in zip(dilation, kernel_size)]
    around = (padding[1], both[1] - padding[1], padding[0], both[0] - padding[0])
    input = F.pad(torch.where(mask, _layout.dense(input), 0), around)
    grad = _layout.laid_as(torch.where(mask, grad, 0), input)
    weight = grad.new_empty(1).expand(grad.shape[1], input.shape[1], *kernel_size)
    gradient = torch.ops.aten.convolution_backward(
        grad, input, weight, None, (1, 1), (0, 0), dilation, False, (0, 0), 1, (False, True, False)
    )[1]
    return gradient.contiguous()


def _backward_weight_fake(grad, input, mask, kernel_size, padding, dilation):
    return input.new_empty((grad.shape[1], input.shape[1], *kernel_size))


define(
    "masked_conv2d(Tensor input, Tensor mask, Tensor weight, Tensor? bias, int[2] padding, "
    "int[2] dilation, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
define(
    "masked_conv2d_backward_weight(Tensor grad, Tensor input, Tensor mask, SymInt[2] kernel_size, "
    "int[2] padding, int[2] dilation) -> Tensor",
    _backward_weight,
    _backward_weight_fake,
)


def _by_input(grad, mask, weight, padding, dilation, backend):
    """The gradient of a masked convolution by its input."""
    turned = weight.flip(2, 3).transpose(0, 1)
    behind = [d * (r - 1) - p for r, d, p in zip(weight.shape[2:], dilation, padding)]
    return _ops.masked_conv2d(grad, mask, turned, None, behind, dilation, backend)


def _save(ctx, inputs, output):
    input, mask, weight, _, *ctx.arguments = inputs
    ctx.save_for_backward(input, mask, weight)


def _gradients(ctx, grad):
    input, mask, weight = ctx.saved_tensors
    padding, dilation, backend = ctx.arguments
    needs = ctx.needs_input_grad
    dense = _layout.laid_as(grad, input) if needs[0] or needs[2] else grad
    return (
        _by_input(dense, mask, weight, padding, dilation, backend) if needs[0] else None,
        None,
        _ops.masked_conv2d_backward_weight(dense, input, mask, weight.shape[2:], padding, dilation)
        if needs[2]
        else None,
        torch.where(mask, grad, 0).sum((0, 2, 3)) if needs[3] else None,
        *[None] * 3,
    )


def _save_backward(ctx, inputs, output):
    grad, input, mask, _, *ctx.arguments = inputs
    ctx.save_for_backward(grad, input, mask)


def _backward_weight_gradients(ctx, g):  # g is like the weight
    grad, input, mask = ctx.saved_tensors
    padding, dilation = ctx.arguments
    needs = ctx.needs_input_grad
    return (
        _ops.masked_conv2d(input, mask, g, None, padding, dilation, "auto") if needs[0] else None,
        _by_input(grad, mask, g, padding, dilation, "auto") if needs[1] else None,
        *[None] * 4,
    )


differentiable("masked_conv2d", _gradients, _save)
differentiable("masked_conv2d_backward_weight", _backward_weight_gradients, _save_backward)
autocast("masked_conv2d")
autocast("masked_conv2d_backward_weight")


# --- the native kernels: csrc/torch/masked_conv.cpp registers those without "cuda" in their name on
# the CPU key, masked_conv_cuda.cpp the other ---


def _pixels_fake(mask):
    count = torch.library.get_ctx().new_dynamic_size()
    return mask.new_empty(count, dtype=torch.int32), mask.new_empty(mask.numel(), dtype=torch.int32)


def _pack_fake(weight):
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.float32)


def _native_forward_fake(
    input, list, place, filter, bias, out_channels, kernel_size, padding, dilation
):
    return _layout.empty((input.shape[0], out_channels, *input.shape[2:]), input)


def _cuda_forward_fake(input, mask, filter, bias, padding, dilation, strict):
    return _layout.empty((input.shape[0], filter.shape[0], *input.shape[2:]), input)


define("_masked_pixels(Tensor mask) -> (Tensor, Tensor)", None, _pixels_fake)
define("_masked_pack(Tensor weight) -> Tensor", None, _pack_fake)
define(
    "_masked_forward(Tensor input, Tensor list, Tensor place, Tensor filter, Tensor? bias, "
    "int out_channels, int[2] kernel_size, int[2] padding, int[2] dilation) -> Tensor",
    None,
    _native_forward_fake,
)
define(
    "_masked_cuda_forward(Tensor input, Tensor mask, Tensor filter, Tensor? bias, "
    "int[2] padding, int[2] dilation, bool strict) -> Tensor",
    None,
    _cuda_forward_fake,
)
