# SPDX-License-Identifier: BSD-3-Clause
"""What recipes have in common: values that come from options, TOML or JSON, and are checked."""

import os
from dataclasses import asdict, field, fields

from pywino.train.recipe import read_toml


def option(default, text: str):
    """A field with the help text of its option on the command line."""
    return field(default=default, metadata={"help": text})


class Fields:
    """The base of a frozen dataclass of values. A `__post_init__` of its own calls this one."""

    def __post_init__(self):
        for one in fields(self):  # TOML and JSON have lists
            if isinstance(getattr(self, one.name), list):
                object.__setattr__(self, one.name, tuple(getattr(self, one.name)))

    def refuse(self, name: str, must: str):
        raise ValueError(f"pywino.train: {name} must be {must}, got {getattr(self, name)!r}")

    def at_least_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                self.refuse(name, "1 or more")

    @classmethod
    def from_toml(cls, path: str | os.PathLike):
        """A recipe from a file of `name = value` lines."""
        return cls(**read_toml(path, cls))

    def as_dict(self) -> dict:
        return asdict(self)
