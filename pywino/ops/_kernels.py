# SPDX-License-Identifier: BSD-3-Clause
"""The native Winograd kernels of every backend behind one interface: how a filter is made, and how
a convolution runs with it."""

import importlib
from typing import NamedTuple

import torch

from pywino import backends, planner
from pywino.ops import _winograd_cuda
from pywino.ops._winograd_zeros import pack, pattern

_ops = torch.ops.pywino
_chosen = planner.memo()


def _as_read(input, bias, residual):
    """Dense tensors as the kernels read them."""
    channels_last = backends.is_channels_last(input)
    format = torch.channels_last if channels_last else torch.contiguous_format
    if not channels_last:
        input = input.contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    if residual is not None:
        residual = residual.to(input.dtype).contiguous(memory_format=format)
    return input, bias, residual


class Kernel(NamedTuple):
    """What runs a call; filters of equal kernels are alike, as long as the CPU's instruction set
    stays."""

    backend: str  # "cpu" | "cuda" | "triton"
    tile: int  # m of F(m x m, 3 x 3), 1 for the direct convolution
    # "cpu": products in bf16. "cuda" and "triton": fp32 throughout (3xTF32), no fp16 inside.
    mode: bool
    winograd_relu: bool = False  # the weight is in the Winograd domain, and V goes through a ReLU
    domain: bool = False  # the weight is in the Winograd domain, and V goes through none
    skips: bool = False  # "cuda": the filter of a weight in the domain has no zeros

    def filter(self, weight, rotate=False):
        """The packed filter of a weight; `rotate`: of the input gradient."""
        if self.backend == "cpu" and not self._spatial:
            return pack(weight, self.tile, pattern(weight, rotate), rotate)
        if self.skips:
            return _winograd_cuda.pack(weight, self.tile, self.mode)
        return self.whole_filter(weight, rotate)

    def whole_filter(self, weight, rotate=False):
        """The same with all zeros of the weight."""
        if self.backend == "cpu":
            if self._spatial:
                return _ops._winograd_filter.default(weight, self.tile, rotate, self.mode)
            return _ops._winograd_pack.default(weight, self.tile, rotate)
        if self.backend == "cuda":
            return _winograd_cuda.transform_filter(
                weight, self.tile, self.mode, rotate, self._spatial
            )
        if self.tile == 1:
            return _triton("dilated_conv").transform_filter(weight, rotate)
        return _triton().transform_filter(weight, self.tile, self._domain, rotate, self._spatial)

    def forward(self, input, filter, bias, residual, out_channels, padding, dilation, relu):
        """act(conv + bias + residual) of tensors as they come: strides, bias and residual are made
        what the kernels read. channels_last iff `input` is."""
        input, bias, residual = _as_read(input, bias, residual)
        arguments = (input, filter, bias, residual, out_channels, self.tile, padding, dilation)
        if self.backend == "cpu":
            return _ops._winograd_forward.default(*arguments, relu, self.winograd_relu, self.mode)
        if self.backend == "cuda":
            return _winograd_cuda.forward(*arguments, relu, self.mode, self.winograd_relu)
        if self.tile == 1:
            return _triton("dilated_conv").forward(
                input, filter, bias, residual, padding, dilation, relu, self.mode
            )
        u, scale = filter
        arguments = (input, u, scale, *arguments[2:])
        return _triton().forward(*arguments, relu, self.winograd_relu, self._domain)

    def convolve(self, input, weight, bias, residual, padding, dilation, relu, rotate=False):
        """`forward` with a filter that is made for this call. `rotate`: the input gradient, where
        `input` is the output's."""
        filter, k = None, weight.shape[1 if rotate else 0]
        if self.backend != "cpu":
            filter = self.filter(weight, rotate)
        elif not self._spatial and (how := pattern(weight, rotate)) != "dense":
            filter = pack(weight, self.tile, how, rotate)
        if filter is not None:
            return self.forward(input, filter, bias, residual, k, padding, dilation, relu)
        input, bias, residual = _as_read(input, bias, residual)
        relus = (relu, self.winograd_relu)
        return _ops._winograd_convolve.default(
            input, weight, bias, residual, self.tile, padding, dilation, *relus, rotate, self.mode
        )

    def gives_mean(self, input):
        """Whether `forward_mean` takes this input."""
        if len(input) != 1 or not self._spatial:
            return False
        return self.backend == "cuda" or (
            self.backend == "cpu" and backends.is_channels_last(input)
        )

    def forward_mean(self, input, gate, filter, bias, out_channels, padding, dilation, out=None):
        """(conv + bias, the mean of each of its channels (1, K) in float32), in one pass; with a
        gate, C numbers in float32, conv of relu(gate input), which `takes_gate` must admit.
        out: a tensor to write into, on the CPU."""
        if bias is not None:
            bias = bias.float().contiguous()
        if self.backend == "cuda":
            if not backends.is_channels_last(input):
                input = input.contiguous()
            return _winograd_cuda.forward_mean(
                input, gate, filter, bias, out_channels, self.tile, padding, dilation, self.mode
            )
        arguments = (
            input, gate, filter, bias, out_channels, self.tile, padding, dilation, self.mode
        )  # fmt: skip
        if out is not None:
            return out, _ops._winograd_forward_mean_out.default(out, *arguments)
        return _ops._winograd_forward_mean.default(*arguments)

    def takes_gate(self, input):
        return self.gives_mean(input) and (self.backend == "cuda" or input.dtype == torch.float32)

    def takes_lstm(self, input, channels):
        """Whether `conv_lstm` takes this input and so many channels of the state."""
        if self.backend == "cuda" and self.tile == 1:
            sizes = (input.shape[1], channels)
            return backends.is_channels_last(input) and not any(
                size * input.element_size() % 16 for size in sizes
            )
        return (
            self.backend == "cpu"
            and not self.winograd_relu
            and input.dtype == torch.float32
            and backends.is_channels_last(input)
            and input.shape[1] % 16 == channels % 16 == 0
        )

    def lstm_filter(self, weight):
        """The packed filter of a convolutional LSTM's gates."""
        if self.backend == "cuda":
            return _winograd_cuda.lstm_filter(weight, self.mode)
        return self.filter(weight)

    def conv_lstm(self, input, hidden, cell, filter, bias, channels):
        """(h', c') of a convolutional LSTM whose gates are conv([input, h]) + bias, with a filter
        from `lstm_filter`."""
        states = (
            state if state is None else state.contiguous(memory_format=torch.channels_last)
            for state in (hidden, cell)
        )
        if self.backend == "cuda":
            return _winograd_cuda.conv_lstm(input, *states, filter, bias, channels, self.mode)
        if bias is not None:
            bias = bias.contiguous()
        return _ops._winograd_conv_lstm.default(
            input, *states, filter, bias, channels, self.tile, self.mode
        )

    def weight_gradient(self, grad, input, padding, dilation):
        """The gradient by the weight, of dense tensors of one layout."""
        arguments = (grad, input, self.tile, padding, dilation)
        if self.backend == "triton":
            return _triton().weight_gradient(*arguments, self.winograd_relu, self._domain)
        kinds = (self._spatial, self.winograd_relu)
        if self.backend == "cpu":
            return _ops._winograd_backward_weight.default(*arguments, *kinds)
        return _winograd_cuda.weight_gradient(*arguments, *kinds, self.mode)

    def domain_input_gradient(self, grad, input, weight, padding, dilation):
        """The gradient by the input, of a weight in the Winograd domain. Where V goes through no
        ReLU, no element of the input is read."""
        arguments = (self.tile, padding, dilation)
        if self.backend == "cpu":
            how, arguments = pattern(weight, rotate=True), (*arguments, self.winograd_relu)
            if how == "dense":
                once = _ops._winograd_domain_backward_input_once.default
                return once(grad, input, weight, *arguments)
            filter = pack(weight, self.tile, how, rotate=True)
            return _ops._winograd_domain_backward_input.default(grad, input, filter, *arguments)
        filter = self.filter(weight, rotate=True)
        if self.backend == "triton":
            return _triton().relu_input_gradient(grad, input, *filter, *arguments, self._domain)
        arguments = (grad, input, filter, *arguments, self.winograd_relu)
        return _winograd_cuda.domain_input_gradient(*arguments, self.mode)

    @property
    def _spatial(self):
        return not (self.winograd_relu or self.domain)

    @property
    def _domain(self):
        return "f32" if self.mode else "f16"


