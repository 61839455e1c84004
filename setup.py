# SPDX-License-Identifier: BSD-3-Clause
"""Builds pywino. The metadata is in pyproject.toml, the native sources and flags in CMakeLists.txt.

    pip install --no-build-isolation .       with the native library: torch must be installed first
    PYWINO_PURE=1 pip install .              pure Python: everything works, on PyTorch's own kernels

Environment: PYWINO_PURE=1, CXX (the compiler), MAX_JOBS (compiler processes at a time),
PYWINO_CUDA=auto|0|1 (auto: the CUDA kernels are built where nvcc is found; 1: it must be there),
TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX"; default: every architecture that the kernels run on).
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
INSTALL = "pip install --no-build-isolation ."
OLDEST_TORCH = (2, 11)


def find_tool(name: str) -> str | None:
    """The tool that pip put beside this Python, else the one on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return shutil.which(name, path=path)


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else the one on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    inside = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    return inside or find_tool("nvcc")


def why_no_cuda() -> str | None:
    """The reason to build no CUDA kernels; None builds them."""
    wish = os.environ.get("PYWINO_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SetupError(f"PYWINO_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return "it was built with PYWINO_CUDA=0"
    if find_nvcc() is None:
        if wish == "1":
            raise SetupError("PYWINO_CUDA=1 needs nvcc on PATH or in CUDA_HOME; none was found")
        return "nvcc was not found when it was built"
    return None


def cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX") in CMake's words ("80-real;90a"); without it every
    architecture from sm_80 on, and PTX of the last for those to come."""
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0 8.6 8.9 9.0a 10.0 12.0+PTX")
    found = []
    for name in names.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if match is None:
            raise SetupError(
                f'TORCH_CUDA_ARCH_LIST must be like "8.0;9.0a+PTX", got {name!r} in {names!r}'
            )
        if int(match[1]) >= 8:
            found.append(match[1] + match[2] + ("" if match[3] else "-real"))
    if not found:
        raise SetupError(f"the CUDA kernels need sm_80 or later; TORCH_CUDA_ARCH_LIST is {names!r}")
    return ";".join(found)


def why_pure() -> str | None:
    """The reason to build no native library, with what to do about it; None builds it."""
    if os.environ.get("PYWINO_PURE", "0") not in ("", "0"):
        return f"it was built with PYWINO_PURE=1; unset it and type `{INSTALL}`"
    if os.name != "posix":
        return "the native library is built on Linux only; on Windows use WSL"
    compilers = [os.environ["CXX"].split()[0]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    if not any(find_tool(name) for name in compilers):
        return (
            f"no C++ compiler was found ({', '.join(compilers)}); "
            f"install one (Debian: `apt-get install g++`) and type `{INSTALL}`"
        )
    missing = [name for name in ("cmake", "ninja") if not find_tool(name)]
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    if missing:
        names = " ".join(missing)
        return f"not found: {names}; type `pip install {names}`, then `{INSTALL}`"
    return None


PURE = why_pure()


def write_record(folder: Path, reason: str | None, **facts: str) -> None:
    """Leaves beside the package what was built, or why nothing was: pywino/_native.py reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"native": reason is None, "reason": reason, **facts}
    (folder / "_build.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


class BuildPython(build_py):
    def run(self) -> None:
        if not self.editable_mode:  # what an earlier build left there must not enter this wheel
            shutil.rmtree(Path(self.build_lib) / "pywino", ignore_errors=True)
        super().run()
        if PURE:
            package = ROOT if self.editable_mode else Path(self.build_lib)
            write_record(package / "pywino", PURE)
            print(
                f"\n{'!' * 100}\n"
                f"!! pywino is built WITHOUT its native library: {PURE}.\n"
                "!! Everything works, but on PyTorch's own kernels: nothing will be faster.\n"
                f"{'!' * 100}\n",
                file=sys.stderr,
                flush=True,
            )


class Metadata(dist_info):
    def run(self) -> None:
        if not PURE:
            find_torch()  # stops pip here, before it downloads a torch that would not be used
        super().run()


class BuildNative(build_ext):
    """One CMake run makes libpywino_core.so, _C.so and _host.<abi>.so in the package's folder."""

    def run(self) -> None:
        # build_py runs first, except in `setup.py build_ext --inplace`.
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "pywino"
        torch, torch_version = find_torch()
        import pybind11

        build = ROOT / "build" / sys.implementation.cache_tag  # kept: a second build is quick
        ninja = find_tool("ninja")
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "PYWINO_TORCH_INCLUDE": f"{torch}/include;{torch}/include/torch/csrc/api/include",
            "PYWINO_TORCH_LIB": f"{torch}/lib",
            "PYWINO_PYTHON_INCLUDE": f"{sysconfig.get_path('include')};{pybind11.get_include()}",
            "PYWINO_PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        }
        no_cuda = why_no_cuda()
        options["PYWINO_CUDA_ARCHITECTURES"] = "" if no_cuda else cuda_architectures()
        if not no_cuda:
            options["CMAKE_CUDA_COMPILER"] = find_nvcc()
        defines = [f"-D{name}={value}" for name, value in options.items()]
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        run(find_tool("cmake"), "-S", ROOT, "-B", build, "-G", "Ninja", *defines)
        run(ninja, "-C", build, *jobs)
        package.mkdir(parents=True, exist_ok=True)
        for name in ("libpywino_core.so", "_C.so", f"_host{options['PYWINO_PYTHON_SUFFIX']}"):
            # Moved, not written: another Python may be running the old file.
            shutil.copy2(build / name, package / f"{name}.new")
            os.replace(package / f"{name}.new", package / name)
        cuda = {"no_cuda": no_cuda} if no_cuda else {"cuda": options["PYWINO_CUDA_ARCHITECTURES"]}
        write_record(package, None, torch=torch_version, **cuda)

    # setuptools would look for one file an extension, built by itself.
    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


def find_torch() -> tuple[Path, str]:
    """Folder and version of the torch to build against; stops where there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SetupError(
            "pywino builds against the torch that you have, and this Python has none (pip hides it "
            f"in an isolated build). Install torch and type: {INSTALL}"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise SetupError(
            f"pywino needs torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}, this is torch {version}. "
            f"Type: pip install -U torch && {INSTALL}"
        )
    return Path(spec.origin).parent, version


def run(*command: object) -> None:
    try:
        subprocess.run([str(part) for part in command], check=True)
    except subprocess.CalledProcessError as error:
        raise SetupError(
            f"the native library could not be built: `{Path(str(command[0])).name}` ended with "
            f"{error.returncode}, its words are above. To install without it, type: "
            "PYWINO_PURE=1 pip install ."
        ) from None


packages = find_packages(include=["pywino", "pywino.*"])
package_dir = {}
if (ROOT / "kernels").is_dir():  # Triton kernels; no __init__.py there, see docs/adding_an_op.md
    packages.append("pywino.kernels")
    package_dir["pywino.kernels"] = "kernels"

setup(
    packages=packages,
    package_dir=package_dir,
    # One name stands for the three files: it makes the wheel a platform wheel and runs build_ext.
    ext_modules=[] if PURE else [Extension("pywino._C", sources=[])],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative, "dist_info": Metadata},
)
