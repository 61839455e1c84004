# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA LSTM cell, run by the emulator, against float64."""

import functools
from ctypes import c_bool, c_int, c_int64

import numpy as np
import pytest
import torch
from emulator.build import CSRC, HERE
from emulator.harness import In, Out, Struct, bf16, from_bf16
from emulator.mutate import Recipe

from pywino.reference import conv_lstm as reference

SOURCE = HERE / "kernels" / "rooms.cu"
DTYPES = {"f32": 0, "bf16": 1, "f16": 2}
ROUNDING = {"f32": 0.0, "bf16": 2.0**-8, "f16": 2.0**-11}
# Before the rounding to the tensors' dtype it is fp32: 1 - sigma and 1 - tanh^2 cancel where a gate
# is open, so the error of a gradient is one of the largest number.
OF_LARGEST = 5e-7
# n, c, pixels, channels_last, dtype, with a cell: 16 bytes at a time, and one number at a time; the
# last has one number more than a whole block
CASES = [
    (2, 8, 35, True, "f16", True),
    (3, 5, 7, True, "f32", False),
    (1, 3, 72, False, "bf16", True),
    (2, 33, 9, False, "f32", True),
    (1, 16, 40, True, "bf16", False),
    (1, 1, 257, False, "f32", True),
]


def encode(x, dtype):
    return bf16(x) if dtype == "bf16" else x.astype({"f32": np.float32, "f16": np.float16}[dtype])


def decode(x):
    return from_bf16(x) if x.dtype == np.uint16 else x.astype(np.float64)


def assert_close(actual, expected, dtype):
    error = np.abs(decode(actual) - expected)
    limit = 1.01 * ROUNDING[dtype] * np.abs(expected) + OF_LARGEST * np.abs(expected).max()
    assert (error <= limit).all(), (error - limit).max()


def shape_fields(case):
    n, c, pixels, last, dtype, _ = case
    sizes = {"n": c_int64(n), "c": c_int64(c), "pixels": c_int64(pixels)}
    return {**sizes, "last": c_bool(last), "dtype": c_int(DTYPES[dtype])}


def check_cell(kernel, case, **how):
    n, c, pixels, last, dtype, has_cell = case
    random = np.random.default_rng(c)

    def tensor(channels):
        shape = (n, pixels, channels) if last else (n, channels, pixels)
        return encode(2 * random.standard_normal(shape), dtype)

    def exact(x):  # (n, channels, pixels, 1), as the reference has it
        x = decode(x)
        return torch.from_numpy(x.transpose(0, 2, 1) if last else x).unsqueeze(3)

    def back(x):
        x = x.squeeze(3).numpy()
        return x.transpose(0, 2, 1) if last else x

    gates, cell, grad_hidden, grad_cell = tensor(4 * c), tensor(c), tensor(c), tensor(c)
    hidden, next_cell, by_gates, by_cell = (np.empty_like(x) for x in (cell, cell, gates, cell))
    given = {"gates": In(gates), "cell": In(cell) if has_cell else None}
    fields = {**shape_fields(case), **given, "hidden": Out(hidden), "next_cell": Out(next_cell)}
    kernel.call("pywino_conv_lstm_forward", Struct(fields), None, **how)
    doubles = exact(gates), exact(cell) if has_cell else None
    for actual, expected in zip((hidden, next_cell), reference.pointwise(*doubles)):
        assert_close(actual, back(expected), dtype)

    fields = {
        **shape_fields(case),
        "grad_hidden": In(grad_hidden),
        "grad_next_cell": In(grad_cell),
        **given,
        "grad_gates": Out(by_gates),
        "grad_cell": Out(by_cell),
    }
    kernel.call("pywino_conv_lstm_backward", Struct(fields), None, **how)
    grads = reference.pointwise_gradients(exact(grad_hidden), exact(grad_cell), *doubles)
    for actual, expected in zip((by_gates, by_cell), grads):
        assert_close(actual, back(expected), dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cell(emulate, run, case):
    mode, schedule = run
    check_cell(emulate(SOURCE, mode), case, schedule=schedule)


MUTATE = [
    Recipe(
        CSRC / "core" / "conv_lstm" / "cuda.cu",
        [functools.partial(check_cell, case=case) for case in CASES],
        harmless={
            "f(element, width, "
            "dim3(unsigned((s.n * s.c * s.pixels + kNumbers + 1) / kNumbers)));": (
                "one block more than numbers need: it has none and returns"
            ),
            "for (const void* t : tensors) wide &= reinterpret_cast<uintptr_t>(t) % 32 == 0;": (
                "more tensors go one number at a time, to the same results"
            ),
        },
    )
]
