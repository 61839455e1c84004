# SPDX-License-Identifier: BSD-3-Clause
"""Breaks kernels, one token at a time, and asks whether their tests notice.

    python -m emulator.mutate [file.cu ...]          make mutate

A kernel takes part with a Recipe in the list MUTATE of a tests/emulator/test_*.py: its source, and
functions that run it and raise where something is wrong. A mutant that they let through is either
harmless, which the recipe then says, or shows a shape or check that is missing.
"""

import argparse
import importlib
import os
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from emulator.build import CACHE, HERE, ROOT
from emulator.harness import Kernel
from rich.progress import track


@dataclass
class Recipe:
    """`checks` are called with a Kernel and a schedule. `harmless` maps the text of mutated lines
    to why they change nothing. `headers` of csrc are broken too; `others` are linked, unbroken.
    `choices` are functions of the source whose answer changes what is fast, and no number."""

    source: Path
    checks: Sequence[Callable]
    harmless: dict[str, str] = field(default_factory=dict)
    headers: Sequence[Path] = ()
    others: Sequence[Path] = ()
    choices: Sequence[str] = ()

    def kernel(self, mode, changed, quickly=True):
        return Kernel(
            self.source, mode, changed=changed, others=self.others, quickly=quickly, seconds=10
        )


# The quicker one to compile first.
RUNS = (("fast", "random"), ("check", "ascending"))


# What is replaced (in code, not in comments), and by what.
MUTATIONS = [
    (r"__sync(threads|warp)\(\);", r"/* \g<0> */;", "no barrier"),
    (
        r"ptx::(\w*(wait|commit|fence|barrier)\w*)(<[^>]*>)?\([^;]*\);",
        r"/* \g<0> */;",
        "no wait or commit",
    ),
    (r"wait_group<([^>]*)>", r"wait_group<\1 + 1>", "one group less waited for"),
    (r" < ", r" <= ", "< to <="),
    (r" > ", r" >= ", "> to >="),
    (r" <= ", r" < ", "<= to <"),
    (r" >= ", r" > ", ">= to >"),
    (r" \+ (?=[\w(])", r" - ", "+ to -"),
    (r" - (?=[\w(])", r" + ", "- to +"),
    (r"([*/%]) (\d+)\b", lambda m: f"{m[1]} {2 * int(m[2])}", "a factor doubled"),
    (r"([+-]) (\d+)\b", lambda m: f"{m[1]} {int(m[2]) + 1}", "one more"),
    (r" && ", r" || ", "&& to ||"),
    (r"\? (\w[^:;]*) : 0\b", r"? \1 : \1", "no zero where there is nothing"),
]


def device_code(text):
    """The part of a file that runs on the device: from the first function to the launchers."""
    start = re.search(r"__device__|__global__", text)
    end = re.search(r'^extern "C"', text, re.MULTILINE)
    return (start.start() if start else 0), (end.start() if end else len(text))


def mutants(text, choices=()):
    """(text, line number, mutated line, name) of each, outside of the bodies of `choices`."""
    begin, end = device_code(text)
    bodies = [re.search(rf"\b{name}\([^)]*\) {{.*?\n}}", text, re.DOTALL) for name in choices]
    for pattern, replacement, name in MUTATIONS:
        for match in re.compile(pattern).finditer(text, begin, end):
            line_start = text.rfind("\n", 0, match.start()) + 1
            before = text[line_start : match.start()]
            if "//" in text[line_start : match.end()]:
                continue
            if any(body.start() < match.start() < body.end() for body in bodies):
                continue
            if before.lstrip().startswith(("#", "static_assert")):
                continue
            new = replacement(match) if callable(replacement) else match.expand(replacement)
            mutated = text[: match.start()] + new + text[match.end() :]
            line = mutated[line_start : mutated.find("\n", match.start())].strip()
            yield mutated, text.count("\n", 0, match.start()) + 1, line, name


def findings(recipe, changed, mode, schedule, quickly=True):
    """The kind of the first finding of the recipe's checks, "numbers", or "" where they pass; None
    where the change does not compile."""
    try:
        kernel = recipe.kernel(mode, changed, quickly)
    except RuntimeError:
        return None
    try:
        for check in recipe.checks:
            check(kernel, schedule=schedule)
    except AssertionError as error:
        return next(iter(getattr(error, "kinds", [])), "numbers")
    finally:
        kernel.close()
        if changed:
            for made in CACHE.glob(f"{kernel.library.stem.rpartition('-')[0]}*"):
                made.unlink()
    return ""


def how_caught(recipe, path, case):
    """As `findings`, of one mutant in both modes; and again as tests compile it, where nothing was
    noticed and nothing is known: what is written behind a local array shows in one or the other."""
    text, _, line, _ = case
    for quickly in (True, False):
        for mode, schedule in RUNS:
            if (caught := findings(recipe, {path: text}, mode, schedule, quickly)) != "":
                return caught
        if line in recipe.harmless:
            break
    return ""


def recipes():
    sys.path.insert(0, str(ROOT / "tests"))
    for path in sorted(HERE.glob("test_*.py")):
        yield from getattr(importlib.import_module(f"emulator.{path.stem}"), "MUTATE", [])


def run(recipe, path, jobs, sample=None):
    """Prints what became of one file's mutants, or of a sample of so many; how many got through
    without an explanation."""
    began = time.monotonic()
    for mode, schedule in RUNS:
        if (found := findings(recipe, {}, mode, schedule)) != "":
            # By which every mutant would be caught.
            print(f"{path.name}: fails as it is, in {mode} mode: {found or 'does not compile'}")
            return 1
    choices = recipe.choices if path == recipe.source else ()
    cases = list(mutants(path.read_text(), choices))
    if sample is not None and sample < len(cases):
        cases = random.Random(0).sample(cases, sample)
    with ThreadPoolExecutor(jobs) as pool:
        caught = pool.map(lambda case: how_caught(recipe, path, case), cases)
        results = list(track(caught, path.name, len(cases)))
    compiled = [(case, caught) for case, caught in zip(cases, results) if caught is not None]
    survivors = [case for case, caught in compiled if not caught]
    unexplained = [case for case in survivors if case[2] not in recipe.harmless]
    for _, number, line, name in unexplained:
        print(f"  {path.name}:{number}: {name}: {line}")
    where = path.name if path == recipe.source else f"{path.name} in {recipe.source.name}"
    print(
        f"{where}: {len(compiled)} mutants, {len(compiled) - len(survivors)} caught, "
        f"{len(survivors) - len(unexplained)} harmless, {len(unexplained)} unexplained "
        f"({time.monotonic() - began:.0f} s)",
        flush=True,
    )
    return len(unexplained)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, help="these only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--sample", type=int, help="so many mutants of each file, not all")
    options = parser.parse_args()
    wanted = {path.resolve() for path in options.sources}
    chosen = [r for r in recipes() if not wanted or Path(r.source).resolve() in wanted]
    if not chosen:
        parser.error("no recipe for these: add one to MUTATE in a tests/emulator/test_*.py")
    files = [(recipe, path) for recipe in chosen for path in (recipe.source, *recipe.headers)]
    through = [run(recipe, path, options.jobs, options.sample) for recipe, path in files]
    sys.exit(sum(through) > 0)


if __name__ == "__main__":
    main()
