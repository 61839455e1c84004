# SPDX-License-Identifier: BSD-3-Clause
"""All that decides what a training run computes."""

import os
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import nn

from pywino import data as readers
from pywino import models

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
    micro_batch: the most samples that are computed at once, None for no limit.
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
    micro_batch: int | None = None
    seed: int = 0

    def __post_init__(self):
        for name, known in (("data", DATA), ("model", tuple(MODELS))):
            if getattr(self, name) not in known:
                self._refuse(name, f"one of {', '.join(known)}")
        if self.data != "fashion-mnist" and self.root is None:
            self._refuse("root", f"the folder or archive with the files of {self.data}")
        if not 0 < self.held_out < 1:
            self._refuse("held_out", "between 0 and 1")
        if self.limit is not None and self.limit < 2:
            self._refuse("limit", "None or at least 2")
        if self.width != 1 and self.model not in _WITH_WIDTH:
            self._refuse("width", f"1 for {self.model}")

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

    def build(self, num_classes: int, in_channels: int) -> nn.Module:
        """The model with fresh weights."""
        options = {"dropout": self.dropout, "tile": self.tile}
        if self.model in _WITH_WIDTH:
            options["width"] = self.width
        return MODELS[self.model](num_classes, in_channels, self.conv, **options)


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
