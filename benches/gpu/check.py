# SPDX-License-Identifier: BSD-3-Clause
"""Proves and measures pywino on the GPU of this machine, in one go: `make gpu-check OUT=folder`.

    python benches/gpu/check.py --out OUT [--stages a,b] [--budget SECONDS] [--dry-run]

Every stage is a process of its own with its share of the time: one that crashes, hangs or loses the
CUDA context costs the others nothing. Results are written whole after each stage. docs/gpu_check.md
says what comes out. This process imports neither torch nor pywino.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tables
from gpu import report, rows

BENCHES = Path(__file__).resolve().parents[1]
ROOT = BENCHES.parent

BUDGET_S = 450  # of all stages; "less than 8 minutes" with the building of tables
SKIPPED = 77  # a stage's exit status that says: nothing to do; its last line is the reason
NO_TESTS = 5  # pytest's, where nothing was collected
PATIENCE_S = 3  # from the polite signal to the other one


@dataclass(frozen=True)
class Stage:
    """A command with a share of the time.

    In `command`, {out}, {journal} and {until} are replaced; {until} is when it should end by
    itself, as time.time() counts, a little before it is killed.
    """

    name: str
    command: tuple[str, ...]
    share: float
    beside: str = ""  # consecutive stages with the same word run at once: none of them takes times
    result: str = ""  # the file in OUT that its journal of rows goes to
    text: bool = False  # its output goes to tests.txt too
    needs: Callable[[], str | None] = lambda: None  # why it cannot run
    environment: dict = field(default_factory=dict)


@dataclass
class Outcome:
    stage: str
    status: str  # "ok", "skipped: …", "failed: …", "killed: …"
    seconds: float = 0.0
    started: str = ""
    clocks: str | None = None
    starts: int = 1
    lines: list = field(default_factory=list, repr=False)

    @property
    def good(self) -> bool:
        return self.status == "ok" or self.status.startswith("skipped")


def python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def exists(path: str) -> Callable[[], str | None]:
    return lambda: None if (ROOT / path).exists() else f"there is no {path} in this checkout"


def is_built() -> bool:
    return (ROOT / "pywino" / "_C.so").exists()


# More checks that run beside the test suite: (name, pytest's arguments, what it needs). A file
# joins by a line here.
CHECKS = (("instructions", ("tests/emulator", "-m", "gpu"), exists("tests/emulator")),)


def stages(dry: bool, architecture: str | None) -> list[Stage]:
    """What there is to do, in order."""
    flags = ("--dry-run",) if dry else ()
    measured = ("--out", "{out}", "--until", "{until}", *flags)
    pytest = ("-q" if dry else "-v", "-ra", "--tb=short", "-p", "no:cacheprovider")
    workers = ("-n", "6") if importlib.util.find_spec("xdist") and not dry else ()
    small = ("--until", "{until}", *flags)
    # The dry run shows that the command works, on one small file.
    suite = ("tests/test_testing.py",) if dry else ("tests", "--ignore=tests/emulator")
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    as_is = lambda: "a dry run uses the library that is there" if dry else None  # noqa: E731
    building = {"TORCH_CUDA_ARCH_LIST": architecture} if architecture else {}
    return [
        Stage("machine", python("gpu.machine", "--out", "{out}", *flags), 40),
        Stage("build", build, 95, needs=as_is, environment=building),
        # Where nvcc does not take the CUDA sources: the processor's kernels, and Triton's beside.
        Stage(
            "build-cpu",
            build,
            20,
            needs=lambda: as_is() or ("the first build did well" if is_built() else None),
            environment={"PYWINO_CUDA": "0"},
        ),
        Stage("doctor", python("pywino", "doctor"), 15),
        *(
            Stage(
                name,
                python("pytest", *pytest, *arguments),
                90,
                beside="checks",
                text=True,
                needs=needs,
            )
            for name, arguments, needs in CHECKS
        ),
        Stage("memcheck", python("gpu.smoke", "--tool", "memcheck", *small), 90, beside="checks"),
        Stage(
            "racecheck",
            python("gpu.smoke", "--tool", "racecheck", *small),
            90,
            beside="checks",
            needs=lambda: (
                "a dry run has no tool, and memcheck's calls are the same" if dry else None
            ),
        ),
        Stage(
            "tests-gpu",
            python("pytest", *pytest, *suite, "-m", "gpu"),
            90,
            beside="checks",
            text=True,
        ),
        Stage(
            "tests",
            python("pytest", *pytest, *workers, *suite, "-m", "not gpu"),
            90,
            beside="checks",
            text=True,
        ),
        *(
            Stage(
                name,
                python("gpu.cudnn", *measured, "--journal", "{journal}", *extra),
                60,
                result="cudnn.json",
            )
            for name, extra in (("cudnn", ()), ("cudnn-benchmark", ("--benchmark",)))
        ),
        Stage(
            "ours", python("gpu.ours", *measured, "--journal", "{journal}"), 75, result="ours.json"
        ),
        Stage("counters", python("gpu.counters", *measured), 30),
    ]


class Log:
    """log.txt and the terminal: a line at a time, with the stage's name and the time."""

    def __init__(self, path: Path):
        self.file = path.open("a", encoding="utf-8")
        self.lock = threading.Lock()
        self.start = time.monotonic()

    def line(self, name: str, text: str, quiet: bool = False) -> None:
        line = f"{time.monotonic() - self.start:6.1f} {name:>15} | {text.rstrip()}"
        with self.lock:
            self.file.write(line + "\n")
            self.file.flush()
            if not quiet:
                print(line, flush=True)


