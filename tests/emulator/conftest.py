# SPDX-License-Identifier: BSD-3-Clause
import pytest
from emulator.gpu import GpuKernel
from emulator.harness import SCHEDULES, Kernel, missing

# Every way to run a kernel that a test should try. Check mode needs one order of threads only: it
# finds races from the order that the kernel asks for, not from the one that came about.
RUNS = [("fast", schedule) for schedule in SCHEDULES] + [("check", "ascending")]
# And on hardware, with the same inputs: pytest -m gpu tests/emulator
GPU = pytest.param(("gpu", "any"), marks=pytest.mark.gpu, id="gpu")


@pytest.fixture(scope="session", autouse=True)
def _emulator():
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def emulate():
    """emulate(source, mode="fast", defines=()) is a Kernel, compiled and started once a session.

    mode "gpu" is a GpuKernel, and skips the test where there is no GPU for it.
    """
    kernels = {}

    def kernel(source, mode="fast", defines=()):
        key = (str(source), mode, tuple(defines))
        if key not in kernels:
            kernels[key] = (
                GpuKernel(source) if mode == "gpu" else Kernel(source, mode, defines=defines)
            )
        return kernels[key]

    yield kernel
    for started in kernels.values():
        started.close()


@pytest.fixture(params=[*(pytest.param(run, id="-".join(run)) for run in RUNS), GPU])
def run(request):
    """(mode, schedule): a test with this fixture runs in each of them."""
    return request.param
