# SPDX-License-Identifier: BSD-3-Clause
"""What a test can rely on: arguments, errors, guard pages, launches that no GPU would take."""

import numpy as np
import pytest
from emulator.build import CSRC, HERE, compile_kernel
from emulator.harness import EmulatorError, In, InOut, Kernel, Out, bf16, from_bf16, padded

INSTRUCTIONS = HERE / "kernels" / "instructions.cu"
COLLECTIVES = HERE / "kernels" / "collectives.cu"


@pytest.fixture(params=["fast", "check"])
def kernel(emulate, request):
    return emulate(INSTRUCTIONS, request.param)


@pytest.fixture
def nothing(emulate):
    return lambda *numbers: emulate(COLLECTIVES).call("nothing_launch", *numbers, None)


def test_arrays_change_in_place_and_inputs_do_not(kernel):
    x = np.array([1, 2, 3.00001], np.float32)
    before, y = x.copy(), np.zeros(3, np.uint32)
    kernel.call("to_tf32_launch", In(x), Out(y), 3, None)
    assert (x == before).all()
    assert y.view(np.float32).tolist() == [1, 2, 3]


def test_an_output_that_is_not_written_is_nan(kernel):
    y = np.zeros(3, np.float32)
    kernel.call("to_tf32_launch", In(np.ones(3, np.float32)), Out(y), 2, None)
    assert y[:2].tolist() == [1, 1]
    assert np.isnan(y[2])


@pytest.mark.parametrize("size", [3, 1024])
def test_a_write_behind_the_end_is_found(kernel, size):
    """By check mode at its line; by fast mode from the bytes there, or by the guard page."""
    x, y = np.ones(size + 1, np.float32), np.zeros(size, np.uint32)
    with pytest.raises(EmulatorError, match="OUT-OF-BOUNDS"):
        kernel.call("to_tf32_launch", In(x), Out(y), size + 1, None)


def test_a_finding_names_buffer_thread_and_line(emulate):
    x = np.ones(40, np.float32)
    with pytest.raises(EmulatorError) as raised:
        emulate(INSTRUCTIONS, "check").call(
            "to_tf32_launch", In(x), Out(np.zeros(33, np.uint32), "the output"), 40, None
        )
    (finding,) = raised.value.findings
    assert finding.thread == "block (0, 0, 0) thread (33, 0, 0)"
    assert "behind the end of the output" in finding.text
    line = int(finding.place.removeprefix("instructions.cu:"))
    assert "y[i] = ptx::to_tf32(x[i])" in INSTRUCTIONS.read_text().splitlines()[line - 1]


def test_a_process_that_ends_is_an_error_and_not_the_end(kernel):
    with pytest.raises(EmulatorError, match="no_such_launch"):
        kernel.call("no_such_launch", None)
    y = np.zeros(1, np.uint32)
    kernel.call("to_tf32_launch", In(np.ones(1, np.float32)), Out(y), 1, None)
    assert y[0] == 0x3F800000


def test_arguments_of_another_type_are_refused(kernel):
    with pytest.raises(TypeError, match="argument 0 must be In, Out"):
        kernel.call("to_tf32_launch", np.ones(1, np.float32), None, 1, None)
    with pytest.raises(TypeError, match="argument 2 must be"):
        kernel.call("to_tf32_launch", None, None, 1.0, None)


def test_launches_within_the_limits(nothing):
    nothing(3, 1024, 48 << 10, 48 << 10)
    nothing(1, 1, 227 << 10, 227 << 10)


@pytest.mark.parametrize(
    ("launch", "why"),
    [
        ((1, 1025, 0, 0), "LAUNCH .* block \\(1025, 1, 1\\)"),
        ((0, 32, 0, 0), "LAUNCH .* grid \\(0, 1, 1\\)"),
        ((1, 32, (48 << 10) + 1, 48 << 10), "LAUNCH .* call cudaFuncSetAttribute"),
        ((1, 32, 0, (227 << 10) + 1), "returned 1"),
    ],
)
def test_launches_that_no_gpu_takes(nothing, launch, why):
    with pytest.raises(EmulatorError, match=why):
        nothing(*launch)


def test_what_does_not_compile_says_why():
    text = INSTRUCTIONS.read_text() + '\n__device__ void f() { asm volatile("exit;"); g(); }\n'
    with pytest.raises(RuntimeError, match=r"instructions.cu.*'g' was not declared|‘g’ was not"):
        compile_kernel(INSTRUCTIONS, changed={INSTRUCTIONS: text})


def test_a_header_can_be_changed_as_well():
    ptx = CSRC / "core" / "common" / "ptx.cuh"
    text = ptx.read_text().replace("0x1000u) & ~0x1fffu", "0x1000u) & ~0x3fffu")
    x, y = np.array([1 + 2**-10], np.float32), np.empty(1, np.float32)
    with Kernel(INSTRUCTIONS, changed={ptx: text}) as kernel:
        kernel.call("to_tf32_launch", In(x), Out(y.view(np.uint32)), 1, None)
    assert y[0] == 1  # and not 1 + 2^-10, of which the change drops the last bit


def test_a_kernel_that_is_included_is_seen_to_change(tmp_path):
    """rooms.cu includes the project's kernels: a change of one makes another library."""
    (tmp_path / "whole.cu").write_text('#include "part.cu"\n')
    names = []
    for value in (1, 2):
        (tmp_path / "part.cu").write_text(f'extern "C" int value() {{ return {value}; }}\n')
        names.append(compile_kernel(tmp_path / "whole.cu").name)
    assert names[0] != names[1]


def test_a_hanging_kernel_is_stopped():
    text = COLLECTIVES.read_text().replace("while (atomicAdd(&turn, 0) != warp)", "while (true)")
    with (
        Kernel(COLLECTIVES, text=text, seconds=1) as kernel,
        pytest.raises(EmulatorError, match=r"HANG .*still running after 1 s"),
    ):
        kernel.call("spin_launch", InOut(np.zeros(4, np.int32)), 4, None)


def test_padded_rows_are_nan_behind_their_end():
    x = np.arange(6, dtype=np.float16).reshape(2, 3)
    wide = padded(x, 8)
    assert (wide[:, :3] == x).all()
    assert np.isnan(wide[:, 3:]).all()
    assert np.isnan(from_bf16(padded(bf16(x), 4))[:, 3]).all()


def test_bf16_rounds_to_nearest_even():
    # 1 + 2^-8 is a tie between 1 and 1 + 2^-7, 1 + 3 * 2^-8 one between 1 + 2^-7 and 1 + 2^-6.
    x = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.5])
    expected = [1, 1, 1 + 2**-6, 1 + 2**-7, -3.5]
    assert from_bf16(bf16(x)).tolist() == expected
