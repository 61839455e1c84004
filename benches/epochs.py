# SPDX-License-Identifier: BSD-3-Clause
"""Seconds per epoch, tables 1 to 6 of "Efficient ensemble sparse convolutional neural networks with
dynamic batch size" (Zheng et al.), with the paper's figures (a GPU's) beside ours.

Measured is one training step, three times or more: batch from the images in memory, forward,
backward, update, in channels_last; masks held where the networks are pruned. A step times the steps
of an epoch is the epoch: evaluation is not in it, nor is what comes once.

C-CNN     the named network, dense
SC-CNN    with ConvPool-CNN-C and All-CNN-C, dense: the three networks of a stack, one by one
SWR-CNN   the same three with Winograd-ReLU layers, tile 2
DBS       with the batch that 128 grows to while momentum rises, 448; the paper's figures are of
          whole runs, in which the batch grows
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from pywino.data import Images
from pywino.optim import DynamicBatchSGDM, batch_size
from pywino.train import Recipe

# Task -> (images of an epoch, their size, classes).
TASKS = {
    "alexnet": (60000, (1, 28, 28), 10),
    "vgg16": (50000, (3, 32, 32), 10),
    "resnet32": (50000, (3, 32, 32), 100),
}
MEMBERS = ("convpool_cnn_c", "all_cnn_c")  # of a stack, beside the named network
CONTENDERS = ("C-CNN", "SC-CNN", "SWR-CNN", "SWR-CNN + DBS")
DBS = "DBS"

# Seconds per epoch in the paper: by per cent of zeros C, SC, SWR, SWR + DBS; by batch C, SC, SWR.
PAPER = {
    ("alexnet", "sparsity"): {
        20: (12, 37, 17, 11),
        30: (12, 37, 17, 11),
        40: (12, 36, 16, 11),
        50: (11, 37, 17, 11),
        60: (11, 37, 16, 10),
        70: (11, 36, 16, 10),
        80: (11, 37, 16, 10),
    },
    ("vgg16", "sparsity"): {
        20: (19, 41, 18, 15),
        30: (19, 41, 18, 14),
        40: (18, 40, 18, 14),
        50: (18, 40, 18, 14),
        60: (18, 40, 18, 13),
        70: (18, 39, 17, 13),
        80: (18, 39, 17, 12),
    },
    ("resnet32", "sparsity"): {
        20: (28, 51, 25, 21),
        30: (28, 51, 25, 21),
        40: (29, 49, 24, 20),
        50: (28, 53, 26, 22),
        60: (29, 53, 26, 22),
        70: (30, 51, 25, 21),
        80: (28, 49, 24, 20),
    },
    ("alexnet", "batch"): {
        64: (20, 53, 24),
        128: (12, 37, 17),
        256: (7, 28, 13),
        512: (5, 22, 10),
        1024: (3, 21, 8),
        DBS: (6, 24, 11),
    },
    ("vgg16", "batch"): {
        64: (28, 62, 28),
        128: (18, 40, 18),
        256: (13, 32, 15),
        512: (11, 28, 13),
        1024: (9, 27, 12),
        DBS: (13, 29, 14),
    },
    ("resnet32", "batch"): {
        64: (49, 90, 53),
        128: (29, 49, 20),
        256: (20, 34, 14),
        512: (14, 25, 11),
        1024: (12, 22, 10),
        DBS: (18, 29, 13),
    },
}


@dataclass(frozen=True)
class Row:
    """A line of a table: per cent of zeros at batch 128, or a batch of networks without zeros."""

    by: str
    value: int | str

    def __str__(self) -> str:
        return f"{self.value} % zeros" if self.by == "sparsity" else f"batch {self.value}"


SPARSITIES = tuple(Row("sparsity", value) for value in PAPER["alexnet", "sparsity"])
BATCHES = tuple(Row("batch", value) for value in PAPER["alexnet", "batch"])
# m at its highest: 0.9 exp(0.5^2 / (2 k)), k = 1.6 (pywino.optim.controller).
GROWN = batch_size(
    0.02,
    0.9 * math.exp(0.25 / 3.2),
    base_lr=0.02,
    base_momentum=0.9,
    base_batch_size=128,
)


def _step(task: str, model: str, conv: str, batch: int, zeros: int):
    """A function that trains a network on a batch of random images, as large as the task's."""
    _, size, classes = TASKS[task]
    recipe = Recipe(model=model, conv=conv, sparsity=(zeros / 100,) if zeros else ())
    torch.manual_seed(0)
    net = recipe.build(classes, size[0]).train().to(memory_format=torch.channels_last)
    pruner = recipe.pruner(net)
    if pruner is not None:
        pruner.step()
    opt = DynamicBatchSGDM(net.parameters(), lr=1e-9)  # every step computes about the same
    pixels = torch.randint(0, 256, (2 * batch, *size), dtype=torch.uint8)
    images = Images(pixels, torch.arange(2 * batch) % classes, range(classes))

    def step():
        x, y = images.batch(torch.randperm(2 * batch)[:batch])
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
        return pruner  # it lives as long as the function, and holds the zeros

    return step


def _stack(task, conv, batch, zeros):
    steps = [_step(task, model, conv, batch, zeros) for model in (task, *MEMBERS)]
    return lambda: [step() for step in steps]


def compare_epochs(compare, full, task, row):
    by_sparsity = row.by == "sparsity"
    zeros = row.value if by_sparsity else 0
    batch = 128 if by_sparsity else GROWN if row.value == DBS else row.value
    contenders = {
        "C-CNN": _step(task, task, "dense", batch, zeros),
        "SC-CNN": _stack(task, "dense", batch, zeros),
        "SWR-CNN": _stack(task, "winograd_relu", batch, zeros),
    }
    if by_sparsity and full:
        contenders["SWR-CNN + DBS"] = _stack(task, "winograd_relu", GROWN, zeros)
    samples = {name: GROWN if name[-3:] == DBS else batch for name in contenders}
    images = TASKS[task][0]

    def extra(ms):
        ms = {"SWR-CNN": ms["ours"], **ms}
        epochs = {name: ms[name] / 1e3 * images / samples[name] for name in samples}
        paper = PAPER[task, row.by][row.value]
        columns = {f"{name} s/epoch (the paper)": "" for name in CONTENDERS[: len(paper)]}
        for name, theirs in zip(CONTENDERS, paper):
            ours = f"{epochs[name]:.3g}" if name in epochs else ""
            columns[f"{name} s/epoch (the paper)"] = f"{ours} ({theirs})"
        return columns

    ours = contenders.pop("SWR-CNN")
    compare(
        {"f2": ours},
        contenders,
        denominator=("SC-CNN",),
        same=False,
        rounds=3,
        extra=extra,
        note=f"Milliseconds are those of a step; an epoch is {images} images over the batch, "
        f"extrapolated. {NOTES.get((task, row.by), '')}".strip(),
    )


NOTES = {
    ("vgg16", "sparsity"): "The paper's abstract says 2.86× for CIFAR-10, which no table has: "
    "SWR-CNN + DBS takes 14 of 26 s, 1.86×, and 2.17× at 80 % zeros.",
    ("resnet32", "batch"): "The paper's table has 20 s for SWR-CNN at batch 128; its table by "
    "sparsity has 24 to 26 s.",
}
