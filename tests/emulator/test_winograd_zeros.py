# SPDX-License-Identifier: BSD-3-Clause
"""The products of the Winograd domain without zeros, run by the emulator, against float64 on what
they really got."""

import functools
from ctypes import c_int

import numpy as np
import pytest
import torch
from emulator.build import CSRC, HERE
from emulator.harness import In, Out, Struct
from emulator.mutate import Recipe
from emulator.test_sparse_conv import SPARSE_GEMM_HARMLESS
from emulator.test_winograd import DOMAINS, assert_rounded, decode, empty, product_of

from pywino.ops import _packed

SOURCE = HERE / "kernels" / "rooms.cu"

# taps, tiles, C', K', output channels of a block, the part of the blocks that is kept: edges of
# every block, lists of odd and even length, empty ones, and nothing but these; and whole blocks.
BLOCKS = [
    (4, 49, 24, 72, 64, 0.6),
    (3, 130, 136, 8, 64, 0.5),
    (3, 131, 200, 264, 128, 0.4),
    (2, 5, 40, 136, 128, 0.0),
    (1, 129, 72, 136, 128, 1.0),
    (2, 128, 64, 128, 64, 0.7),
    (2, 256, 32, 128, 128, 1.0),
]
TWO_OF_FOUR = [(4, 49, 24, 72), (3, 130, 136, 8), (2, 65, 72, 264), (2, 128, 64, 128)]


def product(kernel, domain, v, u, packed, group, places, **how):
    """M of V and a packed U."""
    m = np.empty((*v.shape[:2], u.shape[1]), v.dtype)
    product = product_of(domain, v, packed, Out(m), m.shape[2])
    zeros = Struct({"group": c_int(group), "places": In(places)})
    kernel.call("pywino_winograd_sparse_product", product, zeros, None, **how)
    return m


def check_product(kernel, domain, v, u, packed, group, places, **how):
    """M against float64."""
    m = product(kernel, domain, v, u, packed, group, places, **how)
    v, u = decode(v), decode(u)
    expected = np.einsum("ptc,pkc->ptk", v, u)
    magnitude = np.einsum("ptc,pkc->ptk", abs(v), abs(u))
    # As for the dense product.
    assert_rounded(m, expected, magnitude, domain, sums=4 if domain == "f16" else 16)


def uniform(shape, domain, seed):
    array = empty(shape, domain)
    array[...] = np.random.default_rng(seed).uniform(-1, 1, shape)
    return array


def as_weight(u):
    """(taps, K', C') as the (K, C, height, width) that is packed."""
    return torch.from_numpy(u).permute(1, 2, 0).unsqueeze(3)


def blocks_of(u, kept, group):
    """A U whose zeros are those of `kept`, as the kernel wants it: values, and where they are."""
    u[~kept.repeat(group, 1).repeat(32, 2)[:, : u.shape[1], : u.shape[2]]] = 0
    blocks = _packed.pack_blocks(as_weight(u), by_tap=True, groups=(group,))
    values, entries, starts = (t.numpy() for t in blocks)
    assert values.shape == (kept.sum(), group, 32)
    return values, group, np.concatenate([starts, entries])


def two_of_four_of(u):
    """The same of two of four neighbours, chosen here."""
    order = np.broadcast_to(np.arange(4), (*u.shape[:2], u.shape[2] // 4, 4))
    u[(np.random.default_rng(2).permuted(order, axis=3) >= 2).reshape(u.shape)] = 0
    values, metadata = (t.numpy() for t in _packed.pack_two_of_four(as_weight(u)))
    return values, 0, metadata


def check_blocks(kernel, shape, domain, **how):
    taps, tiles, c, k, group, density = shape
    v, u = uniform((taps, tiles, c), domain, 0), uniform((taps, k, c), domain, 1)
    kept = np.random.default_rng(2).random((taps, -(-k // group), -(-c // 32))) < density
    check_product(kernel, domain, v, u, *blocks_of(u, kept, group), **how)


def check_two_of_four(kernel, shape, **how):
    taps, tiles, c, k = shape
    v, u = uniform((taps, tiles, c), "f16", 0), uniform((taps, k, c), "f16", 1)
    check_product(kernel, "f16", v, u, *two_of_four_of(u), **how)


def check_infinities(kernel, of, **how):
    """One infinite tile, or output channel, makes no other number infinite or NaN: what is copied
    in the place of what is not there is zero."""
    v, u = uniform((1, 40, 72), "f16", 0), uniform((1, 24, 72), "f16", 1)
    (v if of == "tile" else u)[0, 0] = np.inf
    odd = np.array([[[True, False, False]]])  # a list that ends inside a stage
    for packed in (blocks_of(u.copy(), odd, 64), two_of_four_of(u.copy())):
        m = product(kernel, "f16", v, u, *packed, **how)
        others = m[0, 1:] if of == "tile" else m[0, :, 1:]
        assert np.isfinite(others).all()


@pytest.mark.parametrize("shape", BLOCKS, ids=str)
@pytest.mark.parametrize("domain", DOMAINS)
def test_blocks(emulate, run, shape, domain):
    mode, schedule = run
    check_blocks(emulate(SOURCE, mode), shape, domain, schedule=schedule)


@pytest.mark.parametrize("shape", TWO_OF_FOUR, ids=str)
def test_two_of_four(emulate, run, shape):
    mode, schedule = run
    check_two_of_four(emulate(SOURCE, mode), shape, schedule=schedule)


@pytest.mark.parametrize("of", ["tile", "channel"])
def test_infinities_stay_where_they_are(emulate, run, of):
    mode, schedule = run
    check_infinities(emulate(SOURCE, mode), of, schedule=schedule)


MUTATE = [
    Recipe(
        CSRC / "core" / "winograd" / "cuda_sparse_product.cu",
        [
            *(
                functools.partial(check_blocks, shape=shape, domain=domain)
                for shape in BLOCKS
                for domain in DOMAINS
            ),
            *(functools.partial(check_two_of_four, shape=shape) for shape in TWO_OF_FOUR),
            *(functools.partial(check_infinities, of=of) for of in ("tile", "channel")),
        ],
        harmless={
            **SPARSE_GEMM_HARMLESS,
            **dict.fromkeys(
                (
                    "gemm.run(stages, (last + first + kBlocksOfStage - 1) / kBlocksOfStage,",
                    "gemm.run(stages, (last - first + kBlocksOfStage + 1) / kBlocksOfStage,",
                ),
                "more stages of zeros",
            ),
            **dict.fromkeys(
                (
                    "const int64_t groups = (p.out_channels + G::BN - 2) / G::BN;",
                    "const int64_t blocks_m = (p.out_channels + G::BM - 2) / G::BM, "
                    "rows = blocks_m * G::BM;",
                    "const int64_t steps = (p.channels + G::BK - 2) / G::BK;",
                    "const int64_t blocks = (p.out_channels + G::BN - 2) / G::BN * "
                    "((p.tiles + G::BM - 1) / G::BM);",
                    "const int64_t blocks = (p.out_channels + G::BM - 2) / G::BM * "
                    "((p.tiles + G::BN - 1) / G::BN);",
                ),
                "channels are multiples of 8",
            ),
        },
        headers=[CSRC / "core" / "common" / "sparse_gemm.cuh"],
    ),
]
