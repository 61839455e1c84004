# SPDX-License-Identifier: BSD-3-Clause
"""Calls the launchers of a .cu file in the emulator, on numpy arrays (README.md beside this file).

with Kernel("csrc/core/winograd/cuda_forward.cu", mode="check") as kernel:
    kernel.call("winograd_forward", In(x), In(filters), Out(y), n, h, w, None)
"""

import ctypes
import functools
import pickle
import re
import selectors
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from emulator.build import CSRC, HERE, MODES, ROOT, compile_kernel, missing
from emulator.worker import SCHEDULES

COMMON = CSRC / "core" / "common"

__all__ = [
    "MODES",
    "SCHEDULES",
    "EmulatorError",
    "Finding",
    "In",
    "InOut",
    "Kernel",
    "Out",
    "Struct",
    "Workspace",
    "bf16",
    "from_bf16",
    "missing",
    "padded",
]


# --- Arguments of a call


@dataclass
class In:
    """An array that the kernel reads. To write to it is a finding."""

    array: np.ndarray
    name: str | None = None


@dataclass
class Out:
    """An array that the kernel writes. Before that it holds NaN, and to read it is a finding."""

    array: np.ndarray
    name: str | None = None


@dataclass
class InOut:
    """An array that the kernel reads and writes."""

    array: np.ndarray
    name: str | None = None


@dataclass
class Workspace:
    """So many bytes for the kernel's own use: an Out that nobody looks at after the call."""

    nbytes: int
    name: str | None = None


@dataclass
class Struct:
    """A pointer to a C struct: its fields in order, each In, Out, InOut, Workspace, None (a null
    pointer) or a ctypes number of the field's type."""

    fields: dict


def encode(argument, name):
    """An argument as worker.py takes it: (kind, value, name)."""
    if isinstance(argument, Struct):
        return ("Struct", {k: encode(v, k) for k, v in argument.fields.items()}, name)
    if isinstance(argument, Workspace):
        return ("Workspace", argument.nbytes, argument.name or name)
    if isinstance(argument, In | Out | InOut):
        return (type(argument).__name__, argument.array, argument.name or name)
    if argument is None:
        return ("null", None, name)
    if isinstance(argument, int):
        return ("number", ctypes.c_int64(argument), name)  # for int as well: a register's low half
    if isinstance(argument, ctypes._SimpleCData):
        return ("number", argument, name)
    raise TypeError(
        f"{name} must be In, Out, InOut, Workspace, Struct, an int, None or a ctypes number, "
        f"got {type(argument).__name__}"
    )


def outputs(arguments):
    """The arrays of a call in the order in which worker.py makes their buffers."""
    for argument in arguments:
        if isinstance(argument, Struct):
            yield from outputs(argument.fields.values())
        elif isinstance(argument, In | Out | InOut):
            yield argument


# --- What was found


@dataclass
class Finding:
    """One thing the emulator found. `kind` is a word or two ("RACE", "OUT-OF-BOUNDS", …), `place`
    and `other` are lines of the kernel, innermost first, such as "cuda_forward.cu:120"."""

    kind: str
    kernel: str
    thread: str
    text: str
    place: str = ""
    other: str = ""

    def __str__(self):
        lines = [f"{self.kind} in {self.kernel}, {self.thread}: {self.text}"]
        lines += [f"    at {self.place}"] if self.place else []
        lines += [f"    and {self.other}"] if self.other else []
        return "\n".join(lines)


class EmulatorError(AssertionError):
    """The kernel did something that it must not. `findings` has the details."""

    def __init__(self, message, findings=()):
        super().__init__("\n".join([message, *map(str, findings)]))
        self.findings = list(findings)
        self.kinds = [finding.kind for finding in self.findings]


@functools.cache
def source_lines(library, offset):
    """The source lines of an address in a library; those of the emulator itself are left out."""
    if offset < 0:
        return ""
    command = ["addr2line", "-i", "-e", str(library), hex(offset)]
    told = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    lines = [re.sub(r" \(discriminator \d+\)", "", Path(line).name) for line in told]
    own = {path.name for path in (*HERE.glob("*.*"), *COMMON.glob("*.cuh"))} | {"??"}
    return " <- ".join(line for line in lines if line.split(":")[0] not in own)


