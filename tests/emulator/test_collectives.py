# SPDX-License-Identifier: BSD-3-Clause
"""What CUDA C++ has built in (builtins.h): indices, barriers, warp collectives, atomics, half."""

import numpy as np
import pytest
from emulator.build import HERE
from emulator.harness import In, InOut, Out, bf16, from_bf16

SOURCE = HERE / "kernels" / "collectives.cu"


@pytest.fixture
def call(emulate, run):
    """Calls a launcher of collectives.cu, in each way there is to run it."""
    mode, schedule = run
    kernel = emulate(SOURCE, mode)
    return lambda launcher, *arguments: kernel.call(launcher, *arguments, None, schedule=schedule)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_identity(call):
    out = np.empty((4, 3, 2, 2, 3, 5, 6), np.int32)
    call("identity_launch", Out(out))
    bz, by, bx, tz, ty, tx = np.indices(out.shape[:-1])
    assert (out == np.stack([tx, ty, tz, bx, by, bz], -1)).all()


@pytest.mark.parametrize("width", [32, 16, 4])
@pytest.mark.parametrize("type", ["float", "double"])
def test_shuffle(call, rng, type, width):
    x = rng.standard_normal(32).astype(np.float32 if type == "float" else np.float64)
    source = rng.integers(0, 64, 32).astype(np.int32)
    source[0] = 3  # by how many lanes up and down
    out = np.empty((4, 32), x.dtype)
    call(f"shuffle_{type}_launch", In(x), In(source), Out(out), width)
    lane = np.arange(32)
    first, last = lane // width * width, lane // width * width + width - 1
    delta = 3
    assert (out[0] == x[first + source % width]).all()
    assert (out[1] == x[np.where(lane - delta < first, lane, lane - delta)]).all()
    assert (out[2] == x[np.where(lane + delta > last, lane, lane + delta)]).all()
    assert (out[3] == x[np.where(lane ^ 5 > last, lane, lane ^ 5)]).all()


def test_votes(call, rng):
    x = rng.integers(-100, 100, 96).astype(np.int32)
    out = np.empty((96, 9), np.uint32)
    call("votes_launch", In(x), Out(out), 96)
    halves = x.reshape(6, 16)
    bits = (halves > 0) @ (1 << np.arange(16)) << np.arange(6) % 2 * 16
    unsigned = halves.astype(np.uint32)
    expected = [
        bits,
        (halves > 90).any(1),
        (halves > -90).all(1),
        halves.sum(1).astype(np.uint32),
        halves.min(1).astype(np.uint32),
        unsigned.max(1),
        np.bitwise_and.reduce(unsigned, axis=1),
        np.bitwise_or.reduce(unsigned, axis=1),
        np.bitwise_xor.reduce(unsigned, axis=1),
    ]
    assert (out == np.repeat(np.stack(expected, 1), 16, axis=0)).all()


def test_block_votes(call, rng):
    x = rng.integers(-100, 100, (3, 70)).astype(np.int32)
    x[1] = np.abs(x[1]) % 80
    out = np.empty((3, 70, 3), np.int32)
    call("block_votes_launch", In(x), Out(out), 3, 70)
    expected = np.stack([(x > 90).any(1), (x > -90).all(1), (x > 0).sum(1)], 1)
    assert (out == expected[:, None]).all()


@pytest.mark.parametrize("full", [1, 0])
def test_block_sum(call, rng, full):
    x = rng.integers(-50, 50, 1000).astype(np.float32)
    total, positive = np.zeros(1, np.float32), np.zeros(1, np.int32)
    call("block_sum_launch", In(x), InOut(total), InOut(positive), x.size, full)
    assert total[0] == x.sum()
    assert positive[0] == (x > 0).sum()


def test_atomics(call, rng):
    x = rng.integers(-1000, 1000, 200).astype(np.int32)
    out = np.array([0, 0, 2000, -2000, -1, 0, 0, 0], np.int32)
    largest = np.array([-5000], np.float32)
    call("atomics_launch", In(x), InOut(out), InOut(largest), x.size)
    folds = [np.bitwise_and, np.bitwise_or, np.bitwise_xor]
    expected = [x.sum(), -x.sum(), x.min(), x.max(), *(fold.reduce(x) for fold in folds), 7]
    assert out.tolist() == expected
    assert largest[0] == x.max()


def test_lanes_that_have_exited_are_not_waited_for(call):
    out = np.full(64, -1, np.int32)
    call("early_exit_launch", InOut(out))
    # Lane l leaves in round l; until then it sees what lane 31 wrote in the round before.
    assert out.reshape(2, 32).tolist() == [[-1, *range(31)]] * 2


def test_a_loop_that_waits_for_another_warp_ends(call):
    out = np.zeros(4, np.int32)
    call("spin_launch", InOut(out), 4)
    assert out.tolist() == [3, 2, 1, 0]


def test_halves(call, rng):
    x = rng.standard_normal((32, 2)).astype(np.float16)
    y = bf16(rng.standard_normal((32, 2)))
    a, b = np.empty((32, 3, 2), np.float16), np.empty((32, 3, 2), np.uint16)
    call("halves_launch", In(x), In(y), Out(a), Out(b))

    def expected(v):
        thirds = [np.float32(v[:, 0]) * np.float32(3), np.float32(v[:, 1]) / np.float32(3)]
        return np.stack([v * v + v, np.maximum(v + v, 0), np.stack(thirds, 1)], 1)

    assert (a == expected(x.astype(np.float64)).astype(np.float16)).all()
    assert (b == bf16(expected(from_bf16(y)))).all()
