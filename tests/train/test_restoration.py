# SPDX-License-Identifier: BSD-3-Clause
"""Training of restoration on small random photos: what a run writes, that it resumes exactly, and
what it refuses."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from safetensors.torch import load_file

from pywino import losses, models
from pywino.cli.train import train
from pywino.models import sapnet
from pywino.train import (
    DerainRecipe,
    Learner,
    Listener,
    RestorationRecipe,
    load_checkpoint,
    train_restoration,
)
from pywino.train.restoration import SCHEDULES

image = pytest.importorskip("PIL.Image", reason="photos need Pillow")

# Sourced by other processes too. A photo is darkened to a half; one weight can undo that.
SETUP = """
import io
from dataclasses import dataclass
import numpy as np
import torch
from PIL import Image
from torch import nn
from pywino.data import Pairs, Photos
from pywino.train import Learner, RestorationRecipe, train_restoration

def photo(i):
    noise = np.random.default_rng(i).integers(0, 256, (24, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()

PHOTOS = Photos([f"{i}.png" for i in range(10)], [lambda i=i: photo(i) for i in range(10)])
DATA = Pairs(PHOTOS, lambda x, generator: x / 2).split(0.3)

@dataclass(frozen=True)
class Lighten(RestorationRecipe):
    def build(self):
        net = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), nn.Dropout(0.001))
        def loss(restored, clean, degraded):
            return {"l1": (restored - clean).abs().mean(), "l2": ((restored - clean) ** 2).mean()}
        return Learner(net, loss, torch.optim.Adam(net.parameters(), self.lr))

RECIPE = Lighten(data="here", epochs=3, steps=30, crop=12, lr=0.1, schedule="cosine", validate=3,
                 largest=16)