def decode_findings(text, library):
    for line in text.splitlines():
        kind, kernel, thread, sentence, place, other = line.split("\t")
        lines = (source_lines(library, int(offset)) for offset in (place, other))
        yield Finding(kind, kernel, thread, sentence, *lines)


# --- Kernels


class Kernel:
    """A .cu file, compiled for the emulator, in a process of its own.

    `source` is relative to the repository's root. mode "fast" computes, with NaN in memory that was
    not written and guard pages around each buffer; mode "check" looks at every access. The process
    is started at the first call, and again after a crash. A launch that takes more than `seconds`
    of processor time is a finding. `text` takes the place of what the file has; `changed` maps
    files, headers of csrc among them, to such texts; `others` are linked with it as they stand;
    `quickly` compiles without optimizing, and findings have no line.
    """

    def __init__(
        self,
        source,
        mode="fast",
        *,
        defines=(),
        text=None,
        changed=None,
        others=(),
        quickly=False,
        seconds=60,
    ):
        self.mode = mode
        self.seconds = seconds
        changed = dict(changed or {}) | ({ROOT / source: text} if text is not None else {})
        self.library = compile_kernel(source, mode, defines, changed, others, quickly)
        self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self.process:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.kill()
            self.process.wait()
            self.process = None

    def call(self, launcher, *arguments, schedule="ascending", seed=0):
        """Calls an `extern "C"` launcher that returns an int; arrays are changed in place.

        Raises EmulatorError where the emulator found something, and where the launcher did not
        return 0. `schedule` is the order in which threads run: "ascending", "descending" (blocks
        too), or "random" by `seed`.
        """
        if self.process is None:
            command = [sys.executable, HERE / "worker.py", self.library]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        encoded = [encode(a, f"argument {i}") for i, a in enumerate(arguments)]
        check = self.mode == "check"
        request = (launcher, encoded, check, schedule, seed, self.seconds)
        status, arrays, text, overrun = self.ask(request, 10 * self.seconds + 60)
        findings = list(decode_findings(text, self.library))
        findings += [
            Finding("OUT-OF-BOUNDS", launcher, "some thread", f"write behind the end of {name}")
            for name in overrun
        ]
        if any(finding.kind == "HANG" for finding in findings):
            self.close()  # it was stopped anywhere, perhaps inside of the runtime
        if findings:
            raise EmulatorError(f"{launcher}: {len(findings)} findings", findings)
        if status:
            raise EmulatorError(f"{launcher} returned {status}")
        for argument, array in zip(outputs(arguments), arrays):
            if not isinstance(argument, In):
                argument.array[...] = array

    def ask(self, request, seconds):
        try:
            pickle.dump(request, self.process.stdin, protocol=5)
            self.process.stdin.flush()
            with selectors.DefaultSelector() as answered:
                answered.register(self.process.stdout, selectors.EVENT_READ)
                if answered.select(seconds):
                    return pickle.load(self.process.stdout)
            problem = f"no answer after {seconds} s"
            self.process.kill()
        except (BrokenPipeError, EOFError):
            problem = "the process ended"
        _, errors = self.process.communicate()
        problem += f", status {self.process.returncode}\n{errors.decode()}"
        self.process = None
        raise EmulatorError(problem)


# --- Arrays


def bf16(x):
    """The bits of x in bf16, rounded to nearest even, as uint16 (numpy has no bf16)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    """The float64 values of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def padded(x, pitch, axis=-1):
    """x with `axis` as long as `pitch`, the new elements NaN: for rows that are longer in memory
    than the kernel may look. Integers, being bits of some float format, are filled with ones."""
    shape = list(x.shape)
    shape[axis] = pitch
    nan = np.nan if x.dtype.kind == "f" else np.iinfo(x.dtype).max
    out = np.full(shape, nan, x.dtype)
    out[tuple(slice(n) for n in x.shape)] = x
    return out
