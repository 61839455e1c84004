# SPDX-License-Identifier: BSD-3-Clause
"""The dilated convolution."""

from pywino.nn.winograd import WinogradConv2d


class DilatedConv2d(WinogradConv2d):
    """An `nn.Conv2d` that is meant to be dilated: its arguments, parameters and state_dict, and
    those of `WinogradConv2d`, whose kernels cover any dilation (one interleaved grid of pixels
    after the other), also one that is larger than the image.

    A 3 x 3 layer with `padding=dilation` keeps H and W."""
