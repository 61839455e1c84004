# SPDX-License-Identifier: BSD-3-Clause
"""The layers."""

from pywino.nn.winograd import WinogradConv2d, WinogradReLUConv2d, freeze_, invalidate_

__all__ = ["WinogradConv2d", "WinogradReLUConv2d", "freeze_", "invalidate_"]
