# SPDX-License-Identifier: BSD-3-Clause
"""Trains pywino's models on the GPU of this machine, in one go: `make gpu-train OUT=folder`.

    python benches/gpu/train.py --out OUT [--runs a,b] [--budget SECONDS] [--data DATA]
        [--resume OUT] [--most MIB] [--dry-run]

Every run is a `pywino train` command in a process and a folder of its own. What is not done when
the time is over goes on in the next call. docs/gpu_train.md says what comes out, and where data are
looked for. This process imports neither torch nor pywino.
"""

import argparse
import io
import json
import os
import random
import signal
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import runs
import tables
from gpu import check, report
from gpu.check import ROOT, Outcome, Stage, python

BUDGET_S = 540  # of all runs
MOST_MIB = 60  # of what comes back in pieces
PIECE = 12 << 20
LAST_S = 20  # no run is begun with less time left
BESIDE = 8  # runs at once, where there are two cores for each
SMALL = (*runs.SMALL, "kernels.png")


@dataclass(frozen=True)
class Job:
    """A `pywino train` command. {data} and {work} in it are the folders of data and of runs."""

    name: str  # of its folder
    group: str
    command: str
    seconds: float  # at most, in a call
    needs: str  # in the folder of data
    after: str = ""  # the run whose weights it starts from
    alone: bool = False  # nothing runs beside it: its seconds are a measurement


_KINDS = {
    "dense": "--conv dense",
    "swr": "--conv winograd_relu",
    "dense-dbs": "--conv dense --dbs",
    "swr-dbs": "--conv winograd_relu --dbs",
}
_FASHION = "classify --data fashion-mnist --root {data}/fashion-mnist --model alexnet"
_CIFAR = "classify --data folder --root {data}/cifar10.tar.xz --model vgg16 --epochs 20 --seed 0"
_PHOTOS = "ai_benchmark-0.1.2-py3-none-any.whl"
_RESTORE = "--data {data}/" + _PHOTOS + " --only */enhancement/* --only */classification/*"


def _trained(group: str, kind: str, seed: int, alone: bool = False) -> Job:
    command = f"{_FASHION} {_KINDS[kind]} --epochs 12 --seed {seed}"
    return Job(f"fashion-{kind}-s{seed}", group, command, 200, "fashion-mnist", alone=alone)


def _pruned(group: str, kind: str, seed: int) -> Job:
    first = f"fashion-{kind}-s{seed}"
    command = f"{_FASHION} {_KINDS[kind]} --epochs 0 --sparsity .3,.6,.8 --seed {seed}"
    command += f" --init {{work}}/{first}/last.safetensors --plot-kernels"
    return Job(f"{first}-pruned", group, command, 150, "fashion-mnist", first)


def _stacked(kind: str) -> list[Job]:
    name, own = f"fashion-stack-{kind}-s0", f"{_FASHION} {_KINDS[kind]} --stack --width 0.5"
    return [
        Job(name, "c", f"{own} --epochs 6", 300, "fashion-mnist"),
        Job(
            f"{name}-pruned",
            "c",
            f"{own} --epochs 0 --sparsity .3 --init {{work}}/{name}",
            150,
            "fashion-mnist",
            name,
        ),
    ]


def jobs() -> list[Job]:
    """All runs, the more valuable ones first."""
    rain = "derain --rain mixed --loss ssim --loss l1 --stages 3 --schedule cosine"
    return [
        *(_trained("a", kind, 0, alone=True) for kind in _KINDS),
        *(_pruned("b", kind, 0) for kind in _KINDS),
        Job(
            "derain",
            "derain",
            f"{rain} {_RESTORE} --init pywino-rain --seed 3 --batch-size 16 --crop 96 --epochs 40 "
            "--steps 200 --validate 40",
            500,
            _PHOTOS,
        ),
        Job(
            "deblur",
            "deblur",
            f"deblur {_RESTORE} --init pywino-blur --balance --lr 5e-4 --batch-size 16 --epochs 80 "
            "--steps 250 --validate 40 --seed 2",
            500,
            _PHOTOS,
        ),
        Job(
            "deblur-whole",
            "deblur",
            f"deblur {_RESTORE} --phase whole --init {{work}}/deblur/last.safetensors --balance "
            "--epochs 10 --steps 100 --validate 40 --seed 3",
            300,
            _PHOTOS,
            "deblur",
        ),
        *_stacked("swr-dbs"),
        *_stacked("dense"),
        *(
            job
            for seed in (1, 2)
            for kind in _KINDS
            for job in (_trained("d", kind, seed), _pruned("d", kind, seed))
        ),
        *(
            Job(
                f"fashion-{kind}-b{size}-s0",
                "e",
                f"{_FASHION} {_KINDS[kind]} --epochs 12 --batch-size {size} --seed 0",
                300,
                "fashion-mnist",
            )
            for kind in ("swr", "dense")
            for size in (64, 256, 512, 1024)
        ),
        *(
            Job(f"cifar10-{kind}-s0", "e", f"{_CIFAR} {_KINDS[kind]}", 400, "cifar10.tar.xz")
            for kind in ("dense", "swr", "swr-dbs")
        ),
    ]


