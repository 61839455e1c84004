# SPDX-License-Identifier: BSD-3-Clause
"""The torch ops of pywino: schemas, kernels in Python that call the native ones, fakes, gradients,
autocast."""

from pywino.ops import (
    channel_attention,
    conv_lstm,
    dilated_conv,
    masked_conv,
    sparse_conv,
    winograd,
)
