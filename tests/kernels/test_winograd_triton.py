# SPDX-License-Identifier: BSD-3-Clause
"""The Triton Winograd kernels: their numbers, their machine code, their ops and their errors, all
without a GPU. Under the interpreter an operand's precision is what it is in memory: that "f32"
multiplies in three TF32 products is read from the machine code, its error only a GPU can show."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from pywino.kernels import winograd

FOLDER = Path(__file__).parent
ops = torch.ops.pywino


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=FOLDER.parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


# --- without Triton ---


def test_without_triton_it_says_so():
    script = """
import sys
sys.modules["triton"] = None
import torch
from pywino.kernels import winograd
assert "pip install triton" in winograd.why_not()
assert not hasattr(torch.ops.pywino, "_winograd_triton_forward")
try:
    winograd.transform_filter(torch.ones(1, 1, 3, 3), 4, "f16")
except RuntimeError as error:
    print(error)
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pywino::_winograd_triton_filter: Triton is not installed (")


triton = pytest.importorskip("triton")
GPUTarget = importlib.import_module("triton.backends.compiler").GPUTarget
resources = importlib.import_module("triton_resources")  # it needs Triton, too

TABLE = json.loads(resources.TABLE.read_text(encoding="utf-8"))


# --- numbers ---


@pytest.mark.slow
def test_numbers():
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = python("-m", "pytest", "-q", "-x", FOLDER / "winograd_numbers.py", **interpreted)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


# --- machine code ---


def rows():
    for name, table in TABLE.items():
        if name.startswith("sm_"):
            for launch, row in table.items():
                yield pytest.param(name, launch, row, id=f"{name} {launch}")


def spills_of(launch):
    """None; 16 bytes in the input transform of F6: 64 values, and nobody's default."""
    return 16 if "to_domain x=0 tile=6" in launch else 0


@pytest.mark.parametrize(("architecture", "launch", "row"), list(rows()))
def test_the_table_fits_every_gpu(architecture, launch, row):
    assert row["stack"] <= spills_of(launch), "registers are spilled"
    assert row["registers"] * row["threads"] <= 65536
    assert row["shared"] <= 99 << 10  # what one block has on sm_86, 89 and 120
    if "products" in launch or "convolve" in launch:
        assert any(row.get(name) for name in resources.MATRIX_INSTRUCTIONS)
        assert row["LDGSTS"] > 0, "operands are not copied in the background"


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_the_table_has_what_can_be_launched(architecture):
    assert list(TABLE[f"sm_{architecture}"]) == list(resources.launches(architecture))


def compiled():
    """A launch of each kind for sm_90; with PYWINO_ALL_CONFIGURATIONS=1 the whole table."""
    everything = os.environ.get("PYWINO_ALL_CONFIGURATIONS") == "1"
    for architecture in resources.ARCHITECTURES if everything else (90,):
        kinds = set()
        for name, launch in resources.launches(architecture).items():
            kind = launch[0].__name__, "tf32x3" in name
            if everything or kind not in kinds:
                kinds.add(kind)
                yield pytest.param(architecture, name, launch, id=f"sm_{architecture} {name}")


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "name", "launch"), list(compiled()))
def test_compiles_to_what_the_table_says(architecture, name, launch):
    row = resources.resources(launch, architecture)
    if triton.__version__ == TABLE["triton"]:
        assert row == TABLE[f"sm_{architecture}"][name]
    assert row["stack"] <= spills_of(name)


def test_configurations_are_all_that_the_rules_choose():
    products, summed = winograd.configurations()
    for channels in (1, 16, 32, 33, 64, 96, 128, 192, 512, 1000):
        for others in (3, 64, 160, 256):
            k, c = winograd.padded(channels), winograd.padded(others)
            assert k % 32 == c % 32 == 0
            for domain in winograd.DOMAINS:
                block = winograd.summed_product(k, c, domain)
                assert k % block.k == c % block.c == winograd.ROWS % block.tiles == 0
                assert (domain, block) in summed
                for tiles in (1, 64, 65, 10**6):
                    block = winograd.product(tiles, k, c, domain)
                    assert k % block.k == c % block.c == winograd.ROWS % block.tiles == 0
                    assert (domain, block) in products


# --- the ops ---


@pytest.mark.parametrize("last", [False, True])
def test_fakes_have_the_true_shapes_and_strides(last):
    layout = torch.channels_last if last else torch.contiguous_format
    with FakeTensorMode():
        x = torch.empty(2, 5, 9, 11, device="cuda", dtype=torch.bfloat16, memory_format=layout)
        w = torch.empty(70, 5, 3, 3, device="cuda", dtype=torch.bfloat16)
        u, scale = ops._winograd_triton_filter(w, 4, "f16")
        assert (u.shape, u.dtype, scale.shape) == ((36, 128, 32), torch.float16, (128,))
        geometry = (4, [1, 0], [1, 2])
        y = ops._winograd_triton_forward(x, u, scale, None, None, 70, *geometry, True, False, "f16")
        expected = torch.empty(2, 70, 9, 7, memory_format=layout)
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), x.dtype)
        dw = ops._winograd_triton_weight_gradient(y, x, *geometry, False, "f16")
        assert (dw.shape, dw.stride()) == (w.shape, w.stride())
        turned = ops._winograd_triton_filter(w.new_empty(70, 5, 6, 6), 4, "f16", True, False)
        dx = ops._winograd_triton_relu_input_gradient(y, x, *turned, *geometry, "f16")
        assert (dx.shape, dx.stride()) == (x.shape, x.stride())


