# SPDX-License-Identifier: BSD-3-Clause
"""Kernel tables of the Winograd ops, layer by layer. Both sides run with the same threads and
allocator (conftest.py)."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from layers import ADVERSARIAL, CHAINS, DENSE, LAYERS, QUICK, UNDILATED, VGG, Layer
from torch import Tensor, nn
from torch.nn import functional as F

import pywino
from pywino.reference.winograd import transform_matrices, winograd_transform_filter

CHANNELS_LAST = torch.channels_last
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Relative L2 errors against float64 that a tile may have (docs/winograd.md says why).
LIMITS = {"f2": 7e-7, "f4": 2.5e-6, "f6": 7e-6}
# What an algorithm saves in multiplications. PyTorch's fp32 convolution runs near the machine's
# peak and no transform is free, so a higher ratio to it is a broken measurement.
BOUNDS = {"f2": 2.25, "f4": 4.0, "f6": 5.0625}
CACHED = "The filters are transformed before: the layer keeps them (inference)."
INSIDE = "The filter transform is inside every call, as in training."

_QUICK_DENSE = tuple(layer for layer in QUICK if layer in DENSE)
_QUICK_UNDILATED = tuple(layer for layer in QUICK if layer in UNDILATED)
_VGG_B1 = tuple(layer for layer in VGG if layer.n == 1)


def _ends(y: Tensor) -> Tensor:
    """First and last image: enough to check a batch, at a fraction of the float64 work."""
    return y[:: max(1, len(y) - 1)]


def _exact(layer: Layer, dtype: torch.dtype = torch.float32):
    """The float64 result of the layer's first and last image, from the same rounded tensors."""
    x, w, b = (t.double() for t in layer.tensors(dtype))
    return F.conv2d(_ends(x), w, b, padding=layer.dilation, dilation=layer.dilation)


def _torch_peers(layer: Layer, dtype: torch.dtype = torch.float32) -> dict:
    """F.conv2d in both memory formats."""
    peers = {}
    for name, memory_format in FORMATS.items():
        x, w, b = layer.tensors(dtype, memory_format)
        peers[name] = lambda x=x, w=w, b=b: F.conv2d(
            x, w, b, padding=layer.dilation, dilation=layer.dilation
        )
    return peers


def _module(
    layer: Layer, algorithm: str, dtype: torch.dtype = torch.float32, precision: str = "default"
) -> nn.Module:
    _, w, b = layer.tensors(dtype)
    # Inference tensors have no version, so a layer of them could not keep its transformed filters.
    with torch.inference_mode(False):
        conv = nn.Conv2d(
            layer.c, layer.k, 3, padding=layer.dilation, dilation=layer.dilation, dtype=dtype
        )
    conv.weight.data.copy_(w)
    conv.bias.data.copy_(b)
    return pywino.WinogradConv2d.from_dense(conv.eval(), algorithm=algorithm, precision=precision)


def _ours(
    layer: Layer,
    memory_format: torch.memory_format,
    algorithms: tuple[str, ...] = ("f2", "f4", "f6"),
    dtype: torch.dtype = torch.float32,
    precision: str = "default",
) -> dict:
    x, _, _ = layer.tensors(dtype, memory_format)
    # As in a model of that layout, and as the peers have it.
    modules = {
        name: _module(layer, name, dtype, precision).to(memory_format=memory_format)
        for name in algorithms
    }
    return {name: lambda module=module: module(x) for name, module in modules.items()}


def _compare_forward(compare, layer, ours, peers=None, limit=None, **options):
    compare(
        ours,
        peers or _torch_peers(layer),
        reference=lambda: _exact(layer),
        limit=limit or LIMITS,
        bounds=BOUNDS,
        view=_ends,
        denominator=("nchw", "channels_last"),
        **options,
    )


# ------------------------------------------------------------------------------------ forward, fp32


