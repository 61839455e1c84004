# SPDX-License-Identifier: BSD-3-Clause
"""Detectors' training runs on small scenes: what they write, what they learn, that they resume
exactly, on one rank and on two."""

import csv
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from safetensors.torch import load_file

from pywino import planner
from pywino.cli import main
from pywino.optim import MicroBatches
from pywino.train import DetectRecipe, detect, load_checkpoint

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("faster_coco_eval", reason="needs pywino[detect]")

# Sourced by other processes too.
SETUP = """
import numpy as np, torch
from torch.utils.data import Dataset
from pywino.train import DetectRecipe, detect

class Squares(Dataset):
    "A bright square a picture, red or blue."
    classes, problems = ("red", "blue"), []

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def sample(self, index, epoch=0):
        rng = np.random.default_rng((self.seed, epoch, index))
        image, label = torch.full((3, 64, 64), 0.3), int(rng.integers(2))
        side = int(rng.integers(24, 40))
        x, y = (int(n) for n in rng.integers(0, 64 - side, 2))
        image[2 * label, y : y + side, x : x + side] = 1
        return image, torch.tensor([[x, y, x + side, y + side, label]], dtype=torch.float32)

DATA = Squares(48, 0), Squares(12, 1)
RECIPE = DetectRecipe(data="here", size=64, epochs=3, batch_size=8, lr=2e-3, validate=12)
"""
namespace = {}
exec(SETUP, namespace)
DATA, RECIPE, Squares = namespace["DATA"], namespace["RECIPE"], namespace["Squares"]


def recipe(**changes):
    return DetectRecipe(**(RECIPE.as_dict() | changes))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (folder, rows)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYWINO_PLAN", "static")
        planner.reset()
        rows = detect(RECIPE, out, data=DATA)
    torch.set_num_threads(threads)
    return out, rows


def without_times(rows):
    return [{name: v for name, v in row.items() if name != "seconds"} for row in rows]


def same(a, b):
    """Equal rows; NaN is equal to NaN."""
    return json.dumps(without_times(a)) == json.dumps(without_times(b))


def test_files(whole):
    out, rows = whole
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert DetectRecipe(**json.loads((out / "recipe.json").read_text())) == RECIPE
    assert same([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()], rows)
    with open(out / "curves.csv", newline="") as file:
        assert [float(row["map50"]) for row in csv.DictReader(file)] == [r["map50"] for r in rows]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "classes.txt").read_text() == "red\nblue\n"
    with Image.open(out / "samples" / "epoch-0003.png") as sheet:
        assert sheet.size == (3 * 64, 2 * 64)
        white = np.asarray(sheet).min(2) == 255
        assert white.any()  # a truth's box
    model = RECIPE.build(2)
    model.load_state_dict(load_file(out / "last.safetensors"))


@pytest.mark.slow
def test_it_learns(tmp_path):
    options = {"epochs": 14, "lr": 4e-3}
    rows = detect(recipe(**options), tmp_path / "run", data=(Squares(96, 0), Squares(12, 1)))
    assert rows[-1]["map50"] > 0.8
    assert {"ap50_red", "ap50_blue", "map"} <= set(rows[-1])
    assert rows[0]["lr"] > rows[-1]["lr"]


