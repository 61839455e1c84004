# SPDX-License-Identifier: BSD-3-Clause
"""The layers."""

from pywino.nn._instance_norm import InstanceNorm2d
from pywino.nn.channel_attention import ChannelResidualAttention
from pywino.nn.conv_lstm import ConvLSTMCell
from pywino.nn.dilated_conv import DilatedConv2d
from pywino.nn.masked_conv import MaskedConv2d
from pywino.nn.sparse_conv import SparseConv2d
from pywino.nn.winograd import WinogradConv2d, WinogradReLUConv2d, freeze_, invalidate_

__all__ = [
    "ChannelResidualAttention",
    "ConvLSTMCell",
    "DilatedConv2d",
    "InstanceNorm2d",
    "MaskedConv2d",
    "SparseConv2d",
    "WinogradConv2d",
    "WinogradReLUConv2d",
    "freeze_",
    "invalidate_",
]