@pytest.mark.benchmark(group="forward")
@pytest.mark.layers(full=LAYERS, default=LAYERS)
@torch.inference_mode()
def test_forward(compare, native, layer):
    """forward, fp32, channels_last, best algorithm, against the better of F.conv2d's two layouts"""
    _compare_forward(compare, layer, _ours(layer, CHANNELS_LAST), note=CACHED)


@pytest.mark.benchmark(group="forward_nchw")
@pytest.mark.layers(full=UNDILATED, default=UNDILATED)
@torch.inference_mode()
def test_forward_nchw(compare, native, layer):
    """forward, fp32, NCHW in and out, best algorithm, against the better of F.conv2d's layouts"""
    _compare_forward(compare, layer, _ours(layer, torch.contiguous_format), note=CACHED)


def _test_tile(compare, layer, algorithm):
    _compare_forward(compare, layer, _ours(layer, CHANNELS_LAST, (algorithm,)), note=CACHED)


@pytest.mark.benchmark(group="forward_f2")
@pytest.mark.layers(full=LAYERS, default=_VGG_B1)
@torch.inference_mode()
def test_forward_f2(compare, native, layer):
    """forward, fp32, channels_last, F(2x2,3x3)"""
    _test_tile(compare, layer, "f2")


@pytest.mark.benchmark(group="forward_f4")
@pytest.mark.layers(full=LAYERS, default=_VGG_B1)
@torch.inference_mode()
def test_forward_f4(compare, native, layer):
    """forward, fp32, channels_last, F(4x4,3x3)"""
    _test_tile(compare, layer, "f4")


@pytest.mark.benchmark(group="forward_f6")
@pytest.mark.layers(full=LAYERS, default=_VGG_B1)
@torch.inference_mode()
def test_forward_f6(compare, native, layer):
    """forward, fp32, channels_last, F(6x6,3x3)"""
    _test_tile(compare, layer, "f6")


@pytest.mark.benchmark(group="forward_odd")
@pytest.mark.layers(full=ADVERSARIAL, default=ADVERSARIAL)
@torch.inference_mode()
def test_forward_odd(compare, native, layer):
    """forward, fp32, channels_last, sizes that fit no tile; what `auto` chooses (PyTorch's kernel
    among it)"""
    ours = _ours(layer, CHANNELS_LAST, ("auto",))
    _compare_forward(compare, layer, ours, limit=LIMITS["f6"], note=CACHED)


@pytest.mark.benchmark(group="forward_peers")
@pytest.mark.layers(full=LAYERS, default=())
@torch.inference_mode()
def test_forward_peers(compare, native, layer):
    """forward, fp32, channels_last, best algorithm, with torch.compile and NNPACK as peers too"""
    d = layer.dilation
    peers = _torch_peers(layer)
    compiled = torch.compile(lambda x, w, b: F.conv2d(x, w, b, padding=d, dilation=d))
    x, w, b = layer.tensors(memory_format=CHANNELS_LAST)
    peers["torch.compile"] = lambda: compiled(x, w, b)
    if torch._nnpack_available() and d == 1:  # asking is what initialises it
        x2, w2, b2 = layer.tensors()
        peers["NNPACK"] = lambda: torch._nnpack_spatial_convolution(x2, w2, b2, padding=[1, 1])
    _compare_forward(compare, layer, _ours(layer, CHANNELS_LAST), peers, note=CACHED)


# --------------------------------------------------------------------------------- other precisions


@pytest.mark.benchmark(group="forward_bf16")
@pytest.mark.layers(full=LAYERS, default=_VGG_B1)
@torch.inference_mode()
def test_forward_bf16(compare, native, layer):
    """forward, bf16 in and out, channels_last, best algorithm, against F.conv2d in bf16 and no less
    accurate"""
    _compare_half(compare, layer, torch.bfloat16)


@pytest.mark.benchmark(group="forward_fp16")
@pytest.mark.layers(full=LAYERS, default=_VGG_B1)
@torch.inference_mode()
def test_forward_fp16(compare, native, layer):
    """forward, fp16 in and out, channels_last, best algorithm, against F.conv2d in fp16 and no less
    accurate"""
    _compare_half(compare, layer, torch.float16)


