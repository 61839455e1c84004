# SPDX-License-Identifier: BSD-3-Clause
"""Compiles .cu files for the emulator, with g++, into build/emulator: once for the same sources."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulator"

# -fno-gnu-unique: `static thread_local` of a template must lie in this module, whatever others are
# loaded. -fno-optimize-sibling-calls: return addresses say where in the kernel a finding is.
COMMON_FLAGS = [
    *("-std=c++20", "-g", "-fPIC", "-fno-gnu-unique", "-fno-strict-aliasing"),
    *("-fno-optimize-sibling-calls", "-Wno-psabi"),
]
RUNTIME_FLAGS = ["-O3", "-march=native"]
# No -march: a * b + c is rounded twice here, as C++ has it. nvcc makes it one FMA.
KERNEL_FLAGS = {
    "fast": ["-O2"],  # with -O1 wrappers are not inlined, and the lines of collectives not found
    # The compiler calls __tsan_* before each access (shadow.cpp), and __ubsan_* where an index is
    # outside of its array, a shift is too long or an int overflows (report.cpp).
    "check": [
        *("-O2", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"),
        "-fsanitize=bounds-strict,shift,signed-integer-overflow,integer-divide-by-zero",
    ],
}
MODES = tuple(KERNEL_FLAGS)


def missing():
    """Why no kernel can be compiled here, or None."""
    if not shutil.which("g++"):
        return "the emulator needs g++"
    if os.uname().machine != "x86_64":
        return "the emulator's fibers are written for x86-64"
    if not cuda_include():
        return "the emulator needs NVIDIA's headers: a CUDA toolkit with nvcc on the PATH"
    return None


@functools.cache
def cuda_include():
    """The folder of cuda_runtime.h, or None."""
    candidates = [Path(os.environ["CUDA_HOME"]) / "include"] if "CUDA_HOME" in os.environ else []
    if nvcc := shutil.which("nvcc"):
        dry_run = [nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"]
        told = subprocess.run(dry_run, capture_output=True, text=True).stderr
        candidates += [Path(folder) for folder in re.findall(r'"-I(\S+?)"', told)]
    candidates += sorted(Path("/usr/local").glob("cuda*/include"))
    return next((p.resolve() for p in candidates if (p / "cuda_runtime.h").exists()), None)


def is_for_sm90a(source):
    """Whether a .cu file is made of wgmma, and so compiled for sm_90a alone."""
    return source.stem.endswith("_sm90") or "wgmma.cuh" in source.read_text()


def digest(*parts):
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, bytes) else str(part).encode())
        h.update(b"\0")
    return h.hexdigest()[:20]


def contents(paths):
    return [part for path in sorted(paths) for part in (path.name, path.read_bytes())]


@functools.cache
def compiler():
    def told(*options):
        return subprocess.run(["g++", *options], capture_output=True, text=True).stdout

    return digest(told("--version"), told("-march=native", "-Q", "--help=target"), cuda_include())


def make(target, command):
    """Runs a command, in which {} is a folder for what it makes; `target` is kept of that. Of
    processes that want the same target one makes it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"), tempfile.TemporaryDirectory(dir=CACHE) as folder:
        if target.exists():
            return target
        command = [str(part).replace("{}", folder) for part in command]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        (Path(folder) / target.name).replace(target)
    return target


@functools.cache
def runtime():
    """The emulator's own object files, which every kernel's library is linked with."""
    flags = [*COMMON_FLAGS, *RUNTIME_FLAGS, "-Wall", "-Wextra", "-isystem", cuda_include()]
    headers = contents(HERE.glob("*.h"))
    objects = []
    for source in sorted(HERE.glob("*.cpp")):
        name = f"{source.stem}-{digest(compiler(), flags, *headers, source.read_bytes())}.o"
        objects.append(make(CACHE / name, ["g++", *flags, "-c", source, "-o", f"{{}}/{name}"]))
    return objects


def changed_copy(source, changed, folder):
    """(csrc, source) in a copy of both trees, where the files in `changed` have other texts."""
    csrc = Path(shutil.copytree(CSRC, folder / "csrc"))
    if source.is_relative_to(CSRC):
        copies = {CSRC: csrc}
    else:
        copies = {CSRC: csrc, source.parent: Path(shutil.copytree(source.parent, folder / "own"))}

    def copy_of(path):
        root = next(root for root in copies if path.is_relative_to(root))
        return copies[root] / path.relative_to(root)

    for path, text in changed.items():
        copy_of(path).write_text(text)
    return csrc, copy_of(source)


def compile_kernel(source, mode="fast", defines=(), changed=None, others=(), quickly=False):
    """The library of a .cu file. `changed` maps files to texts that take the place of theirs in it;
    `others` are linked with it as they stand. `quickly` leaves optimizing and line numbers out."""
    if reason := missing():
        raise RuntimeError(reason)
    flags = [*COMMON_FLAGS, *KERNEL_FLAGS[mode], *(f"-D{define}" for define in defines)]
    flags += ["-O0", "-g0"] if quickly else []
    kernels = [compile_object(ROOT / source, mode, flags, changed)]
    kernels += [compile_object(ROOT / other, mode, flags) for other in others]
    objects = [*kernels, *runtime()]
    library = f"{kernels[0].stem}-{digest(*(path.name for path in objects))}.so"
    link_it = ["g++", "-shared", "-Wl,-Bsymbolic", *objects, "-ldl", "-o", f"{{}}/{library}"]
    return make(CACHE / library, link_it)


def compile_object(source, mode, flags, changed=None):
    source = source.resolve()
    folders = {*CSRC.rglob("*"), *source.parent.iterdir(), *HERE.iterdir()}
    # Kernels are included, too, and the host code that runs them in order.
    headers = contents(
        path for path in folders if path.suffix in (".h", ".cuh", ".cu") or path.name == "cuda.cpp"
    )
    changes = sorted((changed or {}).items())
    key = digest(compiler(), flags, source, source.read_bytes(), *headers, changes)
    name = f"{source.stem}-{mode}-{key}"
    with tempfile.TemporaryDirectory() as folder:
        csrc, file = changed_copy(source, changed, Path(folder)) if changed else (CSRC, source)
        return make(
            CACHE / f"{name}.o",
            [
                *("g++", "-x", "c++", *flags, "-Wno-unknown-pragmas", "-Wno-attributes"),
                *("-include", HERE / "emulator.h", "-I", csrc, "-I", csrc / "core"),
                *("-isystem", cuda_include(), "-c", file, "-o", f"{{}}/{name}.o"),
            ],
        )
