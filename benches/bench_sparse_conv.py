# SPDX-License-Identifier: BSD-3-Clause
"""Pruned layers by sparsity and pattern: the Winograd domain, and spatial weights. Both sides run
with the same threads and allocator (conftest.py)."""

import copy

import pytest
import torch
from layers import UNDILATED, VGG, Layer
from torch import Tensor
from torch.nn import functional as F

import pywino
from pywino.models import vgg16
from pywino.ops import sparse_conv
from pywino.ops._kernels import Kernel
from pywino.ops.winograd import winograd_transform_filter
from pywino.pruning import Block, prune_
from pywino.reference import winograd as reference

_ops = torch.ops.pywino
CHANNELS_LAST = torch.channels_last
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SPARSITIES = (0, 50, 70, 80, 90, 95)  # in percent
_TWO_OF_SPARSITIES = [
    s if s in (50, 90) else pytest.param(s, marks=pytest.mark.full_only) for s in SPARSITIES
]
# Relative L2 error against float64: of F(4x4,3x3), and of PyTorch's own convolution, thrice.
LIMIT_F4, LIMIT_DIRECT = 2.5e-6, 1.5e-6
DENSE = "F.conv2d computes all products of a dense 3x3 weight: a measure of time only."
PACKED = "The filter is packed before: the layer keeps it (inference)."

_VGG_B1 = tuple(layer for layer in VGG if layer.n == 1)
# What a short run keeps: a large, a middle and a small layer of many channels, and few channels.
_SHORT = tuple(
    layer
    for layer in UNDILATED
    if layer.name
    in {"vgg-64x224-b1", "vgg-256x56-b1", "vgg-512x14-b1", "cifar-64x8-b128", "sap-32x481x321-d1"}
)
_SHORTEST = tuple(layer for layer in _SHORT if layer.c == 256)


