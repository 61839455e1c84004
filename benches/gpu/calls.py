# SPDX-License-Identifier: BSD-3-Clause
"""The convolutions that are measured: layers, modes of precision, passes, and PyTorch's way to run
each."""

from dataclasses import dataclass, replace

import torch
from layers import GPU_AIMS, GPU_LAYERS, Layer
from torch import Tensor
from torch.nn import functional as F

# mode -> (dtype, cudnn.allow_tf32): what a user's program asks for.
MODES = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
PASSES = ("forward", "input gradient", "weight gradient")

# Gradients are measured for the layers of the aims, and SAPNet's at two dilations.
GRADIENTS = GPU_AIMS + tuple(
    layer for layer in GPU_LAYERS if layer.name in ("sap-32x481x321-d1", "sap-32x481x321-d4")
)


def shrunk(x: Layer) -> Layer:
    """The layer, so small that a CPU runs it in no time."""
    return replace(x, n=min(x.n, 2), c=min(x.c, 8), h=min(x.h, 12), w=min(x.w, 14), k=min(x.k, 8))


def tiny(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Three of the layers, shrunk, for the dry run."""
    names = ("resnet-64x56-b32", "sap-32x481x321-d4", "odd-3x224x224-k64")
    return tuple(shrunk(layer) for layer in layers if layer.name in names)


def facts(layer: Layer, kind: str, mode: str, layout: str) -> dict:
    """What every row says of its call."""
    return {
        "layer": layer.name,
        "pass": kind,
        "mode": mode,
        "layout": layout,
        "n": layer.n,
        "c": layer.c,
        "aims": layer.name in {aim.name for aim in GPU_AIMS},
        "flops": layer.flops,
    }


@dataclass(frozen=True)
class Setting:
    """How PyTorch is asked to run a convolution."""

    layer: Layer
    kind: str  # one of PASSES
    mode: str
    layout: str
    benchmark: bool = False
    deterministic: bool = False

    @property
    def way(self) -> str:
        return f"{self.layout}, benchmark={int(self.benchmark)}"

    @property
    def key(self) -> str:
        parts = (self.layer, self.kind, self.mode, self.way)
        return " | ".join(map(str, parts)) + f", deterministic={int(self.deterministic)}"

    def facts(self) -> dict:
        own = {"benchmark": self.benchmark, "deterministic": self.deterministic}
        return facts(self.layer, self.kind, self.mode, self.layout) | own

    def apply(self) -> None:
        """Sets PyTorch's switches. `benchmark` counts at the first call of a signature only: the
        plan that this call finds is kept in the process, whatever the switch says later."""
        torch.backends.cudnn.allow_tf32 = MODES[self.mode][1]
        torch.backends.cudnn.benchmark = self.benchmark
        torch.backends.cudnn.deterministic = self.deterministic


def tensors(layer: Layer, kind: str, mode: str, layout: str, device: str) -> tuple[Tensor, ...]:
    """(input, weight, bias) of a forward, (output's gradient, input, weight) of the others."""
    x, w, b = layer.tensors(MODES[mode][0], LAYOUTS[layout], device=device)
    if kind == "forward":
        return x, w, b
    generator = torch.Generator(device).manual_seed(1)
    g = torch.randn(layer.n, layer.k, layer.h, layer.w, generator=generator, device=device)
    return g.to(x.dtype).contiguous(memory_format=LAYOUTS[layout]), x, w


def pytorch(layer: Layer, kind: str):
    """A function of `tensors(…)`."""
    pads = [layer.dilation] * 2
    if kind == "forward":
        return lambda x, w, b: F.conv2d(x, w, b, padding=pads, dilation=pads)
    masks = {"input gradient": [True, False, False], "weight gradient": [False, True, False]}
    index = masks[kind].index(True)

    def gradient(g, x, w):
        return torch.ops.aten.convolution_backward(
            g, x, w, None, [1, 1], pads, pads, False, [0, 0], 1, masks[kind]
        )[index]

    return gradient


def ends(t: Tensor) -> Tensor:
    """First and last image: enough to check a batch, at a fraction of the float64 work."""
    return t[:: max(1, len(t) - 1)]


def exact(layer: Layer, kind: str, arguments: tuple[Tensor, ...]):
    """(view, result): what of the output of `tensors(…)` is compared, and that in float64."""
    view = (lambda t: t) if kind == "weight gradient" else ends  # it needs every image
    first, second, third = arguments
    parts = [view(first), second if kind == "forward" else view(second), third]
    doubles = [t.double().contiguous() for t in parts]
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # a search among float64 kernels takes long
    result = pytorch(layer, kind)(*doubles)
    torch.backends.cudnn.benchmark = benchmark
    return view, result


def error_of(layer: Layer, kind: str, arguments: tuple[Tensor, ...], output: Tensor) -> float:
    """Relative L2 error of an output against float64."""
    view, result = exact(layer, kind, arguments)
    return float((view(output).double() - result).norm() / result.norm())


def extra_memory(clock, run) -> int | None:
    """Bytes that a call needs beside its output."""
    if clock.device != "cuda":
        return None
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = run()
    size = output.numel() * output.element_size()
    return max(0, torch.cuda.max_memory_allocated() - before - size)
