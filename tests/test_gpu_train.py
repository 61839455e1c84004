# SPDX-License-Identifier: BSD-3-Clause
"""`make gpu-train` without a GPU: what waits for what, what is left for the next call, what comes
back in pieces, the tables of kept runs, and a dry run of it all."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import runs
from gpu import check, train

ROOT = Path(__file__).parents[1]
FASHION = {"data": "fashion-mnist", "model": "alexnet", "batch_size": 128, "dynamic_batch": False}
FACTS = {"dry_run": True, "date": "2026-01-02", "torch": "2", "gpu": None, "alone": []}


def write_run(folder: Path, accuracies, **recipe) -> None:
    """A run as `pywino train classify` leaves it."""
    recipe = FASHION | {"conv": "dense", "seed": 0, "epochs": len(accuracies)} | recipe
    rows = [{"epoch": i, "test_accuracy": a, "seconds": 2.0} for i, a in enumerate(accuracies)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# --------------------------------------------------------------------------------------- the runs


def test_the_runs_are_those_that_are_asked_for():
    found = {job.name: job for job in train.jobs()}
    assert len(found) == len(train.jobs())
    order = [job.group for job in train.jobs()]
    assert list(dict.fromkeys(order)) == ["a", "b", "derain", "deblur", "c", "d", "e"]
    assert [job.name for job in train.jobs() if job.alone] == [
        "fashion-dense-s0",
        "fashion-swr-s0",
        "fashion-dense-dbs-s0",
        "fashion-swr-dbs-s0",
    ]
    names = list(found)
    for job in found.values():
        if job.after:
            assert names.index(job.after) < names.index(job.name)
            assert f"{{work}}/{job.after}" in job.command
        assert job.command.count("{data}/") == 1
        assert f"{{data}}/{job.needs}" in job.command


@pytest.mark.parametrize("job", [*train.jobs(), *train.dry_jobs()], ids=lambda job: job.name)
def test_every_command_is_a_recipe(job, tmp_path, monkeypatch):
    """As far as the first file that is not there."""
    from click.testing import CliRunner

    from pywino.cli.train import train as command

    monkeypatch.chdir(tmp_path)
    words = [word.format(data="no", work="none") for word in job.command.split()]
    result = CliRunner().invoke(command, [*words, "--out", "out"])
    assert result.exit_code == 1, result.output
    assert "there is no" in result.output or "must have" in result.output, result.output


# ----------------------------------------------------------------------------------------- driver


class Scripts(train.Training):
    """Runs Python code instead of commands."""

    def stage(self, job, data, flags):
        from dataclasses import replace

        stage = super().stage(job, data, flags)
        return replace(stage, command=(sys.executable, "-c", job.command))


def job(name, code="", **options):
    options = {"group": "x", "seconds": 30.0, "needs": ""} | options
    return train.Job(name, command=code, **options)


def drive(tmp_path, *found, budget=60.0, most=60.0) -> dict[str, check.Outcome]:
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    run = Scripts(tmp_path / "out", budget, FACTS, work, most)
    return {outcome.stage: outcome for outcome in run.all([], list(found), tmp_path, "")}


WRITE = (
    "import sys; sys.path[:0] = {path!r}; from pathlib import Path; "
    "from test_gpu_train import write_run; write_run(Path({folder!r}), [0.5])"
)


def writing(folder: Path) -> str:
    return WRITE.format(path=[str(ROOT / "tests"), str(ROOT / "benches")], folder=str(folder))


def test_what_starts_from_another_run_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)  # two at once
    first = tmp_path / "work" / "first"
    found = drive(
        tmp_path,
        job("first", "import time; time.sleep(1); " + writing(first)),
        job("second", f"import os; assert os.path.exists({str(first)!r})", after="first"),
        job("orphan", after="elsewhere"),
        job("no data", needs="no/such/file"),
    )
    assert found["first"].status == found["second"].status == "ok"
    assert found["orphan"].status == "skipped: it starts from elsewhere, which is not finished"
    assert found["no data"].status == f"skipped: there is no {tmp_path / 'no/such/file'}"
    again = drive(tmp_path, job("first", "raise SystemExit(1)"))
    assert again["first"].status == "skipped: it was finished before"


def test_runs_are_alone_or_beside_one_another(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    log, lock, running, most = [], threading.Lock(), set(), {}

    def one(self, stage, seconds):
        with lock:
            running.add(stage.name)
            log.append(frozenset(running))
        time.sleep(0.2)
        with lock:
            running.discard(stage.name)
        most[stage.name] = seconds

    monkeypatch.setattr(train.Training, "one", one)
    drive(tmp_path, job("b"), job("a", alone=True), job("c", seconds=5.0), job("d"))
    assert frozenset("a") in log
    assert not any("a" in together and len(together) > 1 for together in log)
    assert max(map(len, log)) == 2
    assert most["c"] == 5
    assert 25 < most["d"] <= 30


def test_what_has_no_time_is_left_for_the_next_call(tmp_path):
    found = drive(tmp_path, job("hangs", "import time; time.sleep(60)", seconds=1.0), budget=21)
    assert found["hangs"].status.startswith("killed: it was not done after 1 s")
    assert drive(tmp_path, job("late"), budget=10)["late"].status == "skipped: no time is left"


def test_pieces(tmp_path, monkeypatch):
    """What is small comes first, then weights of restoring networks, then states that fit; the next
    call takes up what it does not have yet."""
    monkeypatch.setattr(train, "PIECE", 1 << 16)
    work = tmp_path / "work"
    write_run(work / "done", [0.5])
    write_run(work / "half", [0.5], epochs=2)
    write_run(work / "large", [0.5], epochs=2)
    write_run(work / "photos", [0.5])
    (work / "photos" / "samples").mkdir()
    for name, size in (("done", 9), ("half", 100_000), ("large", 500_000)):
        (work / name / "checkpoint.pt").write_bytes(os.urandom(size))
    (work / "photos" / "best.safetensors").write_bytes(b"weights")
    drive(tmp_path, most=0.25)
    out = tmp_path / "out"
    pieces = sorted(out.glob("work.tar.*"))
    assert [piece.name for piece in pieces] == ["work.tar.0", "work.tar.1"]
    assert all(piece.stat().st_size <= 1 << 16 for piece in pieces)
    (tmp_path / "next" / "done").mkdir(parents=True)
    runs.unpack(out, tmp_path / "next")
    files = {str(p.relative_to(tmp_path / "next")) for p in (tmp_path / "next").rglob("*.*")}
    small = {f"{n}/{f}" for n in ("half", "large", "photos") for f in ("recipe.json", "log.jsonl")}
    assert files == {*small, "half/checkpoint.pt", "photos/best.safetensors"}
    for name in ("half/checkpoint.pt", "half/recipe.json"):
        assert (tmp_path / "next" / name).read_bytes() == (work / name).read_bytes()
    (work / "half" / "checkpoint.pt").unlink()
    drive(tmp_path, most=0.25)  # less than before: no old piece stays
    assert [piece.name for piece in sorted(out.glob("work.tar.*"))] == ["work.tar.0"]


# ----------------------------------------------------------------------------------------- tables


@pytest.fixture
def kept(tmp_path):
    for seed, last, conv in ((0, 0.92, "dense"), (1, 0.93, "winograd")):  # the same network
        write_run(tmp_path / f"dense-{seed}", [0.9, last], seed=seed, conv=conv)
    pruned = {"sparsity": [0.3, 0.6, 0.8], "prune_epochs": 2, "epochs": 1, "conv": "winograd_relu"}
    write_run(tmp_path / "swr", [0.9, 0.1, 0.91, 0.1, 0.915, 0.1, 0.899], **pruned)
    write_run(tmp_path / "half", [0.1, 0.2], epochs=3, conv="winograd_relu", dynamic_batch=True)
    write_run(tmp_path / "b64", [0.8, 0.9], batch_size=64)
    member = {"epochs": 0, "sparsity": [0.3], "prune_epochs": 1, "conv": "winograd_relu"}
    write_run(tmp_path / "stack" / "alexnet", [0.5], dynamic_batch=True, **member)
    stack = {"members": ["alexnet", "all_cnn_c"], "test_accuracy": 0.934}
    (tmp_path / "stack" / "stack.json").write_text(json.dumps(stack))
    return tmp_path


def test_accuracies_by_hand(kept):
    text = runs.markdown("accuracy", kept)
    fashion = "| Fashion-MNIST | AlexNet"
    dense = "2 | 92.50 (92.00–93.00, n = 2) |  |  |  | 90.83 at 30 % |"
    assert f"{fashion}, dense (C-CNN) | {dense}" in text
    assert f"{fashion}, Winograd-ReLU | 1 | 90.00 | 91.00 | 91.50 | 89.90 |  |" in text
    assert f"{fashion}, Winograd-ReLU, DBS |  |  |  |  |  |  |" in text  # not finished
    assert "| stack, Winograd-ReLU, DBS |  |  | 93.40 |  |  | 93.49 at 30 % |" in text
    batches = runs.markdown("accuracy_by_batch", kept)
    mean = "92.50 (92.00–93.00, n = 2)"
    assert f"{fashion}, dense (C-CNN) | 90.00 | {mean} |  |  |  |  |" in batches


def test_keeping_runs(kept, tmp_path):
    (kept / "dense-0" / "checkpoint.pt").write_bytes(b"large")
    assert runs.main([str(kept), "--kept", str(tmp_path / "kept")]) == 0
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert names == {"dense-0", "dense-1", "swr", "b64", "stack"}
    files = {path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert files == {"recipe.json", "log.jsonl", "stack.json"}
    assert runs.markdown("accuracy", tmp_path / "kept") == runs.markdown("accuracy", kept)
    assert runs.main([str(tmp_path / "kept" / "swr"), "--kept", str(tmp_path / "none")]) == 1


def test_the_kept_runs_are_small_and_whole():
    kept = {path.name: runs.read(path) for path in runs.KEPT.glob("*") if path.is_dir()}
    assert kept
    assert None not in kept.values()
    # Whole: to its last epoch, or stopped and then gone on from by another run.
    starts = [run.recipe.get("init") or "" for run in kept.values()]
    stopped = set(kept) - {run.name for run in runs.read_all(runs.KEPT)}
    assert stopped <= {Path(start).parent.name for start in starts}
    for path in runs.KEPT.rglob("*"):
        assert path.is_dir() or path.name in runs.SMALL
        assert path.stat().st_size < 200_000


# --------------------------------------------------------------------------------------- dry run


@pytest.mark.slow
def test_dry_run(tmp_path):
    if "PYWINO_GPU_CHECK" in os.environ:
        pytest.skip("a driver runs this test, and would run itself")
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "benches" / "gpu" / "train.py"), "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYWINO", "PYTEST"))}
    done = subprocess.run(
        # A busy machine must not be taken for a run that hangs.
        [*command, "--dry-run", "--budget", "3000"],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    record = json.loads((out / "machine.json").read_text())
    assert {run["stage"]: run["status"] for run in record["runs"]} == {
        job.name: "ok" for job in train.dry_jobs()
    }
    names = {path.name for path in out.iterdir()}
    assert names >= {"log.txt", "machine.json", "tables.md", "work.tar.0"}
    assert len(names) <= 8
    assert all(path.stat().st_size <= 16 << 20 for path in out.iterdir())
    page = (out / "tables.md").read_text()
    assert "A dry run: no number here is a result." in page
    assert "| fashion-swr-dbs-s0-pruned | ok | 1 of 1 |" in page
    runs.unpack(out, tmp_path / "work")
    assert {path.name for path in (tmp_path / "work").iterdir()} == {
        job.name for job in train.dry_jobs()
    }
    assert (tmp_path / "work" / "derain" / "last.safetensors").exists()


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    seen = {"torch": "2", "capability": None, "name": None}
    monkeypatch.setattr(check, "probe", lambda: seen)
    with pytest.raises(SystemExit, match="torch 2 sees no CUDA device"):
        train.main(["--out", str(tmp_path)])
    monkeypatch.setitem(seen, "capability", [9, 0])
    with pytest.raises(SystemExit, match=r"no run f; there are a, .*cifar10-dense-s0"):
        train.main(["--out", str(tmp_path), "--runs", "a,f"])
