# SPDX-License-Identifier: BSD-3-Clause
"""All that decides what a training run computes."""

import itertools
import os
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import nn

from pywino import data as readers
from pywino import models
from pywino.pruning import Block, Magnitude, Pruner

DATA = ("fashion-mnist", "cifar10", "cifar100", "folder")
MODELS: dict[str, Callable[..., nn.Module]] = {
    "alexnet": models.alexnet,
    "vgg16": lambda *args, **options: models.vgg16(*args, image_size=32, **options),
    "resnet32": models.resnet32,
    "convpool_cnn_c": lambda *args, **options: models.convpool_cnn_c(
        *args, batch_norm=True, **options
    ),
    "all_cnn_c": lambda *args, **options: models.all_cnn_c(*args, batch_norm=True, **options),
}
PATTERNS = {"unstructured": Magnitude, "blocks": Block}
_WITH_WIDTH = ("convpool_cnn_c", "all_cnn_c")


@dataclass(frozen=True)
class Recipe:
    """data: "fashion-mnist", "cifar10", "cifar100" or "folder", of the files in `root`.
    model: "alexnet", "vgg16", "resnet32", "convpool_cnn_c", "all_cnn_c"; the last two with
        BatchNorm, and `width` times their channels.
    conv: "dense", "winograd" or "winograd_relu", the last with F(tile x tile, 3 x 3).
    dynamic_batch: let learning rate, momentum and batch size grow (`DynamicBatchController`), with
        k and every; otherwise the batch stays, with the same warm-up and the same plateaus.
    held_out: the part of the training images that accuracy is taken from to steer by.
    augment: random shifts by up to an eighth of the side, and mirror images.
    limit: use so many training images, None for all.
    amp: forward passes in bfloat16 autocast.
    compile: training steps through torch.compile, once for each of the first batch sizes.
    micro_batch: the most samples that are computed at once, None for no limit.
    init: weights to start from; of a stack the folder of another stack.
    sparsity: after `epochs` epochs the 3x3 convolutions but the first are pruned to each of these
        in turn, in the Winograd domain where `conv` is "winograd_relu", and trained for
        prune_epochs epochs each. pattern: "unstructured" (the smallest weights) or "blocks" (of 16
        output channels). One schedule of learning rate and batch goes through all epochs.
    """

    data: str = "fashion-mnist"
    root: str | None = None
    model: str = "alexnet"
    conv: str = "dense"
    tile: int = 2
    width: float = 1.0
    dropout: float = 0.0
    epochs: int = 12
    batch_size: int = 128
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    dynamic_batch: bool = False
    k: float = 1.6
    every: int = 2
    held_out: float = 0.1
    augment: bool = False
    limit: int | None = None
    amp: bool = False
    compile: bool = False
    micro_batch: int | None = None
    init: str | None = None
    sparsity: tuple[float, ...] = ()
    prune_epochs: int = 1
    pattern: str = "unstructured"
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.sparsity, list):  # TOML and JSON have these
            object.__setattr__(self, "sparsity", tuple(self.sparsity))
        for name, known in (("data", DATA), ("model", tuple(MODELS))):
            if getattr(self, name) not in known:
                self._refuse(name, f"one of {', '.join(known)}")
        if self.data != "fashion-mnist" and self.root is None:
            self._refuse("root", f"the folder or archive with the files of {self.data}")
        if not 0 < self.held_out < 1:
            self._refuse("held_out", "between 0 and 1")
        if self.limit is not None and self.limit < 2:
            self._refuse("limit", "None or at least 2")
        numbers = isinstance(self.sparsity, tuple) and all(
            isinstance(s, int | float) for s in self.sparsity
        )
        if not numbers or any(a >= b for a, b in itertools.pairwise((0, *self.sparsity, 1))):
            self._refuse("sparsity", "rising numbers between 0 and 1")
        if self.prune_epochs < 1:
            self._refuse("prune_epochs", "1 or more")
        if self.pattern not in PATTERNS:
            self._refuse("pattern", f"one of {', '.join(PATTERNS)}")
        if self.epochs < (0 if self.sparsity else 1):
            self._refuse("epochs", "1 or more, or 0 with sparsity")

    def _refuse(self, name, must):
        raise ValueError(f"pywino.train: {name} must be {must}, got {getattr(self, name)!r}")

    @classmethod
    def from_toml(cls, path: str | os.PathLike) -> "Recipe":
        """A recipe from a file of `name = value` lines."""
        return cls(**read_toml(path, cls))

    def as_dict(self) -> dict:
        return asdict(self)

    def read_data(self) -> tuple[readers.Images, readers.Images]:
        """(training images, test images)."""
        if self.data == "folder":
            return readers.image_folder(self.root)
        functions = {
            "fashion-mnist": readers.fashion_mnist,
            "cifar10": readers.cifar10,
            "cifar100": readers.cifar100,
        }
        return functions[self.data](self.root)

    @property
    def all_epochs(self) -> int:
        """Those before the first pruning, and those after each."""
        return self.epochs + len(self.sparsity) * self.prune_epochs

    def build(self, num_classes: int, in_channels: int) -> nn.Module:
        """The model with fresh weights, or those of `init`."""
        options = {"dropout": self.dropout, "tile": self.tile}
        if self.model in _WITH_WIDTH:
            options["width"] = self.width
        elif self.width != 1:  # of a stack it is the width of two members
            self._refuse("width", f"1 for {self.model}")
        net = MODELS[self.model](num_classes, in_channels, self.conv, **options)
        return net if self.init is None else models.load_weights(net, self.init)

    def pruner(self, net: nn.Module) -> Pruner | None:
        """What prunes `net` to each sparsity in turn; None where it is not pruned.

        The layers are those that Liu et al. (ICLR 2018) prune, whatever the kind of convolution."""
        if not self.sparsity:
            return None
        spec = PATTERNS[self.pattern](self.sparsity[-1])
        if self.conv == "winograd_relu":
            return Pruner(net, spec, self.sparsity, domain="winograd")
        first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
        return Pruner(
            net,
            spec,
            self.sparsity,
            filter_fn=lambda conv, name: conv.kernel_size == (3, 3) and conv is not first,
        )


def read_toml(path: str | os.PathLike, recipe: type = Recipe) -> dict:
    """The values of a recipe file, by the names of the fields of a recipe's class."""
    with open(path, "rb") as file:
        try:
            values = tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"pywino.train: {Path(path)} must be a TOML file: {error}") from error
    known = [field.name for field in fields(recipe)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"pywino.train: names in {Path(path)} must be among {', '.join(known)}, "
            f"got {', '.join(unknown)}"
        )
    return values
