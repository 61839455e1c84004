# SPDX-License-Identifier: BSD-3-Clause
"""``pywino doctor``: what runs on this machine, and why the rest does not.

It must work where torch or the native library does not, so each is asked for where it is shown.
"""

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pywino
from pywino import _native

# What a processor must have for each instruction set, by the names of /proc/cpuinfo.
_V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_NEEDS = {
    "amx": (*_V4, "avx512_bf16", "amx_tile", "amx_bf16"),
    "avx512bf16": (*_V4, "avx512_bf16"),
    "avx512": _V4,
    "avx2": _V3,
    "portable": (),
}


def report() -> str:
    """The whole report, as text of several lines."""
    sections = {
        "versions": _versions,
        "native library": _library,
        "instruction sets": _instruction_sets,
        "backends": _backends,
        "threads": _threads,
        "environment": _environment,
    }
    lines = [f"pywino {pywino.__version__} in {_native.PACKAGE} ({_kind_of_copy()})"]
    for title, section in sections.items():
        lines += ["", title]
        lines += [f"  {name:<14} {text}" for name, text in section()]
    return "\n".join(lines)


def _kind_of_copy() -> str:
    folder = _native.PACKAGE.parent
    if folder.name in ("site-packages", "dist-packages"):
        return "installed"
    if (folder / "setup.py").exists():
        how = "in place" if _native.build_record() else "and nothing built in it"
        return f"a source checkout, {how}"
    return "a copy"


def _versions() -> Iterator[tuple[str, str]]:
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    for name in ("torch", "numpy", "safetensors", "rich", "click"):
        yield name, _version(name)


def _version(name: str) -> str:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken package may raise anything; this is where one learns it
        return f"cannot be imported: {_one_line(error)}; type `pip install {name}`"
    if name == "torch":
        cuda = f"CUDA {module.version.cuda}" if module.version.cuda else "built without CUDA"
        return f"{module.__version__} ({cuda})"
    return importlib.metadata.version(name)


def _library() -> Iterator[tuple[str, str]]:
    if not _native.loaded:
        yield "not loaded", f"{_native.reason}"
        yield "", "every call goes to PyTorch's own kernels: right, but nothing gets faster"
        return
    info = _native.host.build_info()
    built_for = _native.build_record().get("torch", "an unknown torch")
    yield "loaded", f"built by {info['compiler']} ({info['build_type']}) against torch {built_for}"
    if architectures := _native.build_record().get("cuda"):
        yield "CUDA kernels", f"for {architectures}"


def _instruction_sets() -> Iterator[tuple[str, str]]:
    if not _native.loaded:
        yield "unknown", "they are in the native library"
        return
    host = _native.host
    built, runs, in_force = host.built_isas(), host.isas(), host.isa()
    for name in _NEEDS:
        if name in built and name in runs:
            yield name, "runs here" + (", in force" if name == in_force else "")
        elif name in built:
            yield name, f"built, but {_missing_features(name)}"
        elif platform.machine() not in ("x86_64", "AMD64"):
            yield name, f"not built: it is for x86-64 and this is {platform.machine()}"
        else:
            yield name, "not built: the compiler did not know it; a newer one does (GCC 12)"
    if platform.machine() in ("aarch64", "arm64"):
        yield "neon", "not written yet: backend='auto' uses PyTorch's kernels on ARM"


def _missing_features(name: str) -> str:
    have = _cpu_features()
    missing = [feature for feature in _NEEDS[name] if feature not in have]
    if have and missing:
        return f"this processor lacks {', '.join(missing)}"
    return "this processor or its operating system does not run it"


def _cpu_features() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _backends() -> Iterator[tuple[str, str]]:
    try:
        from pywino import backends
    except Exception as error:
        yield "unknown", f"pywino.backends cannot be imported: {_one_line(error)}"
        return
    # One ordinary call stands for all: pywino.explain() shows the reasons of a layer.
    call = backends.Call(
        "winograd_conv2d", n=1, c=64, h=56, w=56, k=64, padding=(1, 1), dilation=(1, 1)
    )
    for name in backends.BACKENDS:
        device = "cuda" if name in backends.of_device("cuda") else "cpu"
        reason = backends.can_run(name, call._replace(device=device))
        yield name, "yes" if reason is None else f"no: {reason}"
        if name == "cuda" and reason is None:
            yield "", f"its large fp16 products are by {_native.kind_of_products()}"


def _threads() -> Iterator[tuple[str, str]]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "processors", f"{os.cpu_count()}, of which this process may use {usable}"
    if (torch := sys.modules.get("torch")) is not None:
        yield "of torch", f"{torch.get_num_threads()} (torch.set_num_threads changes it)"


def _environment() -> Iterator[tuple[str, str]]:
    names = [name for name in sorted(os.environ) if name.startswith("PYWINO_")]
    names += [name for name in ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA") if name in os.environ]
    for name in names:
        yield name, os.environ[name]
    if not names:
        yield "", "no PYWINO_* variable is set"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