def _compare_half(compare, layer, dtype):
    compare(
        _ours(layer, CHANNELS_LAST, dtype=dtype),
        _torch_peers(layer, dtype),
        reference=lambda: _exact(layer, dtype),
        limit="no worse",
        view=_ends,
        note=CACHED,
    )


@pytest.mark.benchmark(group="forward_fast")
@pytest.mark.layers(full=DENSE, default=_QUICK_DENSE)
@torch.inference_mode()
def test_forward_fast(compare, native, layer):
    """forward, fp32 in and out, precision="fast" (bf16 products), channels_last, F(4x4,3x3),
    against F.conv2d in fp32"""
    if not {"avx512bf16", "amx"} & set(native.host.isas()):
        pytest.skip("this processor has no bf16 products (avx512bf16, amx)")
    ours = _ours(layer, CHANNELS_LAST, ("f4",), precision="fast")
    # Not "f4": its products run at twice the rate or more, so the bound does not hold.
    _compare_forward(compare, layer, {"f4 fast": ours["f4"]}, limit=1.2e-2, note=CACHED)


# --------------------------------------------------------------------------------- AVX2, both sides


@pytest.mark.benchmark(group="forward_avx2")
@pytest.mark.layers(full=LAYERS, default=_VGG_B1)
@pytest.mark.environment(ONEDNN_MAX_CPU_ISA="AVX2")
@torch.inference_mode()
def test_forward_avx2(compare, native, layer):
    """forward, fp32, channels_last, best algorithm, the AVX2 kernels against F.conv2d with
    ONEDNN_MAX_CPU_ISA=AVX2"""
    if "avx2" not in native.host.isas():
        pytest.skip("the AVX2 kernels are not built or do not run here")
    with native.force_isa("avx2"):
        _compare_forward(compare, layer, _ours(layer, CHANNELS_LAST), note=CACHED)


# ------------------------------------------------------------------------------------ Winograd-ReLU


