# SPDX-License-Identifier: BSD-3-Clause
"""The torch ops of the CUDA kernels on CPU tensors: the same binding, over emulated kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulator.build import CACHE, CSRC, HERE, compile_kernel, contents, digest, make

BINDINGS = sorted(CSRC.glob("torch/*_cuda.cpp"))


@pytest.fixture(scope="module")
def library():
    """The bindings with their ops on the CPU key, over the emulator's kernels."""
    kernels = compile_kernel(HERE / "kernels" / "rooms.cu")
    root = Path(torch.__file__).parent
    flags = [
        *("-std=c++20", "-O1", "-fPIC", "-shared", "-DPYWINO_CUDA_KEY=CPU"),
        *("-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
        *("-isystem", root / "include", "-I", CSRC),
    ]
    headers = [*CSRC.glob("torch/*.h"), *CSRC.rglob("core/**/*.h")]
    key = digest(torch.__version__, flags, kernels.name, *contents([*BINDINGS, *headers]))
    name = f"binding-{key}.so"
    libraries = [root / "lib" / f"lib{lib}.so" for lib in ("torch_cpu", "c10")]
    build = ["g++", *flags, *BINDINGS, kernels, *libraries, f"-Wl,-rpath,{CACHE}"]
    return make(CACHE / name, [*build, "-o", f"{{}}/{name}"])


def test_ops_on_emulated_kernels(library):
    """In a process of its own, which must not have the real kernels under the same names."""
    checks = HERE / "binding_checks.py"
    done = subprocess.run(
        [sys.executable, checks, library],
        env={**os.environ, "PYWINO_PURE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all checks passed" in done.stdout
