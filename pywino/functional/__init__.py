# SPDX-License-Identifier: BSD-3-Clause
"""The public functions: argument checks, choice of backend and algorithm."""

from pywino.functional.winograd import conv2d, winograd_relu_conv2d

__all__ = ["conv2d", "winograd_relu_conv2d"]
