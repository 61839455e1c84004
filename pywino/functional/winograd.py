# SPDX-License-Identifier: BSD-3-Clause
"""`conv2d`, a drop-in for `torch.nn.functional.conv2d`, and `winograd_relu_conv2d`."""

import torch
from torch import Tensor, get_autocast_dtype, get_num_threads, is_autocast_enabled
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import is_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from pywino import _native as native
from pywino import backends, planner
from pywino.functional._checks import (
    autocasts,
    check_choice,
    check_geometry,
    check_relu_geometry,
    check_tensors,
    check_types,
)
from pywino.ops import _layout
from pywino.ops import winograd as ops
from pywino.ops._kernels import kernel_in_domain, kernel_of
from pywino.reference import winograd as reference

_ops = torch.ops.pywino
_PLAIN = (Tensor, torch.nn.Parameter)
_routes = planner.memo()
# Seconds that a forward must save before a call with gradients leaves PyTorch: what the Python
# around its backward costs.
_AUTOGRAD = 40e-6
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def conv2d(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    activation=None,
    backend="auto",
    algorithm="auto",
    precision="default",
):
    """`torch.nn.functional.conv2d`, by whatever runs the call fastest here.

    Args:
        input: (N, C, H, W) or (C, H, W). 3 x 3 convolutions of stride 1 and one group have kernels
            on the CPU, in float32, bfloat16 and float16 (the 16-bit ones computed in float32);
            everything else that F.conv2d takes goes to it.
        weight: (K, C / groups, kernel height, kernel width).
        bias: (K,) or None.
        stride, padding, dilation, groups: as in F.conv2d, padding="same" and "valid" included.
        activation: None or "relu", fused into the kernel.
        backend: "auto" | "cpu" | "aten" | "cuda" | "triton".
        algorithm: "auto" or F(m x m, 3 x 3) as "f2" | "f4" | "f6".
        precision: "default" stays in the error class of the dtype; "fast" allows bfloat16 products
            where the CPU has them.

    Returns:
        (N, K, H_out, W_out) or (K, H_out, W_out) in input's dtype. Where a kernel covers the call,
        it is channels_last iff input or weight is. Differentiable twice.

    Raises:
        RuntimeError, TypeError: whatever F.conv2d refuses, and an explicit backend or algorithm
            that cannot run the call.

    The choice is measured at the first call of a signature (`pywino.planner`). Transformed filters
    are not kept between calls: `pywino.WinogradConv2d` keeps them.
    """
    return run_conv2d(
        input,
        weight,
        bias,
        None,
        stride,
        padding,
        dilation,
        groups,
        activation,
        backend,
        algorithm,
        precision,
    )


def run_conv2d(
    input,
    weight,
    bias,
    residual,
    stride,
    padding,
    dilation,
    groups,
    activation,
    backend,
    algorithm,
    precision,
    cache=None,
    strict=True,
):
    """`conv2d` with a residual that is added before the activation, for the layers.

    `cache` keeps transformed filters between calls without gradients
    (`pywino.nn.winograd.FilterCache`); without `strict`, an algorithm that cannot run the call's
    geometry gives way to PyTorch."""
    arguments = (stride, padding, dilation, groups, activation, backend, algorithm, precision)
    if torch.compiler.is_dynamo_compiling():
        return _traced(input, weight, bias, residual, arguments, cache, strict)
    if not (
        type(input) is Tensor
        and type(weight) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
        and (residual is None or type(residual) in _PLAIN)
        and (input.is_cpu or input.is_cuda)
        # functorch transforms, forward-mode AD, modes and jit.trace know F.conv2d, not our ops.
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and (_len_torch_function_stack() == 0 or _only_default_device())
        and _len_torch_dispatch_stack() == 0
        and _get_tracing_state() is None
    ):
        return _outside(input, weight, bias, residual, arguments, strict)
    gradients = _gradients(input, weight, bias, residual)
    device = "cpu" if input.is_cpu else "cuda"
    key = (
        input.shape,
        input.stride(),
        input.dtype,
        weight.shape,
        weight.stride(),
        weight.dtype,
        None if bias is None else (bias.shape, bias.dtype),
        None if residual is None else (residual.shape, residual.dtype),
        arguments,
        strict,
        cache is not None,
        gradients,
        get_num_threads() if device == "cpu" else (input.device, backends.allows_tf32(input)),
        is_autocast_enabled(device) and get_autocast_dtype(device),
    )
    try:
        route = _routes.get(key)
    except TypeError:  # something that has no hash among the arguments
        if any(isinstance(a, list) for a in arguments):
            arguments = tuple(tuple(a) if isinstance(a, list) else a for a in arguments)
            return run_conv2d(input, weight, bias, residual, *arguments, cache, strict)
        route = _find_route(input, weight, bias, residual, arguments, cache, strict, gradients)
        return route(input, weight, bias, residual, cache)
    if route is None:
        route = _find_route(input, weight, bias, residual, arguments, cache, strict, gradients)
        planner.remember(_routes, key, route)
    return route(input, weight, bias, residual, cache)


