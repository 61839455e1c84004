# SPDX-License-Identifier: BSD-3-Clause
"""What a user can get wrong: refused with F.conv2d's exception type, by op, argument, what it must
be, what it is, and what to do instead."""

import operator

import torch
from torch.overrides import is_tensor_like

from pywino.backends import ALGORITHMS, BACKENDS, PRECISIONS, TILES


def _refuse(op, text, error=RuntimeError):
    raise error(f"pywino.{op}: {text}")


def autocasts(input):
    """Whether autocast gives a convolution of `input` another dtype."""
    device = input.device.type
    able = torch.amp.is_autocast_available(device)  # "meta", for one, is not
    return able and torch.is_autocast_enabled(device) and input.dtype != torch.float64


def check_choice(op, backend, algorithm="auto", precision="default", activation=None):
    for name, value, known in (
        ("backend", backend, ("auto", *BACKENDS)),
        ("algorithm", algorithm, ("auto", *ALGORITHMS)),
        ("precision", precision, PRECISIONS),
        ("activation", activation, (None, "relu")),
    ):
        if value not in known:
            names = ", ".join(map(repr, known))
            _refuse(op, f"{name} must be one of {names}, got {value!r}; use {known[0]!r}")


def check_types(op, input, weight, bias, residual=None):
    tensors = {"input": input, "weight": weight, "bias": bias, "residual": residual}
    for name, tensor in tensors.items():
        if tensor is None and name in ("bias", "residual"):
            continue
        if not is_tensor_like(tensor):
            got = type(tensor).__name__
            _refuse(op, f"{name} must be a tensor, got {got}; pass a torch.Tensor", TypeError)


def check_tensors(op, input, weight, bias, residual=None):
    check_types(op, input, weight, bias, residual)
    shape = tuple(weight.shape)
    if input.dim() not in (3, 4):
        got = f"got {tuple(input.shape)}; reshape it"
        _refuse(op, f"input must be (N, C, H, W) or (C, H, W), {got}")
    if weight.dim() != 4:
        must = "(K, C / groups, kernel height, kernel width)"
        _refuse(op, f"weight must be {must}, got {shape}; reshape it")
    if weight.shape[0] == 0 or weight.shape[2] == 0 or weight.shape[3] == 0:
        _refuse(op, f"weight must be without empty dimensions, got {shape}; drop the layer")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != input.device:
            got = f"got {tensor.device}; move it: {name}.to(input.device)"
            _refuse(op, f"{name} must be on input's device {input.device}, {got}")
        if tensor.dtype != input.dtype and not autocasts(input):
            got = f"got {tensor.dtype}; convert it: {name}.to(input.dtype)"
            _refuse(op, f"{name} must be of input's dtype {input.dtype}, {got}")
    if bias is not None and tuple(bias.shape) != shape[:1]:
        must = f"({shape[0]},), one number an output channel"
        _refuse(op, f"bias must be {must}, got {tuple(bias.shape)}; reshape it")


def check_geometry(op, input, weight, stride, padding, dilation, groups):
    """(stride, padding, dilation) as pairs; padding is (0, 0) where a string says something that no
    kernel covers."""
    stride = _pair(op, "stride", stride, 1)
    dilation = _pair(op, "dilation", dilation, 1)
    if not isinstance(groups, int):
        _refuse(op, f"groups must be an integer, got {groups!r}; pass an int", TypeError)
    if groups < 1:
        _refuse(op, f"groups must be >= 1, got {groups}; use groups=1")
    k, channels, *kernel = weight.shape
    channels *= groups
    if input.shape[-3] != channels:
        got = f"{tuple(input.shape)} for weight {tuple(weight.shape)} and groups={groups}"
        _refuse(op, f"input must be of {channels} channels, got {got}; change one of them")
    if k % groups:
        must = f"of output channels divisible by groups={groups}"
        _refuse(op, f"weight must be {must}, got {k}; change groups")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            must = "an integer, two, 'same' or 'valid'"
            _refuse(op, f"padding must be {must}, got {padding!r}; use padding=0")
        if padding == "same" and stride != (1, 1):
            remedy = "give the padding as numbers"
            _refuse(op, f"stride must be 1 with padding='same', got {stride}; {remedy}")
        same = padding == "same" and kernel == [3, 3]
        return stride, dilation if same else (0, 0), dilation
    padding = _pair(op, "padding", padding, 0)
    _check_fit(op, input, kernel, padding, dilation)
    return stride, padding, dilation


def check_relu_geometry(op, input, weight, padding, dilation, tile):
    """(padding, dilation) as pairs, of the Winograd-ReLU layer."""
    if not isinstance(tile, int):
        _refuse(op, f"tile must be 2, 4 or 6, got {tile!r}; pass an int", TypeError)
    if tile not in TILES.values():
        _refuse(op, f"tile must be 2, 4 or 6, got {tile}; use tile=2")
    c, size = input.shape[-3], tile + 2
    if tuple(weight.shape[1:]) != (c, size, size):
        remedy = "a 3 x 3 weight needs pywino.ops.winograd.winograd_transform_filter"
        must = f"(K, {c}, {size}, {size}) for tile={tile}"
        _refuse(op, f"weight must be {must}, got {tuple(weight.shape)}; {remedy}")
    padding, dilation = _pair(op, "padding", padding, 0), _pair(op, "dilation", dilation, 1)
    _check_fit(op, input, (3, 3), padding, dilation)
    return padding, dilation


def _check_fit(op, input, kernel, padding, dilation):
    for name, i, p, d, r in zip(("height", "width"), input.shape[-2:], padding, dilation, kernel):
        padded, extent = i + 2 * p, d * (r - 1) + 1
        if padded < extent:
            must = f"of padded {name} >= the kernel's {extent}"
            _refuse(op, f"input must be {must}, got {padded}; add padding")


def _pair(op, name, value, least):
    """Two integers >= least, from one or two."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    try:
        values = tuple(operator.index(v) for v in values)
    except TypeError:
        remedy = "pass int or (int, int)"
        _refuse(op, f"{name} must be an integer or two, got {value!r}; {remedy}", TypeError)
    if len(values) not in (1, 2):
        remedy = "pass (height, width)"
        _refuse(op, f"{name} must be an integer or two, got {value!r}; {remedy}")
    if min(values) < least:
        _refuse(op, f"{name} must be >= {least}, got {value!r}; crop or slice the input instead")
    return values if len(values) == 2 else values * 2
