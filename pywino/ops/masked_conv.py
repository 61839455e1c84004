# SPDX-License-Identifier: BSD-3-Clause
"""The ops of convolution of the pixels of a mask.

    pywino::masked_conv2d                  m (conv(m input, weight) + bias), of input's size
    pywino::masked_conv2d_backward_weight  its gradient by the weight
    pywino::_masked_…                      the native kernels, no gradient

A masked convolution's gradient by its input is a masked convolution again, of the turned filter.
What runs is chosen inside the kernels, on real tensors, by signature and density: the kernel that
visits the mask's pixels alone ("pixels"), for 3x3 kernels Winograd's algorithm on those of its
tiles that the mask meets ("tiles"), or a dense convolution of the masked input ("dense"). On a GPU
there are no tiles, and the host does not know how many pixels a mask has: it waits to be told only
where that costs little beside the convolution; elsewhere "auto" is the dense one there. An output
is channels_last iff the op's input is.
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

# Time in units of PyTorch's dense convolution: what a kernel costs in any case, and by the part
# of the pixels, or of the tiles, that is in the mask. Decides where nothing is measured.
_COSTS = {"pixels": (0.1, 1.2), "tiles": (0.1, 0.4), "dense": (1.0, 0.0)}
_TILE = 4
_LANES = 16  # with fewer channels vectors are half empty, and transforms cost what products save
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
    mask = mask.expand(len(input), -1, -1, -1).contiguous()
    tiles = tiles_of(mask, weight, *where)
    way = choose(input, mask, tiles, weight, *where, backend)
    if way == "dense":
        return dense_forward(input, mask, weight, bias, *where)
    if way == "tiles":
        return tiles_forward(input, mask, tiles, filter_of("tiles"), bias, len(weight), dilation)
    return pixels_forward(input, mask, filter_of("cpu"), bias, weight, *where)


def choose(input, mask, tiles, weight, padding, dilation, backend):
    """ "pixels", "tiles" or "dense": what runs a call that is covered, on the CPU. `mask` has an
    entry for each image, `tiles` is its tiles_of."""
    density = _density(mask)
    if density == 0:
        return "pixels"
    parts = {"pixels": density}
    if tiles is not None:
        parts["tiles"] = len(tiles) * _TILE**2 / mask.numel()
    if backend == "auto":
        parts["dense"] = 1
    if len(parts) == 1:
        return "pixels"
    if not planner.may_measure():
        return min(parts, key=lambda way: _COSTS[way][0] + _COSTS[way][1] * parts[way])
    call = planner.describe("masked_conv2d", input, weight, padding, dilation)
    steps = tuple((way, _steps(part)) for way, part in parts.items())
    key = (planner.bucket(call), steps, torch.get_num_threads(), native.host.isa())
    choice = _choices.get(key)
    if choice is None:
        runs = _runs(weight, padding, dilation)
        runs = {way: runs[way] for way in parts if way != "dense"}
        seconds = _race(runs, input, mask, weight, padding, dilation)
        if backend == "auto":
            choice = _winner(seconds)
        else:
            choice = min(runs, key=seconds.get)
        choice = planner.remember(_choices, key, choice)
    return choice


def _runs(weight, padding, dilation):
    """The kernels of the CPU as functions of input and mask."""
    weight = weight.detach()
    # In the first call, which is not the quickest.
    filter_of = functools.cache(lambda name: pack(weight, name))

    def pixels(input, mask):
        return pixels_forward(input, mask, filter_of("cpu"), None, weight, padding, dilation)

    def tiles(input, mask):
        listed, filter = tiles_of(mask, weight, padding, dilation), filter_of("tiles")
        return tiles_forward(input, mask, listed, filter, None, len(weight), dilation)

    return {"pixels": pixels, "tiles": tiles}


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

        seconds = _race({"asked": asked}, input, mask, weight, *where)
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
        seconds = _race(runs, input, mask, weight, *where)
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


def _race(runs, input, mask, weight, padding, dilation):
    """Seconds of functions of input and mask, and of the dense convolution."""
    device = input.device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        input, weight = input.detach(), weight.detach()
        dense = lambda: dense_forward(input, mask, weight, None, padding, dilation)  # noqa: E731
        own = {name: functools.partial(run, input, mask) for name, run in runs.items()}
        return planner.race({**own, "dense": dense}, _CALLS, device)


def tiles_of(mask, weight, padding, dilation):
    """The Winograd tiles that a mask (N, 1, H, W) meets; None where that is no way to go."""
    square = tuple(weight.shape[2:]) == (3, 3) and tuple(padding) == tuple(dilation)
    if not square or min(weight.shape[:2]) < _LANES or not mask.numel():
        return None
    return _ops._masked_tiles.default(mask, _TILE, dilation)


def pack(weight, backend="cpu"):
    """The weight for `_masked_forward` ("cpu"), for `_masked_tiles_forward` ("tiles"), or
    (K, height, width, C) for the kernels of a GPU; for "cuda" with zeros behind the channels, so
    that they are whole 16 bytes."""
    if backend == "cpu":
        return _ops._masked_pack.default(weight)
    if backend == "tiles":
        return _ops._winograd_filter.default(weight, _TILE, False, False)
    filter = weight.permute(0, 2, 3, 1)
    if backend == "cuda":
        filter = F.pad(filter, (0, -weight.shape[1] % (16 // weight.element_size())))
    return filter.contiguous()


def pixels_forward(input, mask, filter, bias, weight, padding, dilation):
    """`_masked_forward` on tensors as they come; of `weight` only the shape counts."""
    if bias is not None:
        bias = bias.float().contiguous()
    out_channels, _, *kernel_size = weight.shape
    pixels = _ops._masked_pixels.default(mask)
    where = (kernel_size, padding, dilation)
    return _ops._masked_forward.default(
        _layout.dense(input), *pixels, filter, bias, out_channels, *where
    )


def tiles_forward(input, mask, tiles, filter, bias, out_channels, dilation):
    """`_masked_tiles_forward` on tensors as they come."""
    if bias is not None:
        bias = bias.float().contiguous()
    return _ops._masked_tiles_forward.default(
        _layout.dense(input), mask, tiles, filter, bias, out_channels, _TILE, dilation
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


def _tiles_fake(mask, tile, dilation):
    return mask.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int32)


def _tiles_forward_fake(input, mask, tiles, filter, bias, out_channels, tile, dilation):
    return _layout.empty((input.shape[0], out_channels, *input.shape[2:]), input)


define("_masked_pack(Tensor weight) -> Tensor", None, _pack_fake)
define(
    "_masked_forward(Tensor input, Tensor list, Tensor place, Tensor filter, Tensor? bias, "
    "int out_channels, int[2] kernel_size, int[2] padding, int[2] dilation) -> Tensor",
    None,
    _native_forward_fake,
)
define("_masked_tiles(Tensor mask, int tile, int[2] dilation) -> Tensor", None, _tiles_fake)
define(
    "_masked_tiles_forward(Tensor input, Tensor mask, Tensor tiles, Tensor filter, Tensor? bias, "
    "int out_channels, int tile, int[2] dilation) -> Tensor",
    None,
    _tiles_forward_fake,
)
define(
    "_masked_cuda_forward(Tensor input, Tensor mask, Tensor filter, Tensor? bias, "
    "int[2] padding, int[2] dilation, bool strict) -> Tensor",
    None,
    _cuda_forward_fake,
)
