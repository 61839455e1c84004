# SPDX-License-Identifier: BSD-3-Clause
"""The ops of convolution with a spatial weight that has zeros.

    pywino::sparse_conv2d                   conv(input, weight) + bias, any kernel, stride, padding
                                            and dilation, one group
    pywino::sparse_conv2d_backward_input    its gradients. The three are closed under
    pywino::sparse_conv2d_backward_weight   differentiation
    pywino::_sparse_…                       the native kernels: a packed filter, no gradient

What runs is chosen inside the kernels, on real tensors: PyTorch's dense convolution, or the kernel
that skips zeros, where it was the faster one on this signature and density. The gradient of the
weight is that of the dense weight: a zero of the weight has a gradient too, and
`pywino.pruning.Pruner` masks it. With `kept` it is that of the weights that are not zero, and zero
elsewhere: on the CPU whole blocks are not computed.

On a GPU these ops take PyTorch's convolution for "auto": the host would wait for the device in each
call to learn where zeros are. A layer that keeps its filter packed knows, and measures
(`choose_on_gpu`). An output is channels_last iff the op's input is.
"""

import functools
import importlib

import torch
from torch.nn import functional as F

from pywino import _native as native
from pywino import backends, planner
from pywino.ops import _layout, _packed
from pywino.ops._library import autocast, define, differentiable

_ops = torch.ops.pywino
_choices = planner.memo()

BLOCK = 16  # output channels of a block; whole vectors in every instruction set
# The time of the kernels in units of PyTorch's dense convolution, by the part of the weights (of
# the 16 x 1 blocks) that is not zero: slope and what it costs in any case. Decides where nothing is
# measured, and which of the two is measured.
_WORK = {"unstructured": (2.4, 0.2), "blocks": (1.4, 0.2)}
_GAIN = 0.9  # a kernel must take less than this part of PyTorch's time
# The part of the blocks up to which the gradient of what is kept is measured, and up to which it is
# taken where nothing is measured: 1 x 1 kernels gain from there on, 3 x 3 ones from 0.7 (AVX-512).
_MEASURED_BLOCKS, _SURE_BLOCKS = 0.9, 0.3
_CALLS = 3  # of each contender, where it is measured
# Seconds that the kernel must save beside: what the layer's Python costs more than nn.Conv2d's (one
# Zen 4 core, torch 2.13).
_PYTHON = 25e-6


# --- what runs ---


def densities(weight):
    """(part of the weights, part of the blocks of 16 output x 1 input channels) that are not
    zero."""
    kept = weight.detach() != 0
    single = kept.float().mean().item()
    kernels = F.pad(kept.flatten(2).any(2), (0, 0, 0, -len(kept) % BLOCK))
    return single, kernels.unflatten(0, (-1, BLOCK)).any(1).float().mean().item()


def estimate(single, blocks):
    """(pattern, its time by PyTorch's) of the quicker kernel by the rule."""
    times = {
        name: slope * density + fixed
        for (name, (slope, fixed)), density in zip(_WORK.items(), (single, blocks))
    }
    return min(times.items(), key=lambda item: item[1])


