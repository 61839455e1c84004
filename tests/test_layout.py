# SPDX-License-Identifier: BSD-3-Clause
"""The house: a room has the same name on every floor, and arrows point one way (docs/design.md)."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "csrc" / "core"
PACKAGE = ROOT / "pywino"

# The one list of rooms is in CMakeLists.txt.
ROOMS = re.search(r"set\(PYWINO_ROOMS ([\w ]+)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()

# Rooms whose kernels are those of the rooms that they call; their README says why.
BORROWING_ROOMS = ["dilated_conv"]
ALL_ROOMS = [*ROOMS, *BORROWING_ROOMS]
# Which other rooms' functions and ops a room may call.
CALLS = {"conv_lstm": {"winograd"}, "dilated_conv": {"winograd"}, "masked_conv": {"winograd"}}

NATIVE_FILES_OF_A_ROOM = [
    "csrc/core/{0}/{0}.h",
    "csrc/core/{0}/dispatch.cpp",
    "csrc/core/{0}/cpu*.cpp",
    "csrc/torch/{0}.cpp",
]
FILES_OF_A_ROOM = [
    "csrc/core/{0}/README.md",
    "pywino/reference/{0}.py",
    "pywino/ops/{0}.py",
    "pywino/functional/{0}.py",
    "pywino/nn/{0}.py",
    "tests/ops/test_{0}.py",
    "benches/bench_{0}.py",
    "docs/{0}.md",
]

# A part of the package may import those that stand on floors above it in this list.
FLOORS = [
    {"reference", "_native"},
    {"backends"},
    {"planner"},
    {"ops"},
    {"functional"},
    {"nn"},
    {"swap", "models", "testing", "optim", "data", "metrics"},
    {"pruning", "losses"},
    {"pywino"},  # `import pywino`, which reaches everything above
    {"train"},
    {"cli"},
    {"__main__"},
]
RANK = {part: rank for rank, floor in enumerate(FLOORS) for part in floor}

SOURCES = sorted(
    path
    for pattern in ("**/*.py", "**/*.cpp", "**/*.h", "**/*.cu", "**/*.cuh")
    for folder in ("csrc", "kernels", "pywino", "tests", "benches")
    for path in (ROOT / folder).glob(pattern)
) + [
    ROOT / name for name in ("setup.py", "CMakeLists.txt", "Makefile", "pyproject.toml", ".ci/run")
]


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("room", ALL_ROOMS)
@pytest.mark.parametrize("pattern", [*NATIVE_FILES_OF_A_ROOM, *FILES_OF_A_ROOM])
def test_every_room_is_on_every_floor(room, pattern):
    wanted = room in ROOMS or pattern in FILES_OF_A_ROOM
    found = list(ROOT.glob(pattern.format(room)))
    assert bool(found) == wanted, f"{pattern.format(room)} is missing, or {found} should not be"


@pytest.mark.parametrize("floor", ["reference", "ops", "functional", "nn"])
def test_no_floor_has_a_room_of_its_own(floor):
    modules = {path.stem for path in (PACKAGE / floor).glob("*.py") if path.name[0] != "_"}
    assert modules == set(ALL_ROOMS)


@pytest.mark.parametrize("floor", ["reference", "ops", "functional"])
@pytest.mark.parametrize("room", ALL_ROOMS)
def test_rooms_call_one_another_by_the_list(room, floor):
    text = (PACKAGE / floor / f"{room}.py").read_text(encoding="utf-8")
    named = {
        other
        for other in ALL_ROOMS
        if re.search(rf"pywino\.(reference|ops|functional)(\.| import ){other}\b", text)
    }
    assert named <= {room} | CALLS.get(room, set())


def test_no_native_room_is_missing_from_the_list():
    assert {path.name for path in CORE.iterdir() if path.is_dir()} == {*ALL_ROOMS, "common"}
    bindings = {path.stem for path in (ROOT / "csrc" / "torch").glob("*.cpp")}
    assert {name.removesuffix("_cuda") for name in bindings} == set(ROOMS)


def imports(path):
    """The names of pywino's parts that a module imports anywhere, lazily or not."""
    package = path.parent.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "pywino":
                yield rest.partition(".")[0] or "pywino"


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_point_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in RANK, f"give pywino.{part} a floor in this test"
    for target in set(imports(path)) - {part, "__version__"}:
        assert target in RANK, f"{name_of(path)} imports pywino.{target}, which has no floor"
        assert RANK[target] < RANK[part], f"{name_of(path)}: {part} must not import {target}"


