# SPDX-License-Identifier: BSD-3-Clause
"""The edge loss on images whose edges are known."""

import pytest
import torch

from pywino.losses import EdgeLoss

EPS = 1e-3


def test_laplacian_of_one_pixel():
    """8 at the pixel, -1 around it, in its channel alone."""
    image = torch.zeros(1, 3, 5, 5)
    image[0, 1, 2, 2] = 1
    edges = EdgeLoss().filtered(image)
    wanted = torch.zeros(1, 3, 3, 3)
    wanted[0, 1] = -1
    wanted[0, 1, 1, 1] = 8
    assert torch.equal(edges, wanted)
    loss = (18 * EPS + 8 * (1 + EPS**2) ** 0.5 + (64 + EPS**2) ** 0.5) / 27
    assert float(EdgeLoss()(image, torch.zeros_like(image))) == pytest.approx(loss, rel=1e-6)


def test_sobel_of_a_slope():
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    image = (0.03 * x + 0.04 * y).expand(2, 3, 6, 7)
    edges = EdgeLoss("sobel").filtered(image)
    assert edges.shape == (2, 3, 4, 5)
    torch.testing.assert_close(edges, torch.full_like(edges, 8 * 0.05), rtol=1e-4, atol=1e-5)


def test_the_published_filter():
    """A constant image gives -9, 18, -9; channels are mixed along the diagonal."""
    constant = EdgeLoss(faithful=True).filtered(torch.ones(1, 3, 4, 4))
    assert constant.mean((2, 3)).tolist() == [[-9, 18, -9]]
    image = torch.zeros(1, 3, 3, 3)
    image[0, 2] = torch.tensor([[1.0, 9, 9], [9, 2, 9], [9, 9, 4]])
    # Column 2 of the Laplacian, (-1, -1, -1), times the diagonal's sum.
    assert EdgeLoss(faithful=True).filtered(image).flatten().tolist() == [-7, -7, -7]
    assert EdgeLoss(faithful=True).filtered(image.flip(1)).flatten().tolist() == [-7, -7, -7]
    middle = image[:, [0, 2, 1]]
    assert EdgeLoss(faithful=True).filtered(middle).flatten().tolist() == [-7, 56, -7]


@pytest.mark.parametrize("edges", ["laplacian", "sobel"])
@pytest.mark.parametrize("faithful", [False, True])
def test_gradient(edges, faithful):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 1, 3, 5, 6, generator=generator, dtype=torch.float64)
    loss = EdgeLoss(edges, faithful).double()
    assert torch.autograd.gradcheck(lambda t: loss(t, y), x.requires_grad_())
    assert float(loss(y, y)) == pytest.approx(EPS)


def test_refusal():
    with pytest.raises(ValueError, match="edges must be 'laplacian' or 'sobel', got 'canny'"):
        EdgeLoss("canny")