def _composition(
    x: Tensor, w: Tensor, b: Tensor | None, tile: int, matrices, padding: int = 1
) -> Tensor:
    """Y = A^T [W . ReLU(B^T d B)] A in plain PyTorch, vectorised: what one writes without this
    library.

    x (N, C, H, W), w (K, C, tile + 2, tile + 2) -> (N, K, H, W) for padding 1.
    """
    bt, _, at = matrices
    n, c, h, width = x.shape
    k, a = w.shape[0], tile + 2
    oh, ow = h + 2 * padding - 2, width + 2 * padding - 2
    th, tw = -(-oh // tile), -(-ow // tile)
    x = F.pad(x, (padding, tw * tile + 2 - width - padding, padding, th * tile + 2 - h - padding))
    d = x.unfold(2, a, tile).unfold(3, a, tile)  # (N, C, th, tw, a, a)
    v = (bt @ d @ bt.T).relu().permute(4, 5, 1, 0, 2, 3).reshape(a * a, c, -1)
    m = torch.bmm(w.permute(2, 3, 0, 1).reshape(a * a, k, c), v)
    m = m.view(a, a, k, n, th, tw).permute(3, 2, 4, 5, 0, 1)
    y = (
        (at @ m @ at.T)
        .permute(0, 1, 2, 4, 3, 5)
        .reshape(n, k, th * tile, tw * tile)[:, :, :oh, :ow]
    )
    return y if b is None else y + b[:, None, None]


def _relu_tensors(
    layer: Layer, tile: int, memory_format: torch.memory_format, requires_grad: bool = False
):
    x, w, b = layer.tensors(memory_format=memory_format)
    w = winograd_transform_filter(w, tile)
    return x.requires_grad_(requires_grad), w.requires_grad_(requires_grad), b


def _relu_layer(layer: Layer, tile: int):
    """One WinogradReLUConv2d on channels_last input, its filter packed before, and its float64
    result."""
    x, w, b = _relu_tensors(layer, tile, CHANNELS_LAST)
    w = w.contiguous()
    with torch.inference_mode(False):  # as in _module
        module = pywino.WinogradReLUConv2d(layer.c, layer.k, 3, 1, 1, bias=True, tile=tile).eval()
    module.weight.data.copy_(w)
    module.bias.data.copy_(b)

    def exact():
        return _composition(
            _ends(x).double(), w.double(), b.double(), tile, transform_matrices(tile)
        )

    return lambda: module(x), exact


def _compare_relu(compare, layer, tile):
    ours, exact = _relu_layer(layer, tile)
    # Another function than F.conv2d's: that is the measure of time only, and ours is checked
    # against its own float64.
    name = f"f{tile}"
    compare(
        {name: ours},
        _torch_peers(layer),
        reference=exact,
        limit=LIMITS,
        view=_ends,
        same=False,
        bounds=BOUNDS,
        note=CACHED,
    )


@pytest.mark.benchmark(group="winograd_relu_f4")
@pytest.mark.layers(full=UNDILATED, default=_QUICK_UNDILATED)
@torch.inference_mode()
def test_winograd_relu_f4(compare, native, layer):
    """winograd_relu_conv2d, forward, fp32, channels_last, F(4x4,3x3), against one F.conv2d of the
    same size"""
    _compare_relu(compare, layer, 4)


@pytest.mark.benchmark(group="winograd_relu_f2")
@pytest.mark.layers(full=UNDILATED, default=_QUICK_UNDILATED)
@torch.inference_mode()
def test_winograd_relu_f2(compare, native, layer):
    """winograd_relu_conv2d, forward, fp32, channels_last, F(2x2,3x3), against one F.conv2d of the
    same size"""
    _compare_relu(compare, layer, 2)


def _compare_composition(compare, layer, tile):
    """Forward, then the gradients of input and weight, for one fixed output gradient."""
    g = torch.randn(layer.n, layer.k, layer.h, layer.w, generator=torch.Generator().manual_seed(1))

    def step(function, memory_format, dtype=torch.float32):
        x, w, b = _relu_tensors(layer, tile, memory_format)
        x, w, b = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), b.to(dtype)
        grad = g.to(dtype).contiguous(memory_format=memory_format)

        def run():
            y = function(x, w, b)
            return y, *torch.autograd.grad(y, (x, w), grad)

        return run

    def composed(dtype=torch.float32):
        matrices = transform_matrices(tile, dtype)
        return lambda x, w, b: _composition(x, w, b, tile, matrices)

    compare(
        {
            f"f{tile}": step(
                lambda x, w, b: pywino.winograd_relu_conv2d(x, w, b, padding=1, tile=tile),
                CHANNELS_LAST,
            )
        },
        {name: step(composed(), memory_format) for name, memory_format in FORMATS.items()},
        reference=lambda: _flat(
            step(composed(torch.float64), torch.contiguous_format, torch.float64)()
        ),
        # B^T d B is rounded, so one value in a million lies on the other side of the ReLU's corner
        # than in float64, and its whole gradient comes or goes. The tests compare gradients away
        # from the corner, at the true limit.
        limit=2e-3,
        view=_flat,
        note=INSIDE,
    )


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    """Several results as one vector, each scaled to the same weight."""
    return torch.cat([t.detach().double().flatten() / t.numel() ** 0.5 for t in tensors])


@pytest.mark.benchmark(group="winograd_relu_training_f4")
@pytest.mark.layers(full=UNDILATED, default=_VGG_B1)
def test_winograd_relu_training_f4(compare, native, layer):
    """winograd_relu_conv2d, forward and backward, F(4x4,3x3), against its composition"""
    _compare_composition(compare, layer, 4)


@pytest.mark.benchmark(group="winograd_relu_training_f2")
@pytest.mark.layers(full=UNDILATED, default=())
def test_winograd_relu_training_f2(compare, native, layer):
    """winograd_relu_conv2d, forward and backward, F(2x2,3x3), against its composition"""
    _compare_composition(compare, layer, 2)