"""
namespace = {"__name__": "setup"}
sys.modules["setup"] = type(sys)("setup")  # dataclasses look their module up
exec(SETUP, namespace)
DATA, RECIPE, Lighten = namespace["DATA"], namespace["RECIPE"], namespace["Lighten"]


def recipe(**changes):
    return Lighten(**(RECIPE.as_dict() | changes))


def without_times(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (folder, rows)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, train_restoration(RECIPE, out, data=DATA)


def test_it_learns(whole):
    _, rows = whole
    assert rows[-1]["psnr"] > rows[-1]["input_psnr"] + 10
    assert rows[-1]["ssim"] > rows[-1]["input_ssim"] + 0.1
    assert rows[-1]["loss"] < rows[0]["loss"]
    for row in rows:
        assert row["l1_loss"] + row["l2_loss"] == pytest.approx(row["loss"], rel=1e-6)


def test_files(whole):
    out, rows = whole
    names = {path.name for path in out.iterdir()}
    assert names >= {"recipe.json", "checkpoint.pt", "last.safetensors", "best.safetensors"}
    assert Lighten(**json.loads((out / "recipe.json").read_text())) == RECIPE
    assert [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] == rows
    if "curves.png" not in names:
        pytest.importorskip("matplotlib")
    sheets = sorted((out / "samples").iterdir())
    assert [path.name for path in sheets] == [f"epoch-000{i}.png" for i in (1, 2, 3)]
    degraded, clean = DATA[1].picture(0, 16)
    sheet = torch.from_numpy(__import__("numpy").array(image.open(sheets[-1]))).permute(2, 0, 1)
    assert sheet.shape == (3, 3 * 16, 3 * 16)
    torch.testing.assert_close(sheet[:, :16, :16] / 255, degraded, rtol=0, atol=0.0021)
    torch.testing.assert_close(sheet[:, :16, 32:] / 255, clean)
    restored = sheet[:, :16, 16:32] / 255
    assert float((restored - clean).abs().mean()) < 0.05


def test_scores_are_those_of_the_weights(whole):
    """psnr and input_psnr of the last row, from the last weights."""
    out, rows = whole
    net = RECIPE.build().networks["model"].eval()
    net.load_state_dict(load_file(out / "last.safetensors"))
    with torch.no_grad():
        pairs = [DATA[1].picture(i, 16) for i in range(3)]
        for key, restore in (("psnr", net), ("input_psnr", lambda x: x)):
            errors = [((restore(d[None])[0].clamp(0, 1) - c) ** 2).mean() for d, c in pairs]
            wanted = sum(-10 * torch.log10(e) for e in errors) / 3
            assert rows[-1][key] == pytest.approx(float(wanted), rel=1e-6)


class Interrupted(Listener):
    """Raises what Ctrl-C raises, at a step of the whole run, or when an epoch ends."""

    def __init__(self, step=None, epoch=None):
        self.left, self.epoch = step, epoch

    def step(self, samples, values):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def end(self, row):
        if row["epoch"] == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "every"), [({"step": 17}, 0.0), ({"step": 45}, 1e9), ({"epoch": 1}, 0.0)]
)
def test_an_interrupted_run_goes_on_exactly(whole, tmp_path, where, every):
    options = {"data": DATA, "checkpoint_seconds": every}
    with pytest.raises(KeyboardInterrupt):
        train_restoration(RECIPE, tmp_path, listener=Interrupted(**where), **options)
    rows = train_restoration(RECIPE, tmp_path, resume=True, **options)
    assert without_times(rows) == without_times(whole[1])
    for name in ("last", "best"):
        mine, wanted = (load_file(f / f"{name}.safetensors") for f in (tmp_path, whole[0]))
        assert all(torch.equal(mine[key], wanted[key]) for key in wanted)


def test_a_run_that_is_there(whole, tmp_path):
    with pytest.raises(FileExistsError, match="has a run already"):
        train_restoration(RECIPE, whole[0], data=DATA)
    with pytest.raises(ValueError, match=r"of this recipe, got one with lr 0.1 \(here 0.2\)"):
        train_restoration(recipe(lr=0.2), whole[0], data=DATA, resume=True)
    assert train_restoration(RECIPE, whole[0], data=DATA, resume=True) == whole[1]


def test_a_loss_that_is_no_number(tmp_path, monkeypatch):
    """It stops, and the last checkpoint is one of finite weights."""
    step, calls = Learner.step, []

    def poisoned(self, degraded, clean):
        calls.append(1)
        return step(self, degraded * float("nan") if len(calls) == 40 else degraded, clean)

    monkeypatch.setattr(Learner, "step", poisoned)
    with pytest.raises(FloatingPointError, match=r"must be finite, got .*checkpoint.pt is from be"):
        train_restoration(RECIPE, tmp_path, data=DATA, checkpoint_seconds=0)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert all(bool(value.isfinite().all()) for value in state["model"].values())
    monkeypatch.setattr(Learner, "step", step)
    assert len(train_restoration(RECIPE, tmp_path, data=DATA, resume=True)) == 3


class Critic(Learner):
    """Two networks that learn in turn, as a generator and a discriminator do."""

    def __init__(self, net, loss, lr):
        super().__init__(net, loss, torch.optim.Adam(net.parameters(), lr))
        critic = torch.nn.Conv2d(3, 1, 3)
        self.networks["critic"] = self.models["critic"] = critic
        self.optimizers["critic_optimizer"] = torch.optim.Adam(critic.parameters(), lr / 5)

    def step(self, degraded, clean):
        terms = super().step(degraded, clean)
        with torch.no_grad():
            restored = self.models["model"](degraded)
        judged = self.models["critic"](restored).mean() - self.models["critic"](clean).mean()
        self.optimizers["critic_optimizer"].zero_grad()
        judged.backward()
        self.optimizers["critic_optimizer"].step()
        return terms


class Adversarial(Lighten):
    def build(self):
        base = super().build()
        return Critic(base.networks["model"], base.loss, self.lr)


def test_two_networks(tmp_path):
    seen = []

    class Rates(Listener):
        def begin(self, epoch, *_):
            if run_of:
                seen.append([o.param_groups[0]["lr"] for o in run_of[0].optimizers.values()])

    run_of = []
    init = Critic.__init__

    def spied(self, *args):
        init(self, *args)
        run_of.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Critic, "__init__", spied)
        once = Adversarial(**RECIPE.as_dict() | {"epochs": 2})
        train_restoration(once, tmp_path / "a", data=DATA, listener=Rates())
    (first, later) = seen
    assert first == [0.1, 0.02]
    assert later[0] == pytest.approx(5 * later[1])
    assert later[0] < 0.06
    with pytest.raises(KeyboardInterrupt):
        train_restoration(
            once, tmp_path / "b", data=DATA, listener=Interrupted(step=41), checkpoint_seconds=0
        )
    train_restoration(once, tmp_path / "b", data=DATA, resume=True)
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in "ab")
    for name in ("model", "critic"):
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name])
    assert set(load_file(tmp_path / "a" / "last.safetensors")) == set(a["model"])


class WithSgdm(Lighten):
    """The recipe's own optimizer."""

    def build(self):
        base = super().build()
        return Learner(base.networks["model"], base.loss, self.optimize(base.networks["model"]))


