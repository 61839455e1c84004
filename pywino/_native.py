# SPDX-License-Identifier: BSD-3-Clause
"""Loads the native library once, and remembers why not where it cannot.

``loaded``  True where the ops' native kernels are registered.
``reason``  None where they are, else why not and what to do, in one sentence.
``host``    the torch-free module ``pywino._host``, None where ``loaded`` is False.

Everything in pywino works without the library, on PyTorch's own kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
INSTALL = "pip install --no-build-isolation ."

loaded: bool = False
reason: str | None = None
host: ModuleType | None = None

_forced: str | None = None
_warned = False


def build_record() -> dict:
    """What setup.py wrote when it built this copy; {} for a checkout that nothing was built in."""
    try:
        return json.loads((PACKAGE / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Runs the CPU kernels of one instruction set inside the ``with`` block, in the whole process.

    For tests and benches. Filters that were packed outside the block belong to another set.

    Raises:
        RuntimeError: the native library is not loaded.
        ValueError: no such set, or it is not built, or this processor does not run it.
    """
    global _forced
    if host is None:
        raise RuntimeError(
            f"pywino.force_isa: {name!r} needs the native library, which is not loaded: {reason}"
        )
    before = _forced
    host.force_isa(name)
    _forced = name
    try:
        yield
    finally:
        host.force_isa(before)
        _forced = before


def why_no_cuda() -> str | None:
    """None where the CUDA kernels run on the current device, else why not and what to do."""
    if not loaded:
        return f"the native library is not loaded: {reason}"
    import torch

    return _why_no_cuda_on(torch.cuda.current_device() if torch.cuda.is_available() else None)


@functools.cache
def _why_no_cuda_on(index: int | None) -> str | None:
    record = build_record()
    if "cuda" not in record:
        why = record.get("no_cuda", "nvcc was not found when it was built")
        return f"the library has no CUDA kernels: {why}; install CUDA and type `{INSTALL}`"
    if index is None:
        return "torch sees no GPU"
    import torch

    driver, library = host.cuda_versions()
    if driver // 1000 < library // 1000:  # a library runs on every driver of its major version
        return (
            f"the driver is for CUDA {_release(driver)}, the library has CUDA {_release(library)}: "
            f"update the driver, or install that CUDA and type `{INSTALL}`"
        )
    device = torch.cuda.get_device_capability(index)
    if not any(_image_runs(name, device) for name in record["cuda"].split(";")):
        have = "{}.{}".format(*device)
        return (
            f"the kernels were built for {record['cuda']}, the GPU is sm_{have.replace('.', '')}; "
            f'type `TORCH_CUDA_ARCH_LIST="{have}" {INSTALL}`'
        )
    return None


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def kind_of_products() -> str:
    """What multiplies in large fp16 products of the CUDA kernels on the current device."""
    why = host.why_no_wgmma()
    return "wgmma and TMA" if why is None else f"mma.sync: {why}"


@contextlib.contextmanager
def without_wgmma() -> Iterator[None]:
    """Inside the ``with`` block all products are mma.sync's, in the whole process: for tests and
    benches."""
    host.allow_wgmma(False)
    try:
        yield
    finally:
        host.allow_wgmma(True)


def _image_runs(name: str, device: tuple[int, int]) -> bool:
    """Whether code for an architecture in CMake's words, "90a-real" or "120", runs on a device:
    machine code within its major version ("a": on it alone), PTX on every later one."""
    arch, _, kind = name.partition("-")
    number = int(arch.rstrip("af"))
    built = divmod(number, 10)
    if arch.endswith("a"):
        return built == device
    return (built[0] == device[0] and built <= device) or (not kind and built <= device)


def warn_once() -> None:
    """Warns, once in a process, where the library is not loaded: called when a public name of
    pywino is first used."""
    global _warned
    if not loaded and not _warned:
        _warned = True
        warnings.warn(
            f"pywino runs on PyTorch's own kernels, so nothing gets faster: {reason}",
            RuntimeWarning,
            stacklevel=3,
        )


def _load() -> str | None:
    """Loads both parts of the library; returns why not."""
    global host
    if os.environ.get("PYWINO_PURE", "0") not in ("", "0"):
        return "PYWINO_PURE=1 is set in the environment; unset it"
    record = build_record()
    if record.get("native") is False:
        return record["reason"]
    library = PACKAGE / "_C.so"
    if not library.exists():
        return (
            f"it was never built in {PACKAGE}; type `{INSTALL}` in pywino's source folder"
            " (`-e .` to work on it)"
        )
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch cannot be imported ({error}); type `pip install torch`"
    try:
        module = importlib.import_module("pywino._host")
        torch.ops.load_library(library)
    except (ImportError, OSError) as error:
        built = record.get("torch", "an unknown version")
        return (
            f"it does not load: {error}; it was built against torch {built}, this is torch "
            f"{torch.__version__}; type `{INSTALL}` in pywino's source folder"
        )
    host = module
    return None


reason = _load()
loaded = reason is None