# ----------------------------------------------------------------------------------------- backward


def _aten_backward(layer: Layer, mask: list[bool]) -> dict:
    """aten's convolution backward in both memory formats: what autograd of F.conv2d calls."""
    d = [layer.dilation] * 2
    peers = {}
    for name, memory_format in FORMATS.items():
        x, w, _ = layer.tensors(memory_format=memory_format)
        g = _gradient(layer, memory_format)
        peers[name] = lambda x=x, w=w, g=g: torch.ops.aten.convolution_backward(
            g, x, w, None, [1, 1], d, d, False, [0, 0], 1, mask
        )[mask.index(True)]
    return peers


def _gradient(layer: Layer, memory_format: torch.memory_format) -> Tensor:
    g = torch.randn(layer.n, layer.k, layer.h, layer.w, generator=torch.Generator().manual_seed(1))
    return g.contiguous(memory_format=memory_format)


@pytest.mark.benchmark(group="backward_input")
@pytest.mark.layers(full=LAYERS, default=QUICK)
@torch.inference_mode()
def test_backward_input(compare, native, layer):
    """gradient of the input, fp32, channels_last, best algorithm, against aten's in the better of
    two layouts"""
    d = [layer.dilation] * 2
    _, w, _ = layer.tensors(memory_format=CHANNELS_LAST)
    g = _gradient(layer, CHANNELS_LAST)
    op = torch.ops.pywino.winograd_conv2d_backward_input
    compare(
        {name: lambda name=name: op(g, w, d, d, name, "cpu", "default") for name in LIMITS},
        _aten_backward(layer, [True, False, False]),
        reference=lambda: F.conv_transpose2d(_ends(g).double(), w.double(), padding=d, dilation=d),
        limit=LIMITS,
        view=_ends,
        note=INSIDE,
    )


@pytest.mark.benchmark(group="backward_weight")
@pytest.mark.layers(full=LAYERS, default=QUICK)
@torch.inference_mode()
def test_backward_weight(compare, native, layer):
    """gradient of the weight, fp32, channels_last, best algorithm, against aten's in the better of
    two layouts"""
    d = [layer.dilation] * 2
    x, w, _ = layer.tensors(memory_format=CHANNELS_LAST)
    g = _gradient(layer, CHANNELS_LAST)
    op = torch.ops.pywino.winograd_conv2d_backward_weight
    compare(
        {name: lambda name=name: op(g, x, d, d, name, "cpu", "default") for name in LIMITS},
        _aten_backward(layer, [False, True, False]),
        reference=lambda: torch.ops.aten.convolution_backward(
            g.double(),
            x.double(),
            w.double(),
            None,
            [1, 1],
            d,
            d,
            False,
            [0, 0],
            1,
            [False, True, False],
        )[1],
        # Sums of chunks are added up: 100,000 tiles of 2 x 2, the most here, leave a trace in F2.
        limit={**LIMITS, "f2": 1e-6},
        note="Several algorithms are tried on each row and the fastest is measured.",
    )


# --------------------------------------------------------------------------------------------- ncnn

_NCNN_WORKER = """
import json, sys
import ncnn, numpy as np
# Its OpenMP threads must sleep at once when their work is done: the other side wants the cores.
folder, threads = sys.argv[1], int(sys.argv[2])
net = ncnn.Net()
net.opt.num_threads = threads
net.opt.openmp_blocktime = 0
net.opt.use_vulkan_compute = False
for name in ("packed", "storage", "arithmetic"):
    setattr(net.opt, f"use_fp16_{name}", False)
net.opt.use_bf16_storage = False
assert net.load_param(folder + "/net.param") == 0 and net.load_model(folder + "/net.bin") == 0
array = np.load(folder + "/x.npy")  # the Mat looks at its memory without keeping it
x = ncnn.Mat(array).clone()
for line in sys.stdin:
    extractor = net.create_extractor()
    extractor.input("b0", x)
    status, y = extractor.extract("b%d" % json.loads(line)["layers"])
    assert status == 0
    if json.loads(line)["save"]:
        np.save(folder + "/y.npy", np.array(y))
    print("{}", flush=True)
"""


