# SPDX-License-Identifier: BSD-3-Clause
"""Each instruction of ptx.cuh, against the layouts that CuTe has for it (tables/layouts.json).

mma.sp's metadata has no table there; its layout is from the PTX ISA ("Sparse matrix storage").
"""

import itertools

import numpy as np
import pytest
from emulator.build import HERE
from emulator.harness import In, InOut, Out
from emulator.layouts import INDEX, LAYOUTS, TYPES, close, nested, pack, positions, unpack

SOURCE = HERE / "kernels" / "instructions.cu"


@pytest.fixture
def call(emulate, run):
    """Calls a launcher of instructions.cu, in each way there is to run it."""
    mode, schedule = run
    kernel = emulate(SOURCE, mode)
    return lambda launcher, *arguments: kernel.call(launcher, *arguments, None, schedule=schedule)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_layout_is_read_as_cute_means_it():
    # "A" of m16n8k16 in the PTX ISA: lane 5 is group 1, thread 1 of it; a1 is row 9, column 2.
    table = positions("mma_m16n8k16_f16", "a")
    assert table.shape == (32, 8)
    assert divmod(table[5, 2], 16) == (2, 9)
    assert sorted(table.ravel()) == list(range(256))


# --- mma.sync


@pytest.mark.parametrize("name", ["mma_m16n8k16_f16", "mma_m16n8k16_bf16", "mma_m16n8k8_tf32"])
def test_mma(call, rng, name):
    to_bits, from_bits = TYPES[name.split("_")[-1]]
    m, n, k = nested(LAYOUTS[name]["shape_mnk"])
    a = to_bits(rng.standard_normal((m, k)))
    b = to_bits(rng.standard_normal((n, k)))
    c = rng.standard_normal((m, n)).astype(np.float32)
    tables = {operand: positions(name, operand) for operand in "abd"}
    d = np.ascontiguousarray(c.T.ravel()[tables["d"]])
    arguments = In(pack(a, tables["a"])), In(pack(b, tables["b"])), InOut(d)
    call("mma_launch", INDEX[name.split("_")[-1]], *arguments)
    expected = c + from_bits(a).astype(np.float64) @ from_bits(b).astype(np.float64).T
    close(unpack(d, tables["d"], (m, n)), expected)


def test_mma_tf32_drops_the_low_bits(call):
    table = positions("mma_m16n8k8_tf32", "a")
    a = np.full((16, 8), 0x3F801FFF, np.uint32)  # 1 + 8191 * 2^-23
    b = np.full((8, 8), 0x3F800000, np.uint32)
    d = np.zeros((32, 4), np.float32)
    arguments = In(pack(a, table)), In(pack(b, positions("mma_m16n8k8_tf32", "b"))), InOut(d)
    call("mma_launch", INDEX["tf32"], *arguments)
    assert (d == 8).all()


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("type", ["f16", "bf16"])
def test_mma_sp(call, rng, type, selector):
    to_bits, from_bits = TYPES[type]
    m, n, k = 16, 8, 32
    stored = to_bits(rng.standard_normal((m, k // 2)))
    # Of each four columns two are kept, in ascending order.
    places = np.sort(rng.permuted(np.tile(np.arange(4), (m, k // 4, 1)), axis=2)[..., :2], axis=2)
    dense = np.zeros((m, k // 4, 4))
    np.put_along_axis(dense, places, from_bits(stored).astype(np.float64).reshape(m, -1, 2), 2)
    b = to_bits(rng.standard_normal((n, k)))
    # Lane 4 g + 2 * selector + h: bits 0-15 row g, 16-31 row g + 8, of columns 16 h ... 16 h + 15.
    # Other lanes' metadata is not looked at.
    metadata = rng.integers(0, 2**32, 32, dtype=np.uint32)
    bits = (places.reshape(m, 2, 8).astype(np.uint32) << (2 * np.arange(8, dtype=np.uint32))).sum(2)
    for g, h in itertools.product(range(8), range(2)):
        metadata[4 * g + 2 * selector + h] = bits[g, h] | bits[g + 8, h] << 16
    a_table = positions("mma_m16n8k16_f16", "a")  # the stored half of A is laid out like a dense A
    lane, register, half = np.meshgrid(range(32), range(4), range(2), indexing="ij")
    b_table = ((8 * register + lane % 4 * 2 + half) * n + lane // 4).reshape(32, 8)
    d_table = positions("mma_m16n8k16_f16", "d")
    d = np.zeros((32, 4), np.float32)
    arguments = In(pack(stored, a_table)), In(pack(b, b_table)), In(metadata), InOut(d)
    call("mma_sp_launch", INDEX[type], selector, *arguments)
    expected = dense.reshape(m, k) @ from_bits(b).astype(np.float64).T
    close(unpack(d, d_table, (m, n)), expected)


# --- ldmatrix, cp.async, conversions, named barriers


@pytest.mark.parametrize("name", ["ldmatrix_x4", "ldmatrix_x4_trans"])
def test_ldmatrix(call, rng, name):
    data = rng.integers(0, 2**16, 256, dtype=np.uint16)
    rows = rng.permutation(32).astype(np.int32)  # lanes name the rows in any order
    out = np.empty((32, 4), np.uint32)
    call("ldmatrix_launch", int("trans" in name), In(data), In(rows * 16), Out(out))
    # Bit `source[lane, 0]` of what is loaded is the first of the row that the lane names.
    named = data.reshape(32, 8)[rows].ravel()
    assert (positions(name, "source")[:, 0] == 128 * np.arange(32)).all()
    elements = positions(name, "destination")[:, ::16] // 16
    assert (out.view(np.uint16) == named[elements]).all()


def test_cp_async(call, rng):
    source = rng.integers(0, 2**32, (32, 4), dtype=np.uint32)
    nbytes = (np.arange(32) % 17).astype(np.int32)
    order = rng.permutation(32).astype(np.int32)
    first, both = np.empty((32, 4), np.uint32), np.empty((32, 4), np.uint32)
    call("cp_async_launch", In(source), In(nbytes), In(order), Out(first), Out(both))
    expected = source[order].view(np.uint8).copy()
    expected[np.arange(16) >= nbytes[:, None]] = 0
    assert (first.view(np.uint8) == expected[::-1]).all()
    assert (both == source[::-1]).all()


def test_to_tf32(call, rng):
    x = np.concatenate([rng.standard_normal(300), [0, -0.0, np.inf, -np.inf, 1e-40, 3.4e38]])
    ties = np.array([0x3F801000, 0x3F803000, 0xBF801000], np.uint32).view(np.float32)
    x = np.concatenate([x, ties]).astype(np.float32)
    y = np.empty(x.size, np.uint32)
    call("to_tf32_launch", In(x), Out(y), x.size)
    assert (y & 0x1FFF == 0).all()
    rounded = y.view(np.float32).astype(np.float64)
    # To nearest, and ties away from zero: half a unit of the 10-bit mantissa at most.
    finite = np.isfinite(rounded)
    unit = 2.0 ** np.maximum(np.frexp(x.astype(np.float64))[1] - 11, -136)
    assert (np.abs(rounded[finite] - x[finite]) <= unit[finite] / 2).all()
    assert y[-3:].tolist() == [0x3F802000, 0x3F804000, 0xBF802000]
    assert rounded[302:304].tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_named_barriers(call, rng, rounds):
    x = rng.integers(-1000, 1000, (rounds, 64), dtype=np.int32)
    sums = np.empty(64, np.int32)
    call("named_barriers_launch", In(x), Out(sums), rounds)
    assert (sums == x.sum(0)[::-1]).all()
