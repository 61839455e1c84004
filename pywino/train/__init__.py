# SPDX-License-Identifier: BSD-3-Clause
"""Training of the reference models; `pywino train` is its command.

from pywino.train import Recipe, classify
rows = classify(Recipe(data="fashion-mnist", model="alexnet", epochs=12), "runs/alexnet")
"""

from pywino.train.checkpoint import load_checkpoint, save_checkpoint, write_whole
from pywino.train.classify import classify, classify_stack
from pywino.train.recipe import Recipe

__all__ = [
    "Recipe",
    "classify",
    "classify_stack",
    "load_checkpoint",
    "save_checkpoint",
    "write_whole",
]
