# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA masked convolution, run by the emulator, against float64."""

import functools
from ctypes import c_bool, c_int, c_int64
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from emulator.build import CSRC, HERE
from emulator.harness import In, Out, Struct, Workspace, bf16, from_bf16
from emulator.mutate import Recipe

from pywino.reference import masked_conv as reference

SOURCE = HERE / "kernels" / "rooms.cu"
DTYPES = {"f32": 0, "bf16": 1, "f16": 2}
# Relative L2 errors: the rounding of the output and, in TF32, of the operands.
BOUND = {"f16": 3e-4, "bf16": 2.5e-3, "f32": 3e-7, "tf32": 4e-4}
LISTED = 1024  # pixels that a block of the compaction looks at
MANY = LISTED * (LISTED + 1) + 7  # pixels of more blocks than their sum takes at once
MASKS = ("empty", "full", "one", "random", "streaks", "different")


@dataclass(frozen=True)
class Case:
    n: int = 2
    c: int = 16
    h: int = 9
    w: int = 7
    k: int = 16
    mask: str = "random"
    kernel: tuple = (3, 3)
    dilation: tuple = (1, 1)
    last: bool = True
    dtype: str = "f16"  # or tf32: fp32 without `strict`
    bias: bool = True
    infinite: bool = False  # the filter of output channel 0


CASES = [
    *(Case(n=3, mask=mask) for mask in MASKS),
    Case(mask="streaks", c=20, k=13, last=False, dtype="f32"),  # rows are gathered, C' = C
    Case(c=19, k=70, dtype="bf16"),  # C' = 24: gathered from channels_last
    Case(n=1, c=72, h=13, w=15, k=136, mask="full", last=False),  # blocks of pixels, k and depth
    Case(n=1, c=36, k=8, dtype="tf32"),
    Case(n=1, c=8, h=17, w=25, k=8, mask="full", dtype="f32"),  # more blocks than run at once
    Case(kernel=(5, 2), dilation=(1, 3), c=8, k=5, dtype="f32", bias=False),
    Case(kernel=(1, 1), c=8, h=1, w=1, n=5, k=3),
    Case(kernel=(1, 1), c=8, h=1, w=1, n=1, k=1, mask="full"),
    Case(n=1, c=19, k=8, mask="full", dtype="bf16"),  # the last pixel has no channels behind it
    Case(n=1, mask="full", infinite=True),
]


def encode(x, dtype):
    if dtype == "bf16":
        return bf16(x)
    return x.astype(np.float16 if dtype == "f16" else np.float32)


def decode(x):
    return from_bf16(x) if x.dtype == np.uint16 else x.astype(np.float64)