# ----------------------------------------------------------------------------------------- dry run

_DRY = (
    *("fashion-dense-s0", "fashion-swr-dbs-s0", "fashion-swr-dbs-s0-pruned"),
    *("fashion-stack-swr-dbs-s0", "derain", "deblur", "deblur-whole"),
)


def dry_jobs() -> list[Job]:
    """One of each sort, on a few random pictures."""
    found = []
    for job in jobs():
        if job.name not in _DRY:
            continue
        if job.command.startswith("classify"):
            own = "--data folder --root {data}/pictures --batch-size 16"
            own += " --sparsity .5" if job.after else " --epochs 1"
        else:
            own = "--epochs 1 --steps 1 --batch-size 2 --crop 32 --validate 1 --largest 32"
            own += " --only *.ppm"
            job = replace(job, command=job.command.replace(_PHOTOS, "photos"))
        found.append(replace(job, command=f"{job.command} {own}", needs=""))
    return found


def write_dry_data(folder: Path) -> None:
    """Random pictures, as PPM files."""
    generator = random.Random(0)
    places = [f"pictures/{part}/{label}" for part in ("train", "test") for label in "ab"]
    for place in (*places, "photos"):
        (folder / place).mkdir(parents=True)
        size = 64 if place == "photos" else 28
        for i in range(12):
            pixels = generator.randbytes(3 * size * size)
            (folder / place / f"{i}.ppm").write_bytes(b"P6 %d %d 255\n" % (size, size) + pixels)


# ------------------------------------------------------------------------------------------ driver