class Run:
    """One run of the stages into a folder."""

    def __init__(self, out: Path, budget: float, facts: dict):
        self.out, self.facts = out, facts
        out.mkdir(parents=True, exist_ok=True)
        self.log = Log(out / "log.txt")
        self.end = time.monotonic() + budget
        self.outcomes: list[Outcome] = []
        self.processes: set[subprocess.Popen] = set()
        self.texts: dict[str, list[str]] = {}
        self.scratch = tempfile.TemporaryDirectory()

    # ------------------------------------------------------------------------------------ stages

    def all(self, chosen: list[Stage]) -> list[Outcome]:
        groups = grouped(chosen)
        while groups:
            # Time that a stage did not need is shared by those behind it.
            share = max(stage.share for stage in groups[0])
            total = sum(max(stage.share for stage in group) for group in groups)
            seconds = max(0.0, self.end - time.monotonic()) * share / total
            group = groups.pop(0)
            threads = [threading.Thread(target=self.one, args=(stage, seconds)) for stage in group]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.write()
        return self.outcomes

    def one(self, stage: Stage, seconds: float) -> Outcome:
        outcome = Outcome(stage.name, "", started=now(), clocks=clocks())
        start = time.monotonic()
        try:
            reason = stage.needs()
            if reason is None:
                text = f"starts, {seconds:.0f} s at most; {outcome.clocks or ''}"
                self.log.line(stage.name, text)
                journal = self.out / f"{stage.name}.jsonl"
                journal.unlink(missing_ok=True)
                self.attempts(stage, outcome, start + seconds, journal)
                if stage.result:
                    rows.settle(journal, stage.name, self.out / stage.result)
            else:
                outcome.status = f"skipped: {reason}"
        except Exception as error:  # a bug of this file, too, costs one stage
            outcome.status = f"failed: {type(error).__name__}: {error}"
        outcome.seconds = time.monotonic() - start
        if stage.text:
            self.texts[stage.name] = [f"===== {stage.name}: {outcome.status}", *outcome.lines]
        self.log.line(stage.name, f"{outcome.status} ({outcome.seconds:.1f} s)")
        self.outcomes.append(outcome)
        return outcome

    def attempts(self, stage: Stage, outcome: Outcome, end: float, journal: Path) -> None:
        """Starts the stage, and again where it ended badly but had written rows: it goes on behind
        the row that ended it."""
        written = -1
        while True:
            self.process(stage, outcome, end, journal)
            lines = len(rows.read(journal))
            again = outcome.status.startswith("failed") and stage.result and lines > written
            if not again or end - time.monotonic() < PATIENCE_S:
                return
            written = lines
            outcome.starts += 1
            self.log.line(stage.name, f"{outcome.status}; starts again")

    def process(self, stage: Stage, outcome: Outcome, end: float, journal: Path) -> None:
        seconds = end - time.monotonic()
        command = list(stage.command)
        until = time.time() + seconds - max(2.0, 0.08 * seconds)
        values = {"out": self.out, "journal": journal, "until": f"{until:.1f}"}
        for name, value in values.items():
            command = [part.replace(f"{{{name}}}", str(value)) for part in command]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment(stage),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a group of its own, which ends as a whole
        )
        self.processes.add(process)
        reader = threading.Thread(target=self.read, args=(stage, outcome, process), daemon=True)
        reader.start()
        try:
            status = process.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            stop(process)
            outcome.status = f"killed: it was not done after {seconds:.0f} s"
            status = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the stage left running
        reader.join(PATIENCE_S)
        self.processes.discard(process)
        if status is not None:
            outcome.status = verdict(status, outcome.lines)

    def read(self, stage: Stage, outcome: Outcome, process: subprocess.Popen) -> None:
        for line in process.stdout:
            outcome.lines.append(line.rstrip())
            self.log.line(stage.name, line, quiet=stage.text)

    def environment(self, stage: Stage) -> dict[str, str]:
        old = os.environ.get("PYTHONPATH")
        path = [str(BENCHES), str(ROOT), *([old] if old else [])]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "PYWINO_GPU_CHECK": "1",  # its own tests do not start it again
            # Plans of this run: those in the user's cache may have been measured on a busy machine.
            "PYWINO_PLAN": str(Path(self.scratch.name) / "plans.json"),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(self.scratch.name) / "inductor"),
            "TRITON_CACHE_DIR": str(Path(self.scratch.name) / "triton"),
            **stage.environment,
        }

    # ------------------------------------------------------------------------------------ results

    def write(self) -> None:
        """Everything that is known so far."""
        record = {
            **self.facts,
            "stages": [
                {k: v for k, v in vars(outcome).items() if k != "lines"}
                for outcome in self.outcomes
            ],
        }
        path = self.out / "machine.json"
        machine = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        tables.write_whole(path, json.dumps({**machine, "run": record}, indent=1) + "\n")
        text = "\n".join(line for lines in self.texts.values() for line in [*lines, ""])
        tables.write_whole(self.out / "tests.txt", text + "\n")
        try:
            page = report.page(self.out)
        except Exception:  # the rows are there, and tables can be made of them later
            page = f"The tables could not be made:\n\n{traceback.format_exc()}"
        tables.write_whole(self.out / "tables.md", page)

    def interrupted(self, number: int, _frame) -> None:
        """Ctrl-C, or the machine's owner wants it back."""
        for process in list(self.processes):
            stop(process)
        self.outcomes.append(Outcome("run", f"failed: {signal.Signals(number).name}"))
        with contextlib.suppress(Exception):
            self.write()
        os._exit(1)


