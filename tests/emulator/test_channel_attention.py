# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA channel attention, run by the emulator, against float64."""

import functools
from ctypes import c_bool, c_int, c_int64
from typing import NamedTuple

import numpy as np
import pytest
import torch
from emulator.build import CSRC, HERE
from emulator.harness import In, Out, Struct, Workspace, bf16, from_bf16
from emulator.mutate import Recipe

from pywino.reference import channel_attention as reference

SOURCE = HERE / "kernels" / "rooms.cu"
DTYPES = {"f32": 0, "bf16": 1, "f16": 2}
ROUNDING = {"f32": 0.0, "bf16": 2.0**-8, "f16": 2.0**-11}
SUMS = 2e-6  # of the largest number: fp32 sums of some thousand numbers


class Case(NamedTuple):
    """Channels and pixels that fill no block, or whole ones; 16 bytes at a time, and one number at
    a time."""

    n: int = 2
    c: int = 24
    pixels: int = 35
    hidden: int = 5
    channels_last: bool = True
    dtype: str = "f16"
    w3: bool = True
    bias: bool = False
    residual: bool = False
    relu: bool = False
    dark: bool = False  # channel 0 is zero, and the first hidden number sees it alone


CASES = [
    Case(),
    Case(n=1, c=72, pixels=700, hidden=9, relu=True, residual=True),
    Case(n=3, c=5, pixels=63, hidden=2, dtype="f32", w3=False, bias=True, relu=True),
    Case(c=70, pixels=9, hidden=33, channels_last=False, dtype="bf16", bias=True),
    Case(n=1, c=3, pixels=1288 * 9, hidden=1, channels_last=False, residual=True, relu=True),
    Case(n=2, c=19, pixels=1301, hidden=4, channels_last=False, dtype="f32", w3=False, relu=True),
    Case(n=1, c=1032, pixels=33, hidden=3, dtype="bf16", w3=False, residual=True),
    # Whole blocks; one channel more; one number more than pieces of 16 bytes.
    Case(n=2, c=64, pixels=128, hidden=4, relu=True),
    Case(n=2, c=65, pixels=9, hidden=3, dtype="f32", dark=True),
    Case(n=1, c=5, pixels=45, hidden=2),
]


def encode(x, dtype):
    return bf16(x) if dtype == "bf16" else x.astype({"f32": np.float32, "f16": np.float16}[dtype])


def decode(x):
    return from_bf16(x) if x.dtype == np.uint16 else x.astype(np.float64)


def assert_close(actual, expected, dtype="f32"):
    error = np.abs(decode(actual) - expected) - 1.01 * ROUNDING[dtype] * np.abs(expected)
    assert error.max() <= SUMS * np.abs(expected).max(), error.max() / np.abs(expected).max()


class Tensors:
    """Random tensors of a case, (n, c, pixels), and weights."""

    def __init__(self, case):
        random = np.random.default_rng(case.c)
        self.case = case
        normal = lambda *shape: encode(random.standard_normal(shape), case.dtype)  # noqa: E731
        self.input = encode(0.2 + random.standard_normal((case.n, case.c, case.pixels)), case.dtype)
        self.grad, self.residual = (normal(*self.input.shape) for _ in range(2))
        self.w1 = encode(decode(normal(case.hidden, case.c)) * case.pixels**0.5 / 4, case.dtype)
        self.input[:, :, ::9] = 0  # where a ReLU behind the gate has no gradient
        if case.dark:  # the same of a number of the hidden layer
            self.input[:, 0], self.w1[0, 1:] = 0, 0
        self.w2 = normal(case.c, case.hidden)
        self.w3 = encode(decode(normal(case.c, case.c)) / case.c**0.5, case.dtype)
        self.b1, self.b2 = normal(case.hidden), normal(case.c)

    def layout(self, x):
        return np.ascontiguousarray(x.transpose(0, 2, 1)) if self.case.channels_last else x

    def back(self, x):
        return x.transpose(0, 2, 1) if self.case.channels_last else x

    def layers(self):
        """As the kernels' params: "hidden" and the weights."""
        case = self.case
        given = [
            ("w1", self.w1, True), ("b1", self.b1, case.bias), ("w2", self.w2, True),
            ("b2", self.b2, case.bias), ("w3", self.w3, case.w3),
        ]  # fmt: skip
        weights = {name: In(weight) if has else None for name, weight, has in given}
        return {"hidden": c_int64(case.hidden), **weights}

    def exact(self, *names):
        """In float64; tensors as (n, c, pixels, 1)."""
        case = self.case
        left_out = {"w3": not case.w3, "b1": not case.bias, "b2": not case.bias}
        left_out["residual"] = not case.residual
        found = []
        for name in names:
            x = torch.from_numpy(decode(getattr(self, name)))
            found.append(None if left_out.get(name) else x.unsqueeze(3) if x.dim() == 3 else x)
        return found