def test_the_reference_imports_nothing_of_pywino():
    for path in (PACKAGE / "reference").glob("*.py"):
        assert not set(imports(path)) - {"reference"}, name_of(path)


INCLUDE = re.compile(r'^\s*#\s*include\s*(<[^>]+>|"[^"]+")', re.MULTILINE)


def includes(path):
    return [match[1:-1] for match in INCLUDE.findall(path.read_text(encoding="utf-8"))]


def core_sources():
    return [
        path for path in sorted(CORE.rglob("*")) if path.suffix in (".h", ".cpp", ".cu", ".cuh")
    ]


@pytest.mark.parametrize("path", core_sources(), ids=name_of)
def test_core_is_free_of_torch_and_python(path):
    outside = {"torch", "ATen", "c10", "caffe2", "pybind11", "Python.h"}
    assert not {name.split("/")[0] for name in includes(path)} & outside


@pytest.mark.parametrize("path", core_sources(), ids=name_of)
def test_native_rooms_include_themselves_and_common_only(path):
    room = path.relative_to(CORE).parts[0]
    for match in INCLUDE.findall(path.read_text(encoding="utf-8")):
        if match[0] == '"':
            target = (path.parent / match[1:-1]).resolve()
            assert target.is_file(), f"{match} is not relative to {name_of(path)}"
            assert target.relative_to(CORE).parts[0] in (room, "common")


# What the emulator (tests/emulator) cannot run as C++, and the only files where it may stand.
CUDA_ONLY = {
    "inline PTX": (re.compile(r"\basm\b"), {"ptx.cuh", "wgmma.cuh"}),
    "a launch": (re.compile(r"<<<"), {"launch.cuh"}),
    "dynamic shared memory": (re.compile(r"\bextern\s+__shared__"), {"launch.cuh"}),
}
CUDA_SOURCES = [path for path in SOURCES if path.suffix in (".cu", ".cuh")]


@pytest.mark.parametrize("path", CUDA_SOURCES, ids=name_of)
def test_cuda_sources_leave_to_common_what_is_not_cpp(path):
    code = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
    for what, (pattern, allowed) in CUDA_ONLY.items():
        if path.parent == CORE / "common" and path.name in allowed:
            continue
        assert not pattern.search(code), f"{name_of(path)}: {what} belongs in {sorted(allowed)}"


def test_the_python_module_is_free_of_torch():
    for path in (ROOT / "csrc" / "python").glob("*"):
        assert not {name.split("/")[0] for name in includes(path)} & {"torch", "ATen", "c10"}


def test_instruction_sets_share_no_function():
    """A weak symbol in two copies is one function after linking, maybe the AVX-512 one for all."""
    objects = [
        path
        for room in ROOMS
        for copy in (room, "bf16")
        for path in (ROOT / "build").glob(f"cpython-*/CMakeFiles/pywino_{copy}_*.dir/**/*.o")
        if (CORE / room / path.stem).exists()  # the others are of sources that are gone
    ]
    if not objects or not shutil.which("nm"):
        pytest.skip("no object files of a native build, or no nm to read them")
    for path in objects:
        listing = subprocess.run(
            ["nm", "--defined-only", "-C", path], capture_output=True, text=True, check=True
        ).stdout
        weak = [line for line in listing.splitlines() if re.match(r"\w+ [WVu] ", line)]
        assert not weak, f"{path.parent.name}: {weak}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_source_file_names_its_licence(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    first = lines[1] if lines and lines[0].startswith("#!") else (lines or [""])[0]
    assert re.fullmatch(r"(#|//) SPDX-License-Identifier: BSD-3-Clause", first)