def grouped(chosen: list[Stage]) -> list[list[Stage]]:
    """Lists of consecutive stages that run at once."""
    groups: list[list[Stage]] = []
    for stage in chosen:
        if stage.beside and groups and groups[-1][0].beside == stage.beside:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def verdict(status: int, lines: list[str]) -> str:
    last = next((line for line in reversed(lines) if line.strip()), "")
    if status == 0:
        return "ok"
    if status == SKIPPED:
        return f"skipped: {last}"
    if status == NO_TESTS and "pytest" not in last and ("deselected" in last or "no tests" in last):
        return "skipped: no test is meant for it"
    if status < 0:
        return f"failed: signal {signal.Signals(-status).name}"
    return f"failed: exit status {status}; {last[:200]}"


def stop(process: subprocess.Popen) -> None:
    """Ends a stage with all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def clocks() -> str | None:
    """Clocks, power and temperature as they are; nothing is set."""
    if not shutil.which("nvidia-smi"):
        return None
    query = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    return None


def probe() -> dict:
    """What torch sees, asked in another process."""
    code = (
        "import json, torch; c = torch.cuda.is_available(); print(json.dumps({'torch': torch."
        "__version__, 'capability': torch.cuda.get_device_capability() if c else None, "
        "'name': torch.cuda.get_device_name() if c else None}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"gpu-check: {sys.executable} cannot import torch:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def architecture(capability: list[int]) -> str:
    """For TORCH_CUDA_ARCH_LIST. The "a" adds what only this architecture has (wgmma)."""
    return f"{capability[0]}.{capability[1]}" + "a" * (capability[0] >= 9)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--stages", help="only these, by name, separated by commas")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds of all stages")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes on the CPU: shows that it runs"
    )
    options = parser.parse_args(arguments)
    seen = probe()
    capability = seen["capability"]
    if capability is None and not options.dry_run:
        sys.exit(
            f"gpu-check: torch {seen['torch']} sees no CUDA device; it must be run where there is "
            "one, or with --dry-run (make gpu-check DRY=1)"
        )
    chosen = stages(options.dry_run, None if options.dry_run else architecture(capability))
    if options.stages:
        names = options.stages.split(",")
        unknown = sorted(set(names) - {stage.name for stage in chosen})
        if unknown:
            known = ", ".join(stage.name for stage in chosen)
            sys.exit(f"gpu-check: no stage {', '.join(unknown)}; there are {known}")
        chosen = [stage for stage in chosen if stage.name in names]
    facts = {"dry_run": options.dry_run, "budget_s": options.budget, "date": now()}
    run = Run(options.out.resolve(), options.budget, facts)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, run.interrupted)
    outcomes = run.all(chosen)
    print((run.out / "tables.md").read_text(encoding="utf-8").split("## Failed or wrong")[0])
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
