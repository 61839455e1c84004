# SPDX-License-Identifier: BSD-3-Clause
"""What `make mutate` counts as caught."""

import numpy as np
from emulator.build import HERE
from emulator.harness import In, Out
from emulator.mutate import Recipe, mutants, run

SOURCE = HERE / "kernels" / "instructions.cu"


def check_rounding(kernel, expected=(1, 2, 3), **how):
    y = np.zeros(3, np.uint32)
    kernel.call("to_tf32_launch", In(np.array([1, 2, 3.00001], np.float32)), Out(y), 3, None, **how)
    assert tuple(y.view(np.float32)) == expected


def test_every_mutant_is_caught_or_explained(capsys):
    lines = [line for _, _, line, _ in mutants(SOURCE.read_text())]
    recipe = Recipe(SOURCE, [check_rounding], dict.fromkeys(lines, "another instruction"))
    assert run(recipe, SOURCE, jobs=1, sample=3) == 0
    assert "0 unexplained" in capsys.readouterr().out


def test_a_check_that_fails_on_the_kernel_itself_catches_nothing(capsys):
    recipe = Recipe(SOURCE, [lambda kernel, **how: check_rounding(kernel, (3, 2, 1), **how)])
    assert run(recipe, SOURCE, jobs=1, sample=1) == 1
    assert "fails as it is, in fast mode: numbers" in capsys.readouterr().out


def test_a_kernel_that_does_not_build_is_named(tmp_path, capsys):
    source = tmp_path / "broken.cu"
    source.write_text('#include "nowhere.h"\n')
    assert run(Recipe(source, []), source, jobs=1) == 1
    assert "does not compile" in capsys.readouterr().out
