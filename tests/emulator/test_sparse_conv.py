# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA convolutions without blocks of zeros and of 2:4 weights, run by the emulator, against
float64."""

import functools
from ctypes import c_bool, c_int, c_int64
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from emulator.build import CSRC, HERE
from emulator.harness import In, Out, Struct, bf16, from_bf16
from emulator.mutate import Recipe

from pywino.ops import _packed as ops
from pywino.reference import sparse_conv as reference

SOURCE = HERE / "kernels" / "rooms.cu"
DTYPES = {"f32": 0, "bf16": 1, "f16": 2}
# Relative L2 errors: the rounding of the output and, in TF32, of the operands.
BOUND = {"f16": 3e-4, "bf16": 2.5e-3, "f32": 3e-7, "tf32": 4e-4}


@dataclass(frozen=True)
class Case:
    n: int = 2
    c: int = 40
    h: int = 9
    w: int = 7
    k: int = 64
    density: float = 0.5  # of the blocks
    group: int = 64  # output channels of a block of zeros
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    padding: tuple = (1, 1)
    dilation: tuple = (1, 1)
    dtype: str = "f16"  # or tf32: fp32 without `strict`
    bias: bool = True
    infinite: bool = False  # the weights of output channel 0


CASES = [
    Case(),
    Case(n=1, c=72, h=13, w=11, k=136, dtype="bf16"),  # several groups; an odd number of blocks
    Case(n=1, c=36, h=11, w=13, k=260, group=128, dtype="f32"),
    Case(k=13, kernel=(5, 2), stride=(1, 3), padding=(2, 1), dilation=(2, 1), dtype="tf32"),
    Case(c=8, kernel=(1, 1), stride=(2, 2), padding=(0, 0), density=1, bias=False),
    Case(n=1, h=3, w=3, k=128, density=0, group=128),
    # Whole blocks, one output channel and one pixel more, and a list that ends inside a stage.
    Case(n=1, c=32, h=16, w=16, k=128, kernel=(1, 1), padding=(0, 0)),
    Case(n=1, c=32, h=3, w=43, k=65, density=1, kernel=(1, 1), padding=(0, 0)),
    Case(n=1, c=24, density=1, kernel=(1, 1), padding=(0, 0), infinite=True),
]


def decode(x):
    return from_bf16(x) if x.dtype == np.uint16 else x.astype(np.float64)


def encoded(x, dtype):
    """(array as the kernel has it, its numbers as a float32 tensor)."""
    if dtype == "bf16":
        array = bf16(x)
    else:
        array = x.astype(np.float16 if dtype == "f16" else np.float32)
    return array, torch.from_numpy(decode(array).astype(np.float32))


def check_forward(kernel, case, **how):
    random = np.random.default_rng(case.k)
    blocks = random.random((-(-case.k // case.group), -(-case.c // 32), *case.kernel))
    kept = (blocks < case.density).repeat(case.group, 0).repeat(32, 1)[: case.k, : case.c]
    weight = random.standard_normal(kept.shape) / (9 * case.c) ** 0.5
    if case.infinite:
        weight[0] = np.inf
    weight = encoded(np.where(kept, weight, 0), case.dtype)[1]
    values, entries, starts = (t.numpy() for t in ops.pack_blocks(weight, groups=(case.group,)))
    fields = {
        "group": c_int(values.shape[1]),
        "strict": c_bool(case.dtype == "f32"),
        "input": None,
        "values": In(encoded(values, case.dtype)[0]),
        "entries": In(entries),
        "starts": In(starts),
    }
    launch(kernel, "pywino_sparse_conv_forward", case, weight, fields, **how)


def check_two_of_four(kernel, case, **how):
    random = np.random.default_rng(case.k)
    weight = random.standard_normal((case.k, case.c, *case.kernel)) / (9 * case.c) ** 0.5
    fours = np.pad(weight, ((0, 0), (0, -case.c % 4), (0, 0), (0, 0)))
    fours = fours.reshape(case.k, -1, 4, *case.kernel)
    kept = random.permuted(np.broadcast_to(np.arange(4)[:, None, None], fours.shape), axis=2) < 2
    kept[:, 0] = False  # none of four, and one
    kept[:, -1, 1:] = False
    weight = (fours * kept).reshape(case.k, -1, *case.kernel)[:, : case.c]
    weight = encoded(weight, case.dtype)[1]
    values, metadata = (t.numpy() for t in ops.pack_two_of_four(weight))
    fields = {
        "input": None,
        "values": In(encoded(values, case.dtype)[0]),
        "metadata": In(metadata),
    }
    launch(kernel, "pywino_sparse_conv_two_of_four", case, weight, fields, **how)


def check_csr(kernel, case, **how):
    random = np.random.default_rng(case.k)
    weight = random.standard_normal((case.k, case.c, *case.kernel)) / (9 * case.c) ** 0.5
    kept = random.random(weight.shape) < case.density
    kept[1], kept[-1] = False, True  # an empty list, and a long one
    weight = torch.from_numpy((weight * kept).astype(np.float32))
    values, entries, starts = (t.numpy() for t in ops.pack_csr(weight))
    fields = {
        "input": None,
        "values": In(values),
        "entries": In(entries),
        "starts": In(starts),
    }
    launch(kernel, "pywino_sparse_conv_csr", case, weight, fields, **how)


def launch(kernel, launcher, case, weight, fields, **how):
    """Launches a kernel with its own fields of the struct, and looks at the output; that of CSR
    reads and writes planes, and its input has the padding."""
    random = np.random.default_rng(case.c)
    x, numbers = encoded(random.standard_normal((case.n, case.h, case.w, case.c)), case.dtype)
    bias = random.standard_normal(case.k).astype(np.float32)

    where = (case.stride, case.padding, case.dilation)
    exact = reference.sparse_conv2d(
        numbers.double().permute(0, 3, 1, 2),
        weight.double(),
        torch.from_numpy(bias).double() if case.bias else None,
        *where,
    )
    planes = launcher.endswith("csr")
    h, w, padding = case.h, case.w, case.padding
    if planes:
        (down, right), padding = case.padding, (0, 0)
        x = np.pad(x.transpose(0, 3, 1, 2), ((0, 0), (0, 0), (down, down), (right, right)))
        h, w = x.shape[2:]
        exact = exact.numpy()
    else:
        exact = exact.permute(0, 2, 3, 1).numpy()
    where = (case.stride, padding, case.dilation)
    y = np.empty(exact.shape, x.dtype)
    sizes = (case.n, case.c, h, w, case.k, *case.kernel)
    fields = {
        **{f"size{i}": c_int64(s) for i, s in enumerate(sizes)},
        **{f"where{i}": c_int64(s) for i, s in enumerate(s for pair in where for s in pair)},
        "last": c_bool(not planes),
        "dtype": c_int(DTYPES[case.dtype.removeprefix("t")]),
        **fields,
        "input": In(x),
        "bias": In(bias) if case.bias else None,
        "output": Out(y),
    }
    kernel.call(launcher, Struct(fields), None, **how)
    # What is copied in the place of what is not there is zero: no other channel becomes NaN.
    finite = weight.flatten(1).isfinite().all(1).numpy()
    y, exact = (np.compress(finite, of, axis=1 if planes else 3) for of in (y, exact))
    assert np.linalg.norm(decode(y) - exact) <= BOUND[case.dtype] * np.linalg.norm(exact)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(emulate, run, case):
    mode, schedule = run
    check_forward(emulate(SOURCE, mode), case, schedule=schedule)


TWO_OF_FOUR = [
    Case(),
    Case(n=1, c=136, h=7, w=19, k=140, dtype="bf16"),  # several blocks of channels and pixels
    Case(k=13, c=24, kernel=(5, 2), stride=(1, 3), padding=(2, 1), dilation=(2, 1), bias=False),
    # Whole blocks; one output channel and one pixel more.
    Case(n=1, c=64, h=16, w=8, k=128, kernel=(1, 1), padding=(0, 0)),
    Case(n=1, c=64, h=5, w=13, k=129, kernel=(1, 1), padding=(0, 0)),
]


@pytest.mark.parametrize("case", TWO_OF_FOUR, ids=str)
def test_two_of_four(emulate, run, case):
    mode, schedule = run
    check_two_of_four(emulate(SOURCE, mode), case, schedule=schedule)


CSR = [
    Case(dtype="f32", density=0.1),
    # More pixels than a warp has, more terms than a partial sum.
    Case(n=1, c=24, h=19, w=17, k=9, density=0.9, dtype="f32", bias=False),
    Case(c=5, k=13, kernel=(5, 2), stride=(1, 3), padding=(2, 1), dilation=(2, 1), dtype="f32"),
    Case(c=40, k=8, kernel=(1, 1), stride=(2, 2), padding=(0, 1), density=0.3, dtype="f32"),
    # All pixels of a warp, and one more.
    Case(c=3, h=16, w=16, k=9, kernel=(1, 1), padding=(0, 0), dtype="f32"),
    Case(c=3, h=1, w=257, k=9, kernel=(1, 1), padding=(0, 0), dtype="f32"),
    # So many terms that a sum in one piece would have too large an error.
    Case(n=1, c=8000, h=2, w=3, k=2, kernel=(1, 1), padding=(0, 0), density=1, dtype="f32"),
]


@pytest.mark.parametrize("case", CSR, ids=str)
def test_csr(emulate, run, case):
    mode, schedule = run
    check_csr(emulate(SOURCE, mode), case, schedule=schedule)


def test_what_is_not_two_of_four():
    weight = torch.ones(4, 8, 1, 1)
    weight[:, ::2] = 0
    assert ops.pack_two_of_four(weight) is not None
    weight[3, 6] = 1
    assert ops.pack_two_of_four(weight) is None


NO_PIXELS = "the blocks more have no pixels"
SPARSE_GEMM_HARMLESS = {
    "kStages * kStageBytes >= kTileBytes ? kStages * kStageBytes : kTileBytes;": "the same",
    "return row * 64 + ((chunk ^ (row / 4 & 3)) << 4);": (
        "written and read at the same places, only with more bank conflicts"
    ),
}

MUTATE = [
    Recipe(
        CSRC / "core" / "sparse_conv" / "cuda_csr.cu",
        [functools.partial(check_csr, case=case) for case in CSR],
        harmless={
            "for (int first = begin; first <= end; first += 32) {": "a round without entries",
            "const int count = end - first <= 32 ? end - first : 32;": "the same number",
            "if (end - first > 32 && (first - 32 - begin) % kCut != 0) continue;": "cut elsewhere",
            "if (end - first > 32 && (first + 32 + begin) % kCut != 0) continue;": "cut elsewhere",
        },
    ),
    Recipe(
        CSRC / "core" / "sparse_conv" / "cuda.cu",
        [functools.partial(check_forward, case=case) for case in CASES],
        harmless={
            **dict.fromkeys(
                (
                    "gemm.run(stages, (last + first + kBlocksOfStage - 1) / kBlocksOfStage,",
                    "gemm.run(stages, (last - first + kBlocksOfStage + 1) / kBlocksOfStage,",
                ),
                "more stages of zeros",
            ),
            **dict.fromkeys(
                (
                    "const int64_t blocks = (g.out_channels + G::BN + 1) / G::BN * "
                    "((pixels + G::BM - 1) / G::BM);",
                    "const int64_t blocks = (g.out_channels + G::BN - 1) / G::BN * "
                    "((pixels + G::BM + 1) / G::BM);",
                ),
                NO_PIXELS,
            ),
        },
    ),
    Recipe(
        CSRC / "core" / "sparse_conv" / "cuda_two_of_four.cu",
        [functools.partial(check_two_of_four, case=case) for case in TWO_OF_FOUR],
        harmless={
            **SPARSE_GEMM_HARMLESS,
            "const int c_in = int(g.c), steps = (c_in + kStep - 2) / kStep, "
            "width = int(g.kernel_w);": "channels are multiples of 8",
            **dict.fromkeys(
                (
                    "const int64_t blocks = (g.out_channels + G::BM + 1) / G::BM * "
                    "((pixels + G::BN - 1) / G::BN);",
                    "const int64_t blocks = (g.out_channels + G::BM - 1) / G::BM * "
                    "((pixels + G::BN + 1) / G::BN);",
                ),
                NO_PIXELS,
            ),
        },
        headers=[CSRC / "core" / "common" / "sparse_gemm.cuh"],
    ),
]