class Training(check.Run):
    """Runs in the folder `work`; what is small, and the state of what is not done, in `out`."""

    def __init__(self, out: Path, budget: float, facts: dict, work: Path, most: float):
        super().__init__(out, budget, facts)
        self.work, self.most = work, most * 2**20
        self.lock = threading.RLock()  # an interruption may come while it is held

    def all(self, chosen: list[Stage], jobs: list[Job], data: Path, flags: str) -> list[Outcome]:
        """First the stages, then the runs that are alone, one by one, then the others beside one
        another."""
        for stage in chosen:
            self.one(stage, min(stage.share, self.left()))
        stages = {job.name: self.stage(job, data, flags) for job in jobs}
        for job in jobs:
            if job.alone:
                self.train(stages[job.name])
        started: dict[str, Future] = {}
        with ThreadPoolExecutor(max(1, min(BESIDE, (os.cpu_count() or 2) // 2))) as pool:
            for job in jobs:
                if not job.alone:
                    before = started.get(job.after)  # has a place in the pool already
                    started[job.name] = pool.submit(self.train, stages[job.name], before)
        for future in started.values():
            future.result()
        self.write()
        return self.outcomes

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def stage(self, job: Job, data: Path, flags: str) -> Stage:
        places = {"{data}": str(data), "{work}": str(self.work)}
        words = f"train {job.command} {flags} --resume --out {{work}}/{job.name}".split()
        for name, place in places.items():
            words = [word.replace(name, place) for word in words]

        def why_not() -> str | None:
            if runs.finished(ROOT / self.work / job.name):
                return "it was finished before"
            if job.needs and not (ROOT / data / job.needs).exists():
                return f"there is no {data / job.needs}"
            if job.after and not runs.finished(ROOT / self.work / job.after):
                return f"it starts from {job.after}, which is not finished"
            if self.left() < LAST_S:
                return "no time is left"
            return None

        return Stage(job.name, python("pywino", *words), job.seconds, needs=why_not)

    def train(self, stage: Stage, before: Future | None = None) -> None:
        if before is not None:
            before.result()
        # A little is kept for writing what there is.
        self.one(stage, min(stage.share, max(1.0, self.left() - 10)))
        self.write()

    def environment(self, stage: Stage) -> dict[str, str]:
        environment = super().environment(stage)
        del environment["PYWINO_PLAN"]  # each run has its own, and keeps it
        return environment

    # ------------------------------------------------------------------------------------ results

    def write(self) -> None:
        """Everything that is known so far."""
        with self.lock:
            facts = {
                **self.facts,
                "runs": [
                    {k: v for k, v in vars(outcome).items() if k != "lines"}
                    for outcome in self.outcomes
                ],
            }
            tables.write_whole(self.out / "machine.json", json.dumps(facts, indent=1) + "\n")
            tables.write_whole(self.out / "tables.md", page(self.facts, self.outcomes, self.work))
            pieces = list(self.pieces())
            for path in self.out.glob(runs.PIECES):
                if int(path.suffix[1:]) >= len(pieces):
                    path.unlink()
            for i, piece in enumerate(pieces):
                tables.write_whole(self.out / f"work.tar.{i}", piece)

    def pieces(self):
        """A tar archive of the runs, in pieces: what is small, the weights of the restoring
        networks, then the states of the runs that are not done, the first ones first, as long as
        they fit."""
        folders = [path for path in sorted((ROOT / self.work).glob("*")) if path.is_dir()]
        order = {outcome.stage: i for i, outcome in enumerate(self.outcomes)}
        folders.sort(key=lambda path: order.get(path.name, len(order)))
        groups = []
        for folder in folders:
            sheets = sorted(folder.glob("samples/*.png"))[-1:]
            groups.append([f for name in SMALL for f in sorted(folder.rglob(name))] + sheets)
        for folder in folders:
            if (folder / "samples").exists():
                groups.append(sorted(folder.glob("*.safetensors")))
        for folder in folders:
            if not runs.finished(folder):
                states = sorted(folder.rglob("checkpoint.pt"))
                states += sorted(folder.rglob("*.safetensors"))
                groups.append(states)
        buffer, names = io.BytesIO(), set()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for group in groups:
                # Read first: a run that goes on may replace a file at any moment.
                contents = {path: path.read_bytes() for path in group if path not in names}
                size = sum(len(content) + 1024 for content in contents.values())
                if buffer.tell() + size + 10240 > self.most:
                    continue
                names |= set(contents)
                for path, content in contents.items():
                    member = tarfile.TarInfo(str(path.relative_to(ROOT / self.work)))
                    member.size, member.mtime = len(content), int(time.time())
                    archive.addfile(member, io.BytesIO(content))
        content = buffer.getvalue()
        for start in range(0, len(content), PIECE):
            yield content[start : start + PIECE]


def page(facts: dict, outcomes: list[Outcome], work: Path) -> str:
    """tables.md"""
    lines = []
    for outcome in outcomes:
        run = runs.read(ROOT / work / outcome.stage)
        if run is None:
            lines.append([outcome.stage, outcome.status, "", "", "", ""])
            continue
        last = run.rows[-1]
        score = f"{last['psnr']:.2f} dB (input {last['input_psnr']:.2f})" if "psnr" in last else ""
        score = f"{last['test_accuracy']:.2%}" if "test_accuracy" in last else score
        if run.stack is not None:
            score = f"{run.stack['test_accuracy']:.2%}, stacked"
        seconds = [row["seconds"] for row in run.rows[1:]]
        each = f"{sum(seconds) / len(seconds):.2f}" if seconds else ""
        alone = "alone" if outcome.stage in facts["alone"] else ""
        epochs = f"{len(run.rows)} of {run.epochs}"
        lines.append([outcome.stage, outcome.status, epochs, score, each, alone])
    head = ["run", "result", "epochs", "score", "s an epoch, without the first", ""]
    parts = [
        "# gpu-train",
        f"{facts['gpu'] or 'CPU'}, torch {facts['torch']}, {facts['date'][:10]}.",
        "A dry run: no number here is a result." if facts["dry_run"] else "",
        report.table(head, lines),
        "Seconds of runs that were not alone are no measurement: the GPU was shared.",
        *(f"## {name}\n\n{runs.markdown(name, ROOT / work)}" for name in runs.TABLES),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--runs", help="only these, by group or name, separated by commas")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds in all")
    parser.add_argument("--data", type=Path, default=Path(".cache/data"), help="folder of data")
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/gpu-train"), help="folder of the runs"
    )
    parser.add_argument("--resume", type=Path, help="the --out of an earlier call, to go on from")
    parser.add_argument("--most", type=float, default=MOST_MIB, help="MiB of all work.tar.*")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes on the CPU: shows that it runs"
    )
    options = parser.parse_args(arguments)
    seen = check.probe()
    if seen["capability"] is None and not options.dry_run:
        sys.exit(
            f"gpu-train: torch {seen['torch']} sees no CUDA device; it must be run where there is "
            "one, or with --dry-run (make gpu-train DRY=1)"
        )
    chosen = dry_jobs() if options.dry_run else jobs()
    if options.runs:
        names = set(options.runs.split(","))
        known = {word for job in chosen for word in (job.group, job.name)}
        if names - known:
            sys.exit(
                f"gpu-train: no run {', '.join(sorted(names - known))}; there are "
                f"{', '.join(sorted(known))}"
            )
        chosen = [job for job in chosen if {job.group, job.name} & names]
    data, work = options.data, options.work
    flags, before = "--device cuda --threads 2 --checkpoint-seconds 20", []
    scratch = tempfile.TemporaryDirectory()
    if options.dry_run:
        flags = "--device cpu --threads 1"
        data, work = Path(scratch.name) / "data", Path(scratch.name) / "work"
        write_dry_data(data)
    else:
        every = check.stages(False, check.architecture(seen["capability"]))
        before = [replace(stage, share=150) for stage in every if stage.name.startswith("build")]
    (ROOT / work).mkdir(parents=True, exist_ok=True)
    if options.resume:
        runs.unpack(options.resume, ROOT / work)
    facts = {
        "dry_run": options.dry_run,
        "budget_s": options.budget,
        "date": check.now(),
        "torch": seen["torch"],
        "gpu": seen["name"],
        "alone": [job.name for job in chosen if job.alone],
    }
    run = Training(options.out.resolve(), options.budget, facts, work, options.most)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, run.interrupted)
    outcomes = run.all(before, chosen, data, flags)
    scratch.cleanup()
    print((run.out / "tables.md").read_text(encoding="utf-8"))
    return 1 if any(outcome.status.startswith("failed") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
