# SPDX-License-Identifier: BSD-3-Clause
"""Training of Deblur-YOLO's generator: its terms, its two phases, norms that stay."""

import io
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

from pywino import models
from pywino.cli.train import train
from pywino.data import Pairs, Photos
from pywino.losses import RelativisticCritic
from pywino.models import deblur_yolo, mobilenet_v2, small_yolo
from pywino.train import DeblurRecipe, Listener, load_checkpoint, train_restoration
from pywino.train.deblur import _GATHER

image = pytest.importorskip("PIL.Image", reason="photos need Pillow")

SMALL = {
    "data": "here", "epochs": 2, "steps": 12, "batch_size": 2, "crop": 32, "validate": 1,
    "largest": 32,
}  # fmt: skip


def photo(i):
    coarse = np.random.default_rng(i).integers(0, 256, (8, 10, 3), np.uint8)
    buffer = io.BytesIO()
    image.fromarray(coarse.repeat(12, 0).repeat(12, 1)).save(buffer, "PNG")
    return buffer.getvalue()


PHOTOS = Photos([f"{i}.png" for i in range(6)], [lambda i=i: photo(i) for i in range(6)])


def recipe(**changes):
    return DeblurRecipe(**SMALL | changes)


def data(one):
    return Pairs(PHOTOS, *one.degrade()).split(0.3)


def a_batch(one, seed=0):
    return data(one)[0].crops(2, one.crop, torch.Generator().manual_seed(seed))


class Interrupted(Listener):
    """Raises what Ctrl-C raises, at a step of the whole run."""

    def __init__(self, step):
        self.left = step

    def step(self, samples, values):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def norms_of(net):
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d | nn.InstanceNorm2d)]


def test_photos_are_blurred_with_a_margin():
    one = recipe(crop=24)
    pairs = data(one)[0]
    blurred, sharp = a_batch(one)
    assert blurred.shape == sharp.shape == (2, 3, 24, 24)
    assert (blurred - sharp).abs().max() > 0.05
    again, _ = a_batch(one)
    assert torch.equal(blurred, again)
    # In the middle of a photo a crop is blurred as the whole is.
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    _, wide = pairs.picture(0, 96)
    degrade, margin = one.degrade()
    whole, part = (degrade(x, g) for x, g in zip((wide, wide[:, 10:80, 10:80]), generators))
    inner = slice(margin, 70 - margin)
    torch.testing.assert_close(part[:, inner, inner], whole[:, 10:80, 10:80][:, inner, inner])


def test_norms_gather_first_and_stay():
    torch.manual_seed(0)
    one = recipe()
    learner = one.build()
    net = learner.networks["model"]
    before = {name: p.clone() for name, p in net.named_parameters()}
    seen = []
    net.smooth[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    for step in range(_GATHER):
        learner.step(*a_batch(one, step))
        net.train()  # as the run does when an epoch begins
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    norm = net.smooth[1]
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-3, atol=1e-5)
    variance = torch.stack([x.var((2, 3)).mean(0) for x in seen]).mean(0)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-3, atol=1e-6)

    statistics = [(m.running_mean.clone(), m.running_var.clone()) for m in norms_of(net)]
    blurred, sharp = a_batch(one, 100)
    learner.step(blurred, sharp)
    assert any(not torch.equal(p, before[name]) for name, p in net.named_parameters())
    for module, (mean, variance) in zip(norms_of(net), statistics):
        assert torch.equal(module.running_mean, mean)
        assert torch.equal(module.running_var, variance)
    # What was trained is what runs in eval mode.
    net.train()
    terms = learner.step(blurred, sharp)
    assert not any(m.training for m in norms_of(net))
    assert float(terms["content"]) > 0


def test_content_loss():
    """0.5 times the mean square in -1..1; balanced, every crop's over its blurred one's."""
    blurred, sharp = a_batch(recipe())
    plain, balanced = (recipe(balance=b).build() for b in (False, True))
    own = plain.step(blurred, sharp)  # the first step: the network is the identity
    wanted = 0.5 * (2 * blurred - 2 * sharp).square().mean()
    assert float(own["content"]) == pytest.approx(float(wanted), rel=1e-4)
    each = (2 * blurred - 2 * sharp).square().mean((1, 2, 3))
    wanted = 0.5 * (each / (each + 4e-4)).mean()
    assert float(balanced.step(blurred, sharp)["content"]) == pytest.approx(float(wanted), rel=1e-4)