def run_conv2d_mean(input, weight, bias, padding, dilation, choice, cache, gate=None, out=None):
    """(conv2d, the means of its output's channels (1, K) in float32), the latter None where they
    would take another pass. With a gate, (N, C) in float32, conv2d of relu(gate input).
    choice: (backend, algorithm, precision). out: a tensor that may be written, of the output's
    size, dtype and layout."""
    kernel = inference_kernel((input, weight, bias, gate), padding, dilation, choice, True)
    if kernel is not None and kernel.gives_mean(input):
        if gate is not None and not kernel.takes_gate(input):
            input, gate = gated(input, gate), None
        filter = cache.filter(weight, kernel)
        return kernel.forward_mean(input, gate, filter, bias, len(weight), padding, dilation, out)
    if gate is not None:
        input = gated(input, gate)
    backend, algorithm, precision = choice
    arguments = (1, padding, dilation, 1, None, backend, algorithm, precision, cache, False)
    return run_conv2d(input, weight, bias, None, *arguments), None


def gated(input, gate):
    return torch.relu(input * gate[:, :, None, None].to(input.dtype))


def inference_kernel(tensors, padding, dilation, choice, cached):
    """The `Kernel` of an eager call on plain tensors without gradients, for what only kernels
    fuse; None where there is another call or PyTorch's convolution was chosen.

    tensors: (input, weight, bias, ...), of which the input may have fewer channels than the
    weight. choice: (backend, algorithm, precision). cached: whether filters are kept."""
    input, weight = tensors[:2]
    backend, algorithm, precision = choice
    if (
        torch.compiler.is_dynamo_compiling()
        or any(t is not None and type(t) not in _PLAIN for t in tensors)
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack() > 0
        or not (input.is_cpu or input.is_cuda)
        or input.dim() != 4
        or autocasts(input)
        or _gradients(*tensors)
    ):
        return None
    call = planner.describe(
        "winograd_conv2d", input, weight, padding, dilation, precision=precision, cached=cached
    )._replace(c=weight.shape[1])
    if not backends.covers(call, algorithm):
        return None
    plan = planner.choose(call, algorithm, backend)
    return kernel_of(plan, call) if plan.tile else None