def test_the_dynamic_batch(tmp_path):
    """It grows, an epoch has the same crops in fewer steps, and a run in two parts is one."""
    once = WithSgdm(**RECIPE.as_dict() | {
        "optimizer": "sgdm", "dynamic_batch": True, "batch_size": 16, "steps": 40, "epochs": 6,
        "lr": 0.01,
    })  # fmt: skip
    seen = []

    class Sizes(Listener):
        def begin(self, epoch, epochs, samples, consumed):
            assert (samples, consumed) == (640, 0)
            seen.append(0)

        def step(self, samples, values):
            assert samples == values["batch"]
            seen[-1] += samples

    rows = train_restoration(once, tmp_path / "a", data=DATA, listener=Sizes())
    assert seen == [640] * 6
    assert rows[0]["batch_size"] == 16
    assert rows[-1]["batch_size"] in (32, 64)
    assert rows[0]["steps"] == 40 > rows[-1]["steps"]
    assert rows[-1]["lr"] > 0.01
    assert rows[-1]["psnr"] > rows[-1]["input_psnr"] + 3
    for row in rows:
        assert row["l1_loss"] + row["l2_loss"] == pytest.approx(row["loss"], rel=1e-6)
    step = sum(row["steps"] for row in rows[:-1]) + 4
    with pytest.raises(KeyboardInterrupt):
        train_restoration(
            once, tmp_path / "b", data=DATA, listener=Interrupted(step=step), checkpoint_seconds=0
        )
    again = train_restoration(once, tmp_path / "b", data=DATA, resume=True)
    assert without_times(again) == without_times(rows)
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in "ab")
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


def test_schedules():
    steps = [round(SCHEDULES["steps"](done), 6) for done in (0, 0.29, 0.3, 0.5, 0.79, 0.8, 0.99)]
    assert steps == [1, 1, 0.2, 0.04, 0.04, 0.008, 0.008]
    cosine = [SCHEDULES["cosine"](done) for done in (0, 0.5, 1)]
    assert cosine == pytest.approx([1, 0.5, 0])
    assert SCHEDULES["constant"](0.9) == 1


def test_amp_and_weights_to_start_from(whole, tmp_path):
    class Started(Lighten):
        def build(self):
            learner = super().build()
            self.started(learner.networks["model"])
            return learner

    start = str(whole[0] / "last.safetensors")
    once = Started(**RECIPE.as_dict() | {"init": start, "epochs": 1, "lr": 1e-6, "amp": True})
    (row,) = train_restoration(once, tmp_path, data=DATA)
    assert row["psnr"] == pytest.approx(whole[1][-1]["psnr"], abs=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "data must be a folder or an archive"),
        ({"held_out": 0.0}, "held_out must be between 0 and 1"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"schedule": "linear"}, "schedule must be one of constant, steps, cosine"),
        ({"optimizer": "sgd"}, "optimizer must be one of adam, sgdm"),
        ({"dynamic_batch": True}, "dynamic_batch must be off for adam"),
    ],
)
def test_recipes_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rain": "hail"}, "rain must be one of light, heavy, mixed"),
        ({"attention": "self"}, "attention must be cra, ca, se or none"),
        ({"loss": ("l3",)}, r"loss must be terms \(TERM or TERM:WEIGHT\) among ssim"),
        ({"loss": ("l1:much",)}, "loss must be terms"),
        ({"loss": ("l1", "l1:2")}, "loss must be terms .*, each once"),
        ({"loss": ("ssim", "ubs")}, "trunk must be a file of ResNet-101's weights"),
    ],
)
def test_derain_recipes_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DerainRecipe(data="photos", **changes)


