# SPDX-License-Identifier: BSD-3-Clause
"""The Winograd ops.

    pywino::winograd_conv2d                    act(conv(input, weight) + bias + residual), 3 x 3,
                                               stride 1
    pywino::winograd_conv2d_backward_input     its gradients. The three are closed under
    pywino::winograd_conv2d_backward_weight    differentiation: the gradient of each is made of the
                                               others and itself
    pywino::winograd_relu_conv2d               A^T [ W . ReLU(B^T d B) ] A (Liu et al., ICLR 2018),
                                               differentiable once
    pywino::winograd_transform_filter          G g G^T
    pywino::_winograd_…                        the native kernels: nothing to choose, no gradient,
                                               packed filters

`algorithm`, `backend` and `precision` are resolved inside the kernels, on real tensors: a traced
graph keeps "auto". An output is channels_last iff the op's input is (`backends.is_channels_last`),
whatever runs.
"""

import weakref

import torch

from pywino import backends, planner
from pywino.backends import Call
from pywino.ops import _layout
from pywino.ops._kernels import kernel_in_domain, kernel_of
from pywino.ops._library import autocast, define, differentiable, once_differentiable
from pywino.reference import winograd as reference

_ops = torch.ops.pywino
_routes = planner.memo()


# --- shapes and layouts ---


def output_size(input, out_channels, padding, dilation):
    height, width = (s + 2 * p - 2 * d for s, p, d in zip(input.shape[2:], padding, dilation))
    return input.shape[0], out_channels, height, width


def _input_size(grad, in_channels, padding, dilation):
    height, width = (s - 2 * p + 2 * d for s, p, d in zip(grad.shape[2:], padding, dilation))
    return grad.shape[0], in_channels, height, width


def _check(op, input, weight, padding, dilation, kernel=3):
    """What must hold for the shapes to make sense; pywino.functional words everything that a user
    can get wrong."""
    torch._check(
        input.dim() == 4 and weight.dim() == 4 and weight.shape[2] == weight.shape[3] == kernel,
        lambda: (
            f"pywino::{op}: input must be (N, C, H, W) and weight (K, C, {kernel}, {kernel}), got "
            f"{tuple(input.shape)} and {tuple(weight.shape)}; reshape them"
        ),
    )
    torch._check(
        input.shape[1] == weight.shape[1] and input.dtype == weight.dtype,
        lambda: (
            f"pywino::{op}: weight must have input's channels and dtype, {input.shape[1]} and "
            f"{input.dtype}, got {weight.shape[1]} and {weight.dtype}; convert one of them"
        ),
    )
    torch._check(
        min(padding) >= 0 and min(dilation) >= 1,
        lambda: (
            f"pywino::{op}: padding must be >= 0 and dilation >= 1, got {padding} and {dilation}; "
            "crop the input instead"
        ),
    )


def _check_output(op, size):
    torch._check(
        size[2] > 0 and size[3] > 0,
        lambda: (
            f"pywino::{op}: the dilated kernel must fit into the padded input, got an output of "
            f"{size[2]} x {size[3]}; add padding"
        ),
    )


def _choose(
    op, input, n, c, h, w, k, padding, dilation, algorithm, backend, precision, cached=False
):
    """The `Kernel` that runs this call, None for PyTorch's."""
    call = Call(
        op,
        n,
        c,
        h,
        w,
        k,
        tuple(padding),
        tuple(dilation),
        input.dtype,
        backends.is_channels_last(input),
        input.device.type,
        precision,
        cached,
        tf32=backends.allows_tf32(input),
    )
    key = (call, algorithm, backend, torch.get_num_threads())
    plan = _routes.get(key)
    if plan is None:
        # In a graph "f4" means f4 where it can run: the caller has refused what must be refused.
        if backend == "auto" and not backends.covers(call, algorithm):
            algorithm = "auto"
        if backends.lacks_gradient(backend, call, algorithm):
            algorithm = backend = "auto"
        plan = planner.remember(_routes, key, planner.choose(call, algorithm, backend))
    return kernel_of(plan, call) if plan.tile else None


# --- winograd_conv2d ---


def _forward(
    input, weight, bias, residual, padding, dilation, activation, algorithm, backend, precision
):
    _check("winograd_conv2d", input, weight, padding, dilation)
    choice = (algorithm, backend, precision)
    return _checked_forward(input, weight, bias, residual, padding, dilation, activation, *choice)


