# SPDX-License-Identifier: BSD-3-Clause
"""Training runs that were kept, and the tables of their accuracies.

    python benches/runs.py FOLDER [--kept benches/runs]

copies what is small of the finished runs in FOLDER (folders that `pywino train` wrote, or what
`make gpu-train` left) to benches/runs/<name>: recipe.json, log.jsonl, pictures, stack.json.
benches/tables.py makes the tables `accuracy` and `accuracy_by_batch` of them. A cell that was not
run stays empty.
"""

import argparse
import io
import json
import statistics
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

KEPT = Path(__file__).parent / "runs"
SMALL = ("recipe.json", "log.jsonl", "curves.png", "kernels.png", "stack.json", "detection.json")
PIECES = "work.tar.*"  # of gpu-train

# (data, network, its kind, what the paper reports in per cent, at which sparsity)
_FASHION = "Fashion-MNIST"
ROWS = (
    (_FASHION, "AlexNet, dense (C-CNN)", ("alexnet", "dense", False, False), "90.83 at 30 %"),
    (_FASHION, "AlexNet, dense, DBS", ("alexnet", "dense", True, False), ""),
    (_FASHION, "AlexNet, Winograd-ReLU", ("alexnet", "winograd_relu", False, False), ""),
    (_FASHION, "AlexNet, Winograd-ReLU, DBS", ("alexnet", "winograd_relu", True, False), ""),
    (_FASHION, "stack, dense (SC-CNN)", ("alexnet", "dense", False, True), "92.29 at 30 %"),
    (
        _FASHION,
        "stack, Winograd-ReLU, DBS",
        ("alexnet", "winograd_relu", True, True),
        "93.49 at 30 %",
    ),
    ("CIFAR-10 (JPEG)", "VGG-16, dense (C-CNN)", ("vgg16", "dense", False, False), "88.36 at 40 %"),
    ("CIFAR-10 (JPEG)", "VGG-16, Winograd-ReLU", ("vgg16", "winograd_relu", False, False), ""),
    ("CIFAR-10 (JPEG)", "VGG-16, Winograd-ReLU, DBS", ("vgg16", "winograd_relu", True, False), ""),
)
SPARSITIES = (0.0, 0.3, 0.6, 0.8)
BATCHES = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Run:
    """A folder of `pywino train`; of a stack, recipe and rows are those of its first member."""

    name: str
    recipe: dict
    rows: list[dict]
    stack: dict | None = None

    @property
    def epochs(self) -> int:
        recipe = self.recipe
        return recipe["epochs"] + len(recipe.get("sparsity", ())) * recipe.get("prune_epochs", 0)

    @property
    def kind(self) -> tuple:
        """(data set, (model, convolution, dynamic batch, stacked))"""
        recipe = self.recipe
        data = recipe["data"]
        if data == "folder" and "cifar10" in Path(recipe["root"]).name:
            data = "CIFAR-10 (JPEG)"
        data = {"fashion-mnist": _FASHION}.get(data, data)
        # "winograd" is the dense network, computed by other kernels.
        conv = {"winograd": "dense"}.get(recipe.get("conv"), recipe.get("conv"))
        stacked = self.stack is not None
        return data, (recipe.get("model"), conv, recipe.get("dynamic_batch"), stacked)

    @property
    def accuracies(self) -> dict[float, float]:
        """Sparsity -> test accuracy after the last epoch with it, of a finished classifier."""
        sparsity = self.recipe.get("sparsity", [])
        if self.stack is not None:
            return {sparsity[-1] if sparsity else 0.0: self.stack["test_accuracy"]}
        found = {}
        epochs = self.recipe["epochs"]
        if epochs:
            found[0.0] = self.rows[epochs - 1]["test_accuracy"]
        for i, s in enumerate(sparsity, 1):
            found[s] = self.rows[epochs + i * self.recipe["prune_epochs"] - 1]["test_accuracy"]
        return found