class _Ncnn:
    """A chain of equal layers in ncnn, in a process of its own: its OpenMP runtime is not torch's.
    A call runs it once."""

    def __init__(self, layer: Layer, weights: list[tuple[Tensor, Tensor]], folder: str):
        self.folder, self.layers = folder, len(weights)
        self._write(layer, weights)
        command = [sys.executable, "-c", _NCNN_WORKER, folder, str(torch.get_num_threads())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _write(self, layer, weights):
        d, n = layer.dilation, self.layers
        lines = ["7767517", f"{n + 1} {n + 1}", "Input input 0 1 b0"]
        size = 9 * layer.c * layer.k
        for i in range(n):
            shape = f"0={layer.k} 1=3 2={d} 4={d} 5=1 6={size}"
            lines.append(f"Convolution conv{i} 1 1 b{i} b{i + 1} {shape}")
        folder = Path(self.folder)
        (folder / "net.param").write_text("\n".join(lines) + "\n")
        with open(folder / "net.bin", "wb") as file:
            for w, b in weights:
                file.write(bytes(4))  # the tag of fp32 weights
                file.write(w.contiguous().numpy().tobytes() + b.numpy().tobytes())
        np.save(folder / "x.npy", layer.tensors()[0][0].numpy())

    def __call__(self, save: bool = False):
        self.process.stdin.write(json.dumps({"layers": self.layers, "save": save}) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline().strip() == "{}", "ncnn's process has ended"

    def result(self) -> Tensor:
        self(save=True)
        return torch.from_numpy(np.load(self.folder + "/y.npy"))[None]

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)


@pytest.mark.benchmark(group="chain_ncnn")
@pytest.mark.layers(full=CHAINS, default=CHAINS)
@torch.inference_mode()
def test_chain_ncnn(compare, native, layer):
    """a chain of six equal layers, fp32, channels_last, best algorithm, against ncnn (own process)
    and F.conv2d"""
    pytest.importorskip("ncnn", reason="PyPI's ncnn is not installed")
    weights = [layer.tensors(seed=seed)[1:] for seed in range(6)]

    def chain(x, convolve):
        for w, b in weights:
            x = convolve(x, w, b)
        return x

    def plain(x, w, b):
        return F.conv2d(x, w, b, padding=layer.dilation, dilation=layer.dilation)

    def swapped(algorithm):
        net = nn.Sequential(*(_module(layer, algorithm) for _ in weights))
        for conv, (w, b) in zip(net, weights, strict=True):
            conv.weight.data.copy_(w)
            conv.bias.data.copy_(b)
        pywino.invalidate_(net)
        x = layer.tensors(memory_format=CHANNELS_LAST)[0]
        return lambda: net(x)

    def torch_chain(memory_format):
        x = layer.tensors(memory_format=memory_format)[0]
        ws = [(w.contiguous(memory_format=memory_format), b) for w, b in weights]

        def run():
            y = x
            for w, b in ws:
                y = plain(y, w, b)
            return y

        return run

    x = layer.tensors()[0]
    with tempfile.TemporaryDirectory() as folder:
        ncnn = _Ncnn(layer, weights, folder)
        try:
            exact = chain(x.double(), lambda x, w, b: plain(x, w.double(), b.double()))
            error = float((ncnn.result().double() - exact).norm() / exact.norm())
            assert error < 1e-4, f"ncnn computes something else: relative error {error:.2g}"
            compare(
                {name: swapped(name) for name in LIMITS},
                {
                    "ncnn": ncnn,
                    **{name: torch_chain(memory_format) for name, memory_format in FORMATS.items()},
                },
                reference=lambda: exact,
                limit={name: 6 * limit for name, limit in LIMITS.items()},
                denominator=("ncnn",),
                note=f"{CACHED} A message to ncnn's process and one back are inside its time.",
            )
        finally:
            ncnn.close()
