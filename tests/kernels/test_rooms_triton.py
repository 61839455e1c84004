# SPDX-License-Identifier: BSD-3-Clause
"""The Triton kernels of each room: their numbers, in Triton's interpreter or on a GPU, and what
they say without Triton. test_winograd_triton.py has more of the winograd room, and the machine code
of all rooms."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
ROOMS = sorted(path.name.removesuffix("_numbers.py") for path in FOLDER.glob("*_numbers.py"))


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=FOLDER.parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def test_without_triton_they_say_so():
    script = f"""
import sys
sys.modules["triton"] = None
from pywino.kernels import launch, {", ".join(ROOMS)}
print(launch.why_not())
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Triton is not installed (")
    assert "pip install triton" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("room", [room for room in ROOMS if room != "winograd"])
def test_numbers(room):
    pytest.importorskip("triton")
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = python("-m", "pytest", "-q", "-x", FOLDER / f"{room}_numbers.py", **interpreted)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