def test_it_learns():
    """One batch by heart. The network is the identity until the norms have gathered."""
    torch.manual_seed(0)
    one = recipe()
    learner, batch = one.build(), a_batch(one)
    losses = [float(learner.step(*batch)["content"]) for _ in range(_GATHER + 40)]
    assert losses[:_GATHER] == pytest.approx([losses[0]] * _GATHER)
    assert losses[-1] < 0.7 * losses[0]


def test_the_dynamic_batchs_optimizer(tmp_path):
    """It learns too; and the steps that gather, which it does not make, count."""
    seen = []

    class Samples(Listener):
        def step(self, samples, values):
            seen.append(samples)

    one = recipe(optimizer="sgdm", lr=0.01, epochs=1, steps=_GATHER + 4)
    (row,) = train_restoration(one, tmp_path, data=data(one), listener=Samples())
    assert seen == [2] * (_GATHER + 4)
    assert row["batch_size"] == 2
    assert load_file(tmp_path / "last.safetensors")["final.weight"].abs().max() > 0


def test_it_goes_on_exactly(tmp_path):
    """A run in two parts is the run in one; and its file is one that deblur_yolo reads."""
    one = recipe(epochs=2, steps=10)
    train_restoration(one, tmp_path / "a", data=data(one))
    with pytest.raises(KeyboardInterrupt):
        train_restoration(
            one, tmp_path / "b", data=data(one), checkpoint_seconds=0, listener=Interrupted(18)
        )
    train_restoration(one, tmp_path / "b", data=data(one), resume=True)
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    start = one.build().networks["model"].state_dict()
    assert not torch.equal(a["final.weight"], start["final.weight"])
    deblur_yolo(tmp_path / "a" / "last.safetensors", trim=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights to start from, and those of what judges: random, but for the names."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    vgg, channels, place = {}, 3, 0
    for block in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
        for width in block:
            conv = nn.Conv2d(channels, width, 3)
            vgg |= {f"features.{place}.{k}": v for k, v in conv.state_dict().items()}
            channels, place = width, place + 2
        place += 1
    torch.save(vgg, folder / "vgg.pth")
    save_file(small_yolo(4).state_dict(), folder / "detector.safetensors")
    torch.save(mobilenet_v2().state_dict(), folder / "encoder.pth")
    learner = recipe(encoder=str(folder / "encoder.pth")).build()
    for step in range(_GATHER):
        learner.step(*a_batch(recipe(), step))
    state = learner.networks["model"].state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "start.safetensors")
    return folder


def test_whole_loss(files, tmp_path):
    """All terms take part, with their weights; the generator and both discriminators learn, VGG,
    the detector and the norms do not; a resumed run is the whole run."""
    one = recipe(
        phase="whole", init=str(files / "start.safetensors"), vgg=str(files / "vgg.pth"),
        detector=str(files / "detector.safetensors"), epochs=1, steps=3, lr=1e-4,
    )  # fmt: skip
    learner = one.build()
    assert list(learner.networks) == ["model", "global", "local"]
    judges = [learner.terms[name][1] for name in ("perceptual", "detection")]
    states = [
        {name: value.clone() for name, value in m.state_dict().items()}
        for m in (*learner.networks.values(), *judges)
    ]
    blurred, sharp = a_batch(one)
    with torch.no_grad():
        restored = learner.networks["model"].eval()(blurred)
        wanted = {
            "content": 0.5 * 4 * (restored - sharp).square().mean(),
            "perceptual": 0.006 * judges[0](restored, sharp),
            "detection": 0.1 * judges[1](restored, sharp),
        }
    terms = learner.step(blurred, sharp)
    assert set(terms) == {*wanted, "adversarial"}
    for name, value in wanted.items():
        assert float(terms[name]) == pytest.approx(float(value), rel=1e-3), name
    # Predictions near 0 at first: 0.01 times ((0 - 0 - 1)^2 + (0 - 0 + 1)^2) / 2.
    assert float(terms["adversarial"]) == pytest.approx(0.01, rel=0.3)
    changed = [
        {name for name, value in m.state_dict().items() if not torch.equal(value, state[name])}
        for m, state in zip((*learner.networks.values(), *judges), states)
    ]
    assert "final.weight" in changed[0]
    assert not any("running" in name for name in changed[0])
    for names in changed[1:3]:
        assert {"real", "made", "seen"} < names
        assert any(name.endswith("weight") for name in names)
    assert changed[3] == changed[4] == set()

    with pytest.raises(KeyboardInterrupt):
        train_restoration(
            one, tmp_path / "b", data=data(one), checkpoint_seconds=0, listener=Interrupted(2)
        )
    for name, resume in (("a", False), ("b", True)):
        train_restoration(one, tmp_path / name, data=data(one), resume=resume)
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in "ab")
    for name in ("model", "global", "local"):
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name]), name


