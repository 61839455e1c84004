# SPDX-License-Identifier: BSD-3-Clause
"""SSIM against scikit-image's and against its formula window by window."""

import pytest
import torch
from torch.nn import functional as F

from pywino.losses import psnr, ssim, ssim_loss


def pictures(n=2, height=23, width=31, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, height, width, generator=generator, dtype=dtype)
    y = (x + 0.3 * torch.rand(n, 3, height, width, generator=generator, dtype=dtype)).clamp(0, 1)
    return x, y


def test_valid_is_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    x, y = pictures()
    wanted = [
        metrics.structural_similarity(
            *(image.permute(1, 2, 0).numpy() for image in pair),
            data_range=1,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for pair in zip(x, y)
    ]
    torch.testing.assert_close(ssim(x, y, "valid"), torch.tensor(wanted, dtype=x.dtype))


def test_same_is_the_formula_at_each_pixel():
    x, y = pictures(1, 9, 7)
    offset = torch.arange(11, dtype=x.dtype) - 5
    window = torch.exp(-(offset[:, None] ** 2 + offset**2) / 4.5)
    window = (window / window.sum()).flatten()
    px, py = (F.unfold(t, 11, padding=5).unflatten(1, (3, 121)) for t in (x, y))

    def mean(t):
        return (t * window[:, None]).sum(2)

    mx, my = mean(px), mean(py)
    covariance = mean((px - mx[:, :, None]) * (py - my[:, :, None]))
    vx, vy = mean((px - mx[:, :, None]) ** 2), mean((py - my[:, :, None]) ** 2)
    wanted = (2 * mx * my + 1e-4) * (2 * covariance + 9e-4)
    wanted = wanted / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    torch.testing.assert_close(ssim(x, y), wanted.mean((1, 2)))
    torch.testing.assert_close(ssim_loss(x, y), -wanted.mean())


def test_gradient_and_best_value():
    x, _ = pictures(1, 8, 8)
    assert float(ssim_loss(x, x)) == pytest.approx(-1)
    y = x.clone().requires_grad_()
    torch.autograd.gradcheck(lambda t: ssim_loss(t, 1 - x), y)


def test_psnr_by_hand():
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack((torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.5)))
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 6.0206]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("shapes", "padding", "message"),
    [
        (((1, 3, 9, 9), (1, 3, 9, 8)), "same", "must be .* of one shape"),
        (((1, 3, 20, 20),) * 2, "full", "padding must be 'same' or 'valid'"),
        (((1, 3, 10, 20),) * 2, "valid", "must have 11 x 11 pixels or more"),
    ],
)
def test_refusals(shapes, padding, message):
    with pytest.raises(ValueError, match=message):
        ssim(*(torch.zeros(shape) for shape in shapes), padding)
