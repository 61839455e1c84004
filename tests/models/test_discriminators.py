# SPDX-License-Identifier: BSD-3-Clause
"""Patch discriminators: counts, what they see, singular values."""

import pytest
import torch

from pywino.models import patch_discriminator


@pytest.mark.parametrize(
    ("layers", "count", "side", "patch"),
    [(3, 2_764_737, 35, 70), (4, 6_959_553, 19, 142), (5, 11_154_369, 11, 286)],
)
def test_counts_sizes_and_patches(layers, count, side, patch):
    model = patch_discriminator(layers)
    assert sum(p.numel() for p in model.parameters()) == count
    with torch.device("meta"):
        meta = patch_discriminator(layers).eval()
        assert meta(torch.empty(2, 3, 256, 256)).shape == (2, 1, side, side)
    # What a number in the middle of a larger image depends on.
    model.eval()
    x = torch.rand(1, 3, 352, 352, requires_grad=True)
    output = model(x)
    output[0, 0, output.shape[2] // 2, output.shape[3] // 2].backward()
    seen = x.grad.abs().amax((0, 1))
    for axis in (0, 1):
        (places,) = seen.amax(axis).nonzero(as_tuple=True)
        assert int(places[-1] - places[0]) + 1 == patch


def test_all_stride2():
    with torch.device("meta"):
        model = patch_discriminator(5, all_stride2=True)
        strides = [m.stride for m in model.model if hasattr(m, "stride")]
        assert strides == [(2, 2)] * 7
        assert sum(p.numel() for p in model.parameters()) == 11_154_369


def test_singular_values_are_one():
    """Of the middle convolutions, as matrices of a row an output channel."""
    torch.manual_seed(0)
    model = patch_discriminator(3)
    with torch.no_grad():
        for _ in range(20):  # steps of the power iteration
            model(torch.zeros(1, 3, 16, 16))
    model.eval()
    convolutions = [m for m in model.model if isinstance(m, torch.nn.Conv2d)]
    values = [
        float(torch.linalg.matrix_norm(m.weight.detach().flatten(1), 2)) for m in convolutions
    ]
    assert values[1:-1] == pytest.approx([1, 1, 1], rel=0.02)
    assert all(abs(value - 1) > 0.05 for value in (values[0], values[-1]))


def test_refusals():
    with pytest.raises(ValueError, match="patch_discriminator: layers must be"):
        patch_discriminator(0)