def _checked_forward(
    input, weight, bias, residual, padding, dilation, activation, algorithm, backend, precision
):
    k = weight.shape[0]
    kernel = _choose(
        "winograd_conv2d", input, *input.shape, k, padding, dilation, algorithm, backend, precision
    )
    relu = activation == "relu"
    if kernel:
        return kernel.convolve(input, weight, bias, residual, padding, dilation, relu)
    return aten_forward(input, weight, bias, residual, padding, dilation, relu)


def aten_forward(input, weight, bias, residual, padding, dilation, relu):
    """PyTorch's convolution, with the epilogue of the op and its layout rule."""
    # PyTorch's output is channels_last if either is: so it is the rule's, without a copy of the
    # output.
    if not backends.is_channels_last(input):
        weight = weight.contiguous()
    output = torch.conv2d(input, weight, bias, 1, padding, dilation)
    if residual is not None:
        output = output.add_(residual)
    return _layout.laid_as(output.relu_() if relu else output, input)


def _forward_fake(
    input, weight, bias, residual, padding, dilation, activation, algorithm, backend, precision
):
    _check("winograd_conv2d", input, weight, padding, dilation)
    size = output_size(input, weight.shape[0], padding, dilation)
    _check_output("winograd_conv2d", size)
    return _layout.empty(size, input)


def _backward_input(grad, weight, padding, dilation, algorithm, backend, precision):
    op = "winograd_conv2d_backward_input"
    k, c = weight.shape[:2]
    n, _, h, w = size = _input_size(grad, c, padding, dilation)
    kernel = _choose(op, grad, n, c, h, w, k, padding, dilation, algorithm, backend, precision)
    if kernel:
        full = [2 * d - p for p, d in zip(padding, dilation)]
        return kernel.convolve(grad, weight, None, None, full, dilation, False, rotate=True)
    grad = _layout.dense(grad)
    input = grad.new_empty(1).expand(size)  # only its size is read
    gradient = torch.ops.aten.convolution_backward(
        grad, input, weight, None, (1, 1), padding, dilation, False, (0, 0), 1, (True, False, False)
    )[0]
    return _layout.laid_as(gradient, grad)


def _backward_input_fake(grad, weight, padding, dilation, algorithm, backend, precision):
    return _layout.empty(_input_size(grad, weight.shape[1], padding, dilation), grad)


def _backward_weight(grad, input, padding, dilation, algorithm, backend, precision):
    op = "winograd_conv2d_backward_weight"
    k, c = grad.shape[1], input.shape[1]
    kernel = _choose(op, input, *input.shape, k, padding, dilation, algorithm, backend, precision)
    input = _layout.dense(input)
    grad = _layout.laid_as(grad, input)
    if kernel:
        return kernel.weight_gradient(grad, input, padding, dilation)
    weight = grad.new_empty(1).expand(k, c, 3, 3)
    gradient = torch.ops.aten.convolution_backward(
        grad, input, weight, None, (1, 1), padding, dilation, False, (0, 0), 1, (False, True, False)
    )[1]
    return gradient.contiguous()


def _backward_weight_fake(grad, input, padding, dilation, algorithm, backend, precision):
    return input.new_empty((grad.shape[1], input.shape[1], 3, 3))


_GEOMETRY = "int[2] padding, int[2] dilation"
_CHOICE = "str algorithm, str backend, str precision"
define(
    "winograd_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, "
    f"{_GEOMETRY}, str? activation, {_CHOICE}) -> Tensor",
    _forward,
    _forward_fake,
)
define(
    f"winograd_conv2d_backward_input(Tensor grad, Tensor weight, {_GEOMETRY}, {_CHOICE}) -> Tensor",
    _backward_input,
    _backward_input_fake,
)
define(
    f"winograd_conv2d_backward_weight(Tensor grad, Tensor input, {_GEOMETRY}, {_CHOICE}) -> Tensor",
    _backward_weight,
    _backward_weight_fake,
)


def _save(ctx, inputs, output):
    input, weight, _, _, padding, dilation, activation, *choice = inputs
    # The output is the mask of the ReLU: no other tensor has to be kept for it.
    ctx.save_for_backward(input, weight, output if activation == "relu" else None)
    ctx.geometry, ctx.choice = (padding, dilation), choice