def test_without_discriminators(files):
    one = recipe(
        phase="whole", init=str(files / "start.safetensors"), adversarial=False,
        detector=str(files / "detector.safetensors"),
    )  # fmt: skip
    learner = one.build()
    assert list(learner.networks) == ["model"]
    assert set(learner.step(*a_batch(one))) == {"content", "detection"}


def test_all_goes_to_the_device(files):
    """The networks, and what judges: a run on a GPU needs both there."""
    one = recipe(
        phase="whole", init=str(files / "start.safetensors"), vgg=str(files / "vgg.pth"),
        detector=str(files / "detector.safetensors"),
    )  # fmt: skip
    learner = one.build()
    learner.to(torch.device("meta"))
    modules = [*learner.networks.values(), *(loss for _, loss in learner.terms.values())]
    assert len(modules) == 5
    for module in modules:
        tensors = [*module.parameters(), *module.buffers()]
        assert {tensor.device.type for tensor in tensors} == {"meta"}, type(module)


def test_half_precision(files):
    """Forward passes in bfloat16 give terms near those of float32, and all learn."""
    one = recipe(
        phase="whole", init=str(files / "start.safetensors"), vgg=str(files / "vgg.pth"),
        detector=str(files / "detector.safetensors"),
    )  # fmt: skip
    terms = []
    for enabled in (False, True):
        torch.manual_seed(0)
        learner = one.build()
        learner.autocast = lambda enabled=enabled: torch.autocast(
            "cpu", torch.bfloat16, enabled=enabled
        )
        net, *critics = learner.networks.values()
        some = [net.final.bias, *(next(critic.parameters()) for critic in critics)]
        before = [parameter.clone() for parameter in some]
        terms.append(learner.step(*a_batch(one)))
        for parameter, old in zip(some, before):
            assert parameter.dtype == torch.float32
            assert not torch.equal(parameter, old)
    for name, value in terms[0].items():
        assert float(terms[1][name]) == pytest.approx(float(value), rel=0.05), name
    # The generator is the identity still; the critics have computed in bfloat16.
    assert float(terms[0]["adversarial"]) != float(terms[1]["adversarial"])


def test_darknets_files_are_yolov3s(files, monkeypatch):
    given = []

    def yolov3(weights):
        given.append(weights)
        return small_yolo(2)

    monkeypatch.setattr(models, "yolov3", yolov3)
    learner = recipe(
        phase="whole", init=str(files / "start.safetensors"), detector="yolov3.weights"
    ).build()
    assert given == ["yolov3.weights"]
    weight, loss = learner.terms["detection"]
    assert weight == 0.1
    assert loss.detector.num_classes == 2