def _mask(size: torch.Size, sparsity: int, pattern: str, seed: int = 1) -> Tensor:
    """True where a (K, C, r, r) weight is kept: numbers, or blocks of 16 output channels (and one
    position, `domain`, or the whole kernel, `spatial`)."""
    generator = torch.Generator().manual_seed(seed)
    k, c, *positions = size
    if pattern == "unstructured":
        return torch.rand(size, generator=generator) >= sparsity / 100
    positions = positions if pattern == "domain blocks" else (1, 1)
    keep = torch.rand(-(-k // 16), c, *positions, generator=generator) >= sparsity / 100
    return keep.repeat_interleave(16, 0)[:k].expand(size)


def _ends(y: Tensor) -> Tensor:
    """First and last image: enough to check a batch, at a fraction of the float64 work."""
    return y[:: max(1, len(y) - 1)]


def _dense_peers(layer: Layer, stride: int = 1, kernel: int = 3) -> dict:
    """F.conv2d in both memory formats, of the weight with its zeros."""
    peers = {}
    for name, memory_format in (
        ("nchw", torch.contiguous_format),
        ("channels_last", CHANNELS_LAST),
    ):
        x, w, b = layer.tensors(memory_format=memory_format)
        if kernel == 1:
            w = w[:, :, :1, :1].contiguous(memory_format=memory_format)
        peers[name] = lambda x=x, w=w, b=b: F.conv2d(x, w, b, stride, kernel // 2)
    return peers


def _aten_gradients(grad, x, w, stride, padding, wanted) -> dict:
    """PyTorch's gradient by the input or the weight in both memory formats, of all weights."""
    runs = {}
    for name, memory_format in FORMATS.items():
        own = [t.contiguous(memory_format=memory_format) for t in (grad, x, w)]
        runs[name] = lambda own=own: torch.ops.aten.convolution_backward(
            *own, None, stride, padding, (1, 1), False, (0, 0), 1, wanted
        )[wanted.index(True)]
    return runs


# ------------------------------------------------------------------------------ the Winograd domain


def _compare_domain(compare, layer, sparsity, how, peer=False):
    x, w, b = layer.tensors()
    last = x.contiguous(memory_format=CHANNELS_LAST)
    w = winograd_transform_filter(w, 4)
    pattern = "unstructured" if how == "unstructured" else "domain blocks"
    w = w * _mask(w.shape, sparsity, pattern)
    filter = _ops._winograd_sparse_pack(w, 4, False, how == "blocks")
    kernel, where = Kernel("cpu", 4, False, domain=True), (len(w), (1, 1), (1, 1), False)
    ours = lambda: kernel.forward(last, filter, b, None, *where)  # noqa: E731
    peers = _dense_peers(layer)
    if peer:
        dense = kernel.whole_filter(w)
        peers["dense F(4x4,3x3)"] = lambda: kernel.forward(last, dense, b, None, *where)
    compare(
        {"f4": ours},
        peers,
        reference=lambda: reference.winograd_domain_conv2d(
            _ends(x).double(), w.double(), b.double(), 1, 1, 4
        ),
        limit=LIMIT_F4,
        view=_ends,
        denominator=("nchw", "channels_last"),
        same=False,
        note=f"{DENSE} {PACKED}",
    )


@pytest.mark.benchmark(group="sparse_winograd_unstructured_80")
@pytest.mark.layers(full=UNDILATED, default=_SHORT)
@torch.inference_mode()
def test_winograd_unstructured_80(compare, native, layer):
    """F(4x4,3x3), 80 % of the Winograd-domain weights zero anywhere, channels_last, against dense
    F.conv2d"""
    _compare_domain(compare, layer, 80, "unstructured")


@pytest.mark.benchmark(group="sparse_winograd_unstructured_90")
@pytest.mark.layers(full=UNDILATED, default=_SHORTEST)
@torch.inference_mode()
def test_winograd_unstructured_90(compare, native, layer):
    """F(4x4,3x3), 90 % of the Winograd-domain weights zero anywhere, channels_last, against dense
    F.conv2d"""
    _compare_domain(compare, layer, 90, "unstructured")


@pytest.mark.benchmark(group="sparse_winograd_blocks_80")
@pytest.mark.layers(full=UNDILATED, default=_SHORTEST)
@torch.inference_mode()
def test_winograd_blocks_80(compare, native, layer):
    """F(4x4,3x3), 80 % of the blocks of 16 output x 1 input channel zero, channels_last, against
    dense F.conv2d"""
    _compare_domain(compare, layer, 80, "blocks")


@pytest.mark.benchmark(group="sparse_winograd_blocks_90")
@pytest.mark.layers(full=UNDILATED, default=_SHORTEST)
@torch.inference_mode()
def test_winograd_blocks_90(compare, native, layer):
    """F(4x4,3x3), 90 % of the blocks of 16 output x 1 input channel zero, channels_last, against
    dense F.conv2d"""
    _compare_domain(compare, layer, 90, "blocks")


@pytest.mark.benchmark(group="sparse_winograd_break_even")
@pytest.mark.layers(full=_VGG_B1, default=())
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("how", ["unstructured", "blocks"])
@torch.inference_mode()
def test_winograd_break_even(compare, native, layer, how, sparsity):
    """F(4x4,3x3) without its zeros by sparsity, channels_last, against dense F.conv2d and the same
    weight with its zeros"""
    _compare_domain(compare, layer, sparsity, how, peer=True)


@pytest.mark.benchmark(group="sparse_winograd_backward")
@pytest.mark.layers(full=_VGG_B1, default=_SHORTEST)
@pytest.mark.parametrize("sparsity", [50, 80, 90])
@torch.inference_mode()
def test_winograd_backward(compare, native, layer, sparsity):
    """input gradient of F(4x4,3x3) with zeros anywhere, channels_last, against PyTorch's of a dense
    3x3 weight and ours of the same weight with its zeros"""
    last, w, _ = layer.tensors(memory_format=CHANNELS_LAST)
    grad = last.flip(0, 2)[:, : layer.k]
    domain_weight = winograd_transform_filter(w.contiguous(), 4)
    domain_weight = domain_weight * _mask(domain_weight.shape, sparsity, "unstructured")
    filters = {
        "sparse": _ops._winograd_sparse_pack(domain_weight, 4, True, False),
        "dense F(4x4,3x3)": _ops._winograd_pack(domain_weight, 4, True),
    }
    where = (4, (1, 1), (1, 1), False)
    runs = {
        name: lambda filter=filter: _ops._winograd_domain_backward_input(grad, last, filter, *where)
        for name, filter in filters.items()
    }
    runs |= _aten_gradients(grad, last, w, (1, 1), (1, 1), (True, False, False))
    ours = runs.pop("sparse")
    compare(
        {"f4": ours},
        runs,
        reference=lambda: reference.winograd_domain_backward_input(
            grad.double(), domain_weight.double(), 1, 1, 4
        ),
        limit=3 * LIMIT_F4,
        denominator=("nchw", "channels_last"),
        same=False,
        note=f"{DENSE} The filter is packed before.",
    )


# ---------------------------------------------------------------------------------- spatial weights

CASES = {"3x3": (3, 1), "3x3 stride 2": (3, 2), "1x1": (1, 1)}


def _spatial(layer: Layer, sparsity: int, how: str, kernel: int):
    x, w, b = layer.tensors()
    w = w[:, :, :kernel, :kernel].contiguous()
    return x, w * _mask(w.shape, sparsity, how), b


def _compare_spatial(compare, layer, case, sparsity, how):
    kernel, stride = CASES[case]
    x, w, b = _spatial(layer, sparsity, how, kernel)
    filter = sparse_conv.pack(w, how)
    padding = kernel // 2
    where = (len(w), (kernel, kernel), (stride, stride), (padding, padding), (1, 1))
    ours = {}
    for name, memory_format in (
        ("nchw", torch.contiguous_format),
        ("channels_last", CHANNELS_LAST),
    ):
        own = x.contiguous(memory_format=memory_format)
        ours[name] = lambda own=own: sparse_conv.native_forward(own, filter, b, *where)
    compare(
        ours,
        _dense_peers(layer, stride, kernel),
        reference=lambda: F.conv2d(_ends(x).double(), w.double(), b.double(), stride, padding),
        limit=LIMIT_DIRECT,
        view=_ends,
        same=False,
        note=f"{DENSE} {PACKED}",
    )


@pytest.mark.benchmark(group="sparse_conv_unstructured_90")
@pytest.mark.layers(full=UNDILATED, default=_SHORTEST)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_spatial_unstructured_90(compare, native, layer, case):
    """spatial weight with 90 % zeros anywhere, the better layout, against the better of dense
    F.conv2d's"""
    _compare_spatial(compare, layer, case, 90, "unstructured")


@pytest.mark.benchmark(group="sparse_conv_blocks_90")
@pytest.mark.layers(full=UNDILATED, default=())
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_spatial_blocks_90(compare, native, layer, case):
    """spatial weight with 90 % of the 16 x 1 blocks of kernels zero, the better layout, against the
    better of dense F.conv2d's"""
    _compare_spatial(compare, layer, case, 90, "blocks")


@pytest.mark.benchmark(group="sparse_conv_break_even")
@pytest.mark.layers(full=_VGG_B1, default=())
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("how", ["unstructured", "blocks"])
@torch.inference_mode()
def test_spatial_break_even(compare, native, layer, how, sparsity):
    """3x3 spatial weight without its zeros by sparsity, the better layout, against the better of
    dense F.conv2d's"""
    _compare_spatial(compare, layer, "3x3", sparsity, how)


@pytest.mark.benchmark(group="sparse_conv_backward_input")
@pytest.mark.layers(full=_VGG_B1, default=())
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("how", ["unstructured", "blocks"])
@torch.inference_mode()
def test_backward_input(compare, native, layer, how, sparsity):
    """input gradient of a 3x3 spatial weight without its zeros, channels_last, against PyTorch's"""
    x, w, _ = layer.tensors(memory_format=CHANNELS_LAST)
    w = w * _mask(w.shape, sparsity, how)
    grad = x.flip(0, 2)[:, : layer.k].contiguous(memory_format=CHANNELS_LAST)
    filter = sparse_conv.pack(w, how, rotate=True)
    where = (w.shape[1], (3, 3), (1, 1), (1, 1), (1, 1))
    compare(
        {"channels_last": lambda: sparse_conv.native_forward(grad, filter, None, *where)},
        _aten_gradients(grad, x, w, (1, 1), (1, 1), (True, False, False)),
        reference=lambda: torch.nn.grad.conv2d_input(x.shape, w.double(), grad.double(), padding=1),
        limit=LIMIT_DIRECT,
        note=f"{DENSE} The filter is packed before.",
    )


@pytest.mark.benchmark(group="sparse_conv_backward_weight")
@pytest.mark.layers(full=_VGG_B1, default=_SHORTEST)
@pytest.mark.parametrize("sparsity", _TWO_OF_SPARSITIES)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_backward_weight(compare, native, layer, case, sparsity):
    """weight gradient of the kept 16 x 1 blocks of kernels alone, channels_last, against PyTorch's
    of all weights"""
    kernel, stride = CASES[case]
    x, w, _ = _spatial(layer, sparsity, "blocks", kernel)
    x, padding = x.contiguous(memory_format=CHANNELS_LAST), (kernel // 2,) * 2
    where = ((stride, stride), padding, (1, 1))
    grad = torch.randn_like(F.conv2d(x, w, None, *where)).contiguous(memory_format=CHANNELS_LAST)
    compare(
        {"channels_last": lambda: _ops._sparse_kept_gradient(grad, x, w, *where)},
        _aten_gradients(grad, x, w, *where[:2], (False, True, False)),
        reference=lambda: (
            torch.nn.grad.conv2d_weight(x.double(), w.shape, grad.double(), *where) * (w != 0)
        ),
        limit=3 * LIMIT_DIRECT,
        same=False,
        note="PyTorch's kernel computes the gradient of every weight.",
    )


@pytest.mark.benchmark(group="sparse_conv_csr")
@pytest.mark.layers(full=_VGG_B1, default=())
@pytest.mark.parametrize("sparsity", SPARSITIES[1:])
@pytest.mark.parametrize("case", ["1x1", "3x3"])
@torch.inference_mode()
def test_torch_sparse(compare, native, layer, case, sparsity):
    """zeros anywhere: ours against torch's own CSR product on the unfolded image"""
    kernel, padding = CASES[case][0], CASES[case][0] // 2
    x, w, b = _spatial(layer, sparsity, "unstructured", kernel)
    filter = sparse_conv.pack(w, "unstructured")
    where = (len(w), (kernel, kernel), (1, 1), (padding, padding), (1, 1))
    csr = w.flatten(1).to_sparse_csr()
    unfolded = lambda: x[0].flatten(1) if kernel == 1 else F.unfold(x, kernel, padding=padding)[0]  # noqa: E731
    compare(
        lambda: sparse_conv.native_forward(x, filter, b, *where),
        {
            "nchw": lambda: F.conv2d(x, w, b, padding=padding),
            "CSR": lambda: ((csr @ unfolded()) + b[:, None]).unflatten(1, x.shape[2:])[None],
        },
        reference=lambda: F.conv2d(x.double(), w.double(), b.double(), padding=padding),
        limit=LIMIT_DIRECT,
        note=PACKED,
    )


# ------------------------------------------------------------------------------------- whole models


@pytest.mark.benchmark(group="sparse_vgg16")
@torch.inference_mode()
def test_vgg16_blocks_80(compare, native):
    """VGG-16, batch 8, 80 % of the Winograd-domain blocks zero but in the first layer,
    channels_last, against the dense model"""
    with torch.inference_mode(False):
        torch.manual_seed(0)
        dense = vgg16().eval()
        pruned = pywino.swap_(copy.deepcopy(dense))
        prune_(
            pruned,
            Block(0.8),
            domain="winograd",
            filter_fn=lambda module, name: module.in_channels > 3,
        )
    x = torch.randn(8, 3, 224, 224)
    last = x.contiguous(memory_format=CHANNELS_LAST)
    models = {
        "nchw": (dense, x),
        "channels_last": (copy.deepcopy(dense).to(memory_format=CHANNELS_LAST), last),
    }
    compare(
        lambda: pruned(last),
        {name: lambda model=model, own=own: model(own) for name, (model, own) in models.items()},
        same=False,
        note=f"{DENSE} {PACKED}",
    )