def _gradients(ctx, grad, by_input=None, by_weight=None):
    by_input = by_input or _ops.winograd_conv2d_backward_input
    by_weight = by_weight or _ops.winograd_conv2d_backward_weight
    input, weight, output = ctx.saved_tensors
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    needs = ctx.needs_input_grad
    # A gradient often comes expanded or in another layout (from sum() or a reshape); what follows
    # has the input's.
    dense = _layout.laid_as(grad, input) if needs[0] or needs[1] else grad
    return (
        by_input(dense, weight, *ctx.geometry, *ctx.choice) if needs[0] else None,
        by_weight(dense, input, *ctx.geometry, *ctx.choice) if needs[1] else None,
        grad.sum((0, 2, 3)) if needs[2] else None,
        grad if needs[3] else None,
        *[None] * 6,
    )


def _save_backward(ctx, inputs, output):
    first, second, padding, dilation, *choice = inputs
    ctx.save_for_backward(first, second)
    ctx.geometry, ctx.choice = (padding, dilation), choice


def _backward_input_gradients(ctx, g):  # g is like the input of the convolution
    grad, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        _ops.winograd_conv2d(g, weight, None, None, *ctx.geometry, None, *ctx.choice)
        if needs[0]
        else None,
        _ops.winograd_conv2d_backward_weight(grad, g, *ctx.geometry, *ctx.choice)
        if needs[1]
        else None,
        *[None] * 5,
    )


def _backward_weight_gradients(ctx, g):  # g is like the weight
    grad, input = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        _ops.winograd_conv2d(input, g, None, None, *ctx.geometry, None, *ctx.choice)
        if needs[0]
        else None,
        _ops.winograd_conv2d_backward_input(grad, g, *ctx.geometry, *ctx.choice)
        if needs[1]
        else None,
        *[None] * 5,
    )


