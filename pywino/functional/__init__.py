# SPDX-License-Identifier: BSD-3-Clause
"""The public functions: argument checks, choice of backend and algorithm."""

from pywino.functional.sparse_conv import sparse_conv2d
from pywino.functional.winograd import conv2d, winograd_relu_conv2d

__all__ = ["conv2d", "sparse_conv2d", "winograd_relu_conv2d"]
