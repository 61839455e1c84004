# SPDX-License-Identifier: BSD-3-Clause
"""Fragments of the matrix instructions, by the layouts that CuTe has for them."""

import itertools
import json
import math
import re

import numpy as np
from emulator.build import HERE
from emulator.harness import bf16, from_bf16

LAYOUTS = json.loads((HERE / "tables" / "layouts.json").read_text())

# --- Numbers

TYPES = {
    # name: bits of a number, number of bits, its index among the kernel's types
    "f16": (lambda x: x.astype(np.float16).view(np.uint16), lambda b: b.view(np.float16)),
    "bf16": (bf16, from_bf16),
    "tf32": (
        lambda x: x.astype(np.float32).view(np.uint32) & 0xFFFFE000,
        lambda b: b.astype(np.uint32).view(np.float32),
    ),
}
# As the kernels' launchers number them.
INDEX = {name: i for i, name in enumerate(TYPES)}

# --- CuTe's notation


def nested(text):
    """ "((_4,_8),_2)" as ((4, 8), 2)."""
    return eval(re.sub(r"_(\d+)", r"\1", text), {"__builtins__": {}})


def flat(shape):
    return [n for part in shape for n in flat(part)] if isinstance(shape, tuple) else [shape]


def positions(name, operand):
    """table[thread, value]: what the layout returns."""
    shape, stride = map(nested, LAYOUTS[name][operand].split(":"))
    modes = []
    for shapes, strides in zip(shape, stride):
        shapes, strides = flat(shapes), flat(strides)
        # The first of the nested indices runs fastest.
        indices = itertools.product(*(range(n) for n in reversed(shapes)))
        modes.append([sum(map(math.prod, zip(i, reversed(strides)))) for i in indices])
    return np.add.outer(*map(np.array, modes))


# --- Registers


def pack(matrix, table):
    """Registers [thread][register] of a matrix of bits, whose element p % rows, p // rows is where
    table[thread, value] == p."""
    values = matrix.T.ravel()[table]
    if matrix.dtype == np.uint16:
        values = np.ascontiguousarray(values).view(np.uint32)  # two to a register, low half first
    return np.ascontiguousarray(values, np.uint32)


def unpack(registers, table, shape):
    matrix = np.full(shape[::-1], np.nan, np.float32).ravel()
    matrix[table] = registers
    return matrix.reshape(shape[::-1]).T


def close(actual, expected):
    """fp32 sums of a few dozen exact products: within 1e-6 of the largest."""
    assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max()
