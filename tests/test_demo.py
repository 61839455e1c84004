# SPDX-License-Identifier: BSD-3-Clause
"""The demo on networks and pictures of a few pixels: what it measures, writes and says."""

import dataclasses
import io
import json
import os
import time

import pytest

pytest.importorskip("skimage", reason="the demo's photographs: pip install 'pywino[demo]'")
pytest.importorskip("sklearn", reason="the demo's photographs: pip install 'pywino[demo]'")
pytest.importorskip("matplotlib", reason="the demo's pictures: pip install 'pywino[demo]'")

import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn

import pywino
from pywino import models
from pywino.cli import demo


class Picture(nn.Module):
    """(N, 3, H, W) to the same; one of its two swappable layers runs twice."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 3, padding=2, dilation=2)
        self.outer = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.point = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.point(self.outer(self.inner(torch.relu(self.inner(x))))) + x


def picture_job():
    return demo.Job(
        "picture", "Picture", Picture, "china.jpg", (20, 30), normalised=False, rain=True
    )


def classifier_job():
    def build():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        )

    return demo.Job("classifier", "A classifier", build, "chelsea", (24, 16))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, results, text on the console) of a demo of both."""
    out = tmp_path_factory.mktemp("demo") / "deep" / "folder"
    text = io.StringIO()
    jobs = [picture_job(), classifier_job()]
    console = Console(file=text, width=200)
    return out, demo.run(jobs, out, console, budget_s=0.02), text.getvalue()


def test_files(finished):
    out, _, text = finished
    names = {"demo.json", "demo.md", "picture.png", "picture_photo.png", "classifier.png"}
    assert {path.name for path in out.iterdir()} == names
    assert all((out / n).read_bytes().startswith(b"\x89PNG") for n in names if n.endswith("png"))
    assert all(name in text for name in names)


def test_json(finished):
    out, results, _ = finished
    content = json.loads((out / "demo.json").read_text(), parse_constant=pytest.fail)
    assert content["environment"]["torch"] == torch.__version__
    assert content["environment"]["threads"] == torch.get_num_threads()
    for model, result in zip(content["models"], results, strict=True):
        assert model["ratio"] == result.ratio
        assert set(model["before_ms"]) == set(model["after_ms"]) == {"nchw", "channels_last"}
        assert [row["name"] for row in model["layers"]] == [row.name for row in result.layers]
        assert all(
            row["ratio"] == pytest.approx(row["before_ms"] / row["after_ms"])
            for row in model["layers"]
        )


def test_layers_and_calls(finished):
    picture, classifier = finished[1]
    assert [(row.name, row.calls) for row in picture.layers] == [("inner", 2), ("outer", 1)]
    assert [row.size for row in picture.layers] == ["3→3, 20×30, d 2", "3→3, 20×30"]
    assert [(row.name, row.size) for row in classifier.layers] == [("0", "3→8, 24×16")]
    for row in picture.layers + classifier.layers:
        assert row.before_ms > 0
        assert row.after_ms > 0
        assert 0 < row.error < 1e-5
        assert 0 < row.torch_error < 1e-5


def test_totals(finished):
    for result in finished[1]:
        assert result.before == min(result.before_ms.values())
        assert result.after == min(result.after_ms.values())
        assert result.ratio == result.before / result.after
        assert result.layers_before == sum(row.before_ms for row in result.layers)
        assert 0 < result.error < 1e-4
        assert 0 < result.torch_error < 1e-4


def cells(out, title):
    """The table of one model in demo.md as lists of cells, without its head."""
    section = (out / "demo.md").read_text().split(f"## {title}: ")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[1:]]


def test_markdown(finished):
    out, results, text = finished
    for result in results:
        rows = cells(out, result.title)
        assert [row[0] for row in rows] == [
            *(layer.name + " (2 calls)" * (layer.calls == 2) for layer in result.layers),
            *("these layers", "all else", "whole model"),
        ]
        assert {len(row) for row in rows} == {8}
        *layers, these, rest, whole = [[float(row[3]), float(row[4])] for row in rows]
        for column in (0, 1):
            assert these[column] == pytest.approx(
                sum(row[column] for row in layers), abs=0.02 * len(rows)
            )
            assert rest[column] == pytest.approx(max(0, whole[column] - these[column]), abs=0.02)
        assert rows[-1][5] == f"{result.ratio:.2f}"
        assert rows[-2][5] == ""
    assert (
        "default memory allocator" in (out / "demo.md").read_text()
        or "GLIBC_TUNABLES" in os.environ
    )
    assert "random weights, seed 0" in text
    assert "it reached" in " ".join(text.split())


def result_with(before, layers, after=1.0):
    rows = [demo.LayerRow("l", "", 1, "", ms, 1.0, 0.0, 0.0) for ms in layers]
    return demo.Result(
        "m", "M", "", {"nchw": before, "channels_last": 2 * before}, {"nchw": after}, 0, 0, rows
    )


