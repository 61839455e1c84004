# SPDX-License-Identifier: BSD-3-Clause
"""A seeded sweep of random calls against F.conv2d in float64.

PYWINO_SWEEP=<n> changes the number of calls, PYWINO_SEED=<n> the seed. A failure prints the call,
which `random_call(random.Random(f"{seed} {number}"))` makes again.
"""

import os
import random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import pywino
from pywino import _native as native
from pywino import testing
from pywino.testing import assert_close_to_reference

SWEEP = int(os.environ.get("PYWINO_SWEEP", "2000"))
SEED = int(os.environ.get("PYWINO_SEED", "0"))
CHUNKS = 10
WORK = 3e6  # multiplications of a call
# tests/ops/test_winograd.py says why each tile has its own. Sums here may have a single term, where
# PyTorch is exact but for one rounding, so the factor is larger.
K = {"aten": 4, "f2": 16, "f4": 64, "f6": 300, "auto": 300}


class Call(NamedTuple):
    shape: tuple
    channels: int  # of the output
    kernel: tuple
    stride: tuple
    padding: tuple
    dilation: tuple
    groups: int
    bias: bool
    activation: str | None
    residual: bool
    dtype: torch.dtype
    layout: str
    algorithm: str
    gradients: bool
    seed: int


def random_call(random):
    """Mostly calls that the kernels cover, of sizes 1 to 70."""
    pick = random.choice
    covered = random.random() < 0.8
    kernel = (3, 3) if covered else (random.randint(1, 4), random.randint(1, 4))
    stride = (1, 1) if covered else (random.randint(1, 3), random.randint(1, 3))
    groups = 1 if covered else pick([1, 1, 2, 3])
    dilation = tuple(pick([1, 1, 1, 2, 3, random.randint(1, 9)]) for _ in range(2))
    padding = tuple(pick([0, 1, d, d, random.randint(0, 2 * d + 2)]) for d in dilation)
    while True:
        n, c, k = random.randint(1, 4), *(groups * random.randint(1, 70 // groups) for _ in "ck")
        h, w = (
            random.randint(max(1, d * (r - 1) + 1 - 2 * p), 70)
            for d, r, p in zip(dilation, kernel, padding)
        )
        if n * c * k * h * w * 9 < WORK * groups:
            break
    covered = covered and native.loaded
    return Call(
        shape=(n, c, h, w),
        channels=k,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=random.random() < 0.5,
        activation=pick([None, "relu"]),
        residual=random.random() < 0.3,
        dtype=pick([torch.float32] * 6 + [torch.bfloat16, torch.float16, torch.float64]),
        layout=pick(
            ["contiguous", "channels_last", "sliced", "sliced channels_last", "transposed"]
        ),
        algorithm=pick(["f2", "f4", "f6", "auto"]) if covered else "aten",
        gradients=random.random() < 0.3,
        seed=random.getrandbits(32),
    )


def laid_out(shape, dtype, layout, generator):
    n, c, h, w = shape
    if layout == "contiguous":
        return torch.randn(shape, generator=generator).to(dtype)
    if layout == "channels_last":
        return torch.randn(n, h, w, c, generator=generator).to(dtype).permute(0, 3, 1, 2)
    if layout == "sliced":
        return torch.randn(n, c + 3, h + 2, w + 5, generator=generator).to(dtype)[:, 2:-1, 1:-1, :w]
    if layout == "sliced channels_last":
        full = torch.randn(n, h, w, 2 * c, generator=generator).to(dtype)
        return full[..., ::2].permute(0, 3, 1, 2)
    return torch.randn(n, w, h, c, generator=generator).to(dtype).permute(0, 3, 2, 1)


def run(call):
    """(what, ours, in float64, PyTorch's) of a call's output and gradients."""
    generator = torch.Generator().manual_seed(call.seed)
    n, c, *size = call.shape
    geometry = (call.stride, call.padding, call.dilation)
    out = [
        (i + 2 * p - d * (r - 1) - 1) // s + 1
        for i, s, p, d, r in zip(size, *geometry, call.kernel)
    ]
    tensors = [
        laid_out(call.shape, call.dtype, call.layout, generator),
        torch.randn(call.channels, c // call.groups, *call.kernel, generator=generator),
        torch.randn(call.channels, generator=generator) if call.bias else None,
        laid_out((n, call.channels, *out), call.dtype, call.layout, generator)
        if call.residual
        else None,
    ]
    tensors = [t if t is None else t.to(call.dtype) for t in tensors]
    grad = torch.randn(n, call.channels, *out, generator=generator)

    def plain(input, weight, bias, residual):
        output = F.conv2d(input, weight, bias, *geometry, call.groups)
        output = output if residual is None else output + residual
        return output.relu() if call.activation else output

    def ours(input, weight, bias, residual):
        if residual is None:
            options = {"activation": call.activation, "algorithm": algorithm}
            return pywino.conv2d(input, weight, bias, *geometry, call.groups, **options)
        layer = pywino.WinogradConv2d(
            c, call.channels, call.kernel, *geometry, call.groups, call.bias,
            activation=call.activation, algorithm=algorithm,
        )  # fmt: skip
        parameters = {"weight": weight} | ({"bias": bias} if call.bias else {})
        return torch.func.functional_call(layer, parameters, (input, residual))

    algorithm = call.algorithm.replace("aten", "auto")
    if call.dtype == torch.float64:
        algorithm = "auto"
    everything = []
    exact = [t if t is None else t.double() for t in tensors]
    mask = None
    for function, arguments in ((plain, exact), (ours, tensors), (plain, tensors)):
        leaves = [t if t is None else t.detach().requires_grad_(call.gradients) for t in arguments]
        output = function(*leaves)
        results = [output.detach()]
        if call.gradients:
            # Where the output is next to 0 the ReLU's derivative is a matter of rounding.
            mask = output.detach().abs() > 1e-2 if mask is None else mask
            wanted = [t for t in leaves if t is not None]
            results += torch.autograd.grad(output, wanted, (grad * mask).to(output.dtype))
        everything.append(results)
    names = ["output", "input's gradient", "weight's", "bias's or residual's", "residual's"]
    exact, actual, peer = everything
    return zip(names, actual, exact, peer)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_calls_against_float64(chunk):
    isas = native.host.isas() if native.loaded else [None]
    for isa in isas:
        numbers = [i for i in range(SWEEP) if i % CHUNKS == chunk]
        numbers = [i for i in numbers if i // CHUNKS % len(isas) == isas.index(isa)]
        with testing.force_isa(isa) if isa else testing.force_backend("aten"):
            for number in numbers:
                call = random_call(random.Random(f"{SEED} {number}"))
                what = f"PYWINO_SEED={SEED}, call {number}, {isa}: {call}"
                try:
                    for name, actual, exact, peer in run(call):
                        k = K[call.algorithm if call.dtype == torch.float32 else "aten"]
                        assert_close_to_reference(actual, exact, peer, k, name)
                except Exception as error:
                    raise AssertionError(f"{what}: {error}") from error
