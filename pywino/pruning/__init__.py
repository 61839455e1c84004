# SPDX-License-Identifier: BSD-3-Clause
"""Zeros for the kernels to skip: patterns, masks that hold during training, and what they bring.

    pywino.prune_(model, pywino.pruning.Block(0.8))     # once
    pruner = pywino.pruning.Pruner(model, spec, schedule)   # in steps, with training in between

docs/pruning.md is the page for users.
"""

from pywino.pruning.pruner import LIU_SCHEDULE, Pruner, check, prune_
from pywino.pruning.report import Report, report
from pywino.pruning.specs import NM, Block, Magnitude

__all__ = [
    "LIU_SCHEDULE",
    "NM",
    "Block",
    "Magnitude",
    "Pruner",
    "Report",
    "check",
    "prune_",
    "report",
]