def test_a_critic_that_is_no_number(files, tmp_path, monkeypatch):
    """The run stops, and the checkpoint of before it, from which it goes on, is finite in all."""
    one = recipe(phase="whole", init=str(files / "start.safetensors"), epochs=1, steps=4)
    loss, calls = RelativisticCritic.loss, []

    def poisoned(self, *predictions):
        calls.append(1)
        return loss(self, *predictions) * (float("nan") if len(calls) == 5 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(RelativisticCritic, "loss", poisoned)
        with pytest.raises(
            FloatingPointError, match=r"must be finite, got .*checkpoint.pt is from"
        ):
            train_restoration(one, tmp_path, data=data(one), checkpoint_seconds=0)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    for name in ("model", "global", "local"):
        assert all(bool(value.isfinite().all()) for value in state[name].values()), name
    assert state["steps"] == 2
    assert len(train_restoration(one, tmp_path, data=data(one), resume=True)) == 1


RANKS = """
import io, sys
import numpy as np
import torch
from PIL import Image
from pywino.data import Pairs, Photos
from pywino.train import DeblurRecipe, train_restoration
from pywino.train.restoration import _Run

def photo(i):
    coarse = np.random.default_rng(i).integers(0, 256, (8, 10, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse.repeat(12, 0).repeat(12, 1)).save(buffer, "PNG")
    return buffer.getvalue()

torch.set_num_threads(1)
start, detector, out = sys.argv[1:]
recipe = DeblurRecipe(data="here", phase="whole", init=start, detector=detector, epochs=1, steps=3,
                      batch_size=4, crop=32, validate=2, largest=32)
photos = Photos([f"{i}.png" for i in range(6)], [lambda i=i: photo(i) for i in range(6)])
networks, close = {}, _Run.close
def closed(self):
    networks.update(self.networks)
    return close(self)
_Run.close = closed
(row,) = train_restoration(recipe, out, data=Pairs(photos, *recipe.degrade()).split(0.3))
sums = [float(sum(p.double().sum() for p in net.parameters())) for net in networks.values()]
print(row["loss"], row["psnr"], row["adversarial_loss"], *sums)
"""


@pytest.mark.slow
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_two_ranks(files, tmp_path):
    """Half of the batch each; generator and discriminators stay the same on both."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    (tmp_path / "script.py").write_text(RANKS)
    arguments = [files / "start.safetensors", files / "detector.safetensors", tmp_path / "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYWINO_PLAN": "static"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, tmp_path / "script.py", *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [process.communicate(timeout=150)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    lines = [text.splitlines()[-1] for text in texts]
    assert lines[0] == lines[1]
    assert float(lines[0].split()[2]) == pytest.approx(0.01, rel=0.5)


def test_the_encoder_may_stay(files):
    one = recipe(encoder=str(files / "encoder.pth"), freeze_encoder=True)
    net = one.build().networks["model"]
    encoder = mobilenet_v2(weights=files / "encoder.pth").features
    assert torch.equal(net.fpn.features[5].conv[2].weight, encoder[5].conv[2].weight)
    assert not any(p.requires_grad for p in net.fpn.features.parameters())
    assert net.final.weight.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase": "half"}, "phase must be one of content, whole"),
        ({"shortest": 9.0, "longest": 3.0}, "shortest must be between 0 and longest"),
        ({"batch_size": 1}, "batch_size must be 2 or more for such small crops"),
        ({"clip": 0.0}, "clip must be more than 0"),
        ({"vgg": "vgg.pth"}, "phase must be 'whole' for vgg"),
        ({"phase": "whole", "detector": "d", "crop": 40}, "crop must be a multiple of 32"),
    ],
)
def test_recipes_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_command(files, tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / "photos" / f"{i}.png").write_bytes(photo(i))
    arguments = ["deblur", "--data", tmp_path / "photos", "--out", tmp_path / "run"]
    arguments += ["--encoder", files / "encoder.pth", "--crop", 32, "--batch-size", 2]
    arguments += ["--epochs", 1, "--steps", 2, "--validate", 1, "--largest", 32, "--balance"]
    result = CliRunner().invoke(train, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "PSNR" in result.output
    assert (tmp_path / "run" / "samples" / "epoch-0001.png").exists()


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ({}, (), "photos must have .jpg"),
        ({"a.png": b"no picture"}, (), "a.png is damaged or another file"),
        ({}, ("--init", "a.png"), "a.png cannot be read as a file of tensors"),
        ({}, ("--encoder", "absent.pth"), "there is no file absent.pth"),
    ],
)
def test_commands_that_are_refused(tmp_path, monkeypatch, content, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "a.png").write_bytes(b"no weights")
    if arguments:
        content = {f"{i}.png": photo(i) for i in range(3)}
    for name, one in content.items():
        (tmp_path / "photos" / name).write_bytes(one)
    for i in range(bool(content) * 4):
        (tmp_path / "photos" / f"{i}.png").write_bytes(photo(i))
    small = (
        "--crop",
        "32",
        "--batch-size",
        "2",
        "--epochs",
        "1",
        "--steps",
        "20",
        "--validate",
        "1",
    )
    line = ["deblur", "--data", "photos", "--out", "run", *small, *arguments]
    result = CliRunner().invoke(train, line)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run" / "last.safetensors").exists()
