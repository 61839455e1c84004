# SPDX-License-Identifier: BSD-3-Clause
from concurrent.futures import ThreadPoolExecutor

import pytest
from emulator.build import compile_kernel
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


@pytest.fixture(scope="session", autouse=True)
def _checked(request, _emulator):
    """source: its library in check mode, of the chosen tests, which takes longest to compile and is
    made while others run."""
    checks = [item for item in request.session.items if "check" in _mode_of(item)]
    checks = [item for item in checks if "emulate" in item.fixturenames]
    sources = {item.module.SOURCE for item in checks if hasattr(item.module, "SOURCE")}
    pool = ThreadPoolExecutor(1)
    yield {str(source): pool.submit(compile_kernel, source, "check") for source in sources}
    pool.shutdown(cancel_futures=True)


def _mode_of(item):
    return item.callspec.params.get("run", ()) if hasattr(item, "callspec") else ()


@pytest.fixture(scope="session")
def emulate(_checked):
    """emulate(source, mode="fast", defines=()) is a Kernel, compiled and started once a session.

    mode "gpu" is a GpuKernel, and skips the test where there is no GPU for it.
    """
    kernels = {}

    def kernel(source, mode="fast", defines=()):
        key = (str(source), mode, tuple(defines))
        if key not in kernels:
            if mode == "check" and str(source) in _checked and not defines:
                _checked[str(source)].result()
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