def test_the_learning_rate_rises_and_falls():
    from pywino.train.detect import _cosine

    values = [_cosine(i / 100) for i in range(101)]
    assert values[0] == 0.01
    assert values[2] == pytest.approx(2 / 3)
    assert values[3] > 0.99
    assert values[-1] == pytest.approx(0.01)
    assert values[51] == pytest.approx(0.5, abs=0.03)
    assert values[3:] == sorted(values[3:], reverse=True)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "sgdm", "lr": 1e-3, "batch_size": 7}, {"workers": 1, "micro_batch": 3}],
    ids=["adamw", "sgdm", "workers"],
)
def test_resumes_exactly(tmp_path, monkeypatch, options, whole):
    """Stopped in the middle of the second epoch, the run ends with the same bits."""
    mine = recipe(**options)
    if options:
        rows = detect(mine, tmp_path / "whole", data=DATA)
        wanted = load_file(tmp_path / "whole" / "last.safetensors")
    else:
        rows, wanted = whole[1], load_file(whole[0] / "last.safetensors")
    calls, backward = [], MicroBatches.backward

    def stopped(self, x, y):
        calls.append(len(x))
        if len(calls) == 10:
            raise Killed
        return backward(self, x, y)

    monkeypatch.setattr(MicroBatches, "backward", stopped)
    with pytest.raises(Killed):
        detect(mine, tmp_path / "run", data=DATA, checkpoint_seconds=0)
    assert 0 < load_checkpoint(tmp_path / "run" / "checkpoint.pt")["sampler"]["consumed"] < 48
    monkeypatch.setattr(MicroBatches, "backward", backward)
    assert same(detect(mine, tmp_path / "run", data=DATA, resume=True), rows)
    got = load_file(tmp_path / "run" / "last.safetensors")
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_a_finished_run_resumes_to_nothing(whole):
    assert same(detect(RECIPE, whole[0], data=DATA, resume=True), whole[1])
    with pytest.raises(FileExistsError, match="out must be a new folder"):
        detect(RECIPE, whole[0], data=DATA)
    with pytest.raises(ValueError, match=r"lr 0.002 \(here 0.1\)"):
        detect(recipe(lr=0.1), whole[0], data=DATA, resume=True)


def test_a_loss_that_is_no_number(tmp_path, monkeypatch):
    calls, backward = [], MicroBatches.backward

    def poisoned(self, x, y):
        calls.append(len(x))
        return backward(self, x * float("nan") if len(calls) == 9 else x, y)

    monkeypatch.setattr(MicroBatches, "backward", poisoned)
    with pytest.raises(FloatingPointError, match=r"must be finite, got .*checkpoint.pt is from be"):
        detect(RECIPE, tmp_path / "run", data=DATA, checkpoint_seconds=0)
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


@pytest.mark.parametrize("swap", [True, False])
def test_frozen_layers_stay(tmp_path, swap):
    """And all others move, in bfloat16 too."""
    mine = recipe(freeze=5, epochs=1, amp=True, swap=swap)
    torch.manual_seed(mine.seed)
    before = mine.build(2).state_dict()
    detect(mine, tmp_path / "run", data=DATA)
    after = load_file(tmp_path / "run" / "last.safetensors")
    for name, value in after.items():
        frozen = name.startswith("trunk.features.") and int(name.split(".")[2]) < 5
        assert torch.equal(value, before[name]) == frozen, name


def test_the_dynamic_batch_grows(tmp_path, monkeypatch):
    """It follows the held-out average precision (here: a number that rises); without gradients the
    run takes no time."""
    module = sys.modules[detect.__module__]
    monkeypatch.setattr(MicroBatches, "backward", lambda self, x, y: torch.zeros(()))
    scores = iter(range(6))
    monkeypatch.setattr(
        module._Run, "_scores", lambda self: {"map50": next(scores), "map": 0, "classes": {}}
    )
    options = {"optimizer": "sgdm", "dynamic_batch": True, "batch_size": 32, "epochs": 6}
    rows = detect(recipe(**options), tmp_path, data=(Squares(640, 0), Squares(4, 1)))
    assert [row["batch_size"] for row in rows] == [32, 32, 64, 64, 64, 64]


def test_yolov3_is_built_with_its_trunk(tmp_path):
    from pywino.models import yolov3

    with pytest.raises(FileNotFoundError, match="there is no file"):
        recipe(model="yolov3", trunk=str(tmp_path / "absent")).build(2)
    with torch.device("meta"):
        assert recipe(model="yolov3").build(3).num_classes == yolov3(num_classes=3).num_classes


