# SPDX-License-Identifier: BSD-3-Clause
"""Layers that keep their transformed filters between calls."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module
from torch.optim.optimizer import register_optimizer_step_post_hook

from pywino import _native as native
from pywino.functional._winograd_domain import run_winograd_domain_conv2d
from pywino.functional.winograd import (
    gated,
    run_conv2d,
    run_conv2d_mean,
    run_winograd_relu_conv2d,
)
from pywino.ops import winograd as ops
from pywino.reference import winograd as reference

_ops = torch.ops.pywino
# Optimizer steps in this process: fused optimizers write weights without raising their `_version`.
_steps = 0
_watching = False
_tokens = itertools.count(1)


class FilterCache:
    """The transformed filters of one layer: derived data, so neither parameter nor buffer (DDP
    broadcasts buffers, `.half()` rounds them), and empty in every copy and pickle of the layer.

    A filter is valid for one Parameter object with one memory, version, dtype and device, until the
    next step of any optimizer. Writes through `weight.data`, and collectives on it, leave no trace:
    `invalidate_` is for them."""

    def __init__(self):
        # (name, instruction set) -> (Parameter, stamp, filter). No weak reference: swap_tensors
        # refuses a tensor that has one.
        self.filters = {}
        self.constant = {}  # the same for a frozen layer -> filter
        self.token = None  # a frozen layer's name in `ops.frozen`

    def filter(self, weight, kernel):
        """The filter of an `ops._kernels.Kernel` that belongs to `weight`."""
        return self.derived(kernel, weight, lambda weight: _transformed(weight, kernel))

    def derived(self, name, weight, make):
        """What `make(weight)` gives, kept under a name while the weight stays."""
        # An inference tensor has no version, and a weight that is no Parameter is not the layer's
        # own (functional_call).
        if type(weight) is not nn.Parameter or weight.is_inference():
            return make(weight)
        filter = self.kept(name, weight)
        if filter is not None:
            return filter
        key = name, _instruction_set()
        if key in self.filters:
            self.filters.clear()  # those of other names are as old
        filter = make(weight)
        if not weight.is_shared():  # another process may write it
            _watch_optimizers()
            self.filters[key] = weight, _stamp(weight), filter
        return filter

    def kept(self, name, weight):
        """What is kept under a name for this weight as it is, or None."""
        kept = self.filters.get((name, _instruction_set()))
        if kept is None or kept[0] is not weight or kept[1] != _stamp(weight):
            return None
        return kept[2]

    def frozen_filter(self, weight, kernel):
        """The filter of a frozen layer in a compiled graph, where `weight` is not the Parameter
        object."""
        key = kernel, _instruction_set()
        filter = self.constant.get(key)
        if filter is None:
            filter = self.constant[key] = _transformed(weight, kernel)
        return filter

    def freeze(self):
        if self.token is None:
            self.token = next(_tokens)
            ops.frozen[self.token] = self

    def clear(self):
        self.filters.clear()
        self.constant.clear()

    def __deepcopy__(self, memo):
        return FilterCache()

    def __reduce__(self):
        return FilterCache, ()


def _stamp(weight):
    return weight.data_ptr(), weight._version, weight.dtype, weight.device, _steps


def _instruction_set():
    return native.host.isa() if native.loaded else None


def _transformed(weight, kernel):
    with torch.no_grad():
        return kernel.filter(weight)


def _watch_optimizers():
    global _watching
    if not _watching:
        _watching = True
        register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer, args, kwargs):
    global _steps
    _steps += 1


class Cached:
    """What empties the filter cache of a layer."""

    def train(self, mode=True):
        self._filters.clear()
        if mode:
            self._filters.token = None  # a layer that trains is not frozen
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._filters.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._filters.clear()
        return super()._load_from_state_dict(*args, **kwargs)


def has_hooks(layer):
    """Whether someone wants to know of calls of this layer."""
    return (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or module._global_forward_hooks
        or module._global_forward_pre_hooks
    )


class WinogradConv2d(Cached, nn.Conv2d):
    """A drop-in `torch.nn.Conv2d`, by whatever runs each call fastest here.

    Args: those of nn.Conv2d, then
        activation: None or "relu", applied to the output.
        algorithm: "auto", or F(m x m, 3 x 3) as "f2" | "f4" | "f6", where it can run.
        backend: "auto" | "cpu" | "aten" | "cuda" | "triton"; one that cannot run a call raises the
            reason.
        precision: "default" | "fast" (bfloat16 products inside, where the CPU has them).
        domain: "spatial", or "winograd" for a 3 x 3 convolution of stride 1 whose parameter is
            `winograd_weight`, (out_channels, in_channels, tile + 2, tile + 2), in the place of
            `weight`. It is pruned and trained there (Liu et al., ICLR 2018), has no counterpart in
            torch.nn, and takes `backend` alone of the choices above.
        tile: of domain="winograd": 2, 4 or 6.

    3 x 3 convolutions of stride 1 and one group have kernels on the CPU; with any other arguments
    it is nn.Conv2d. Parameters, state_dict and hooks are those of nn.Conv2d. Without gradients,
    transformed filters are kept until the weight changes."""

    def __init__(
        self,
        *args,
        activation=None,
        algorithm="auto",
        backend="auto",
        precision="default",
        domain="spatial",
        tile=4,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self._set_up(activation, algorithm, backend, precision)
        if domain not in ("spatial", "winograd"):
            raise RuntimeError(
                "pywino.WinogradConv2d: domain must be 'spatial' or 'winograd', got "
                f"{domain!r}; use 'spatial'"
            )
        if domain == "winograd":
            self.to_winograd_domain_(tile)

    def _set_up(self, activation=None, algorithm="auto", backend="auto", precision="default"):
        self.activation = activation
        self.algorithm = algorithm
        self.backend = backend
        self.precision = precision
        self._filters = FilterCache()

    @property
    def domain(self):
        """ "spatial" or "winograd": where the weight lives."""
        return "winograd" if "winograd_weight" in self._parameters else "spatial"

    @property
    def tile(self):
        """m of F(m x m, 3 x 3) in the Winograd domain, None in the spatial one."""
        return self.winograd_weight.shape[-1] - 2 if self.domain == "winograd" else None

    @property
    def fits_winograd_domain(self):
        """Whether it is a convolution that F(m x m, 3 x 3) covers."""
        geometry = (self.kernel_size, self.stride, self.groups, self.padding_mode)
        return geometry == ((3, 3), (1, 1), 1, "zeros")

    def to_winograd_domain_(self, tile=4):
        """Replaces `weight` by the Parameter `winograd_weight` = G weight G^T, in place; the
        function stays, to rounding. Make optimizers afterwards. Returns the layer; one that is in
        the Winograd domain already stays as it is."""
        if self.domain == "winograd":
            return self
        if tile not in reference.POINTS:
            raise RuntimeError(
                f"pywino.WinogradConv2d: tile must be 2, 4 or 6, got {tile!r}; use tile=4"
            )
        if not self.fits_winograd_domain:
            raise RuntimeError(
                "pywino.WinogradConv2d: a layer of domain='winograd' must have a 3x3 kernel, "
                f"stride 1, groups=1 and padding_mode='zeros', got {self}; leave it in the spatial "
                "domain"
            )
        weight = self.weight
        with torch.no_grad():
            transformed = ops.winograd_transform_filter(weight, tile)
        del self.weight
        self.winograd_weight = nn.Parameter(transformed, weight.requires_grad)
        self._filters.clear()
        return self

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        own, other = "weight", "winograd_weight"
        if self.domain == "winograd":
            own, other = other, own
        if prefix + other in state and prefix + own not in state:
            remedy = (
                "load it into the layer before the layer goes into the Winograd domain"
                if own == "winograd_weight"
                else 'build the layer with domain="winograd", or call to_winograd_domain_'
            )
            errors.append(
                f"pywino.WinogradConv2d: the checkpoint must have {prefix + own}, got "
                f"{prefix + other}, a weight of the other domain; {remedy}"
            )
        arguments = (state, prefix, metadata, strict, missing, unexpected, errors)
        super()._load_from_state_dict(*arguments)

    @classmethod
    def from_dense(cls, conv, *, algorithm="auto", precision="default"):
        """A layer that shares the Parameter objects, hooks and settings of an `nn.Conv2d`."""
        layer = cls.__new__(cls)
        layer.__dict__.update(
            conv.__dict__
        )  # the dict of parameters itself is shared: an assignment is seen by both
        layer._set_up(algorithm=algorithm, precision=precision)
        return layer

    def to_dense(self):
        """The `nn.Conv2d` that shares this layer's Parameter objects, hooks and settings; without
        its activation."""
        if self.domain == "winograd":
            raise RuntimeError(
                "pywino.WinogradConv2d.to_dense: the weight must be in the spatial domain, got "
                "winograd_weight, which no 3x3 kernel equals in general; keep the layer"
            )
        conv = nn.Conv2d.__new__(nn.Conv2d)
        own = ("activation", "algorithm", "backend", "precision", "_filters")
        conv.__dict__.update(
            {name: value for name, value in self.__dict__.items() if name not in own}
        )
        return conv

    def forward(self, input, residual=None):
        """(N, C, H, W) or (C, H, W) -> nn.Conv2d's output, plus `residual` (anything that adds to
        it), then the activation."""
        padding = self.padding
        if self.domain == "winograd":
            return run_winograd_domain_conv2d(
                input,
                self.winograd_weight,
                self.bias,
                residual,
                padding,
                self.dilation,
                self.activation,
                self.backend,
                self._filters,
            )
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return run_conv2d(
            input,
            self.weight,
            self.bias,
            residual,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.activation,
            self.backend,
            self.algorithm,
            self.precision,
            self._filters,
            self.backend != "auto",
        )

    def with_mean(self, input, gate=None, out=None):
        """(the layer's output, the means of its channels (1, K) in float32), without the pass over
        the output that these take alone; None in their place where that cannot be. For what is
        gated by them (`ChannelResidualAttention`).

        With `gate` (N, C) in float32, of relu(gate input), without the pass that this takes
        alone. `out`, a tensor like the output, may be written; use what is returned."""
        fits = self.fits_winograd_domain and self.activation is None and self.domain == "spatial"
        if not fits or isinstance(self.padding, str) or has_hooks(self):
            return self(input if gate is None else gated(input, gate)), None
        choice = (self.backend, self.algorithm, self.precision)
        geometry = (self.padding, self.dilation)
        return run_conv2d_mean(
            input, self.weight, self.bias, *geometry, choice, self._filters, gate, out
        )

    def extra_repr(self):
        parts = [super().extra_repr()]
        if self.domain == "winograd":
            parts.append(f"domain=winograd, tile={self.tile}")
        else:
            parts.append(f"algorithm={self.algorithm}")
        if self.activation is not None:
            parts.append(f"activation={self.activation}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend}")
        if self.precision != "default":
            parts.append(f"precision={self.precision}")
        return ", ".join(parts)


class WinogradReLUConv2d(Cached, nn.Module):
    """The Winograd-ReLU layer of Liu et al. (ICLR 2018): Y = A^T [ sum_c W . ReLU(B^T d B) ] A,
    with W its free parameter.

    Args: those of nn.Conv2d in its order; kernel_size must be 3, stride and groups 1. `tile` is m
    of F(m x m, 3 x 3): 2 (the paper's), 4 or 6.

    The weight is (out_channels, in_channels, tile + 2, tile + 2). There is no ReLU to put before
    the layer (the paper's order is BatchNorm, then this), and no trained 3 x 3 convolution that
    equals it: train or fine-tune it. Differentiable once."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size=3,
        stride=1,
        padding=1,
        dilation=1,
        groups=1,
        bias=False,
        *,
        tile=2,
        backend="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, value, only in (
            ("kernel_size", _pair(kernel_size), (3, 3)),
            ("stride", _pair(stride), (1, 1)),
            ("groups", groups, 1),
        ):
            if value != only:
                raise RuntimeError(
                    f"pywino.WinogradReLUConv2d: {name} must be {only}, got {value}; "
                    "use torch.nn.Conv2d for this layer"
                )
        if tile not in reference.POINTS:
            raise RuntimeError(
                f"pywino.WinogradReLUConv2d: tile must be 2, 4 or 6, got {tile}; use tile=2"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = (3, 3)
        self.stride = (1, 1)
        self.padding = _pair(padding)
        self.dilation = _pair(dilation)
        self.groups = 1
        self.tile = tile
        self.backend = backend
        size = (out_channels, in_channels, tile + 2, tile + 2)
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )
        self._filters = FilterCache()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Truncated normal weights that keep the variance of unit-variance inputs, zero biases.

        An input of unit variance gives V = B^T d B the variance r_i r_j at position (i, j), r_i the
        squared length of row i of B^T; the ReLU keeps half of it. Position (i, j) adds c_i c_j of
        that to an output, c_i the mean square of column i of A^T. The weights' variance 2 / (C a^2
        r_i r_j c_i c_j) gives every position the same share of an output variance of 1."""
        bt, _, at = reference.transform_matrices(self.tile)
        share = bt.square().sum(1) * at.square().mean(0)
        variance = 2 / (self.in_channels * len(share) ** 2 * torch.outer(share, share))
        truncated = 0.8796  # the deviation of a unit normal cut at two deviations
        nn.init.trunc_normal_(self.weight, 0, 1, -2, 2)
        self.weight.mul_((variance.sqrt() / truncated).to(self.weight))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_dense(cls, conv, *, tile=2):
        """A layer that starts from G w G^T of a 3 x 3 `nn.Conv2d` of stride 1: the same weights,
        another function."""
        if not isinstance(conv.padding, tuple) or conv.padding_mode != "zeros":
            raise RuntimeError(
                "pywino.WinogradReLUConv2d.from_dense: padding must be numbers with "
                f"padding_mode='zeros', got {conv.padding!r} with {conv.padding_mode!r}; "
                "leave this layer as it is"
            )
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            tile=tile,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        with torch.no_grad():
            layer.weight.copy_(ops.winograd_transform_filter(conv.weight, tile))
        if conv.bias is not None:
            layer.bias = conv.bias
        return layer.train(conv.training)

    def forward(self, input):
        """(N, C, H, W) or (C, H, W) -> the size of the 3 x 3 convolution."""
        return run_winograd_relu_conv2d(
            input,
            self.weight,
            self.bias,
            self.padding,
            self.dilation,
            self.tile,
            self.backend,
            self._filters,
        )

    def extra_repr(self):
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size=(3, 3), padding={self.padding}"
        )
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        return text + f", bias={self.bias is not None}, tile={self.tile}"


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def freeze_(model):
    """Promises that the weights of every pywino layer in `model` stay as they are, and returns it.

    Compiled inference then uses a constant transformed filter instead of transforming it in every
    call. `model.train()` takes the promise back; after any other change of weights call
    `invalidate_(model)`."""
    for layer in _layers(model):
        layer._filters.freeze()
    return model


def invalidate_(model):
    """Forgets the transformed filters of every pywino layer in `model`, and returns it: for writes
    that leave no trace, as those through `weight.data` or by raw collectives."""
    for layer in _layers(model):
        layer._filters.clear()
    return model


def _layers(model):
    return (module for module in model.modules() if isinstance(module, Cached))
