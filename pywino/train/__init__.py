# SPDX-License-Identifier: BSD-3-Clause
"""Training of the reference models; `pywino train` is its command.

from pywino.train import DerainRecipe, DetectRecipe, Recipe, classify, detect, train_restoration
rows = classify(Recipe(data="fashion-mnist", model="alexnet", epochs=12), "runs/alexnet")
rows = train_restoration(DerainRecipe(data="photos", rain="heavy"), "runs/derain")
rows = detect(DetectRecipe(data="photos", stamps="stamps"), "runs/detect")
"""

from pywino.train.checkpoint import load_checkpoint, save_checkpoint, write_whole
from pywino.train.classify import classify, classify_stack
from pywino.train.deblur import DeblurRecipe
from pywino.train.derain import DerainRecipe
from pywino.train.detect import DetectRecipe, detect
from pywino.train.recipe import Recipe
from pywino.train.restoration import Learner, RestorationRecipe, train_restoration
from pywino.train.run import Listener

__all__ = [
    "DeblurRecipe",
    "DerainRecipe",
    "DetectRecipe",
    "Learner",
    "Listener",
    "Recipe",
    "RestorationRecipe",
    "classify",
    "classify_stack",
    "detect",
    "load_checkpoint",
    "save_checkpoint",
    "train_restoration",
    "write_whole",
]
