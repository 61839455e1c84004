# SPDX-License-Identifier: BSD-3-Clause
"""The checker itself: each planted fault of faults.cu is reported, as what it is, at its line, and
the controls beside them are not."""

import re

import numpy as np
import pytest
from emulator.build import HERE
from emulator.harness import EmulatorError, In, InOut, Kernel, Out

SOURCE = HERE / "kernels" / "faults.cu"
STARTS_AT = re.compile(r"if constexpr \(kCase == (\d+)\)")
EXPECTED = re.compile(r"// expect( fast)?: ([A-Z .-]+)$")
CASES = 57
CONTROLS = {2, 5, 8, 26, 31, 45, 53}
NEEDS_INPUT = {8, 9}  # g is read as well
UNMARKED = {52: "WGMMA"}  # found where the registers come back, not where they were written


def expectations():
    """case: (kind, line, also in fast mode)"""
    found, case = {}, None
    for number, line in enumerate(SOURCE.read_text().splitlines(), 1):
        if starts := STARTS_AT.search(line):
            case = int(starts[1])
        if expected := EXPECTED.search(line):
            found[case] = (expected[2], number, bool(expected[1]))
    return found


EXPECT = expectations()


@pytest.fixture(scope="module")
def start():
    """start(case, mode): the findings of a case."""
    kernels = {mode: Kernel(SOURCE, mode, seconds=1) for mode in ("fast", "check")}

    def start(case, mode, schedule="ascending"):
        g = np.zeros(256, np.float32)
        argument = InOut(g, "g") if case in NEEDS_INPUT else Out(g, "g")
        source = In(np.zeros(256, np.float32), "input")
        try:
            kernels[mode].call("fault_launch", case, argument, source, g.size, schedule=schedule)
        except EmulatorError as error:
            if error.findings:
                return error.findings
            raise  # the emulator's own fault
        return []

    yield start
    for kernel in kernels.values():
        kernel.close()


def test_every_case_is_a_fault_or_a_control():
    assert {*EXPECT, *UNMARKED} == set(range(CASES)) - CONTROLS


def assert_reported(kind, line, findings):
    """There may be more: what is read too early is a race, and not initialised either."""
    place = re.compile(rf"\bfaults\.cu:{line}\b")
    of_kind = [finding for finding in findings if finding.kind == kind]
    assert any(place.search(f"{f.place} {f.other}") for f in of_kind), list(map(str, findings))


@pytest.mark.parametrize("case", sorted(EXPECT))
def test_a_fault_is_reported_at_its_line(start, case):
    kind, line, _ = EXPECT[case]
    assert_reported(kind, line, start(case, "check"))


@pytest.mark.parametrize("case", [case for case in sorted(EXPECT) if EXPECT[case][2]])
def test_some_are_reported_in_fast_mode_too(start, case):
    kind, line, _ = EXPECT[case]
    assert_reported(kind, line, start(case, "fast"))


@pytest.mark.parametrize("mode", ["fast", "check"])
def test_accumulators_are_not_to_be_touched_in_flight(start, mode):
    assert {finding.kind for finding in start(52, mode)} == {UNMARKED[52]}


@pytest.mark.parametrize("schedule", ["ascending", "descending", "random"])
@pytest.mark.parametrize("case", sorted(CONTROLS))
def test_controls_are_silent(start, case, schedule):
    assert start(case, "check", schedule) == []


@pytest.mark.parametrize("schedule", ["descending", "random"])
@pytest.mark.parametrize("case", [1, 3, 4, 6, 10, 30, 46])
def test_races_do_not_depend_on_the_schedule(start, case, schedule):
    kind, line, _ = EXPECT[case]
    assert kind == "RACE"
    assert_reported(kind, line, start(case, "check", schedule))


def test_a_crash_ends_one_call_only(start):
    """A write far outside is reported, and the next call is as good as ever."""
    assert start(14, "fast")
    assert start(2, "fast") == []
