# SPDX-License-Identifier: BSD-3-Clause
"""TMA and wgmma (sm_90a), against the layouts that CuTe has for them (tables/layouts.json)."""

import ctypes

import numpy as np
import pytest
from emulator.build import HERE
from emulator.harness import EmulatorError, In, InOut, Kernel, Out, Struct
from emulator.layouts import INDEX, LAYOUTS, TYPES, close, pack, positions, unpack

SOURCE = HERE / "kernels" / "hopper.cu"
SWIZZLES = {None: 0, 32: 1, 64: 2, 128: 3}


@pytest.fixture
def call(emulate, run):
    """Calls a launcher of hopper.cu, in each way there is to run it."""
    mode, schedule = run
    kernel = emulate(SOURCE, mode)
    return lambda launcher, *arguments: kernel.call(launcher, *arguments, None, schedule=schedule)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def box(tensor, extent, size, at, swizzle=None):
    """The struct Box of hopper.cu. `tensor` holds an array whose last axis is the innermost."""
    array = tensor.array
    rank = array.ndim
    fields = {"rank": rank, "item_bytes": array.itemsize, "swizzle": SWIZZLES[swizzle]}
    pitches = array.strides[-2::-1]
    for name, values, count in (
        ("extent", extent[::-1], 5),
        ("pitch", pitches, 4),
        ("box", size[::-1], 5),
        ("at", at[::-1], 5),
    ):
        fields |= {f"{name}{d}": values[d] if d < len(values) else 0 for d in range(count)}
    return Struct({"tensor": tensor} | {name: ctypes.c_int(n) for name, n in fields.items()})


def cut(array, size, at):
    """The box, with zeros where the array has nothing."""
    index = np.meshgrid(*(a + np.arange(n) for a, n in zip(at, size)), indexing="ij")
    inside = np.all([(i >= 0) & (i < n) for i, n in zip(index, array.shape)], axis=0)
    clipped = tuple(np.clip(i, 0, n - 1) for i, n in zip(index, array.shape))
    return np.where(inside, array[clipped], 0).astype(array.dtype)


BOXES = [
    # extent, with what pitch of the innermost axis, box, coordinates
    ((5, 19), 24, (8, 16), (0, 0)),
    ((5, 19), 24, (4, 8), (-2, 13)),
    ((3, 4, 16), 16, (2, 3, 16), (2, 2, -8)),
    ((2, 3, 4, 8), 8, (2, 2, 3, 8), (1, -1, 2, 0)),
    ((2, 2, 3, 4, 8), 8, (2, 1, 2, 2, 8), (1, 1, 2, -1, 0)),
]