def test_amdahl():
    result = result_with(10.0, [2.0, 3.0], after=8.0)
    assert (result.share, result.ceiling, result.ratio) == (0.5, 2.0, 1.25)
    assert (
        "take 50 % of the time before, so the whole model's ceiling is 2.00×; it reached 1.25×"
        in demo._footer(result)
    )
    # Layers one by one may take longer than in the model: no share above one, no infinity in JSON.
    result = result_with(4.0, [2.0, 3.0])
    assert result.share == 1
    assert result.as_json()["ceiling"] is None
    assert "ceiling is none" in demo._footer(result)
    # Where all else gets faster, too, it is no bound.
    result = dataclasses.replace(result_with(10.0, [2.0, 3.0], after=2.0), others="fused")
    assert result.as_json()["ceiling"] is None
    footer = demo._footer(result)
    assert "ceiling" not in footer
    assert "all else is fused after the swap. The whole model reached 5.00×" in footer


def test_interleaved():
    order = []
    taken = {"a": iter([1e9, 1, 9, 2]), "b": iter([1e9, 5, 3, 4])}

    def run_of(key):
        def run():
            order.append(key)
            return {"": next(taken[key])}

        return run

    ms = demo.interleaved({key: run_of(key) for key in "ab"}, 0, least=3)
    assert order == list("abababab")
    assert ms == {"a": {"": 2}, "b": {"": 4}}  # medians, the round to warm up left out


def test_timed():
    """A layer's calls in one pass add up, and start anew in the next."""

    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(0.01)
            return x

    slow = Slow()
    model = nn.Sequential(slow, nn.Sequential(Slow()), slow)
    timed = demo.Timed(model, torch.zeros(1), ["0", "1.0"])
    for _ in range(2):
        ms = timed()
        assert 20 <= ms["0"] < 39  # wide: a busy machine sleeps longer
        assert ms["1.0"] >= 10
        assert ms["0"] + ms["1.0"] <= ms[""]
    assert torch.equal(timed.output, torch.zeros(1))


def test_twin_shares_parameters_and_nothing_else():
    model = Picture()
    twin = demo._twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    pywino.swap_(twin)
    assert type(twin.inner) is pywino.WinogradConv2d
    assert type(model.inner) is nn.Conv2d


def test_photographs():
    """Each job's is a picture of its size, the same every time; rain makes it brighter."""
    for job in demo.jobs(quick=True):
        photo = demo._photo(job)
        assert photo.shape == (1, 3, *job.size)
        assert 0 <= photo.min() < 0.2
        assert 0.8 < photo.max() <= 1
        assert torch.equal(demo._input(job), demo._input(job))
        rainy = demo._rain(photo)
        assert (rainy >= photo).all()
        assert 0.02 < (rainy - photo).mean() < 0.2


def test_jobs():
    full, quick = demo.jobs(), demo.jobs(quick=True)
    assert [job.size for job in full] == [(224, 224), (224, 224), (321, 481)]
    assert all(q.size < f.size for q, f in zip(quick, full, strict=True))
    assert full[2].build().stages == 6
    assert quick[2].build().stages == 2


def test_given_weights(tmp_path):
    torch.save(models.sapnet().state_dict(), tmp_path / "mine.pth")
    job = demo.jobs(sapnet_weights=str(tmp_path / "mine.pth"))[2]
    assert job.weights == "weights of mine.pth"
    stored = torch.load(tmp_path / "mine.pth")
    assert torch.equal(job.build().conv[0].weight, stored["conv.0.weight"])


def test_without_the_native_library(monkeypatch):
    monkeypatch.setattr(demo._native, "reason", "nobody built it")
    text = demo._header(demo.environment())
    assert "native library is missing, so all ratios are near 1: nobody built it" in text


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    demo.write_whole(path, b"old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_command_refuses(tmp_path):
    runner = CliRunner()
    assert "--quick" in runner.invoke(demo.demo, ["--help"]).output
    assert runner.invoke(demo.demo, ["--threads", "0"]).exit_code == 2
    assert runner.invoke(demo.demo, ["--sapnet-weights", str(tmp_path / "absent")]).exit_code == 2


def test_command(tmp_path, monkeypatch):
    """The whole command, on a small job, with its options; bad weights are a message."""
    asked = {}

    def jobs(quick, sapnet_weights):
        asked.update(quick=quick, weights=sapnet_weights)
        return [classifier_job()]

    monkeypatch.setattr(demo, "jobs", jobs)
    threads = torch.get_num_threads()
    try:
        arguments = ["--quick", "--threads", "1", "--out", str(tmp_path / "out")]
        done = CliRunner().invoke(demo.demo, arguments, catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0
    assert asked == {"quick": True, "weights": None}
    about = json.loads((tmp_path / "out" / "demo.json").read_text())["environment"]
    assert about["threads"] == 1

    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"x")
    monkeypatch.setattr(
        demo,
        "jobs",
        lambda quick, weights: [
            demo.Job("s", "S", lambda: models.sapnet(weights=bad), "china.jpg", (9, 9))
        ],
    )
    done = CliRunner().invoke(
        demo.demo, ["--sapnet-weights", str(bad), "--out", str(tmp_path / "none")]
    )
    assert done.exit_code == 1
    assert (
        done.output.strip().splitlines()[-1].startswith("Error: load_weights:")
        or "load_weights" in done.output
    )
    assert not isinstance(done.exception, RuntimeError)
    assert not (tmp_path / "none").exists()
