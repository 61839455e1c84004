# SPDX-License-Identifier: BSD-3-Clause
import os

# Threads that wait sleep: on a machine that does something else too, spinning makes small calls a
# hundred times slower. Read when torch loads its OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from pywino import _native as native
from pywino import planner, testing

ISAS = native.host.isas() if native.loaded else [None]

needs_native = pytest.mark.skipif(
    not native.loaded, reason=f"needs the native library: {native.reason}"
)


def pytest_configure(config):
    config.addinivalue_line("markers", "native: needs the native library")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("native"):
            item.add_marker(needs_native)


@pytest.fixture(autouse=True)
def plans(monkeypatch, tmp_path):
    """No test reads or writes the user's plans, and none measures unless it asks to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYWINO_PLAN", "static")
    planner.reset()
    yield
    planner.reset()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def ieee():
    """On a GPU fp32 means fp32, in PyTorch's kernels and ours, unless a test says otherwise."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture(params=ISAS, ids=str)
def isa(request):
    """Runs a test under every instruction set that this machine has."""
    if request.param is None:
        pytest.skip(f"needs the native library: {native.reason}")
    with testing.force_isa(request.param):
        yield request.param
