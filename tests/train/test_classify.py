# SPDX-License-Identifier: BSD-3-Clause
"""Training runs on small random pictures: what they write, that they resume exactly after a kill,
and what they refuse."""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pywino import WinogradReLUConv2d, planner
from pywino.models import WeightedAverageStack
from pywino.optim import MicroBatches
from pywino.pruning import Pruner
from pywino.train import (
    Listener,
    Recipe,
    classify,
    classify_stack,
    load_checkpoint,
    save_checkpoint,
)
from pywino.train.run import Run

# Sourced by the processes that are killed too.
SETUP = """
import torch
from pywino.data import Images
from pywino.train import Recipe, classify

def pictures(n, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    pixels = torch.randint(0, 180, (n, 1, 12, 12), generator=generator, dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):  # a bright bar tells the class
        pixels[i, 0, 1 + 4 * label : 3 + 4 * label] += 60
    return Images(pixels, labels, ("a", "b", "c"))

DATA = pictures(360, 0), pictures(60, 1)
RECIPE = Recipe(model="all_cnn_c", width=0.1, dropout=0.1, epochs=3, batch_size=16, lr=0.05,
                dynamic_batch=True, every=1, augment=True, root="here", data="folder")
"""
namespace = {}
exec(SETUP, namespace)
MEMBERS = ("resnet32", "convpool_cnn_c", "all_cnn_c")
DATA, RECIPE = namespace["DATA"], namespace["RECIPE"]


def recipe(**changes):
    return Recipe(**(RECIPE.as_dict() | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (folder, rows)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYWINO_PLAN", "static")
        planner.reset()
        rows = classify(RECIPE, out, data=DATA)
    torch.set_num_threads(threads)
    return out, rows


def test_it_learns(whole):
    _, rows = whole
    assert rows[-1]["test_accuracy"] > 0.9
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["epoch"] for row in rows] == [0, 1, 2]


def test_files(whole):
    out, rows = whole
    names = {path.name for path in out.iterdir()}
    assert names >= {"recipe.json", "checkpoint.pt", "last.safetensors", "best.safetensors"}
    assert Recipe(**json.loads((out / "recipe.json").read_text())) == RECIPE
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log == rows
    with open(out / "curves.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["test_accuracy"]) for row in table] == [r["test_accuracy"] for r in rows]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not [name for name in names if name.startswith(".")]


def test_saved_weights_are_those_of_the_rows(whole):
    out, rows = whole
    model = RECIPE.build(3, 1).eval()
    for name, row in (
        ("last", rows[-1]),
        ("best", max(rows, key=lambda row: row["held_out_accuracy"])),
    ):
        model.load_state_dict(load_file(out / f"{name}.safetensors"))
        x, y = DATA[1].batch(range(60))
        with torch.no_grad():
            assert float((model(x).argmax(1) == y).double().mean()) == row["test_accuracy"]


def without_times(rows):
    return [{name: v for name, v in row.items() if name != "seconds"} for row in rows]


def test_the_same_seed_gives_the_same_run(whole, tmp_path):
    torch.set_num_threads(1)
    rows = classify(recipe(epochs=3), tmp_path / "again", data=DATA)
    assert without_times(rows) == without_times(whole[1])
    other = classify(recipe(seed=1), tmp_path / "other", data=DATA)
    assert without_times(other) != without_times(whole[1])


KILLED = (
    SETUP
    + """
import sys
torch.set_num_threads(1)
classify(RECIPE, sys.argv[1], data=DATA, resume=True, checkpoint_seconds=0)
"""
)


@pytest.mark.slow
def test_resumes_exactly_after_kills(whole, tmp_path):
    """Killed again and again at random moments, the run ends with the same bits."""
    out, chance, kills = tmp_path / "run", random.Random(0), 0
    environment = os.environ | {"PYWINO_PLAN": "static", "OMP_NUM_THREADS": "1"}
    for _ in range(40):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(out)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 120
        before = out / "checkpoint.pt"
        stamp = before.stat().st_mtime_ns if before.exists() else 0
        while process.poll() is None and time.monotonic() < deadline:
            if before.exists() and before.stat().st_mtime_ns != stamp and kills < 3:
                time.sleep(chance.random() * 0.3)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        text = process.communicate(timeout=60)[0].decode()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, text
        kills += 1
        load_checkpoint(before)  # whole, whenever it was killed
    assert process.returncode == 0
    assert kills >= 2
    assert not list(out.glob(".*"))
    mine, wanted = (load_file(folder / "last.safetensors") for folder in (out, whole[0]))
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert without_times(log) == without_times(whole[1])


def test_a_finished_run_resumes_to_nothing(whole):
    out, rows = whole
    stamp = (out / "checkpoint.pt").stat().st_mtime_ns
    assert classify(RECIPE, out, data=DATA, resume=True) == rows
    assert (out / "checkpoint.pt").stat().st_mtime_ns == stamp


def test_a_run_is_not_overwritten(whole):
    with pytest.raises(FileExistsError, match="out must be a new folder"):
        classify(RECIPE, whole[0], data=DATA)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"width": 0.2}, r"width 0.1 \(here 0.2\)"),
        ({"model": "convpool_cnn_c"}, "model 'all_cnn_c'"),
        ({"epochs": 9}, "epochs 3"),
    ],
)
def test_a_checkpoint_of_another_recipe(whole, changes, text):
    with pytest.raises(ValueError, match=f"must be of this recipe, got one with {text}"):
        classify(recipe(**changes), whole[0], data=DATA, resume=True)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
