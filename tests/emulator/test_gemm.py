# SPDX-License-Identifier: BSD-3-Clause
"""Two whole kernels: cp.async + ldmatrix + mma.sync, and TMA + mbarrier + wgmma.

They stand for the project's own here, for mutate.py too: a kernel that was broken must not get
through these functions.
"""

import functools

import numpy as np
import pytest
from emulator.build import HERE
from emulator.harness import EmulatorError, In, Kernel, Out, bf16, from_bf16, padded
from emulator.mutate import Recipe

MMA = HERE / "kernels" / "gemm_mma.cu"
WGMMA = HERE / "kernels" / "gemm_wgmma.cu"

# m, n, k: nothing a multiple of a tile; less than one tile; several tiles and rounds of the ring.
SHAPES = [(77, 71, 45), (136, 129, 72), (9, 5, 33), (64, 64, 256), (70, 65, 130)]
WGMMA_SHAPES = [(77, 51, 45), (129, 65, 650), (9, 5, 65)]


def round_up(n, unit):
    return -(-n // unit) * unit


def assert_close(actual, expected):
    """Products are exact, sums in fp32 over k <= 256: within k * 2^-24 of the sum of magnitudes,
    and much nearer than that for numbers of both signs."""
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= 1e-6, error


def gemm_mma(kernel, m, n, k, **how):
    rng = np.random.default_rng(m * n * k)
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((m, k), (k, n)))
    lda, ldb = round_up(k, 8), round_up(n, 8)
    c = np.empty((m, n), np.float32)
    arguments = In(padded(a, lda), "a"), In(padded(b, ldb), "b"), Out(c, "c")
    kernel.call("gemm_mma_launch", *arguments, m, n, k, lda, ldb, n, None, **how)
    assert_close(c, a.astype(np.float64) @ b.astype(np.float64))


def gemm_wgmma(kernel, m, n, k, **how):
    rng = np.random.default_rng(m * n * k)
    a, b = (bf16(rng.standard_normal(shape)) for shape in ((m, k), (n, k)))
    ld = round_up(k, 8)
    c = np.empty((m, n), np.float32)
    arguments = In(padded(a, ld), "a"), In(padded(b, ld), "b"), Out(c, "c")
    kernel.call("gemm_wgmma_launch", *arguments, m, n, k, ld, ld, n, None, **how)
    assert_close(c, from_bf16(a) @ from_bf16(b).T)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gemm_mma(emulate, run, shape):
    mode, schedule = run
    gemm_mma(emulate(MMA, mode), *shape, schedule=schedule)


@pytest.mark.parametrize("shape", WGMMA_SHAPES, ids=str)
def test_gemm_wgmma(emulate, run, shape):
    mode, schedule = run
    gemm_wgmma(emulate(WGMMA, mode), *shape, schedule=schedule)


MUTATE = [
    Recipe(
        MMA,
        [functools.partial(gemm_mma, m=m, n=n, k=k) for m, n, k in SHAPES],
        harmless={
            "/* ptx::cp_async_wait_group<0>(); */;": "the last wait is for groups that are empty",
            "ptx::cp_async_wait_group<0 + 1>();": "the same",
            "ptx::cp_async_wait_group<kStages - 3>();": "waits too long",
            "if (s <= steps) {": "loads a stage of zeros that nobody reads",
            "if (next <= steps) {": "the same",
            "const int steps = (k + kTileK + 1) / kTileK;": "one step of zeros more",
            # Undefined, and not seen: a row of registers too many is passed on by reference.
            "for (int i = 0; i <= 2; ++i) {": "overwrites b_fragments, which are loaded next",
            "return row * kRowA + ((chunk ^ (row / 4 % 4)) * 16);": "another swizzle: speed only",
        },
    ),
    Recipe(
        WGMMA,
        [functools.partial(gemm_wgmma, m=m, n=n, k=k) for m, n, k in WGMMA_SHAPES],
        harmless={
            "const int steps = (k + kTileK + 1) / kTileK;": "one step of zeros more",
            "if (round > 0) ptx::mbarrier_wait(empty + 8 * s, (round + 1) % 2);": "the same number",
            "ptx::wgmma_m64n64k16_bf16(d, ptx::matrix_descriptor_128b(a + 33 * kk),": "the same "
            "descriptor, which drops four bits",
            "ptx::matrix_descriptor_128b(b + 33 * kk), 1);": "the same",
        },
    ),
]


# What a kernel author may get wrong in a pipeline, and one kind of what is found.
BROKEN = [
    (MMA, "__syncthreads();", "", "RACE"),
    (MMA, "wait_group<kStages - 2>", "wait_group<kStages - 1>", "IN FLIGHT"),
    (MMA, "k0 + row < k ?", "k0 + row <= k ?", "OUT-OF-BOUNDS"),
    (WGMMA, "if (round > 0) ptx::mbarrier_wait", "if (false) ptx::mbarrier_wait", "MBARRIER"),
    (WGMMA, "    ptx::fence_mbarrier_init();\n", "", "PROXY"),
    (WGMMA, "ptx::mbarrier_wait(full", "if (false) ptx::mbarrier_wait(full", "UNINITIALISED"),
    (WGMMA, "ptx::named_barrier_sync(1 + group, 128);", "", "RACE"),
    (WGMMA, "    ptx::wgmma_wait_group<0>();\n", "", "NOT WAITED FOR"),
]


@pytest.mark.parametrize(("source", "right", "wrong", "kind"), BROKEN)
def test_a_broken_pipeline_is_found(source, right, wrong, kind):
    text = source.read_text()
    assert right in text
    gemm, k = (gemm_mma, 130) if source == MMA else (gemm_wgmma, 520)
    with (
        Kernel(source, "check", text=text.replace(right, wrong)) as kernel,
        pytest.raises(EmulatorError) as raised,
    ):
        gemm(kernel, 129, 65, k)
    assert kind in raised.value.kinds


def test_swapped_fragments_give_wrong_numbers(emulate):
    text = MMA.read_text().replace("lane / 4 + v / 2 * 8", "lane / 4 + v % 2 * 8")
    with (
        Kernel(MMA, "fast", text=text) as kernel,
        pytest.raises((AssertionError, EmulatorError)),
    ):
        gemm_mma(kernel, 64, 64, 64)