def shape_fields(case):
    sizes = {name: c_int64(getattr(case, name)) for name in ("n", "c", "pixels")}
    return {**sizes, "last": c_bool(case.channels_last), "dtype": c_int(DTYPES[case.dtype])}


def partial_of(case):
    parts = min(max(case.c * case.pixels // (16 * 1024), 1), 64)  # cuda.cu has the same
    return Workspace(4 * case.n * case.c * parts)


def check_forward(kernel, case, whole=False, **how):
    """`whole`: in one launch, an image a block."""
    tensors = Tensors(case)
    output = np.empty_like(tensors.layout(tensors.input))
    mean, gate = (np.empty((case.n, case.c), np.float32) for _ in range(2))
    fields = {
        **shape_fields(case),
        **tensors.layers(),
        "input": In(tensors.layout(tensors.input)),
        "residual": In(tensors.layout(tensors.residual)) if case.residual else None,
        "output": Out(output),
        "mean": Out(mean),
        "gate": Out(gate),
        "known": None,
        "partial": None if whole else partial_of(case),
        "relu": c_bool(case.relu),
        "residual_relu": c_bool(case.relu),
        "whole": c_bool(whole),
    }
    kernel.call("pywino_channel_attention_forward", Struct(fields), None, **how)
    x, *layers, residual = tensors.exact("input", "w1", "w2", "w3", "b1", "b2", "residual")
    z = x.mean((2, 3))
    assert_close(mean, z.numpy())
    assert_close(gate, reference.gate(z, *layers).numpy())
    activation = "relu" if case.relu else None
    y = reference.channel_residual_attention(x, *layers, residual, activation, activation)
    assert_close(tensors.back(output), y.squeeze(3).numpy(), case.dtype)


def check_known_mean(kernel, case, **how):
    """The gate of means that are there already, then what it makes of the tensor."""
    tensors = Tensors(case)
    x, *layers, residual = tensors.exact("input", "w1", "w2", "w3", "b1", "b2", "residual")
    z = x.mean((2, 3))
    output = np.empty_like(tensors.layout(tensors.input))
    gate = np.empty((case.n, case.c), np.float32)
    fields = {
        **shape_fields(case),
        **tensors.layers(),
        "input": None,
        "residual": None,
        "output": None,
        "mean": None,
        "gate": Out(gate),
        "known": In(z.float().numpy()),
        "partial": None,
        "relu": c_bool(case.relu),
        "residual_relu": c_bool(case.relu),
        "whole": c_bool(False),
    }
    kernel.call("pywino_channel_attention_gate", Struct(fields), None, **how)
    assert_close(gate, reference.gate(z, *layers).numpy())
    fields |= {
        "input": In(tensors.layout(tensors.input)),
        "residual": In(tensors.layout(tensors.residual)) if case.residual else None,
        "output": Out(output),
        "gate": In(gate),
        "known": None,
    }
    kernel.call("pywino_channel_attention_apply", Struct(fields), None, **how)
    activation = "relu" if case.relu else None
    y = reference.channel_residual_attention(x, *layers, residual, activation, activation)
    assert_close(tensors.back(output), y.squeeze(3).numpy(), case.dtype)


def check_backward(kernel, case, whole=False, **how):
    tensors = Tensors(case)
    x, grad, *layers, b2 = tensors.exact("input", "grad", "w1", "w2", "w3", "b1", "b2")
    mean = x.mean((2, 3)).float()
    gate = reference.gate(mean.double(), *layers, b2).float()
    gradient = np.empty_like(tensors.layout(tensors.input))
    du, shift = (np.empty((case.n, case.c), np.float32) for _ in range(2))
    fields = {
        **shape_fields(case),
        **tensors.layers(),
        "grad": In(tensors.layout(tensors.grad)),
        "input": In(tensors.layout(tensors.input)),
        "mean": In(mean.numpy()),
        "gate": In(gate.numpy()),
        "relu": c_bool(case.relu),
        "input_gradient": Out(gradient),
        "logit_gradient": Out(du),
        "partial": None if whole else partial_of(case),
        "shift": None if whole else Out(shift),
        "whole": c_bool(whole),
    }
    kernel.call("pywino_channel_attention_backward", Struct(fields), None, **how)
    activation = "relu" if case.relu else None
    saved = mean.double(), gate.double()
    by_input, by_logit = reference.gradients(grad, x, *saved, *layers, activation)
    assert_close(du, by_logit.numpy())
    assert_close(tensors.back(gradient), by_input.squeeze(3).numpy(), case.dtype)


WHOLE = {
    "whole_forward": functools.partial(check_forward, whole=True),
    "whole_backward": functools.partial(check_backward, whole=True),
}
CHECKS = {f.__name__: f for f in (check_forward, check_known_mean, check_backward)} | WHOLE
# 16 bytes at a time over the ends of rows.
ROWS = [
    Case(n=2, c=6, pixels=12, channels_last=False, dtype="bf16", relu=True, residual=True),
    Case(n=2, c=12, pixels=6, hidden=3, bias=True),
]


@pytest.mark.parametrize("case", [*CASES, *ROWS], ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_channel_attention(emulate, run, check, case):
    mode, schedule = run
    if check in WHOLE:  # the emulator counts what all kernels of a file have in static memory
        case = case._replace(pixels=min(case.pixels, 400))
    CHECKS[check](emulate(SOURCE, mode), case, schedule=schedule)


def test_what_fits_into_a_block(emulate):
    """The emulator's GPU has 227 KB for a block, as an H200 does: 14 x 14 x 512 halves with SE's
    hidden layer fit, and the gradient's second tensor does not."""
    kernel = emulate(SOURCE, "fast")

    def fits(tensors, **sizes):
        found = np.zeros(1, np.int64)
        case = Case(n=1, **sizes)
        kernel.call("attention_whole", Struct(shape_fields(case)), case.hidden, tensors, Out(found))
        return bool(found[0])

    sizes = {"c": 512, "pixels": 14 * 14, "hidden": 32}
    assert fits(1, **sizes)
    assert not fits(2, **sizes)
    assert fits(2, **sizes | {"pixels": 7 * 7})
    assert not fits(1, **sizes | {"dtype": "f32"})
    assert not fits(1, **sizes | {"pixels": 17 * 14})


MUTATE = [
    Recipe(
        CSRC / "core" / "channel_attention" / "cuda.cu",
        [
            functools.partial(check, case=case._replace(pixels=min(case.pixels, 400)))
            for check in WHOLE.values()
            for case in [*CASES, *ROWS]
        ]
        + [
            functools.partial(check, case=case)
            for check in (check_forward, check_known_mean, check_backward)
            for case in CASES
        ],
        harmless={
            "while (lanes < kThreads && lanes <= along) lanes *= 2;": "lanes without a unit",
            "__device__ inline float relu(float x) { return x <= 0.f ? 0.f : x; }  // NaN stays": (
                "of 0"
            ),
            "const int64_t end = first + kChannels <= shape.c ? first + kChannels : shape.c;": (
                "the same"
            ),
            "return s.c >= kWholeThreads ? s.c : kWholeThreads;": "the same",
            "const int groups = (channels + 31) / 32, "
            "count = warps() >= groups ? warps() / groups : 1;": "the same",
            "const int groups = (channels + 32) / 32, "
            "count = warps() > groups ? warps() / groups : 1;": "a group without channels",
            "const int64_t steps = (grid.p + grid.lanes_p + 1) / grid.lanes_p;": (
                "a step without pixels"
            ),
            "return (s.c * s.pixels + kWide + 1) / kWide * kWide;": "more memory",
            "s.dtype == DType::f32 ? kept_numbers<float>(s) * 8 : kept_numbers<__half>(s) * 2;": (
                "more memory"
            ),
            "for (const void* t : tensors) wide &= reinterpret_cast<uintptr_t>(t) % 32 == 0;": (
                "more tensors go one number at a time, to the same results"
            ),
        },
        choices=("whole_threads", "parts_of", "has_whole"),
    )
]
