# SPDX-License-Identifier: BSD-3-Clause
"""How good a result is."""

from pywino.metrics.average_precision import average_precision
from pywino.metrics.laplacian_psnr import laplacian_psnr

__all__ = ["average_precision", "laplacian_psnr"]