class EagerConv2d(torch.autograd.Function):
    """`winograd_conv2d` for eager training, of checked arguments: the same kernels and gradients
    without the dispatcher around them. Forward and backward cost 40 µs more than F.conv2d's by
    this, 100 µs by the op (one Zen 5 core, torch 2.13)."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _checked_forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() or type(grad) is not torch.Tensor:
            return _gradients(ctx, grad)  # create_graph=True, or a tracer: through the ops
        return _gradients(ctx, grad, _backward_input, _backward_weight)


differentiable("winograd_conv2d", _gradients, _save)
differentiable("winograd_conv2d_backward_input", _backward_input_gradients, _save_backward)
differentiable("winograd_conv2d_backward_weight", _backward_weight_gradients, _save_backward)
for _name in (
    "winograd_conv2d",
    "winograd_conv2d_backward_input",
    "winograd_conv2d_backward_weight",
):
    autocast(_name)


# --- the same with filters that a layer has promised not to change ---

frozen = weakref.WeakValueDictionary()  # token -> the `FilterCache` of a frozen layer


def _frozen_forward(
    input,
    weight,
    bias,
    residual,
    padding,
    dilation,
    activation,
    algorithm,
    backend,
    precision,
    token,
):
    k = weight.shape[0]
    kernel = _choose(
        "winograd_conv2d",
        input,
        *input.shape,
        k,
        padding,
        dilation,
        algorithm,
        backend,
        precision,
        True,
    )
    cache = frozen.get(token)
    if not kernel or cache is None:  # None: the graph runs in another process, or the layer is gone
        choice = (activation, algorithm, backend, precision)
        return _forward(input, weight, bias, residual, padding, dilation, *choice)
    filter = cache.frozen_filter(weight, kernel)
    relu = activation == "relu"
    return kernel.forward(input, filter, bias, residual, k, padding, dilation, relu)


def _frozen_forward_fake(*arguments):
    return _forward_fake(*arguments[:-1])


define(
    "_winograd_conv2d_frozen(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, "
    f"{_GEOMETRY}, str? activation, {_CHOICE}, int token) -> Tensor",
    _frozen_forward,
    _frozen_forward_fake,
)
autocast("_winograd_conv2d_frozen")


# --- winograd_relu_conv2d ---


def _relu_kernel(op, like, n, c, h, w, k, padding, dilation, tile, backend, kept=False):
    """The `Kernel` that runs this call, None for the reference; PyTorch has no counterpart, so
    there is nothing to measure."""
    call = Call(
        op,
        n,
        c,
        h,
        w,
        k,
        tuple(padding),
        tuple(dilation),
        like.dtype,
        device=like.device.type,
        tf32=backends.allows_tf32(like),
    )
    return kernel_in_domain(call, tile, backend, kept)


def _relu_forward(input, weight, bias, padding, dilation, tile, backend):
    op = "winograd_relu_conv2d"
    _check(op, input, weight, padding, dilation, tile + 2)
    k = weight.shape[0]
    kernel = _relu_kernel(op, input, *input.shape, k, padding, dilation, tile, backend)
    if kernel:
        return kernel.convolve(input, weight, bias, None, padding, dilation, False)
    output = reference.winograd_relu_conv2d(input, weight, bias, padding, dilation, tile)
    return _layout.laid_as(output, input)


def _relu_forward_fake(input, weight, bias, padding, dilation, tile, backend):
    _check("winograd_relu_conv2d", input, weight, padding, dilation, tile + 2)
    size = output_size(input, weight.shape[0], padding, dilation)
    _check_output("winograd_relu_conv2d", size)
    return _layout.empty(size, input)


def _relu_backward_input(grad, input, weight, padding, dilation, tile, backend):
    op = "winograd_relu_conv2d_backward_input"
    grad = _layout.laid_as(grad, input)
    k = weight.shape[0]
    kernel = _relu_kernel(op, input, *input.shape, k, padding, dilation, tile, backend)
    if kernel:
        return kernel.domain_input_gradient(grad, _layout.dense(input), weight, padding, dilation)
    gradient = reference.winograd_relu_backward_input(grad, input, weight, padding, dilation, tile)
    return _layout.laid_as(gradient, input)


def _relu_backward_input_fake(grad, input, weight, padding, dilation, tile, backend):
    return _layout.empty(input.shape, input)


def _relu_backward_weight(grad, input, padding, dilation, tile, backend):
    op = "winograd_relu_conv2d_backward_weight"
    grad = _layout.laid_as(grad, input)
    k = grad.shape[1]
    kernel = _relu_kernel(op, input, *input.shape, k, padding, dilation, tile, backend)
    if kernel:
        return kernel.weight_gradient(grad, _layout.dense(input), padding, dilation)
    return reference.winograd_relu_backward_weight(
        grad, input, padding, dilation, tile
    ).contiguous()


def _relu_backward_weight_fake(grad, input, padding, dilation, tile, backend):
    return input.new_empty((grad.shape[1], input.shape[1], tile + 2, tile + 2))


define(
    "winograd_relu_conv2d(Tensor input, Tensor weight, Tensor? bias, "
    f"{_GEOMETRY}, int tile, str backend) -> Tensor",
    _relu_forward,
    _relu_forward_fake,
)
define(
    "winograd_relu_conv2d_backward_input(Tensor grad, Tensor input, Tensor weight, "
    f"{_GEOMETRY}, int tile, str backend) -> Tensor",
    _relu_backward_input,
    _relu_backward_input_fake,
)
define(
    "winograd_relu_conv2d_backward_weight(Tensor grad, Tensor input, "
    f"{_GEOMETRY}, int tile, str backend) -> Tensor",
    _relu_backward_weight,
    _relu_backward_weight_fake,
)


def _relu_save(ctx, inputs, output):
    input, weight, _, padding, dilation, tile, backend = inputs
    ctx.save_for_backward(input, weight)
    ctx.arguments = (padding, dilation, tile, backend)


def _relu_gradients(ctx, grad):
    input, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        _ops.winograd_relu_conv2d_backward_input(grad, input, weight, *ctx.arguments)
        if needs[0]
        else None,
        _ops.winograd_relu_conv2d_backward_weight(grad, input, *ctx.arguments)
        if needs[1]
        else None,
        grad.sum((0, 2, 3)) if needs[2] else None,
        *[None] * 4,
    )


differentiable("winograd_relu_conv2d", _relu_gradients, _relu_save)
for _name in ("winograd_relu_conv2d_backward_input", "winograd_relu_conv2d_backward_weight"):
    once_differentiable(
        _name,
        "pywino.reference.winograd.winograd_relu_conv2d is, and computes the same",
    )
    autocast(_name)
autocast("winograd_relu_conv2d")


def _frozen_relu_forward(input, weight, bias, padding, dilation, tile, backend, token):
    op, k = "winograd_relu_conv2d", weight.shape[0]
    cache = frozen.get(token)
    kernel = _relu_kernel(op, input, *input.shape, k, padding, dilation, tile, backend, True)
    if not kernel or cache is None:
        return _relu_forward(input, weight, bias, padding, dilation, tile, backend)
    filter = cache.frozen_filter(weight, kernel)
    return kernel.forward(input, filter, bias, None, k, padding, dilation, False)


def _frozen_relu_forward_fake(*arguments):
    return _relu_forward_fake(*arguments[:-1])


define(
    "_winograd_relu_conv2d_frozen(Tensor input, Tensor weight, Tensor? bias, "
    f"{_GEOMETRY}, int tile, str backend, int token) -> Tensor",
    _frozen_relu_forward,
    _frozen_relu_forward_fake,
)
autocast("_winograd_relu_conv2d_frozen")


# --- winograd_transform_filter ---


def _transform_fake(weight, tile):
    torch._check(
        tile in reference.POINTS,
        lambda: f"pywino::winograd_transform_filter: tile must be 2, 4 or 6, got {tile}",
    )
    return weight.new_empty((*weight.shape[:2], tile + 2, tile + 2))


def _transform_filter(weight, tile):
    torch._check(
        weight.dim() == 4 and tuple(weight.shape[2:]) == (3, 3) and tile in reference.POINTS,
        lambda: (
            "pywino::winograd_transform_filter: weight must be (K, C, 3, 3) and tile 2, 4 or 6, "
            f"got {tuple(weight.shape)} and {tile}; transform each 3 x 3 kernel"
        ),
    )
    return reference.winograd_transform_filter(weight, tile).contiguous()


def _transform_save(ctx, inputs, output):
    ctx.tile = inputs[1]


def _transform_gradient(ctx, grad):
    _, g, _ = reference.transform_matrices(ctx.tile, torch.float64, grad.device)
    return torch.einsum("ai,kcab,bj->kcij", g, grad.double(), g).to(grad.dtype), None


define(
    "winograd_transform_filter(Tensor weight, int tile) -> Tensor",
    _transform_filter,
    _transform_fake,
)
differentiable("winograd_transform_filter", _transform_gradient, _transform_save)


def winograd_transform_filter(weight, tile):
    """G g G^T: (K, C, 3, 3) -> (K, C, tile + 2, tile + 2) in weight's dtype, differentiable any
    number of times."""
    return _ops.winograd_transform_filter.default(weight, tile)


# --- the native kernels: csrc/torch/winograd.cpp registers them on the CPU key ---


def _packed_fake(weight, *arguments):
    # The packing, and so the size, is the native library's own business and depends on the
    # instruction set.
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.float32)


def _sparse_packed_fake(weight, *arguments):
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int32)


def _native_forward_fake(
    input, filter, bias, residual, out_channels, tile, padding, dilation, relu, winograd_relu, fast
):
    return _layout.empty(output_size(input, out_channels, padding, dilation), input)


def _native_forward_mean_fake(
    input, gate, filter, bias, out_channels, tile, padding, dilation, fast
):
    output = _layout.empty(output_size(input, out_channels, padding, dilation), input)
    return output, input.new_empty(output.shape[:2], dtype=torch.float32)


def _native_convolve_fake(
    input, weight, bias, residual, tile, padding, dilation, relu, winograd_relu, rotate, fast
):
    k = weight.shape[1 if rotate else 0]
    return _layout.empty(output_size(input, k, padding, dilation), input)


def _native_conv_lstm_fake(input, hidden, cell, filter, bias, channels, tile, fast):
    size = (input.shape[0], channels, *input.shape[2:])
    return _layout.empty(size, input), _layout.empty(size, input)


def _native_backward_weight_fake(grad, input, tile, padding, dilation, spatial, winograd_relu):
    size = 3 if spatial else tile + 2
    return input.new_empty((grad.shape[1], input.shape[1], size, size))


def _native_domain_backward_input_fake(grad, input, filter, tile, padding, dilation, winograd_relu):
    return _layout.empty(input.shape, input)


define(
    "_winograd_filter(Tensor weight, int tile, bool rotate, bool fast) -> Tensor",
    None,
    _packed_fake,
)
define("_winograd_pack(Tensor weight, int tile, bool rotate) -> Tensor", None, _packed_fake)
define(
    "_winograd_sparse_pack(Tensor weight, int tile, bool rotate, bool blocks) -> Tensor",
    None,
    _sparse_packed_fake,
)
define(
    "_winograd_forward(Tensor input, Tensor filter, Tensor? bias, Tensor? residual, "
    f"int out_channels, int tile, {_GEOMETRY}, bool relu, bool winograd_relu, bool fast) -> Tensor",
    None,
    _native_forward_fake,
)
define(
    "_winograd_convolve(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, "
    f"int tile, {_GEOMETRY}, bool relu, bool winograd_relu, bool rotate, bool fast) -> Tensor",
    None,
    _native_convolve_fake,
)
define(
    "_winograd_forward_mean(Tensor input, Tensor? gate, Tensor filter, Tensor? bias, "
    f"int out_channels, int tile, {_GEOMETRY}, bool fast) -> (Tensor, Tensor)",
    None,
    _native_forward_mean_fake,
)
define(
    "_winograd_forward_mean_out(Tensor(a!) output, Tensor input, Tensor? gate, Tensor filter, "
    f"Tensor? bias, int out_channels, int tile, {_GEOMETRY}, bool fast) -> Tensor",
    None,
    lambda output, *_: output.new_empty(output.shape[:2], dtype=torch.float32),
)
define(
    "_winograd_conv_lstm(Tensor input, Tensor? hidden, Tensor? cell, Tensor filter, Tensor? bias, "
    "int channels, int tile, bool fast) -> (Tensor, Tensor)",
    None,
    _native_conv_lstm_fake,
)
define(
    "_winograd_backward_weight(Tensor grad, Tensor input, int tile, "
    f"{_GEOMETRY}, bool spatial, bool winograd_relu) -> Tensor",
    None,
    _native_backward_weight_fake,
)
for _name, _filter in (("", "filter"), ("_once", "weight")):
    define(
        f"_winograd_domain_backward_input{_name}(Tensor grad, Tensor input, Tensor {_filter}, "
        f"int tile, {_GEOMETRY}, bool winograd_relu) -> Tensor",
        None,
        _native_domain_backward_input_fake,
    )


# --- what the planner measures ---


def _tensors(call):
    """(input, weight, grad) of a call's signature, of a constant that no sum takes out of float16's
    range."""

    def filled(size, last=call.channels_last):
        format = torch.channels_last if last else torch.contiguous_format
        empty = torch.empty(size, dtype=call.dtype, device=call.device, memory_format=format)
        return empty.fill_(2.0**-8)

    input = filled((call.n, call.c, call.h, call.w))
    grad = filled((call.n, call.k, *call.output_size))
    return input, filled((call.k, call.c, 3, 3), last=False), grad


def _run_forward(call):
    input, weight, _ = _tensors(call)
    k, geometry = call.k, (call.padding, call.dilation)

    def run(name):
        if name is None:
            return lambda: torch.conv2d(input, weight, None, 1, *geometry)
        kernel = kernel_of(planner.kernel_plan(name), call)
        if not call.cached:
            return lambda: kernel.convolve(input, weight, None, None, *geometry, False)
        filter = kernel.filter(weight)
        return lambda: kernel.forward(input, filter, None, None, k, *geometry, False)

    return run


def _run_backward(call):
    input, weight, grad = _tensors(call)
    if call.op.endswith("input"):
        kernel, other = _backward_input, weight
    else:
        kernel, other = _backward_weight, input

    def run(name):
        plan = planner.PYTORCH if name is None else planner.kernel_plan(name)
        choice = (plan.algorithm or "auto", plan.backend)
        return lambda: kernel(grad, other, call.padding, call.dilation, *choice, call.precision)

    return run


planner.register("winograd_conv2d", _run_forward)
planner.register("winograd_conv2d_backward_input", _run_backward)
planner.register("winograd_conv2d_backward_weight", _run_backward)