def read(folder: Path) -> Run | None:
    """The run in a folder; None where there is none, or none that has finished an epoch."""
    stack = None
    if (folder / "stack.json").exists():
        stack = json.loads((folder / "stack.json").read_text(encoding="utf-8"))
    inner = folder / stack["members"][0] if stack else folder
    if not (inner / "recipe.json").exists() or not (inner / "log.jsonl").exists():
        return None
    recipe = json.loads((inner / "recipe.json").read_text(encoding="utf-8"))
    lines = (inner / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return Run(folder.name, recipe, [json.loads(line) for line in lines], stack)


def finished(folder: Path) -> bool:
    """Whether all epochs of a run are done; a stack's when its weights are chosen."""
    run = read(folder)
    return run is not None and len(run.rows) >= run.epochs


def read_all(folder: Path) -> list[Run]:
    """The finished runs in a folder's folders."""
    return [run for path in sorted(folder.glob("*")) if finished(path) and (run := read(path))]


# ------------------------------------------------------------------------------------------ tables


def cell(accuracies: list[float]) -> str:
    """Mean, and the range of several seeds, in per cent."""
    if not accuracies:
        return ""
    per_cent = [100 * accuracy for accuracy in accuracies]
    text = f"{statistics.fmean(per_cent):.2f}"
    if len(per_cent) > 1:
        text += f" ({min(per_cent):.2f}–{max(per_cent):.2f}, n = {len(per_cent)})"
    return text


def _table(head: list[str], lines: list[list[str]]) -> str:
    text = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in text)


def accuracy(runs: list[Run]) -> str:
    """Test accuracy by sparsity, at batch 128 or growing from it."""
    lines = []
    for data, title, kind, paper in ROWS:
        own = [run for run in runs if run.kind == (data, kind) and run.recipe["batch_size"] == 128]
        epochs = sorted({run.recipe["epochs"] for run in own if run.recipe["epochs"]})
        by_sparsity = [
            cell([run.accuracies[s] for run in own if s in run.accuracies]) for s in SPARSITIES
        ]
        lines.append([data, title, ", ".join(map(str, epochs)), *by_sparsity, paper])
    head = ["data", "network", "epochs", *(f"{s:.0%} zeros" for s in SPARSITIES), "the paper"]
    return _table(head, lines)


def accuracy_by_batch(runs: list[Run]) -> str:
    """Test accuracy of unpruned networks by the size of a fixed batch, and with a growing one."""
    lines = []
    for data, title, (model, conv, dynamic, stacked), _ in ROWS:
        if dynamic or stacked:
            continue
        cells = []
        for batch in (*BATCHES, None):
            kind = (data, (model, conv, batch is None, False))
            own = [run for run in runs if run.kind == kind and 0.0 in run.accuracies]
            own = [run for run in own if run.recipe["batch_size"] == (batch or 128)]
            cells.append(cell([run.accuracies[0.0] for run in own]))
        lines.append([data, title, *cells])
    return _table(["data", "network", *map(str, BATCHES), "128, DBS"], lines)


TABLES = {"accuracy": accuracy, "accuracy_by_batch": accuracy_by_batch}
NOTE = (
    "Test accuracy in per cent after the last epoch, of finished runs under `benches/runs`; one "
    "seed where no n is given. A cell that was not run is empty. Dense networks are trained with "
    "PyTorch's convolutions or with the Winograd kernels: the same function."
)


def markdown(name: str, folder: Path = KEPT) -> str:
    return f"**{name}**: {NOTE}\n\n{TABLES[name](read_all(folder))}"


# -------------------------------------------------------------------------------------------- keep


def unpack(source: Path, target: Path) -> None:
    """Puts the runs of gpu-train's pieces into `target`, but those that are there already."""
    pieces = sorted(source.glob(PIECES))
    content = io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))
    there = {path.name for path in target.glob("*")}
    if pieces:
        with tarfile.open(fileobj=content) as archive:
            new = [m for m in archive.getmembers() if Path(m.name).parts[0] not in there]
            archive.extractall(target, new, filter="data")


def keep(source: Path, kept: Path) -> list[str]:
    """Copies the small files of the finished runs; returns their names."""
    names = []
    for path in sorted(source.glob("*")):
        if not finished(path):
            continue
        names.append(path.name)
        for file in (file for name in SMALL for file in path.rglob(name)):
            target = kept / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return names


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kept", type=Path, default=KEPT)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as unpacked:
        unpack(options.folder, Path(unpacked))
        names = keep(options.folder, options.kept) + keep(Path(unpacked), options.kept)
    print(f"kept in {options.kept}: {', '.join(names) or 'nothing: no run is finished'}")
    return 0 if names else 1


if __name__ == "__main__":
    sys.exit(main())
