# SPDX-License-Identifier: BSD-3-Clause
"""The layers."""

from pywino.nn.channel_attention import ChannelResidualAttention
from pywino.nn.conv_lstm import ConvLSTMCell
from pywino.nn.winograd import WinogradConv2d, WinogradReLUConv2d, freeze_, invalidate_

__all__ = [
    "ChannelResidualAttention",
    "ConvLSTMCell",
    "WinogradConv2d",
    "WinogradReLUConv2d",
    "freeze_",
    "invalidate_",
]