def mask_of(name, n, h, w):
    mask = np.zeros((n, h, w), bool)
    if name == "full":
        mask[:] = True
    elif name == "one":
        mask[-1, h // 2, w - 1] = True
    elif name == "random":
        mask = np.random.default_rng(h).random((n, h, w)) < 0.3
    elif name == "streaks":
        for y in range(h):
            mask[:, y, 3 * y % w] = True
    elif name == "different":  # none, all, a cluster
        mask[1 % n] = True
        mask[2 % n, : h // 2, w // 3 :] = True
    return mask


def list_fields(mask):
    """The struct's fields, and the arrays of those that are written."""
    pixels = mask.size
    arrays = [np.empty(size, np.int32) for size in (-(-pixels // LISTED) + 1, pixels, pixels)]
    named = {name: Out(a) for name, a in zip(("starts", "list", "place"), arrays)}
    return {"pixels": c_int64(pixels), "mask": In(mask.astype(np.uint8)), **named}, arrays


def check_list(kernel, pixels, density, **how):
    mask = np.random.default_rng(pixels).random(pixels) < density
    fields, (starts, list, place) = list_fields(mask)
    kernel.call("pywino_masked_conv_list", Struct(fields), None, **how)
    expected = np.flatnonzero(mask)
    assert starts[-1] == len(expected)
    assert (list[: len(expected)] == expected).all()
    assert (place[~mask] == -1).all()
    assert (place[expected] == np.arange(len(expected))).all()


def check_forward(kernel, case, **how):
    random = np.random.default_rng(case.c)
    x = encode(random.standard_normal((case.n, case.h, case.w, case.c)), case.dtype)
    size = (case.k, *case.kernel, case.c)
    filter = random.standard_normal(size) / (9 * case.c) ** 0.5
    if case.infinite:
        filter[0] = np.inf
    filter = encode(filter, case.dtype)
    bias = random.standard_normal(case.k).astype(np.float32)
    mask = mask_of(case.mask, case.n, case.h, case.w)
    chunk = 16 // x.itemsize
    behind = -case.c % chunk
    padding = [d * (r - 1) // 2 for r, d in zip(case.kernel, case.dilation)]

    sizes = (case.n, case.c, case.h, case.w, case.k, *case.kernel, *padding, *case.dilation)
    to_format = lambda t: t if case.last else np.ascontiguousarray(t.transpose(0, 3, 1, 2))  # noqa: E731
    y = np.empty_like(to_format(np.empty((case.n, case.h, case.w, case.k), x.dtype)))
    as_they_lie = case.last and not behind
    fields = {
        **{f"size{i}": c_int64(s) for i, s in enumerate(sizes)},
        "last": c_bool(case.last),
        "dtype": c_int(DTYPES[case.dtype.removeprefix("t")]),
        **list_fields(mask)[0],
        "strict": c_bool(case.dtype == "f32"),
        "input": In(to_format(x)),
        "rows": None if as_they_lie else Workspace(mask.size * (case.c + behind) * x.itemsize),
        "filter": In(np.pad(filter, [(0, 0)] * 3 + [(0, behind)])),
        "bias": In(bias) if case.bias else None,
        "output": Out(y),
    }
    kernel.call("pywino_masked_conv_forward", Struct(fields), None, **how)
    y = decode(y if case.last else y.transpose(0, 2, 3, 1))

    exact = reference.masked_conv2d(
        torch.from_numpy(decode(x)).permute(0, 3, 1, 2),
        torch.from_numpy(mask)[:, None],
        torch.from_numpy(decode(filter)).permute(0, 3, 1, 2),
        torch.from_numpy(bias.astype(np.float64)) if case.bias else None,
        padding,
        case.dilation,
    )
    exact = exact.permute(0, 2, 3, 1).numpy()
    assert not y[~mask].any()
    # What is copied in the place of what is not there is zero: no other channel becomes NaN.
    y, exact = (of[..., case.infinite :] for of in (y, exact))
    assert np.linalg.norm(y - exact) <= BOUND[case.dtype] * np.linalg.norm(exact)


@pytest.mark.parametrize("density", [0, 0.3, 1])
@pytest.mark.parametrize("pixels", [1, 1024, 1025, 2500])
def test_list(emulate, run, pixels, density):
    mode, schedule = run
    check_list(emulate(SOURCE, mode), pixels, density, schedule=schedule)


def test_list_of_many_blocks(emulate):
    """The sum over counts goes round."""
    check_list(emulate(SOURCE, "fast"), MANY, 0.3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(emulate, run, case):
    mode, schedule = run
    check_forward(emulate(SOURCE, mode), case, schedule=schedule)


MUTATE = [
    Recipe(
        CSRC / "core" / "masked_conv" / "cuda.cu",
        [
            functools.partial(check_list, pixels=2500, density=0.3),
            functools.partial(check_list, pixels=MANY, density=0.3),
            *(functools.partial(check_forward, case=case) for case in CASES),
        ],
        harmless={
            "for (int64_t first = 0; first <= blocks; first += kListed) {": "a round of no counts",
            "for (int distance = 1; distance <= 32; distance *= 2) {": "no lane is 32",
            "if (block <= blocks) p.starts[block] = before + sum - count;": (
                "the number that is written there below"
            ),
            **dict.fromkeys(
                (
                    "for (int64_t block = blockIdx.x; block <= blocks; block += gridDim.x) {",
                    "const int64_t blocks = (int64_t(pixels) + G::BM + 1) / G::BM * blocks_n;",
                    "(p.list.pixels + G::BM + 1) / G::BM * "
                    "((p.geometry.out_channels + G::BN - 1) / G::BN);",
                    "(p.list.pixels + G::BM - 1) / G::BM * "
                    "((p.geometry.out_channels + G::BN + 1) / G::BN);",
                    "const int blocks_n = int((g.out_channels + G::BN + 1) / G::BN);",
                ),
                "the blocks more have no pixels, or no channels",
            ),
            "const int steps = (pitch + G::BK + 1) / G::BK;": "one more stage of zeros",
            "const int steps = (pitch + G::BK - 2) / G::BK;": "C' is a multiple of 16 bytes",
            "return p.geometry.out_channels < 64 ? launch<Gemm<Mma, 128, 64, 4, 2>>(p, count, "
            "stream)": "a block of another size",
        },
    )
]
