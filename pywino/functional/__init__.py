# SPDX-License-Identifier: BSD-3-Clause
"""The public functions: argument checks, choice of backend and algorithm."""

from pywino.functional.channel_attention import channel_residual_attention
from pywino.functional.conv_lstm import conv_lstm_cell
from pywino.functional.dilated_conv import dilated_conv2d
from pywino.functional.masked_conv import masked_conv2d
from pywino.functional.sparse_conv import sparse_conv2d
from pywino.functional.winograd import conv2d, winograd_relu_conv2d

__all__ = [
    "channel_residual_attention",
    "conv2d",
    "conv_lstm_cell",
    "dilated_conv2d",
    "masked_conv2d",
    "sparse_conv2d",
    "winograd_relu_conv2d",
]
