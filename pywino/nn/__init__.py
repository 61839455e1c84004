# SPDX-License-Identifier: BSD-3-Clause
"""The layers."""

from pywino.nn.sparse_conv import SparseConv2d
from pywino.nn.winograd import WinogradConv2d, WinogradReLUConv2d, freeze_, invalidate_

__all__ = ["SparseConv2d", "WinogradConv2d", "WinogradReLUConv2d", "freeze_", "invalidate_"]
