# SPDX-License-Identifier: BSD-3-Clause
"""Every Python block of the README runs, in order, in one namespace; what the README must show is
in it."""

import ast
import re
import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
BLOCKS = FENCE.findall(README)

# Lines that users were promised, statement by statement.
PROMISED = (
    "layer = pywino.WinogradReLUConv2d(64, 64, 3, 1, 1); y = layer(torch.randn(2, 64, 33, 57))",
    "before = net(x); pywino.swap_(net, example=x); print(pywino.explain(net, x)); "
    "assert_close(net(x), before)",
    "torch.save(net.state_dict(), f); plain_net.load_state_dict(torch.load(f))",
    "net(x).sum().backward(); torch.compile(net, fullgraph=True)(x); pywino.restore_(net)",
)


def statements(code):
    return [ast.unparse(node) for node in ast.parse(code).body]


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    """Shared by the blocks, which run in a folder of their own and leave torch as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        state = torch.get_rng_state()
        torch.manual_seed(0)
        yield {"__name__": "readme"}
        torch.set_rng_state(state)
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def failed():
    return []


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_runs(index, namespace, failed):
    if failed:
        pytest.skip(f"block {failed[0]} failed, and this one builds on it")
    if "torch.compile" in BLOCKS[index] and not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("torch.compile needs a C++ compiler")
    failed.append(index)
    exec(compile(BLOCKS[index], f"README.md, python block {index}", "exec"), namespace)
    failed.clear()


@pytest.mark.parametrize("line", PROMISED)
def test_promised_line_is_there(line):
    wanted = statements(line)
    for block in BLOCKS:
        got = statements(block)
        if any(got[i : i + len(wanted)] == wanted for i in range(len(got))):
            return
    pytest.fail(f"no block of the README has, in this order: {line}")


def test_every_code_block_has_a_language():
    """A block without one, or with an odd one, would not be run by this file."""
    opened = re.findall(r"^```(.*)$", README, re.M)[::2]
    assert len(BLOCKS) >= 4
    assert set(opened) <= {"python", "sh"}


def test_links_lead_somewhere():
    """Of all pages: files that are named exist."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_commands_exist():
    """`make` targets in the README are targets of the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
