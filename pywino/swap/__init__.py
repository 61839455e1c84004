# SPDX-License-Identifier: BSD-3-Clause
"""pywino's kernels in a model that exists: swap_, restore_, plan, explain, fuse_, convert_.
docs/swap.md is the page for users.
"""

from pywino.swap.configs import Attention, Handler, Sparse, Winograd, WinogradReLU, register
from pywino.swap.graph import convert_, fuse_
from pywino.swap.layers import explain, last_report, plan, restore_, swap_
from pywino.swap.report import Explanation, Layer, Report

__all__ = [
    "Attention",
    "Explanation",
    "Handler",
    "Layer",
    "Report",
    "Sparse",
    "Winograd",
    "WinogradReLU",
    "convert_",
    "explain",
    "fuse_",
    "last_report",
    "plan",
    "register",
    "restore_",
    "swap_",
]