def _triton(room="winograd"):
    return importlib.import_module(f"pywino.kernels.{room}")


def kernel_of(plan, call):
    """The `Kernel` of a `planner.Plan` that is not PyTorch's."""
    if plan.backend == "cpu":
        mode = backends.uses_fast_products(call.precision, plan.tile, call.c)
    else:
        mode = backends.is_strict(call, plan.algorithm)
    kinds = (call.op.startswith(op) for op in ("winograd_relu_conv2d", "winograd_domain_conv2d"))
    return Kernel(plan.backend, plan.tile, mode, *kinds)


def kernel_in_domain(call, tile, backend, kept=False):
    """The `Kernel` of a call with a weight in the Winograd domain, None for the reference: PyTorch
    has no counterpart, so there is nothing to measure.

    kept: the filter outlives the call. Then a GPU leaves zeros out where "cuda" was asked for: none
    has measured that yet, and the packing waits for the device."""
    if backend == "aten":
        return None
    algorithm = f"f{tile}"
    names = (backend,)
    if backend == "auto" or backends.lacks_gradient(backend, call, algorithm):
        names = backends.of_device(call.device)
    else:
        planner.require(backend, call, algorithm)
    for name in names:
        if backends.can_run(name, call, algorithm) is None:
            kernel = kernel_of(planner.Plan(name, algorithm), call)
            return kernel._replace(skips=kept and backend == name == "cuda")
    return None


def backend_of(call, backend):
    """The backend that runs a call of an op with one kernel a backend, None for PyTorch's
    composition: on the CPU ours where it can, on a GPU what was measured to be the fastest.

    What cannot run has been refused before: in a gradient or a graph an explicit choice that cannot
    is "auto"."""
    if backend == "aten":
        return None
    if backend != "auto" and backends.can_run(backend, call) is None:
        return backend
    if call.device == "cpu":
        return "cpu" if backends.can_run("cpu", call) is None else None
    plan = _chosen.get(call)
    if plan is None:
        plan = planner.remember(_chosen, call, planner.choose(call))
    return plan.backend if plan.tile else None