def test_terms_and_their_weights():
    """The papers' weights where none is given; each term is the loss of its name."""
    once = DerainRecipe(data="photos", loss=("ssim", "l1:0.5", "edge"), faithful=True)
    assert once.terms() == [("ssim", 1), ("l1", 0.5), ("edge", 0.05)]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 1, 3, 16, 16, generator=generator)
    terms = once.build().loss(*images)
    x, clean, _ = images
    wanted = {
        "ssim": losses.ssim_loss(x, clean),
        "l1": (x - clean).abs().mean() / 2,
        "edge": 0.05 * losses.EdgeLoss(faithful=True)(x, clean),
    }
    assert list(terms) == list(wanted)
    for name in wanted:
        torch.testing.assert_close(terms[name], wanted[name])
    published = DerainRecipe(data="photos", loss=("pcl", "lpisl"))
    assert published.terms() == [("pcl", 0.1), ("lpisl", 0.1)]


def test_terms_with_networks(monkeypatch):
    """The files and `faithful` go where they belong."""
    seen = {}
    for name in ("SegmentationLoss", "PerceptualContrastiveLoss", "PerceptualSimilarityLoss"):

        def record(*args, name=name, **options):
            seen[name, options.get("on")] = (*args, options.get("faithful"))
            return torch.nn.Identity()

        monkeypatch.setattr(losses, name, record)
    names = ("urss", "ubs", "pcl", "lpisl")
    DerainRecipe(data="photos", loss=names, vgg="v", trunk="t", faithful=True, stages=1).build()
    assert seen == {
        ("SegmentationLoss", "residual"): ("t", True),
        ("SegmentationLoss", None): ("t", True),
        ("PerceptualContrastiveLoss", None): ("v", True, None),
        ("PerceptualSimilarityLoss", None): ("v", True, None),
    }


def test_a_recipe_that_degrades_nothing(tmp_path):
    (tmp_path / "1.png").write_bytes(namespace["photo"](0))
    with pytest.raises(ValueError, match="paired must be set"):
        RestorationRecipe(data=str(tmp_path)).read_data()


# ------------------------------------------------------------------------------------------ command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos")
    for i in range(5):
        (path / f"{i}.png").write_bytes(namespace["photo"](i))
    return path


def run(*arguments):
    return CliRunner().invoke(train, ["derain", *map(str, arguments)])


SMALL = ("--epochs", 1, "--steps", 2, "--batch-size", 1, "--crop", 16, "--stages", 1)


def test_command(folder, tmp_path):
    config = tmp_path / "recipe.toml"
    config.write_text('rain = "light"\nloss = ["ssim", "l1:0.5"]\nlr = 0.01\n')
    line = ("--data", folder, "--out", tmp_path / "run", *SMALL, "--config", config, "--lr", 0.002)
    result = run(*line)
    assert result.exit_code == 0, result.output
    assert "derain, epoch 1: loss" in result.output
    assert "dB (input" in result.output
    got = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (got["rain"], got["lr"], got["loss"]) == ("light", 0.002, ["ssim", "l1:0.5"])
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert row["ssim_loss"] + row["l1_loss"] == pytest.approx(row["loss"], rel=1e-6)
    assert sapnet(weights=tmp_path / "run" / "last.safetensors").stages == 1
    again = run(*line)
    assert again.exit_code == 1
    assert "has a run already" in again.output
    assert run(*line, "--resume").exit_code == 0


