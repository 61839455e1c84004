# SPDX-License-Identifier: BSD-3-Clause
"""The Triton kernels of the room: their numbers, in Triton's interpreter or on a GPU, and what they
say without Triton. test_winograd_triton.py holds the machine code of all rooms."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=FOLDER.parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def test_without_triton_it_says_so():
    script = """
import sys
sys.modules["triton"] = None
from pywino.kernels import sparse_conv
print(sparse_conv.why_not())
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Triton is not installed (")
    assert "pip install triton" in done.stdout


@pytest.mark.slow
def test_numbers():
    pytest.importorskip("triton")
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    numbers = FOLDER / "sparse_conv_numbers.py"
    done = python("-m", "pytest", "-q", "-x", numbers, **interpreted)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
