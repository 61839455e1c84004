# SPDX-License-Identifier: BSD-3-Clause
"""The machine code of every CUDA kernel against resources.json, so that a change to it shows."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from emulator import resources
from emulator.build import ROOT

pytestmark = pytest.mark.skipif(bool(resources.missing()), reason=resources.missing() or "")

COMMITTED = json.loads(resources.TABLE.read_text())
CASES = [(s, a) for s in resources.sources() for a in resources.architectures(s)]


@pytest.fixture(scope="module", autouse=True)
def _compiled(request):
    """What the chosen tests look at, made on all cores; their errors are raised there."""
    tests = [item for item in request.session.items if item.fspath == request.fspath]
    cases = [item.callspec.params.values() for item in tests if hasattr(item, "callspec")]
    with ThreadPoolExecutor() as pool:
        for case in cases:
            pool.submit(resources.cubin, *case)


@pytest.mark.parametrize(
    ("source", "architecture"), CASES, ids=[f"{source.stem}-{a}" for source, a in CASES]
)
def test_kernels_are_within_limits_and_as_committed(source, architecture):
    rows = resources.kernels(resources.cubin(source, architecture))
    assert rows, "no kernel in the file"
    for name, row in rows.items():
        # Spills, and arrays that the compiler could not keep in registers.
        assert row["local"] == 0, f"{name} uses local memory"
        assert row["registers"] * row["threads"] <= resources.REGISTERS, name
    if resources.nvcc_release() != COMMITTED["nvcc"]:
        pytest.skip(f"the table is nvcc {COMMITTED['nvcc']}'s, not {resources.nvcc_release()}'s")
    committed = COMMITTED["kernels"][str(source.relative_to(ROOT))][f"sm_{architecture}"]
    assert rows == committed, "python -m emulator.resources --update, and look at the difference"


def test_the_table_has_no_other_files():
    names = {str(source.relative_to(ROOT)) for source in resources.sources()}
    assert set(COMMITTED["kernels"]) == names


def test_local_memory_is_seen(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void k(int* p) {\n"
        "  int a[64];\n"
        "  for (int i = 0; i < 64; ++i) a[p[i] % 64] = i;\n"
        "  for (int i = 0; i < 64; ++i) p[i] = a[i];\n"
        "}\n"
    )
    assert resources.kernels(resources.cubin(source, "80"))["k"]["local"] > 0


def test_matrix_instructions_are_counted():
    kernels = resources.HERE / "kernels"
    (mma,) = resources.kernels(resources.cubin(kernels / "gemm_mma.cu", "80")).values()
    # 2 x 4 tiles, 2 steps of k; 2 + 2 ldmatrix in each; the copies stand in two places.
    assert (mma["HMMA"], mma["LDSM"]) == (16, 8)
    assert mma["LDGSTS"] > 0
    (wgmma,) = resources.kernels(resources.cubin(kernels / "gemm_wgmma.cu", "90a")).values()
    assert (wgmma["HGMMA"], wgmma["UTMALDG"], wgmma["threads"]) == (4, 2, 384)
