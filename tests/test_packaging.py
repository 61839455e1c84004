# SPDX-License-Identifier: BSD-3-Clause
"""What a user installs: wheels are built, listed, installed elsewhere and used there."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pywino import _native

ROOT = Path(__file__).resolve().parent.parent
SHARED_LIBRARIES = {"_C.so", "libpywino_core.so"}


def python(*arguments, cwd, path=(), check=True, **environment):
    """Runs this Python in another process, with `path` before its own packages."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYWINO_")}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=env | environment,
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def build_wheel(source, folder, **environment):
    python(
        *("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"),
        *("--wheel-dir", folder, source),
        cwd=folder,
        **environment,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel, folder):
    python(
        *("-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel),
        cwd=folder.parent,
    )
    return folder


def tracked_files():
    """The files that a clone has, new ones that git does not ignore among them."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout, so nobody knows which files belong to it")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [name for name in listing.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    for name in tracked_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def pure_wheel(clone, tmp_path_factory):
    return build_wheel(clone, tmp_path_factory.mktemp("wheel"), PYWINO_PURE="1")


@pytest.fixture(scope="module")
def pure_install(pure_wheel, tmp_path_factory):
    return install(pure_wheel, tmp_path_factory.mktemp("pure") / "site")


def test_pure_wheel_is_for_every_platform(pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")


def test_pure_wheel_has_the_package_and_nothing_else(pure_wheel):
    names = {name for name in zipfile.ZipFile(pure_wheel).namelist() if ".dist-info/" not in name}
    modules = {
        name for name in tracked_files() if name.startswith("pywino/") and name[-3:] == ".py"
    }
    kernels = {f"pywino/{name}" for name in tracked_files() if name.startswith("kernels/")}
    weights = {name for name in tracked_files() if name.startswith("pywino/models/weights/")}
    assert any(name.endswith(".safetensors") for name in weights)
    assert names == modules | kernels | weights | {"pywino/_build.json"}


def test_wheel_has_the_licence(pure_wheel):
    assert any(name.endswith("/LICENSE") for name in zipfile.ZipFile(pure_wheel).namelist())


def test_pure_install_works_and_says_why_it_is_slow(pure_install, tmp_path):
    script = """
import torch, pywino
from pywino import _native
print(pywino.__file__)
assert not _native.loaded and _native.host is None
x, w = torch.randn(2, 8, 9, 11), torch.randn(4, 8, 3, 3)
torch.testing.assert_close(
    pywino.conv2d(x, w, padding=1), torch.nn.functional.conv2d(x, w, padding=1)
)
assert pywino.WinogradConv2d(8, 4, 3)(x).shape == (2, 4, 7, 9)
print(_native.reason)
"""
    done = python("-c", script, cwd=tmp_path, path=[pure_install])
    where, reason = done.stdout.splitlines()
    assert Path(where).is_relative_to(pure_install)
    assert "PYWINO_PURE=1" in reason
    assert "pip install --no-build-isolation ." in reason


def test_weights_of_our_own_need_nothing_else(pure_install, tmp_path):
    script = """
import torch
from pywino import models
net = models.sapnet(weights="pywino-rain").eval()
print(models.weights.find_weights("pywino-rain"), net.stages)
with torch.no_grad():
    assert net(torch.rand(1, 3, 24, 40)).shape == (1, 3, 24, 40)
"""
    where, stages = python("-c", script, cwd=tmp_path, path=[pure_install]).stdout.split()
    assert Path(where).is_relative_to(pure_install)
    assert Path(where).stat().st_size < 1_000_000
    assert Path(where).with_suffix(".md").is_file()
    assert int(stages) >= 1


def test_pure_install_answers_doctor(pure_install, tmp_path):
    done = python("-m", "pywino", cwd=tmp_path, path=[pure_install])
    assert str(pure_install) in done.stdout
    assert "PYWINO_PURE=1" in done.stdout


def test_a_build_without_a_compiler_is_pure_and_says_so(clone, tmp_path):
    folder = tmp_path / "lib"
    done = python(*("setup.py", "build", "--build-lib", folder), cwd=clone, CXX="no-such-compiler")
    record = json.loads((folder / "pywino" / "_build.json").read_text())
    assert record["native"] is False
    assert "no C++ compiler was found (no-such-compiler)" in record["reason"]
    assert "WITHOUT its native library" in done.stderr


def test_a_build_without_torch_stops_with_the_line_to_type(clone):
    script = "import sys, runpy; sys.modules['torch'] = None; runpy.run_path('setup.py')"
    done = python("-c", script, "build_ext", "--inplace", cwd=clone, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith("pip install --no-build-isolation .")
    assert "Traceback" not in done.stderr


def test_native_wheel(tmp_path):
    """Built in this checkout, where the objects of the last build are still good."""
    if not _native.loaded or not (ROOT / "build" / sys.implementation.cache_tag).exists():
        pytest.skip(f"no native library was built in this checkout: {_native.reason}")
    wheel = build_wheel(ROOT, tmp_path)
    assert not wheel.name.endswith("-any.whl")
    libraries = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name}
    (host,) = libraries - SHARED_LIBRARIES
    assert libraries > SHARED_LIBRARIES
    assert host.startswith("_host.")

    script = "import pywino._native as n; print(n.host.__file__, n.host.isas()); assert n.loaded"
    site = install(wheel, tmp_path / "site")
    done = python("-c", script, cwd=tmp_path, path=[site])
    assert done.stdout.startswith(str(site))


def test_the_package_kernels_of_others_is_not_shadowed(pure_wheel, clone, tmp_path):
    # PyPI has a package `kernels`, and transformers asks for it. Ours are in a folder of that name
    # at the root, which is first on sys.path there: it must have no __init__.py, or it would win.
    tops = {name.split("/")[0] for name in zipfile.ZipFile(pure_wheel).namelist()}
    assert [top for top in tops if not top.endswith(".dist-info")] == ["pywino"]

    theirs = tmp_path / "site" / "kernels" / "__init__.py"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    script = "import pywino, kernels; print(kernels.__file__)"
    done = python("-c", script, cwd=clone, path=[theirs.parent.parent])
    assert done.stdout.strip() == str(theirs)


def test_import_leaves_heavy_packages_unimported(tmp_path):
    script = """
import sys, torch
before = set(sys.modules)
import pywino
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
    new = set(python("-c", script, cwd=tmp_path, path=[ROOT]).stdout.split())
    assert "pywino" in new
    heavy = "click IPython matplotlib ncnn pandas PIL rich safetensors scipy skimage sklearn triton"
    assert not new & set(heavy.split())


def test_nothing_imports_torchvision(tmp_path):
    # This one is there to be imported: a guarded `try: import torchvision` would show as well.
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").touch()
    script = """
import importlib, pkgutil, sys, pywino
for module in pkgutil.walk_packages(pywino.__path__, "pywino."):
    if module.name not in ("pywino.__main__", "pywino.libpywino_core", "pywino._C"):
        importlib.import_module(module.name)
print("torchvision" in sys.modules)
"""
    assert python("-c", script, cwd=tmp_path, path=[tmp_path, ROOT]).stdout.strip() == "False"
