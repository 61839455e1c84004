# SPDX-License-Identifier: BSD-3-Clause
"""The PSNR of Laplacians, by hand."""

import math

import pytest
import torch

from pywino.metrics import laplacian_psnr


def test_laplacian_psnr_by_hand():
    """One wrong pixel in the middle of 5 x 5: the inner 3 x 3 Laplacians differ by 4 d in the
    middle and by d in its four neighbours, (16 + 4) d^2 / 9 on average."""
    truth = torch.rand(2, 3, 5, 5)
    images = truth.clone()
    images[0, :, 2, 2] += 0.1
    images[1, 0, 2, 2] += 0.1  # in one channel of three
    error = 20 * 0.01 / 9
    wanted = [-10 * math.log10(error), -10 * math.log10(error / 3)]
    assert laplacian_psnr(images, truth).tolist() == pytest.approx(wanted, rel=1e-5)
    # A ramp has no Laplacian.
    assert math.isinf(laplacian_psnr(truth, truth)[0])
    ramp = torch.arange(5.0)[:, None] * 0.125 + torch.arange(5.0) * 0.25
    assert float(laplacian_psnr(truth.double() + ramp, truth.double())[0]) > 280


def test_laplacian_psnr_refuses():
    with pytest.raises(ValueError, match="laplacian_psnr: images and truth must be"):
        laplacian_psnr(torch.rand(1, 3, 5, 5), torch.rand(1, 3, 5, 6))
    with pytest.raises(ValueError, match="H, W >= 3"):
        laplacian_psnr(torch.rand(1, 3, 2, 5), torch.rand(1, 3, 2, 5))