def _gradients(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# --- routes: functions (input, weight, bias, residual, cache) -> output, one for each signature ---


def _find_route(input, weight, bias, residual, arguments, cache, strict, gradients):
    stride, padding, dilation, groups, activation, backend, algorithm, precision = arguments
    check_choice("conv2d", backend, algorithm, precision, activation)
    check_tensors("conv2d", input, weight, bias, residual)
    stride, pads, dilation = check_geometry(
        "conv2d", input, weight, stride, padding, dilation, groups
    )
    if input.dim() == 3:
        return lambda input, weight, bias, residual, cache: run_conv2d(
            input.unsqueeze(0), weight, bias, residual, *arguments, cache, strict
        ).squeeze(0)

    dtype = get_autocast_dtype(input.device.type) if autocasts(input) else input.dtype
    call = planner.describe(
        "winograd_conv2d",
        input,
        weight,
        pads,
        dilation,
        stride=stride,
        groups=groups,
        precision=precision,
        cached=cache is not None and not gradients,
    )._replace(dtype=dtype)
    if backends.covers(call) and not call.channels_last and _layout.asks_for_channels_last(weight):
        if backends.is_channels_last(_layout.following(input, weight)):
            return lambda input, weight, bias, residual, cache: run_conv2d(
                _layout.following(input, weight), weight, bias, residual, *arguments, cache, strict
            )
        # One channel or pixel: its output is channels_last all the same, by PyTorch's kernels.
        if backend == algorithm == "auto":
            return _pytorch_route(arguments, None)
    if not strict and not backends.covers(call, algorithm):
        algorithm = "auto"
    plan = planner.choose(call, algorithm, backend)
    if gradients and plan.tile and backend == "auto" and not _pays(plan):
        plan = planner.PYTORCH
    if residual is not None:
        fits = residual.dtype == dtype and residual.shape == (call.n, call.k, *call.output_size)
        plan = plan if fits else planner.PYTORCH  # the kernels do not broadcast or promote
    if not plan.tile:
        covered = backends.covers(call)
        layout = torch.channels_last if call.channels_last else torch.contiguous_format
        return _pytorch_route(arguments, layout if covered else None)
    if gradients:
        choice = (activation, algorithm, backend, precision)
        function = _ops.winograd_conv2d.default if autocasts(input) else ops.EagerConv2d.apply
        return lambda input, weight, bias, residual, cache: function(
            input, weight, bias, residual, pads, dilation, *choice
        )
    return _native_route(plan, call, activation == "relu")


def _pays(plan):
    """Whether a measured forward saves what the Python around its backward costs."""
    seconds = plan.seconds
    ours = seconds.get(planner.label(plan.backend, plan.algorithm))
    return ours is None or seconds["aten"] - ours > _AUTOGRAD


def _native_route(plan, call, relu):
    k, padding, dilation, dtype = call.k, call.padding, call.dilation, call.dtype

    def run(input, weight, bias, residual, cache):
        # Found anew each time: the instruction set in force decides on products in bf16.
        kernel = kernel_of(plan, call)
        if input.dtype is not dtype:  # autocast
            input, weight = input.to(dtype), weight if cache else weight.to(dtype)
        filter = kernel.filter(weight) if cache is None else cache.filter(weight, kernel)
        return kernel.forward(input, filter, bias, residual, k, padding, dilation, relu)

    return run


def _pytorch_route(arguments, layout):
    """F.conv2d; `layout` is the output's by the layout rule, None where no kernel covers the call:
    there PyTorch's own holds."""
    stride, padding, dilation, groups, activation, *_ = arguments

    def run(input, weight, bias, residual, cache):
        if layout is torch.contiguous_format:
            weight = weight.contiguous()  # PyTorch's output is channels_last if either is
        output = torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
        if layout is not None:
            output = output.contiguous(memory_format=layout)
        # In place on the convolution's output, which nobody else holds; a sum may be larger.
        if residual is not None:
            same = residual.shape == output.shape and residual.dtype == output.dtype
            output = output.add_(residual) if same else output + residual
        return output if activation is None else output.relu_()

    return run


# --- calls that are not eager ones on plain CPU tensors ---


def _traced(input, weight, bias, residual, arguments, cache, strict):
    """Under torch.compile: the op where a kernel covers the call. It plans when it runs, on real
    tensors."""
    stride, padding, dilation, groups, activation, backend, algorithm, precision = arguments
    check_choice("conv2d", backend, algorithm, precision, activation)
    if input.dim() == 3:
        output = _traced(input.unsqueeze(0), weight, bias, residual, arguments, cache, strict)
        return output.squeeze(0)
    check_tensors("conv2d", input, weight, bias, residual)
    stride, pads, dilation = check_geometry(
        "conv2d", input, weight, stride, padding, dilation, groups
    )
    device = input.device.type
    dtype = get_autocast_dtype(device) if autocasts(input) else input.dtype
    covered = (
        _has_kernels(device)
        and tuple(weight.shape[2:]) == (3, 3)
        and stride == (1, 1)
        and groups == 1
        and dtype in _FLOATS
    )
    if strict and not covered and (backend not in ("auto", "aten") or algorithm != "auto"):
        call = planner.describe(
            "winograd_conv2d", input, weight, pads, dilation, stride=stride, groups=groups
        )
        planner.require(
            (backends.of_device(device) or ("cpu",))[0] if backend == "auto" else backend,
            call,
            algorithm,
        )
    if residual is not None and covered:
        size = ops.output_size(input, weight.shape[0], pads, dilation)
        covered = residual.dtype == dtype and tuple(residual.shape) == size
    batched = is_batchedtensor(input) or is_batchedtensor(weight)  # PyTorch knows how to vmap
    if not covered or batched or backend == "aten":
        return _pytorch_route(arguments, None)(input, weight, bias, residual, None)
    input = _layout.following(input, weight)
    if (
        backend == algorithm == "auto"
        and not backends.is_channels_last(input)
        and _layout.asks_for_channels_last(weight)
    ):
        return _pytorch_route(arguments, None)(input, weight, bias, residual, None)
    choice = (activation, algorithm, backend, precision)
    if (
        cache is not None
        and cache.token is not None
        and not _gradients(input, weight, bias, residual)
    ):
        return _ops._winograd_conv2d_frozen(
            input, weight, bias, residual, pads, dilation, *choice, cache.token
        )
    return _ops.winograd_conv2d(input, weight, bias, residual, pads, dilation, *choice)


def _has_kernels(device):
    """Whether anything but PyTorch can run on a device here: what a traced graph depends on."""
    if device == "cpu":
        return native.loaded
    probe = backends.Call("winograd_conv2d", 1, 8, 8, 8, 8, (1, 1), (1, 1), device=device)
    return backends.covers(probe)


def _outside(input, weight, bias, residual, arguments, strict):
    """PyTorch's convolution. On another device, an explicit choice says why it cannot run."""
    activation, backend, algorithm, precision = arguments[4:]
    check_choice("conv2d", backend, algorithm, precision, activation)
    check_types("conv2d", input, weight, bias, residual)
    if (
        strict
        and type(input) is Tensor
        and not input.is_cpu
        and input.dim() == 4
        and weight.dim() == 4
    ):
        planner.choose(planner.describe("winograd_conv2d", input, weight), algorithm, backend)
    return _pytorch_route(arguments, None)(input, weight, bias, residual, None)


def _only_default_device():
    """Whether the only __torch_function__ modes are those of torch.set_default_device, which a
    convolution ignores."""
    stack = (torch._C._get_function_stack_at(i) for i in range(_len_torch_function_stack()))
    return all(type(mode) is DeviceContext for mode in stack)


# --- Winograd-ReLU ---


def winograd_relu_conv2d(
    input, weight, bias=None, padding=1, dilation=1, *, tile=2, backend="auto"
):
    """The Winograd-ReLU layer of Liu et al. (ICLR 2018): Y = A^T [ sum_c W . ReLU(B^T d B) ] A,
    with W a free parameter.

    It is not a convolution before or after a ReLU, so no trained 3 x 3 weights can be converted:
    train or fine-tune it.

    Args:
        input: (N, C, H, W) or (C, H, W), float32, bfloat16, float16 (computed in float32) or
            float64.
        weight: (K, C, tile + 2, tile + 2), in the Winograd domain.
        bias: (K,) or None.
        padding, dilation: an integer or two, as in F.conv2d.
        tile: 2 (the paper's), 4 or 6: m of F(m x m, 3 x 3).
        backend: "auto" | "cpu" | "aten" (plain PyTorch, slow) | "cuda" | "triton".

    Returns:
        (N, K, H + 2 padding - 2 dilation, W + 2 padding - 2 dilation), the size of the 3 x 3
        convolution: tiles that stick out are cropped. channels_last iff input or weight
        is. Differentiable once.

    Raises:
        RuntimeError, TypeError: arguments that do not fit, and an explicit backend that cannot run.
    """
    return run_winograd_relu_conv2d(input, weight, bias, padding, dilation, tile, backend)


def run_winograd_relu_conv2d(input, weight, bias, padding, dilation, tile, backend, cache=None):
    """`winograd_relu_conv2d`, with packed filters kept in a layer's `FilterCache`."""
    op = "winograd_relu_conv2d"
    check_choice(op, backend)
    check_tensors(op, input, weight, bias)
    padding, dilation = check_relu_geometry(op, input, weight, padding, dilation, tile)
    if input.dim() == 3:
        output = run_winograd_relu_conv2d(
            input.unsqueeze(0), weight, bias, padding, dilation, tile, backend, cache
        )
        return output.squeeze(0)

    gradients = _gradients(input, weight, bias)
    if torch.compiler.is_dynamo_compiling():
        if not (is_batchedtensor(input) or is_batchedtensor(weight)):
            input = _layout.following(input, weight)
        arguments = (input, weight, bias, padding, dilation, tile, backend)
        if cache is not None and cache.token is not None and not gradients:
            return _ops._winograd_relu_conv2d_frozen(*arguments, cache.token)
        return _ops.winograd_relu_conv2d(*arguments)
    if (
        type(input) is not Tensor
        or type(weight) not in _PLAIN
        or (bias is not None and type(bias) not in _PLAIN)
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return reference.winograd_relu_conv2d(input, weight, bias, padding, dilation, tile)
    input = _layout.following(input, weight)
    if cache is not None and not gradients:
        call = planner.describe(op, input, weight, padding, dilation)
        if autocasts(input):
            call = call._replace(dtype=get_autocast_dtype(call.device))
        kernel = kernel_in_domain(call, tile, backend, kept=True)
        if kernel:
            filter = cache.filter(weight, kernel)
            input = input.to(call.dtype)
            return kernel.forward(
                input, filter, bias, None, weight.shape[0], padding, dilation, False
            )
    return _ops.winograd_relu_conv2d.default(input, weight, bias, padding, dilation, tile, backend)
