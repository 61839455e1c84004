# SPDX-License-Identifier: BSD-3-Clause
"""The convolution of a `WinogradConv2d` whose weight is in the Winograd domain."""

import torch
from torch import Tensor, get_autocast_dtype
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from pywino import planner
from pywino.functional._checks import (
    autocasts,
    check_choice,
    check_relu_geometry,
    check_tensors,
)
from pywino.ops import _layout
from pywino.ops import _winograd_domain as ops
from pywino.ops._kernels import kernel_in_domain
from pywino.reference import winograd as reference

_OP = "winograd_domain_conv2d"
_PLAIN = (Tensor, torch.nn.Parameter)


def run_winograd_domain_conv2d(
    input, weight, bias, residual, padding, dilation, activation, backend, cache
):
    """act(A^T [ sum_c W . (B^T d B) ] A + bias + residual) for the layer; packed filters are kept
    in its `FilterCache` between calls without gradients."""
    check_choice(_OP, backend, activation=activation)
    check_tensors(_OP, input, weight, bias, residual)
    tile = weight.shape[-1] - 2
    if isinstance(padding, str):
        padding = dilation if padding == "same" else 0
    padding, dilation = check_relu_geometry(_OP, input, weight, padding, dilation, tile)
    if input.dim() == 3:
        if residual is not None and residual.dim() == 3:
            residual = residual.unsqueeze(0)
        output = run_winograd_domain_conv2d(
            input.unsqueeze(0),
            weight,
            bias,
            residual,
            padding,
            dilation,
            activation,
            backend,
            cache,
        )
        return output.squeeze(0)

    k = weight.shape[0]
    dtype = get_autocast_dtype(input.device.type) if autocasts(input) else input.dtype
    fused = residual
    if residual is not None and (
        residual.dtype != dtype
        or tuple(residual.shape) != ops.output_size(input, weight, padding, dilation)
    ):
        fused = None  # the kernels do not broadcast or promote
    relu = None if fused is not residual else activation
    plain = (
        type(input) is Tensor
        and type(weight) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
        and (fused is None or type(fused) in _PLAIN)
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )
    tensors = (input, weight, bias, residual)
    gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if plain:
        input = _layout.following(input, weight)
    arguments = (input, weight, bias, fused, padding, dilation)
    if torch.compiler.is_dynamo_compiling():
        output = torch.ops.pywino.winograd_domain_conv2d(*arguments, relu, tile, backend)
    elif not plain:
        output = reference.winograd_domain_conv2d(input, weight, bias, padding, dilation, tile)
        output = output if fused is None else output + fused
        output = output if relu is None else output.relu()
    elif not gradients and (kernel := _kernel(input, weight, padding, dilation, dtype, backend)):
        filter = cache.filter(weight, kernel)
        where = (padding, dilation, relu == "relu")
        output = kernel.forward(input.to(dtype), filter, bias, fused, k, *where)
    else:
        output = torch.ops.pywino.winograd_domain_conv2d.default(*arguments, relu, tile, backend)
    if fused is residual:
        return output
    output = output + residual
    return output if activation is None else output.relu()


def _kernel(input, weight, padding, dilation, dtype, backend):
    call = planner.describe(_OP, input, weight, padding, dilation)._replace(dtype=dtype)
    return kernel_in_domain(call, weight.shape[-1] - 2, backend, kept=True)