def choose(input, weight, stride, padding, dilation, backend, density=None):
    """ "dense", "unstructured" or "blocks": what runs this call; on a GPU "dense", or the backend
    that was asked for.

    Measured at the first call of a signature and density (in steps of 5 %), on the call's own
    weight, and kept with the planner's plans; the rule decides where there is none and the planner
    may not measure."""
    if backend == "aten":
        return "dense"
    call = planner.describe("sparse_conv2d", input, weight, padding, dilation, stride=stride)
    if backend != "auto":
        planner.require(backend, call)
    if backend in ("cuda", "triton"):
        return backend
    if backends.can_run("cpu", call) is not None:
        return "dense"
    single, blocks = density or densities(weight)
    pattern, work = estimate(single, blocks)
    if backend != "auto":
        return pattern
    if planner.mode() == "off":
        return "dense"
    if work > 2:  # nothing to find out
        return "dense"
    steps = tuple(-(-density // 0.05) * 5 for density in (single, blocks))
    key = (planner.bucket(call), steps, pattern, torch.get_num_threads(), native.host.isa())
    choice = _choices.get(key)
    if choice is None:
        what = f"{pattern} {steps[0]:.0f}%,{steps[1]:.0f}%"
        times = lambda: _times(input, weight, stride, padding, dilation, pattern)  # noqa: E731
        plan = planner.measured(call, what, times)
        if plan is None:
            return pattern if work < _GAIN else "dense"
        choice = planner.remember(_choices, key, plan.algorithm or "dense")
    return choice


def _times(input, weight, stride, padding, dilation, pattern):
    """Seconds of PyTorch's kernel ("aten"), and of ours with what its Python costs."""
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        input, weight = input.detach(), weight.detach()
        filter = pack(weight, pattern)
        where = (stride, padding, dilation)
        size = tuple(weight.shape[2:])
        runs = {
            "aten": lambda: torch.conv2d(input, weight, None, *where),
            pattern: lambda: native_forward(input, filter, None, len(weight), size, *where),
        }
        best = planner.race(runs, _CALLS)
    best[pattern] += _PYTHON
    return best


def choose_on_gpu(input, weight, where, filter_of):
    """ "dense", "cuda" or "triton": what runs a call of a layer that keeps its filter, measured as
    on the CPU. filter_of(backend): the weight, packed for it, None where that cannot be now."""
    call = planner.describe("sparse_conv2d", input, weight, *where[1:], stride=where[0])
    if planner.mode() != "measure":
        return "dense"
    filters = {name: filter_of(name) for name in backends.able(call)}
    if not filters or None in filters.values():
        return "dense"
    what = ", ".join(f"{name} {_packed.describe(f, weight)}" for name, f in filters.items())
    key = planner.bucket(call), what
    choice = _choices.get(key)
    if choice is None:
        plan = planner.measured(call, what, lambda: _times_on_gpu(input, weight, where, filters))
        if plan is None:
            return "dense"
        choice = "dense" if plan.backend == "aten" else plan.backend
        planner.remember(_choices, key, choice)
    return choice


def _times_on_gpu(input, weight, where, filters):
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        input, weight = input.detach(), weight.detach()
        own = (None, len(weight), tuple(weight.shape[2:]), *where)
        runs = {"aten": lambda: torch.conv2d(input, weight, None, *where)}
        for name, filter in filters.items():
            runs[planner.label(name, "direct")] = functools.partial(
                gpu_forward, name, input, filter, *own
            )
        best = planner.race(runs, _CALLS, input.device.type)
    return {name: t + _PYTHON * (name != "aten") for name, t in best.items()}


def pack(weight, pattern, rotate=False):
    """The weight without its zeros, for `run`."""
    if pattern in ("cuda", "triton"):
        weight = weight.flip(2, 3).transpose(0, 1) if rotate else weight
        if pattern == "triton":
            return _packed.pack_blocks(weight)
        return _packed.pack(weight, strict=is_strict(weight))[0]
    return _ops._sparse_pack.default(weight, rotate, pattern == "blocks")


def run(pattern, input, filter, bias, out_channels, *where):
    """A kernel on tensors as they come, with a filter from `pack` of the same pattern; where:
    kernel size, stride, padding, dilation."""
    if pattern in ("cuda", "triton"):
        return gpu_forward(pattern, input, filter, bias, out_channels, *where)
    return native_forward(input, filter, bias, out_channels, *where)


def is_strict(tensor):
    """Whether a GPU must multiply these numbers as float32 ones, not as TF32."""
    return tensor.dtype == torch.float32 and not backends.allows_tf32(tensor)


def gpu_forward(backend, input, filter, bias, out_channels, *where):
    if bias is not None:
        bias = bias.float().contiguous()
    if isinstance(filter, _packed.Csr):
        kernel_size, stride, (down, right), dilation = where
        planes = F.pad(input, (right, right, down, down)).contiguous()
        output = _ops._sparse_cuda_csr.default(planes, *filter, bias, kernel_size, stride, dilation)
        return _layout.laid_as(output, input)
    strict = is_strict(input)
    if backend == "triton":
        return _triton().forward(_layout.dense(input), *filter, bias, out_channels, *where, strict)
    # Pixels that are whole 16 bytes, side by side, as the kernel reads them.
    behind = -input.shape[1] % (16 // input.element_size())
    pixels = F.pad(input, (0, 0, 0, 0, 0, behind)) if behind else input
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    if pixels.data_ptr() % 16:
        pixels = pixels.clone()
    arguments = (pixels, *filter, bias, out_channels, *where)
    if isinstance(filter, _packed.TwoOfFour):
        output = _ops._sparse_cuda_two_of_four.default(*arguments)
    else:
        output = _ops._sparse_cuda_forward.default(*arguments, strict)
    return _layout.laid_as(output, input)


def _triton():
    return importlib.import_module("pywino.kernels.sparse_conv")


def native_forward(input, filter, bias, out_channels, kernel_size, stride, padding, dilation):
    """`_sparse_forward` on tensors as they come."""
    if bias is not None:
        bias = bias.float().contiguous()
    where = (kernel_size, stride, padding, dilation)
    return _ops._sparse_forward.default(_layout.dense(input), filter, bias, out_channels, *where)


# --- the op ---


def _output_size(input, weight, stride, padding, dilation):
    sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return (
        input.shape[0],
        weight.shape[0],
        *((i + 2 * p - d * (r - 1) - 1) // s + 1 for i, r, s, p, d in sizes),
    )


def _check(input, weight, stride, padding, dilation):
    torch._check(
        input.dim() == 4
        and weight.dim() == 4
        and input.shape[1] == weight.shape[1]
        and input.dtype == weight.dtype
        and min(padding) >= 0
        and min(*stride, *dilation) >= 1
        and min(_output_size(input, weight, stride, padding, dilation)[2:]) > 0,
        lambda: (
            "pywino::sparse_conv2d: input must be (N, C, H, W) and weight (K, C, height, width) of "
            f"one dtype, with an output, got {tuple(input.shape)} and {tuple(weight.shape)} for "
            f"stride={stride}, padding={padding}, dilation={dilation}; pywino.sparse_conv2d says "
            "more"
        ),
    )


def dense_forward(input, weight, bias, stride, padding, dilation):
    """PyTorch's convolution with the op's layout rule."""
    if not backends.is_channels_last(input):
        weight = weight.contiguous()  # PyTorch's output is channels_last if either is
    output = torch.conv2d(input, weight, bias, stride, padding, dilation)
    return _layout.laid_as(output, input)


def _forward(input, weight, bias, stride, padding, dilation, backend, kept=False):
    _check(input, weight, stride, padding, dilation)
    pattern = choose(input, weight, stride, padding, dilation, backend)
    if pattern == "dense":
        return dense_forward(input, weight, bias, stride, padding, dilation)
    where = (tuple(weight.shape[2:]), stride, padding, dilation)
    return run(pattern, input, pack(weight, pattern), bias, len(weight), *where)


def _forward_fake(input, weight, bias, stride, padding, dilation, backend, kept=False):
    _check(input, weight, stride, padding, dilation)
    return _layout.empty(_output_size(input, weight, stride, padding, dilation), input)


def _backward_input(grad, weight, size, stride, padding, dilation, backend, kept=False):
    """With stride 1 the same convolution, of the turned filter; else PyTorch's."""
    grad = _layout.dense(grad)
    full = [d * (r - 1) - p for r, p, d in zip(weight.shape[2:], padding, dilation)]
    if tuple(stride) == (1, 1) and min(full) >= 0 and grad.numel() and weight.shape[1]:
        turned = weight.flip(2, 3).transpose(0, 1)
        pattern = choose(grad, turned, stride, full, dilation, backend)
        if pattern != "dense":
            filter, kernel = pack(weight, pattern, rotate=True), tuple(weight.shape[2:])
            where = (kernel, stride, full, dilation)
            return run(pattern, grad, filter, None, weight.shape[1], *where)
    input = grad.new_empty(1).expand(size)  # only its size is read
    gradient = torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, False, (0, 0), 1, (True, False, False)
    )[0]
    return _layout.laid_as(gradient, grad)


def _backward_input_fake(grad, weight, size, stride, padding, dilation, backend, kept=False):
    return _layout.empty(tuple(size), grad)


def _backward_weight(grad, input, weight, kernel_size, stride, padding, dilation, backend):
    """With a weight the gradient of what is not zero in it, and zeros."""
    input = _layout.dense(input)
    grad = _layout.laid_as(grad, input)
    where = (stride, padding, dilation)
    if weight is not None and skips_blocks(grad, input, weight, where, backend):
        return _ops._sparse_kept_gradient.default(grad, input, weight.contiguous(), *where)
    gradient = _dense_backward_weight(grad, input, kernel_size, *where)
    return _kept(gradient, weight)


def _kept(gradient, weight):
    """A gradient where a weight is not zero, zeros elsewhere; all of it without a weight."""
    return gradient if weight is None else torch.where(weight != 0, gradient, 0)


def _dense_backward_weight(grad, input, kernel_size, stride, padding, dilation):
    weight = grad.new_empty(1).expand(grad.shape[1], input.shape[1], *kernel_size)
    gradient = torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, False, (0, 0), 1, (False, True, False)
    )[1]
    return gradient.contiguous()


def _backward_weight_fake(grad, input, weight, kernel_size, stride, padding, dilation, backend):
    return input.new_empty((grad.shape[1], input.shape[1], *kernel_size))


def skips_blocks(grad, input, weight, where, backend):
    """Whether the gradient of what is kept is computed for it alone, in blocks of 16 output
    channels and one input channel, or with all others.

    Measured like the forward. Zeros anywhere leave no block out, and gain nothing here: a single
    product loads both of its factors."""
    stride, padding, dilation = where
    op = "sparse_conv2d_backward_weight"
    call = planner.describe(op, input, weight, padding, dilation, stride=stride)
    if backend not in ("auto", "cpu") or backends.can_run("cpu", call) is not None:
        return False
    if backend == "cpu":
        return True
    if planner.mode() == "off":
        return False
    blocks = densities(weight)[1]
    if blocks > _MEASURED_BLOCKS:
        return False
    what = f"kept blocks {-(-blocks // 0.05) * 5:.0f}%"
    key = (planner.bucket(call), what, torch.get_num_threads(), native.host.isa())
    choice = _choices.get(key)
    if choice is None:
        times = lambda: _times_of_gradient(grad, input, weight, where)  # noqa: E731
        plan = planner.measured(call, what, times)
        if plan is None:
            return blocks <= _SURE_BLOCKS
        choice = planner.remember(_choices, key, plan.algorithm or "dense")
    return choice == "blocks"


def _times_of_gradient(grad, input, weight, where):
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        tensors = [t.detach() for t in (grad, input, weight)]
        size = tuple(weight.shape[2:])
        runs = {
            "aten": lambda: _dense_backward_weight(*tensors[:2], size, *where),
            "blocks": lambda: _ops._sparse_kept_gradient.default(*tensors, *where),
        }
        return planner.race(runs, _CALLS)


_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation"
define(
    f"sparse_conv2d(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, str backend, "
    "bool kept=False) -> Tensor",
    _forward,
    _forward_fake,
)
define(
    "sparse_conv2d_backward_input(Tensor grad, Tensor weight, SymInt[4] size, "
    f"{_GEOMETRY}, str backend, bool kept=False) -> Tensor",
    _backward_input,
    _backward_input_fake,
)
define(
    "sparse_conv2d_backward_weight(Tensor grad, Tensor input, Tensor? weight, "
    f"SymInt[2] kernel_size, {_GEOMETRY}, str backend) -> Tensor",
    _backward_weight,
    _backward_weight_fake,
)


def _save(ctx, inputs, output):
    input, weight, _, *ctx.arguments, ctx.kept = inputs
    ctx.save_for_backward(input, weight)


def _by_weight(ctx, grad, input, weight):
    mask = weight.detach() if ctx.kept else None
    size = weight.shape[2:]
    return _ops.sparse_conv2d_backward_weight(grad, input, mask, size, *ctx.arguments)


def _gradients(ctx, grad):
    input, weight = ctx.saved_tensors
    needs, where = ctx.needs_input_grad, ctx.arguments
    dense = _layout.laid_as(grad, input) if needs[0] or needs[1] else grad
    return (
        _ops.sparse_conv2d_backward_input(dense, weight, input.shape, *where, ctx.kept)
        if needs[0]
        else None,
        _by_weight(ctx, dense, input, weight) if needs[1] else None,
        grad.sum((0, 2, 3)) if needs[2] else None,
        *[None] * 5,
    )


def _save_backward_input(ctx, inputs, output):
    grad, weight, _, *ctx.arguments, ctx.kept = inputs
    ctx.save_for_backward(grad, weight)


def _backward_input_gradients(ctx, g):  # g is like the input of the convolution
    grad, weight = ctx.saved_tensors
    needs, where = ctx.needs_input_grad, ctx.arguments
    return (
        _ops.sparse_conv2d(g, weight, None, *where, ctx.kept) if needs[0] else None,
        _by_weight(ctx, grad, g, weight) if needs[1] else None,
        *[None] * 6,
    )


def _save_backward_weight(ctx, inputs, output):
    grad, input, weight, _, *ctx.arguments = inputs
    ctx.save_for_backward(grad, input, weight)


def _backward_weight_gradients(ctx, g):  # g is like the weight
    grad, input, weight = ctx.saved_tensors
    needs, where = ctx.needs_input_grad, ctx.arguments
    g = _kept(g, weight)
    return (
        _ops.sparse_conv2d(input, g, None, *where) if needs[0] else None,
        _ops.sparse_conv2d_backward_input(grad, g, input.shape, *where) if needs[1] else None,
        *[None] * 6,
    )


differentiable("sparse_conv2d", _gradients, _save)
differentiable("sparse_conv2d_backward_input", _backward_input_gradients, _save_backward_input)
differentiable("sparse_conv2d_backward_weight", _backward_weight_gradients, _save_backward_weight)
for _name in ("", "_backward_input", "_backward_weight"):
    autocast("sparse_conv2d" + _name)


# --- the native kernels: csrc/torch/sparse_conv.cpp registers those without "cuda" in their name on
# the CPU key, sparse_conv_cuda.cpp the other ---


def _pack_fake(weight, rotate, blocks):
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int32)


def _native_forward_fake(input, filter, bias, out_channels, kernel_size, stride, padding, dilation):
    weight = input.new_empty(()).expand(out_channels, input.shape[1], *kernel_size)
    return _layout.empty(_output_size(input, weight, stride, padding, dilation), input)


def _csr_fake(input, values, entries, starts, bias, kernel_size, stride, dilation):
    weight = input.new_empty(()).expand(len(starts) - 1, input.shape[1], *kernel_size)
    return input.new_empty(_output_size(input, weight, stride, (0, 0), dilation))


def _two_of_four_fake(
    input, values, metadata, bias, out_channels, kernel_size, stride, padding, dilation
):
    weight = input.new_empty(()).expand(out_channels, input.shape[1], *kernel_size)
    size = _output_size(input, weight, stride, padding, dilation)
    return input.new_empty(size).contiguous(memory_format=torch.channels_last)


def _cuda_forward_fake(input, values, entries, starts, *arguments):
    return _two_of_four_fake(input, values, entries, *arguments[:-1])


def _kept_gradient_fake(grad, input, weight, stride, padding, dilation):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


define(
    f"_sparse_kept_gradient(Tensor grad, Tensor input, Tensor weight, {_GEOMETRY}) -> Tensor",
    None,
    _kept_gradient_fake,
)
define("_sparse_pack(Tensor weight, bool rotate, bool blocks) -> Tensor", None, _pack_fake)
define(
    "_sparse_forward(Tensor input, Tensor filter, Tensor? bias, int out_channels, "
    f"int[2] kernel_size, {_GEOMETRY}) -> Tensor",
    None,
    _native_forward_fake,
)
define(
    "_sparse_cuda_forward(Tensor input, Tensor values, Tensor entries, Tensor starts, "
    f"Tensor? bias, int out_channels, int[2] kernel_size, {_GEOMETRY}, bool strict) -> Tensor",
    None,
    _cuda_forward_fake,
)
define(
    "_sparse_cuda_two_of_four(Tensor input, Tensor values, Tensor metadata, Tensor? bias, "
    f"int out_channels, int[2] kernel_size, {_GEOMETRY}) -> Tensor",
    None,
    _two_of_four_fake,
)
define(
    "_sparse_cuda_csr(Tensor input, Tensor values, Tensor entries, Tensor starts, Tensor? bias, "
    "int[2] kernel_size, int[2] stride, int[2] dilation) -> Tensor",
    None,
    _csr_fake,
)