def test_a_half_written_checkpoint(whole, tmp_path, keep):
    content = (whole[0] / "checkpoint.pt").read_bytes()
    keep = keep if isinstance(keep, int) else int(keep * len(content))
    (tmp_path / "checkpoint.pt").write_bytes(content[:keep])
    with pytest.raises(RuntimeError, match=r"checkpoint.pt is damaged or no checkpoint"):
        classify(RECIPE, tmp_path, data=DATA, resume=True)


def test_a_checkpoint_of_another_format(tmp_path):
    torch.save({"format": 0}, tmp_path / "c.pt")
    with pytest.raises(RuntimeError, match="must be of format 1, got 0"):
        load_checkpoint(tmp_path / "c.pt")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"a": 1})

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, {"a": 2})
    assert load_checkpoint(path)["a"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_kill_between_the_last_files(whole, tmp_path, monkeypatch):
    """Whichever file of the last epoch was the last to be written, the resumed run completes
    them."""
    module = sys.modules[Run.__module__]
    write = module.write_whole
    torch.set_num_threads(1)
    for name in ("last.safetensors", "recipe.json"):
        written = []

        def killed(path, content, name=name, written=written):
            written.append(path.name)
            if written.count(name) == 3:
                raise KeyboardInterrupt
            write(path, content)

        out = tmp_path / name
        monkeypatch.setattr(module, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            classify(RECIPE, out, data=DATA)
        monkeypatch.setattr(module, "write_whole", write)
        assert without_times(classify(RECIPE, out, data=DATA, resume=True)) == without_times(
            whole[1]
        )
        for file in ("last", "best"):
            mine, wanted = (load_file(f / f"{file}.safetensors") for f in (out, whole[0]))
            assert all(torch.equal(mine[key], wanted[key]) for key in wanted)


def test_what_a_kill_left_is_removed(whole, tmp_path):
    (tmp_path / ".abc.part").write_bytes(b"half")
    (tmp_path / "checkpoint.pt").write_bytes((whole[0] / "checkpoint.pt").read_bytes())
    classify(RECIPE, tmp_path, data=DATA, resume=True)
    assert not (tmp_path / ".abc.part").exists()


def test_a_loss_that_is_no_number(tmp_path, monkeypatch):
    """It stops, and the last checkpoint is one of finite weights."""
    calls = []
    backward = MicroBatches.backward

    def poisoned(self, x, y):
        calls.append(len(x))
        return backward(self, x * float("nan") if len(calls) == 25 else x, y)

    monkeypatch.setattr(MicroBatches, "backward", poisoned)
    with pytest.raises(FloatingPointError, match=r"must be finite, got .*checkpoint.pt is from be"):
        classify(RECIPE, tmp_path / "run", data=DATA, checkpoint_seconds=0)
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert all(bool(value.isfinite().all()) for value in state["model"].values())
    monkeypatch.setattr(MicroBatches, "backward", backward)
    rows = classify(RECIPE, tmp_path / "run", data=DATA, resume=True)
    assert len(rows) == 3


def test_micro_batches_and_autocast(tmp_path):
    options = {"epochs": 1, "micro_batch": 5, "amp": True, "conv": "winograd_relu"}
    (row,) = classify(recipe(**options), tmp_path, data=DATA)
    assert row["test_accuracy"] > 1 / 3


@pytest.mark.parametrize("conv", ["dense", "winograd_relu"])
def test_compiled(tmp_path, monkeypatch, conv):
    """The same training, with names and files as they are without."""
    compiled = []

    def compile_quickly(module):
        compiled.append(module)
        return torch._dynamo.optimize("aot_eager")(module)

    expected = classify(recipe(epochs=2, conv=conv), tmp_path / "eager", data=DATA)
    monkeypatch.setattr(torch, "compile", compile_quickly)
    options = {"epochs": 2, "conv": conv, "compile": True}
    rows = classify(recipe(**options), tmp_path / "compiled", data=DATA)
    assert len(compiled) == 1
    for mine, theirs in zip(rows, expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    eager, mine = (load_file(tmp_path / n / "last.safetensors") for n in ("eager", "compiled"))
    assert eager.keys() == mine.keys()
    torch._dynamo.reset()


def test_a_checkpoint_from_before_an_option_was_there_goes_on(tmp_path):
    classify(recipe(epochs=1), tmp_path, data=DATA)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    del state["recipe"]["compile"]
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    assert len(classify(recipe(epochs=1), tmp_path, data=DATA, resume=True)) == 1
    with pytest.raises(ValueError, match=r"one with compile False \(here True\)"):
        classify(recipe(epochs=1, compile=True), tmp_path, data=DATA, resume=True)


def test_the_checkpoint_carries_the_plan(tmp_path, monkeypatch):
    """The run's kernels are measured into its folder, and come back from the checkpoint."""
    monkeypatch.delenv("PYWINO_PLAN")
    options = {"epochs": 1, "width": 0.5, "conv": "winograd"}
    classify(recipe(**options), tmp_path, data=DATA)
    plan = (tmp_path / "plan.json").read_text()
    assert json.loads(plan)["plans"]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["plan"] == plan
    (tmp_path / "plan.json").unlink()
    classify(recipe(**options), tmp_path, data=DATA, resume=True)
    assert (tmp_path / "plan.json").read_text() == plan
    assert "PYWINO_PLAN" not in os.environ


def test_a_model_without_a_width():
    with pytest.raises(ValueError, match=r"width must be 1 for alexnet, got 0.1"):
        recipe(model="alexnet").build(3, 1)


def test_the_width_of_a_stack_is_that_of_two_members(tmp_path):
    own = recipe(model="resnet32", epochs=1, limit=64, width=0.05)
    classify_stack(own, tmp_path, data=DATA)
    widths = [json.loads((tmp_path / n / "recipe.json").read_text())["width"] for n in MEMBERS]
    assert widths == [1.0, 0.05, 0.05]


def test_stack(tmp_path):
    result = classify_stack(recipe(epochs=2), tmp_path, data=DATA)
    assert result["members"] == ["all_cnn_c", "convpool_cnn_c"]
    assert sum(result["weights"]) == pytest.approx(1)
    assert result == json.loads((tmp_path / "stack.json").read_text())
    stack = WeightedAverageStack([recipe(model=n).build(3, 1) for n in result["members"]]).eval()
    stack.load_state_dict(load_file(tmp_path / "stack.safetensors"))
    x, y = DATA[1].batch(range(60))
    with torch.no_grad():
        right = (stack(x).argmax(1) == y).double().mean()
    assert float(right) == result["test_accuracy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "lenet"}, "model must be one of alexnet, vgg16"),
        ({"data": "mnist"}, "data must be one of fashion-mnist"),
        ({"data": "cifar10", "root": None}, "root must be the folder or archive"),
        ({"held_out": 0.0}, "held_out must be between 0 and 1"),
        ({"limit": 1}, "limit must be None or at least 2"),
    ],
)
def test_recipes_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


# ----------------------------------------------------------------------------------------- pruning

PRUNED = {"epochs": 1, "sparsity": (0.3, 0.8), "prune_epochs": 2}


def zeros(path, conv):
    """Name -> part of zeros, of the layers that are pruned."""
    model = recipe(conv=conv).build(3, 1)
    model.load_state_dict(load_file(path))
    kinds = WinogradReLUConv2d if conv == "winograd_relu" else torch.nn.Conv2d
    convs = [m for m in model.modules() if isinstance(m, kinds) and m.kernel_size == (3, 3)]
    if conv == "dense":
        assert convs.pop(0).weight.ne(0).all()
    assert len(convs) == 6  # of All-CNN-C's seven; the other two are 1x1
    return [float((m.weight == 0).double().mean()) for m in convs]


@pytest.mark.parametrize("conv", ["dense", "winograd_relu"])
def test_pruning_rounds(tmp_path, conv):
    """Each round has its zeros in every layer but the first and the 1x1s, at its end too, and the
    accuracy comes back."""
    rows = classify(recipe(conv=conv, **PRUNED), tmp_path, data=DATA)
    assert [row["sparsity"] for row in rows] == pytest.approx([0, 0.3, 0.3, 0.8, 0.8], abs=2e-3)
    for per_cent in (0, 30, 80):
        found = zeros(tmp_path / f"sparsity-{per_cent}.safetensors", conv)
        assert found == pytest.approx([per_cent / 100] * 6, abs=5e-3)
    assert zeros(tmp_path / "best.safetensors", conv) == found
    best = max(rows[3:], key=lambda row: row["held_out_accuracy"])
    model = recipe(conv=conv).build(3, 1).eval()
    model.load_state_dict(load_file(tmp_path / "best.safetensors"))
    x, y = DATA[1].batch(range(60))
    with torch.no_grad():
        accuracy = float((model(x).argmax(1) == y).double().mean())
    assert accuracy == best["test_accuracy"] > 0.8
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_pruning_in_blocks_from_weights(tmp_path):
    """Without an epoch before, from the weights of another run; the first sheet of zeros is made
    of these."""
    classify(recipe(epochs=1, width=0.5), tmp_path / "first", data=DATA)
    init = tmp_path / "first" / "last.safetensors"
    changes = {"epochs": 0, "sparsity": (0.5,), "pattern": "blocks", "width": 0.5}
    rows = classify(recipe(init=str(init), **changes), tmp_path / "second", data=DATA)
    assert len(rows) == 1
    weight = load_file(tmp_path / "second" / "sparsity-50.safetensors")["features.4.weight"]
    blocks = (weight[:48] == 0).view(3, 16, 48, 9)
    assert torch.equal(blocks.all(3).all(1), blocks.any(3).any(1))  # whole or not at all
    assert 0.4 < float(blocks.double().mean()) < 0.6


class _Kill(Listener):
    """Ends the run in the middle of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def begin(self, epoch, epochs, samples, consumed):
        self.left = 4 if epoch == self.epoch else math.inf

    def step(self, samples, values):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_pruning_resumes_exactly(tmp_path, monkeypatch):
    """Killed before, between and in the rounds, it ends with the same bits."""
    monkeypatch.setenv("PYWINO_PLAN", "static")
    planner.reset()
    torch.set_num_threads(1)
    own = recipe(conv="winograd_relu", **PRUNED)
    wanted = classify(own, tmp_path / "whole", data=DATA)
    steps = []
    step = Pruner.step
    monkeypatch.setattr(Pruner, "step", lambda self: steps.append(step(self)))
    for epoch in (0, 1, 2, 3):
        options = {"data": DATA, "resume": True, "checkpoint_seconds": 0}
        with pytest.raises(KeyboardInterrupt):
            classify(own, tmp_path / "run", listener=_Kill(epoch), **options)
    rows = classify(own, tmp_path / "run", **options)
    assert without_times(rows) == without_times(wanted)
    assert steps == pytest.approx([0.3, 0.8], abs=2e-3)  # no pruning was done again
    names = {path.name for path in (tmp_path / "whole").glob("*.safetensors")}
    assert names == {
        f"{n}.safetensors" for n in ("last", "best", *map("sparsity-{}".format, (0, 30, 80)))
    }
    for name in names:
        mine, theirs = (load_file(tmp_path / folder / name) for folder in ("run", "whole"))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_pruned_stack_from_a_stack(tmp_path):
    first = recipe(epochs=1)
    classify_stack(first, tmp_path / "first", data=DATA)
    own = recipe(epochs=0, sparsity=(0.5,), init=str(tmp_path / "first"))
    result = classify_stack(own, tmp_path / "second", data=DATA)
    assert result["test_accuracy"] > 1 / 3
    for member in result["members"]:
        state = load_file(tmp_path / "second" / member / "sparsity-50.safetensors")
        found = [float((w == 0).double().mean()) for w in state.values() if w.shape[-2:] == (3, 3)]
        assert found == pytest.approx([0, *[0.5] * (len(found) - 1)], abs=5e-3)
        assert all(bool(w.ne(0).all()) for w in state.values() if w.shape[-2:] == (1, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("conv", ["dense", "winograd_relu"])
def test_pruning_on_a_gpu(tmp_path, conv):
    """Killed in a round and resumed, it has its zeros and learns; bits are no promise there."""
    own = recipe(conv=conv, epochs=2, sparsity=(0.5,))
    options = {"data": DATA, "device": "cuda", "resume": True, "checkpoint_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        classify(own, tmp_path, listener=_Kill(2), **options)
    rows = classify(own, tmp_path, **options)
    assert rows[-1]["test_accuracy"] > 0.6
    assert zeros(tmp_path / "sparsity-50.safetensors", conv) == pytest.approx([0.5] * 6, abs=5e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": (0.6, 0.3)}, "sparsity must be rising numbers between 0 and 1"),
        ({"sparsity": (0.3, 1.0)}, "sparsity must be rising numbers between 0 and 1"),
        ({"sparsity": 0.3}, "sparsity must be rising numbers between 0 and 1, got 0.3"),
        ({"sparsity": ["30 %"]}, "sparsity must be rising numbers between 0 and 1"),
        ({"sparsity": (0.3,), "prune_epochs": 0}, "prune_epochs must be 1 or more"),
        ({"sparsity": (0.3,), "pattern": "stripes"}, "pattern must be one of unstructured, blocks"),
        ({"epochs": 0}, "epochs must be 1 or more, or 0 with sparsity"),
    ],
)
def test_pruning_that_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_too_few_images(tmp_path):
    with pytest.raises(ValueError, match="held_out must leave an image or more"):
        classify(recipe(limit=3), tmp_path, data=DATA)


def test_fewer_images_than_a_batch(tmp_path):
    rows = classify(recipe(limit=10, epochs=1, batch_size=64), tmp_path, data=DATA)
    assert rows[0]["steps"] == 1


# ---------------------------------------------------------------------------------------- torchrun

RANKS = (
    SETUP
    + """
import os, sys
from pywino.optim import DynamicBatchSGDM
if sys.argv[2] == "dies":
    step = DynamicBatchSGDM.step
    def dying(self, closure=None):
        if os.environ["RANK"] == "1" and self.controller.epoch == 1:
            os._exit(9)
        return step(self, closure)
    DynamicBatchSGDM.step = dying
torch.set_num_threads(1)
changes = {"dropout": 0.0, "augment": False}
rows = classify(Recipe(**RECIPE.as_dict() | changes), sys.argv[1], data=DATA, resume=True,
                timeout_seconds=60)
"""
)


def start_ranks(script, arguments, port):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYWINO_PLAN": "static"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def finish(process, seconds):
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"hung for {seconds} s:\n{process.communicate()[0][-2000:]}")


def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_a_rank_dies_and_the_run_is_resumed(tmp_path):
    processes = start_ranks(RANKS, [str(tmp_path), "dies"], free_port())
    text = finish(processes[0], 150)
    finish(processes[1], 20)
    assert processes[1].returncode == 9
    assert processes[0].returncode == 1
    assert "rank 0 of 2 stops. If another rank has ended" in text
    assert len(load_checkpoint(tmp_path / "checkpoint.pt")["rows"]) == 1
    processes = start_ranks(RANKS, [str(tmp_path), "lives"], free_port())
    texts = [finish(process, 150) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    rows = load_checkpoint(tmp_path / "checkpoint.pt")["rows"]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert rows[-1]["test_accuracy"] > 0.9
