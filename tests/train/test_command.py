# SPDX-License-Identifier: BSD-3-Clause
"""`pywino train classify` on pictures in a folder, and its random shifts."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pywino.cli import main
from pywino.cli.train import train
from pywino.train import Recipe
from pywino.train.classify import _augmented

image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 6)):
        for label in range(2):
            for i in range(count):
                pixels = generator.integers(0, 128, (8, 8, 3), np.uint8)
                pixels[:, 4 * label : 4 * label + 4] += 120
                path = folder / split / f"class{label}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.fromarray(pixels).save(path)
    return folder


def run(*arguments):
    return CliRunner().invoke(train, ["classify", *map(str, arguments)])


def small(pictures, out):
    return (
        "--data",
        "folder",
        "--root",
        pictures,
        "--out",
        out,
        "--model",
        "all_cnn_c",
        "--width",
        0.1,
        "--batch-size",
        16,
        "--epochs",
        2,
    )


def test_command(pictures, tmp_path):
    result = run(*small(pictures, tmp_path / "run"), "--dbs", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "all_cnn_c, epoch 2: loss" in result.output
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["dynamic_batch"] is True
    assert recipe["seed"] == 3
    again = run(*small(pictures, tmp_path / "run"), "--dbs", "--seed", 3)
    assert again.exit_code == 1
    assert "has a run already" in again.output
    assert run(*small(pictures, tmp_path / "run"), "--dbs", "--seed", 3, "--resume").exit_code == 0


def test_stack(pictures, tmp_path):
    result = run(*small(pictures, tmp_path / "run"), "--stack")
    assert result.exit_code == 0, result.output
    assert "Stack of all_cnn_c" in result.output
    assert (tmp_path / "run" / "stack.safetensors").exists()


def test_pruning(pictures, tmp_path):
    """The same from the line and from a file."""
    config = tmp_path / "recipe.toml"
    config.write_text("sparsity = [0.3, 0.6]\nprune_epochs = 1\n")
    arguments = (("--sparsity", ".3,.6"), ("--config", config))
    for name, own in zip("ab", arguments):
        line = (*small(pictures, tmp_path / name), "--epochs", 1, *own)
        result = run(*line)
        assert result.exit_code == 0, result.output
        assert "all_cnn_c, epoch 3: loss" in result.output
        assert "60% zeros" in result.output
        recipe = json.loads((tmp_path / name / "recipe.json").read_text())
        assert recipe["sparsity"] == [0.3, 0.6]
        assert Recipe(**recipe).sparsity == (0.3, 0.6)
        assert not (tmp_path / name / "kernels.png").exists()
        assert run(*line, "--resume", "--plot-kernels").exit_code == 0
        with image.open(tmp_path / name / "kernels.png") as picture:
            assert picture.size == (3 * 400, 432)  # a panel each for 0, 30 and 60 % of zeros
    bad = run("--sparsity", ".3;.6", "--out", tmp_path / "c")
    assert bad.exit_code == 2
    assert "'.3;.6' must be numbers with commas, as in .3,.6,.8" in bad.output


def test_config_file(pictures, tmp_path):
    """The line wins over the file, the file over the defaults."""
    config = tmp_path / "recipe.toml"
    config.write_text(
        f'data = "folder"\nroot = "{pictures}"\n'
        'model = "all_cnn_c"\nwidth = 0.1\nepochs = 7\nlr = 0.03\n'
    )
    result = run("--config", config, "--out", tmp_path / "run", "--epochs", 1)
    assert result.exit_code == 0, result.output
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (recipe["epochs"], recipe["lr"], recipe["width"]) == (1, 0.03, 0.1)
    assert Recipe(**recipe) == replace(Recipe.from_toml(config), epochs=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate = 1", "names in .* must be among data, root"),
        ("epochs = = 1", "must be a TOML file"),
        ("model = 'lenet'", "model must be one of"),
    ],
)
def test_config_files_that_are_refused(tmp_path, text, message):
    config = tmp_path / "recipe.toml"
    config.write_text(text)
    result = run("--config", config, "--out", tmp_path / "run")
    assert result.exit_code == 1
    with pytest.raises(ValueError, match=message):
        Recipe.from_toml(config)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("nope", "device must be cpu or cuda, got 'nope'"),
        pytest.param(
            "cuda",
            "device must be cpu, as torch finds no GPU here, got 'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_devices_that_are_refused(pictures, tmp_path, device, message):
    result = run(
        "--data", "folder", "--root", pictures, "--out", tmp_path / "run", "--device", device
    )
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_missing_data(tmp_path):
    result = run("--root", tmp_path, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "must have train-images-idx3-ubyte" in result.output
    assert "Traceback" not in result.output


def test_help():
    result = CliRunner().invoke(main, ["train", "classify", "--help"])
    assert result.exit_code == 0
    assert "--dynamic-batch" in result.output


def test_training_is_imported_when_it_is_used():
    script = "import sys, pywino; print([m for m in sys.modules if m.startswith('pywino.train')])"
    done = subprocess.run(
        [sys.executable, "-c", script + "; pywino.train.Recipe"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


def test_augmentation():
    """Each result is the padded image, shifted and perhaps mirrored; all shifts occur."""
    x = torch.arange(1.0, 8 * 8 * 2 + 1).view(1, 2, 8, 8).expand(400, 2, 8, 8)
    padded = torch.nn.functional.pad(x[:1], (1, 1, 1, 1))
    wanted = {}
    for dy in range(3):
        for dx in range(3):
            cut = padded[0, :, dy : dy + 8, dx : dx + 8]
            wanted[tuple(cut.flatten().tolist())] = (dy, dx, False)
            wanted[tuple(cut.flip(2).flatten().tolist())] = (dy, dx, True)
    seen = {wanted[tuple(image.flatten().tolist())] for image in _augmented(x)}
    assert len(seen) == 18