def test_compilers_see_what_each_kernel_reads_and_writes(monkeypatch):
    """torch.compile reads it from Triton's code; where it cannot, it copies every argument."""
    wrap = torch._higher_order_ops.triton_kernel_wrap
    if not hasattr(wrap, "identify_accessed_tensors"):
        pytest.skip("this torch has no identify_accessed_tensors")

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    written = {}
    for kernel, arguments, constants, _, _ in resources.launches().values():
        if kernel.__name__ not in written:
            named = dict(zip(kernel.arg_names, arguments)) | constants
            accesses = wrap.identify_accessed_tensors(kernel, named, {}).read_writes
            written[kernel.__name__] = {access.name for access in accesses.writes}
    assert written == {
        "_transform_filter": {"u", "scale"},
        "_to_domain": {"v", "scale"},
        "_products": {"m"},
        "_from_domain": {"output"},
        "_summed_products": {"s"},
        "_from_filter_domain": {"gradient"},
        "_masked_patches": {"patches"},
        "_overlap_add": {"output"},
        "_whole": {"output", "mean", "gate"},
        "_whole_gradient": {"input_gradient", "logit_gradient"},
        "_sums": {"partial"},
        "_gate": {"mean", "gate"},
        "_gate_gradient": {"logit_gradient", "shift"},
        "_apply": {"output"},
        "_apply_gradient": {"input_gradient"},
        "_cell": {"hidden", "next_cell"},
        "_cell_gradient": {"grad_gates", "grad_cell"},
        "_count": {"counts"},
        "_list": {"list", "mask"},  # torch takes no chances with what is behind a scan
        "_convolve": {"output"},
        "_convolve_pixels": {"output"},
        "_convolve_blocks": {"output"},
    }


# --- errors ---


def fakes(*shapes):
    return [torch.empty(shape, device="cuda") for shape in shapes]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": 3}, "tile must be 2, 4 or 6, got 3"),
        ({"domain": "bf16"}, 'domain must be "f16" or "f32", got \'bf16\''),
        ({"dilation": (5, 1)}, "must fit into the padded input, got an output of -2 x 6; add pad"),
        ({"padding": (-1, 0)}, r"padding must be >= 0 and dilation >= 1, got \(-1, 0\)"),
        ({"tile": 4}, "filter must be transformed for tile 4, domain 'f32' and 3 to 4 channels"),
        ({"out_channels": 40}, r"so \(16, 64, 32\) of torch.float32, got \(16, 32, 32\)"),
        ({"workspace_limit": 1000}, "workspace_limit must be at least 524800 bytes, for 128 tiles"),
    ],
)
def test_what_cannot_run_says_why(change, message):
    with FakeTensorMode():
        x, u, scale = fakes((1, 3, 6, 6), (16, 32, 32), (32,))
        arguments = {
            **{"out_channels": 4, "tile": 2, "padding": (1, 1), "dilation": (1, 1)},
            **{"relu": False, "winograd_relu": False, "domain": "f32"},
        }
        with pytest.raises(RuntimeError, match=f"pywino::_winograd_triton_forward: .*{message}"):
            winograd.forward(x, u, scale, None, None, **(arguments | change))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            lambda: torch.ones(4, 3, 3, 3),
            'weight must be on a CUDA device, got cpu; take backend="',
        ),
        (lambda: torch.ones(4, 3, 3, 3, dtype=torch.float64), "got cpu"),
    ],
)
def test_tensors_that_are_not_on_a_gpu(argument, message):
    with pytest.raises(RuntimeError, match=f"pywino::_winograd_triton_filter: .*{message}"):
        ops._winograd_triton_filter(argument(), 2, "f32")


def test_tensors_that_do_not_fit():
    with FakeTensorMode():
        x, grad, w, w64 = fakes((1, 3, 6, 6), (1, 4, 5, 6), (4, 3, 5, 5), (4, 3, 3, 3))
        bias, *_ = fakes((3,))
        with pytest.raises(
            RuntimeError, match=r"weight must be \(K, C, 3, 3\), got \(4, 3, 5, 5\)"
        ):
            winograd.transform_filter(w, 2, "f32")
        with pytest.raises(RuntimeError, match=r"weight must be float32, .*, got float64; convert"):
            winograd.transform_filter(w64.double(), 2, "f32")
        with pytest.raises(
            RuntimeError, match=r"the output's size \(1, 4, 6, 6\) and input's dtyp"
        ):
            winograd.weight_gradient(grad, x, 2, (1, 1), (1, 1), False, "f32")
        u, scale = winograd.transform_filter(w64, 2, "f32")
        arguments = (4, 2, (1, 1), (1, 1), False, False, "f32")
        with pytest.raises(RuntimeError, match=r"bias must be 4 numbers, got \(3,\)"):
            winograd.forward(x, u, scale, bias, None, *arguments)
        with pytest.raises(RuntimeError, match=r"residual must have the output's size \(1, 4, 6, "):
            winograd.forward(x, u, scale, None, grad, *arguments)