@pytest.mark.parametrize(("extent", "pitch", "size", "at"), BOXES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_tma_load(call, rng, extent, pitch, size, at, dtype):
    memory = np.full((*extent[:-1], pitch), np.nan, dtype)
    tensor = memory[..., : extent[-1]]
    tensor[...] = rng.standard_normal(extent)
    out = np.empty(size, dtype)
    call("tma_load_launch", box(In(memory), extent, size, at), Out(out.view(np.uint32)))
    assert (out == cut(tensor, size, at)).all()


@pytest.mark.parametrize(("extent", "pitch", "size", "at"), BOXES[:4])
def test_tma_store(call, rng, extent, pitch, size, at):
    memory = rng.standard_normal((*extent[:-1], pitch)).astype(np.float16)
    before = memory.copy()
    data = rng.standard_normal(size).astype(np.float16)
    call("tma_store_launch", box(InOut(memory), extent, size, at), In(data.view(np.uint32)))
    index = np.meshgrid(*map(np.arange, memory.shape), indexing="ij")
    written = np.all(
        [(i >= a) & (i < a + n) & (i < e) for i, a, n, e in zip(index, at, size, extent)], axis=0
    )
    from_box = data[tuple(np.clip(i - a, 0, n - 1) for i, a, n in zip(index, at, size))]
    assert written.any()
    assert (memory == np.where(written, from_box, before)).all()


def test_a_tile_is_nan_until_it_has_landed(rng):
    """In fast mode, also where older data lies: here zeros. Reading first, waiting after."""
    right = "  ptx::mbarrier_wait(barrier, 0);\n"
    copy = "  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) out[i] = tile[i];\n"
    zeros = copy.replace("out[i] = tile[i]", "tile[i] = 0")
    begin = "  const uint32_t barrier = ptx::shared_address(&full);\n"
    text = SOURCE.read_text()
    assert right + copy in text
    text = text.replace(right + copy, copy + right).replace(begin, begin + zeros, 1)
    tensor = rng.standard_normal((4, 8)).astype(np.float16)
    out = np.zeros_like(tensor)
    with Kernel(SOURCE, text=text) as kernel:
        whole = box(In(tensor), tensor.shape, tensor.shape, (0, 0))
        kernel.call("tma_load_launch", whole, Out(out.view(np.uint32)), None)
    assert np.isnan(out).all()


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_tma_swizzles_as_wgmma_reads(call, rng, swizzle):
    columns = swizzle // 2
    tensor = rng.standard_normal((16, columns)).astype(np.float16)
    out = np.empty(tensor.nbytes, np.uint8)
    whole = box(In(tensor), tensor.shape, tensor.shape, (0, 0), swizzle)
    call("tma_load_launch", whole, Out(out.view(np.uint32)))
    offsets = np.array(LAYOUTS[f"tile_{swizzle}b_f16"]["offsets"])
    chunks = tensor.reshape(16, -1, 8)
    assert (out.view(np.float16)[offsets[..., None] // 2 + np.arange(8)] == chunks).all()


def test_the_descriptor_is_cutes(call):
    out = np.empty(1, np.uint64)
    call("descriptor_launch", Out(out))
    assert f"{out[0]:016x}" == LAYOUTS["tile_128b_f16"]["descriptor"]
    assert f"{out[0]:016x}" == LAYOUTS["tile_128b_tf32"]["descriptor"]


@pytest.mark.parametrize(
    ("extent", "size", "why"),
    [
        ((8, 12), (8, 8), "rows of 24 bytes"),
        ((8, 16), (8, 4), "a box of 8 bytes a row"),
        ((300, 16), (257, 16), "a box of 257 rows"),
        ((8, 80), (8, 72), "a box wider than the swizzle"),
    ],
)
def test_a_tensor_map_that_the_driver_refuses(emulate, extent, size, why):
    memory = np.zeros(extent, np.float16)
    refused = box(In(memory), extent, size, (0, 0), 128)
    with pytest.raises(EmulatorError, match="returned 1"):
        emulate(SOURCE).call("tma_load_launch", refused, Out(np.empty(size, np.float16)), None)


@pytest.mark.parametrize("registers", [0, 1])
@pytest.mark.parametrize("columns", [64, 128, 256])
@pytest.mark.parametrize("type", ["f16", "bf16", "tf32"])
def test_wgmma(call, rng, type, columns, registers):
    to_bits, from_bits = TYPES[type]
    depth = 32 if type == "tf32" else 64  # rows of 128 bytes
    step = depth // 4
    a = to_bits(rng.standard_normal((64, depth)))
    b = to_bits(rng.standard_normal((columns, depth)))
    c = rng.standard_normal((64, columns)).astype(np.float32)
    name = "wgmma_m64n64k8_tf32" if type == "tf32" else "wgmma_m64n64k16_f16"
    a_table = positions(name, "a_in_registers")
    fragments = np.stack([pack(a[:, i : i + step], a_table) for i in range(0, depth, step)])
    # d's layout goes on with its last index, groups of 8 columns: CuTe's for 64 says it all.
    d_table = np.hstack([positions(name, "d") + 64 * first for first in range(0, columns, 64)])
    assert (positions("wgmma_m64n128k16_bf16", "d")[:, : columns // 2] == d_table[:, :64]).all()
    for add in (0, 1):
        d = np.ascontiguousarray(c.T.ravel()[d_table])
        call(
            "wgmma_launch",
            *(INDEX[type], columns, registers),
            box(In(a), a.shape, a.shape, (0, 0), 128),
            box(In(b), b.shape, b.shape, (0, 0), 128),
            *(In(fragments), InOut(d), add),
        )
        product = from_bits(a).astype(np.float64) @ from_bits(b).astype(np.float64).T
        close(unpack(d, d_table, (64, columns)), product + add * c)