def test_truths_may_be_absent(tmp_path):
    class Empty(Squares):
        def sample(self, index, epoch=0):
            return super().sample(index, epoch)[0], torch.zeros(0, 5)

    for mine in (recipe(epochs=1), recipe(epochs=1, optimizer="sgdm", lr=1e-4)):
        (row,) = detect(mine, tmp_path / mine.optimizer, data=(Empty(8, 0), Empty(4, 1)))
        assert math.isfinite(row["loss"])
        assert math.isnan(row["map50"])


def test_the_library_that_scores_is_missed_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(RuntimeError, match="it needs faster-coco-eval"):
        detect(RECIPE, tmp_path / "run", data=DATA)
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "data must be a folder"),
        ({"model": "ssd"}, "model must be one of small, yolov3, got 'ssd'"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, sgdm"),
        ({"size": 100}, "size must be a multiple of 32, got 100"),
        ({"size": 0}, "size must be a multiple of 32"),
        ({"held_out": 1.0}, "held_out must be between"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"freeze": -1}, "freeze must be 0 to 18 for small, got -1"),
        ({"freeze": 19}, "freeze must be 0 to 18"),
        ({"freeze": 7, "model": "yolov3"}, "freeze must be 0 to 6 for yolov3"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"dynamic_batch": True}, "dynamic_batch must be off for adamw"),
    ],
)
def test_recipes_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


# ----------------------------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path):
    """Pictures with labels, one line of which is broken."""
    for name in ("images", "labels"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i in range(10):
        pixels, boxes = Squares(10, 3).sample(i)
        values = pixels.mul(255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(values).save(tmp_path / "data" / "images" / f"{i}.png")
        x1, y1, x2, y2, label = (boxes[0] / 64).tolist()
        line = f"{int(64 * label)} {(x1 + x2) / 2} {(y1 + y2) / 2} {x2 - x1} {y2 - y1}\n"
        (tmp_path / "data" / "labels" / f"{i}.txt").write_text(line + "0 1 2\n" * (i == 4))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, ["train", "detect", *map(str, arguments)])


def test_command_on_a_folder(folder):
    arguments = ("--data", folder / "data", "--out", folder / "run", "--size", 64)
    result = run(*arguments, "--epochs", 1, "--batch-size", 4)
    assert result.exit_code == 0, result.output
    assert "4.txt, line 2: left out: it must have 5 columns" in result.output
    assert "epoch 1: loss" in result.output
    assert "mAP@.5" in result.output
    assert json.loads((folder / "run" / "recipe.json").read_text())["batch_size"] == 4
    result = run(*arguments, "--epochs", 1, "--batch-size", 4)
    assert result.exit_code == 1
    assert "out must be a new folder" in result.output


def test_command_on_scenes(folder):
    for label, color in (("red", (255, 0, 0, 255)), ("blue", (0, 0, 255, 255))):
        (folder / "stamps" / label).mkdir(parents=True)
        for i in range(2):
            stamp = Image.new("RGBA", (80, 80))
            stamp.paste(color, (10, 10, 70 - i, 70))
            stamp.save(folder / "stamps" / label / f"{i}.png")
    arguments = ["--data", folder / "data" / "images", "--stamps", folder / "stamps"]
    arguments += ["--size", 64, "--epochs", 1, "--scenes", 8, "--validate", 4]
    result = run(*arguments, "--out", folder / "run")
    assert result.exit_code == 0, result.output
    assert (folder / "run" / "classes.txt").read_text() == "blue\nred\n"


def test_command_without_data(tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("--data", tmp_path / "empty", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "must have pictures" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------- torchrun


@pytest.mark.slow
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_two_ranks(tmp_path):
    """They agree, and score all held-out pictures between them."""
    script = SETUP + (
        "\nimport sys\ntorch.set_num_threads(1)\n"
        "mine = DetectRecipe(**RECIPE.as_dict() | {'batch_size': 7, 'epochs': 2})\n"
        "detect(mine, sys.argv[1], data=DATA, timeout_seconds=60)\n"
    )
    (tmp_path / "script.py").write_text(script)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYWINO_PLAN": "static"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, tmp_path / "script.py", tmp_path / "run"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in rows] == [7, 7]
    assert rows[1]["loss"] < rows[0]["loss"]