V1 = ("--dilation", 1) * 5
# The flags of docs/sapnet.md, and what comes of them: attention, dilation, terms.
ABLATIONS = {
    "Model1": (("--attention", "none", *V1), (None, V1, "ssim")),
    "Model2": (("--attention", "none", *V1), (None, V1, "ssim urss")),
    "Model3": (("--attention", "none", *V1), (None, V1, "ssim urss edge")),
    "Model4": (("--attention", "cra", *V1), ("cra", V1, "ssim urss edge")),
    "M1": ((*V1, "--schedule", "constant"), ("cra", V1, "ssim")),
    "M2": ((*V1, "--schedule", "constant"), ("cra", V1, "ssim ubs")),
    "M3": ((*V1, "--schedule", "constant"), ("cra", V1, "ssim ubs pcl")),
    "M4": (("--schedule", "constant"), ("cra", (), "ssim ubs pcl")),
    "M5": ((), ("cra", (), "ssim ubs pcl")),
    "Ours": ((), ("cra", (), "ssim ubs pcl lpisl")),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_train(folder, tmp_path, monkeypatch, name):
    """Two steps of each, the networks of the losses replaced by small ones."""

    class Small(torch.nn.Module):
        def __init__(self, *arguments, **options):
            super().__init__()

        def forward(self, restored, clean, degraded):
            return (restored - clean).square().mean()

    for loss in ("SegmentationLoss", "PerceptualContrastiveLoss", "PerceptualSimilarityLoss"):
        monkeypatch.setattr(losses, loss, Small)
    trained = []

    def build(*arguments):
        trained.append(sapnet(*arguments))
        return trained[-1]

    monkeypatch.setattr(models, "sapnet", build)
    flags, (attention, dilation, terms) = ABLATIONS[name]
    flags = (*flags, *(f"--loss={term}" for term in terms.split()), "--trunk=t", "--vgg=v")
    result = run("--data", folder, "--out", tmp_path / "run", *SMALL, *flags)
    assert result.exit_code == 0, result.output
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert {key for key in row if key.endswith("_loss")} == {f"{t}_loss" for t in terms.split()}
    found = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert found["schedule"] == ("constant" if "constant" in flags else "steps")
    assert found["dilation"] == ([1] * 5 if dilation else [1, 2, 4, 8, 16])
    (net,) = trained
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert {m.dilation[0] for m in convolutions} == set(found["dilation"])
    own = sapnet(attention, found["dilation"], weights=tmp_path / "run" / "last.safetensors")
    before = sapnet(attention).state_dict()
    assert own.state_dict().keys() == before.keys()


def test_command_on_pairs(tmp_path):
    for i in range(4):
        for kind in ("rain", "norain"):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / f"{i}.png").write_bytes(namespace["photo"](i))
    result = run("--data", tmp_path, "--paired", "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 0, result.output
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert row["input_ssim"] == pytest.approx(1)


def test_command_without_photos(tmp_path):
    result = run("--data", tmp_path, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "must have .jpg" in result.output
    assert "Traceback" not in result.output


# ----------------------------------------------------------------------------------------- torchrun

RANKS = (
    SETUP
    + """
import sys
torch.set_num_threads(1)
rows = train_restoration(RECIPE, sys.argv[1], data=DATA, resume=True, timeout_seconds=60)
print(rows[-1]["psnr"], rows[-1]["l1_loss"])
"""
)


@pytest.mark.slow
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_two_ranks(whole, tmp_path):
    """Half of the batch each; both see the same scores, and learn what one rank learns."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    script = tmp_path / "script.py"
    script.write_text(RANKS)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYWINO_PLAN": "static"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, tmp_path / "run"],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [process.communicate(timeout=150)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    scores = [text.splitlines()[-1] for text in texts]
    assert scores[0] == scores[1]
    psnr, l1 = map(float, scores[0].split())
    assert psnr == pytest.approx(whole[1][-1]["psnr"], abs=3)
    assert l1 == pytest.approx(whole[1][-1]["l1_loss"], rel=0.5)
