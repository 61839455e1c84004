# SPDX-License-Identifier: BSD-3-Clause
"""SAPNet's edge loss, which its first version calls Canny.

    L = mean sqrt((E(x) - E(gt))^2 + eps^2),   eps = 10^-3

with E an edge filter: the loss of Charbonnier et al. (1994) on edges.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EPS = 1e-3
_LAPLACIAN = ((-1.0, -1.0, -1.0), (-1.0, 8.0, -1.0), (-1.0, -1.0, -1.0))
_SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


class EdgeLoss(nn.Module):
    """loss(restored, clean, degraded); the third is not used.

    edges: "laplacian", the sum of differences to the eight neighbours, or "sobel", the length of
    the gradient; each channel for itself, only where the filter lies inside the image. Canny's
    thresholds have no gradient, and the published code has none either.

    faithful: the published filter. It is a constant of TensorFlow, Laplacian(h, w) times the
    identity of input and output channels, read in PyTorch's order: output channel o is the sum over
    i of Laplacian(o, i) times the diagonal of 3 pixels in channel i. It is no Laplacian: a constant
    image gives -9, 18, -9."""

    def __init__(self, edges: str = "laplacian", faithful: bool = False):
        super().__init__()
        if edges not in ("laplacian", "sobel"):
            raise ValueError(
                f"pywino.losses.EdgeLoss: edges must be 'laplacian' or 'sobel', got {edges!r}"
            )
        self.edges, self.faithful = edges, faithful
        laplacian, sobel = torch.tensor(_LAPLACIAN), torch.tensor(_SOBEL)
        if faithful:
            filters = laplacian[:, :, None, None] * torch.eye(3)
        elif edges == "laplacian":
            filters = laplacian[None, None]
        else:
            filters = torch.stack((sobel, sobel.T))[:, None]
        self.register_buffer("filters", filters, persistent=False)

    def filtered(self, images: Tensor) -> Tensor:
        """E of (N, 3, H, W)."""
        filters = self.filters.to(images.dtype)
        if self.faithful:
            return F.conv2d(images, filters)
        channels = images.flatten(0, 1)[:, None]
        edges = F.conv2d(channels, filters)
        if self.edges == "sobel":
            edges = (edges.square().sum(1, keepdim=True) + _EPS**2).sqrt()
        return edges.unflatten(0, images.shape[:2]).squeeze(2)

    def forward(self, restored: Tensor, clean: Tensor, degraded: Tensor | None = None) -> Tensor:
        difference = self.filtered(restored) - self.filtered(clean)
        return (difference**2 + _EPS**2).sqrt().mean()
