# SPDX-License-Identifier: BSD-3-Clause
"""`pywino doctor` tells the truth, also where little works; `_native` remembers why not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pywino
from pywino import _native
from pywino.cli import doctor

PACKAGE = Path(pywino.__file__).resolve().parent
needs_native = pytest.mark.skipif(not _native.loaded, reason=f"no native library: {_native.reason}")


def run(*arguments, path=PACKAGE.parent, **environment):
    """The output of this Python in another process, which finds pywino in `path`."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=path,  # `python -m` looks here first
        env=os.environ | {"PYTHONPATH": str(path)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def line_of(report, name):
    (line,) = [line for line in report.splitlines() if line.startswith(f"  {name} ")]
    return line.removeprefix(f"  {name} ").strip()


@pytest.fixture
def copy(tmp_path):
    """A copy of the package that a test may break."""
    shutil.copytree(PACKAGE, tmp_path / "pywino", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_report_names_versions_and_the_copy_that_runs():
    report = doctor.report()
    assert report.startswith(f"pywino {pywino.__version__} in {PACKAGE} ")
    assert line_of(report, "torch").startswith(torch.__version__)
    for name in ("native library", "instruction sets", "backends", "threads", "environment"):
        assert f"\n\n{name}\n" in report


def test_module_and_command_print_the_same():
    report = run("-m", "pywino")
    assert report.startswith(f"pywino {pywino.__version__} in ")
    assert run("-m", "pywino", "doctor") == report


def test_help_needs_no_torch():
    script = (
        "import sys; sys.modules['torch'] = None; from pywino.cli import main; main(['--help'])"
    )
    assert "demo" in run("-c", script)


@pytest.mark.native
def test_works_without_torch():
    script = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['pywino'];"
        "runpy.run_module('pywino', run_name='__main__')"
    )
    report = run("-c", script)
    assert line_of(report, "torch").startswith("cannot be imported: ")
    assert "pip install torch" in line_of(report, "torch")
    reason = line_of(report, "not loaded")
    assert "torch cannot be imported" in reason
    assert "pip install torch" in reason


def test_without_torch_public_names_raise_its_own_error():
    script = """
import sys
sys.modules['torch'] = None
import pywino
try:
    pywino.conv2d
except ImportError as error:
    print(error)
"""
    assert "torch" in run("-c", script)


def test_pure_at_run_time():
    report = run("-m", "pywino", PYWINO_PURE="1")
    assert "PYWINO_PURE=1 is set" in line_of(report, "not loaded")
    assert line_of(report, "PYWINO_PURE") == "1"
    assert line_of(report, "cpu").startswith("no: the native library is not loaded")
    assert line_of(report, "aten") == "yes"


def test_a_checkout_without_a_build_says_what_to_type(copy):
    for built in [*copy.rglob("*.so"), *copy.rglob("_build.json")]:
        built.unlink()
    reason = line_of(run("-m", "pywino", path=copy), "not loaded")
    assert reason.startswith(f"it was never built in {copy}")
    assert "pip install --no-build-isolation ." in reason


def test_a_damaged_library_is_a_reason_and_no_crash(copy):
    (copy / "pywino" / "_build.json").unlink(missing_ok=True)
    (copy / "pywino" / "_C.so").unlink(missing_ok=True)
    (copy / "pywino" / "_C.so").write_text("not an ELF file")
    reason = line_of(run("-m", "pywino", path=copy), "not loaded")
    assert reason.startswith("it does not load: ")
    assert torch.__version__ in reason


def test_a_pure_build_is_believed_though_an_old_library_lies_there(copy):
    (copy / "pywino" / "_build.json").write_text('{"native": false, "reason": "nobody wanted it"}')
    assert line_of(run("-m", "pywino", path=copy), "not loaded") == "nobody wanted it"


def test_every_instruction_set_has_a_reason(monkeypatch):
    host = SimpleNamespace(
        built_isas=lambda: ["avx512", "avx2", "portable"],
        isas=lambda: ["avx2", "portable"],
        isa=lambda: "portable",
        build_info=lambda: {"compiler": "GNU 11.4.0", "build_type": "Release"},
    )
    monkeypatch.setattr(_native, "host", host)
    monkeypatch.setattr(_native, "loaded", True)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(doctor, "_cpu_features", lambda: {*doctor._V4} - {"avx512bw", "avx512vl"})
    assert dict(doctor._instruction_sets()) == {
        "amx": "not built: the compiler did not know it; a newer one does (GCC 12)",
        "avx512bf16": "not built: the compiler did not know it; a newer one does (GCC 12)",
        "avx512": "built, but this processor lacks avx512bw, avx512vl",
        "avx2": "runs here",
        "portable": "runs here, in force",
    }
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(host, "built_isas", lambda: ["portable"])
    monkeypatch.setattr(host, "isas", lambda: ["portable"])
    on_arm = dict(doctor._instruction_sets())
    assert on_arm["avx2"] == "not built: it is for x86-64 and this is aarch64"
    assert on_arm["neon"].startswith("not written yet")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A library with CUDA kernels on a machine that has a Hopper GPU; the fields of `host`."""
    host = SimpleNamespace(cuda_versions=lambda: (13000, 13000), why_no_wgmma=lambda: None)
    monkeypatch.setattr(_native, "host", host)
    monkeypatch.setattr(_native, "loaded", True)
    monkeypatch.setattr(_native, "build_record", lambda: {"cuda": "80-real;90a-real"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    _native._why_no_cuda_on.cache_clear()
    yield host
    _native._why_no_cuda_on.cache_clear()


def test_a_driver_that_is_too_old_is_named(on_a_gpu):
    assert _native.why_no_cuda() is None
    _native._why_no_cuda_on.cache_clear()
    on_a_gpu.cuda_versions = lambda: (12060, 13000)
    reason = _native.why_no_cuda()
    assert reason.startswith("the driver is for CUDA 12.6, the library has CUDA 13.0: update")


def test_each_device_has_its_reason(on_a_gpu, monkeypatch):
    assert _native.why_no_cuda() is None
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    reason = _native.why_no_cuda()
    assert reason.startswith("the kernels were built for 80-real;90a-real, the GPU is sm_75; type")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert _native.why_no_cuda() is None


def test_what_multiplies_is_named(on_a_gpu):
    reported = list(doctor._backends())
    assert ("", "its large fp16 products are by wgmma and TMA") in reported
    on_a_gpu.why_no_wgmma = lambda: "it is no Hopper"
    assert _native.kind_of_products() == "mma.sync: it is no Hopper"


@needs_native
def test_the_library_says_why_it_has_no_wgmma():
    if "cuda" not in _native.build_record():
        pytest.skip("the library has no CUDA kernels")
    driver, library = _native.host.cuda_versions()
    assert library >= 12000
    if not torch.cuda.is_available():
        assert driver >= 0
        assert _native.host.why_no_wgmma()


@needs_native
def test_report_marks_the_instruction_set_in_force():
    for name in _native.host.isas():
        with _native.force_isa(name):
            assert line_of(doctor.report(), name) == "runs here, in force"


@needs_native
def test_force_isa_ends_with_its_block():
    best, *_, worst = _native.host.isas() * 2
    with _native.force_isa(worst):
        with _native.force_isa(best):
            assert _native.host.isa() == best
        assert _native.host.isa() == worst
        with pytest.raises(ZeroDivisionError), _native.force_isa(best):
            raise ZeroDivisionError
        assert _native.host.isa() == worst
    assert _native.host.isa() == best


@needs_native
def test_force_isa_names_the_choices():
    with (
        pytest.raises(ValueError, match=r"\('.*portable'\), got 'sse9'"),
        _native.force_isa("sse9"),
    ):
        pass
    assert _native.host.isa() == _native.host.isas()[0]


def test_force_isa_without_the_library(monkeypatch):
    monkeypatch.setattr(_native, "host", None)
    monkeypatch.setattr(_native, "reason", "of a test")
    with pytest.raises(RuntimeError, match="not loaded: of a test"), _native.force_isa("avx2"):
        pass


def test_first_use_without_the_library_warns_once():
    script = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pywino
    assert not caught
    pywino.conv2d, pywino.winograd_relu_conv2d
(warning,) = caught
assert warning.filename == "<string>", warning.filename
print(warning.message)
"""
    assert "nothing gets faster: PYWINO_PURE=1 is set" in run("-c", script, PYWINO_PURE="1")


@needs_native
@pytest.mark.parametrize("tile", [2, 4, 6])
@pytest.mark.parametrize("dilation", [1, 2, 5])
def test_operation_count(tile, dilation):
    n, c, h, w, k = 2, 3, 13, 7, 5
    count = _native.host.operation_count(n, c, h, w, k, tile, dilation)
    patch = tile + 2
    # One tile for every tile x tile block of every interleaved grid, whole or not.
    corners = {(y % dilation, y // dilation // tile) for y in range(h)}
    tiles = n * len(corners) * len({(x % dilation, x // dilation // tile) for x in range(w)})
    assert count["tiles"] == tiles
    assert count["direct_multiplications"] == n * k * h * w * c * 9
    assert count["winograd_multiplications"] == tiles * patch * patch * k * c

    def additions(matrix):
        return int((matrix != 0).sum() - (matrix != 0).any(1).sum())

    bt, g, at = _native.host.transform_matrices(tile)
    assert count["input_additions"] == tiles * c * additions(bt) * 2 * patch
    assert count["filter_additions"] == k * c * additions(g) * (3 + patch)
    assert count["output_additions"] == tiles * k * additions(at) * (patch + tile)


@needs_native
def test_f2_counts_are_those_of_the_paper():
    """Lavin and Gray (2016), 4.1: 16 multiplications for 36, 32 operations for the transform of the
    data, 28 for the filter's, 24 for the inverse."""
    count = _native.host.operation_count(1, 1, 2, 2, 1, 2)
    assert count["direct_multiplications"] == 36
    assert count["winograd_multiplications"] == 16
    assert count["input_additions"] == 32
    assert count["filter_additions"] == 28
    assert count["output_additions"] == 24


@needs_native
@pytest.mark.parametrize(
    "arguments", [(1, 1, 1, 1, 1, 3), (1, 1, 1, 1, 1, 2, 0), (1, -1, 1, 1, 1, 2)]
)
def test_operation_count_refuses(arguments):
    with pytest.raises(ValueError, match=r"pywino._host.operation_count: (tile|sizes) must be"):
        _native.host.operation_count(*arguments)
