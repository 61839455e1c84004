# SPDX-License-Identifier: BSD-3-Clause
"""Motion blur: kernels that are kernels, and images that are convolved with them."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pywino.data import averaged_frames, blur, linear_kernels, trajectory_kernels
from pywino.data.blur import _STEPS, _walk


def moments(kernels):
    """Centres of mass (N, 2) and covariances (N, 2, 2), in pixels (column, row)."""
    side = torch.arange(kernels.shape[-1], dtype=torch.float64)
    places = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).flatten(0, 1)
    weights = kernels.double().flatten(1)
    centre = weights @ places
    away = places - centre[:, None]
    return centre, torch.einsum("np,npi,npj->nij", weights, away, away)


def test_trajectories_are_kernels():
    kernels = trajectory_kernels(200, torch.Generator().manual_seed(0))
    assert kernels.shape == (200, 31, 31)
    assert trajectory_kernels(0).shape == (0, 31, 31)
    assert kernels.min() >= 0
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(200))
    centre, _ = moments(kernels)
    # Bilinear shares keep the centre of mass.
    torch.testing.assert_close(
        centre, torch.full((200, 2), 15.0, dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_trajectories_are_seeded_and_differ():
    first, again, other = (
        trajectory_kernels(3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first[0], first[1])


def test_a_walk_by_hand():
    """Straight on, turned round by a jerk, aside by tremor, and back by the pull."""
    path = [_STEPS * x for x in _walk(1 + 0j, [0j, 0j, 1j], [0j, -2 + 0j, 0j], 0.0)]
    assert path == pytest.approx([1, 0, (-1 + 1j) / math.sqrt(2)])
    there_and_back = _walk(1 + 0j, [0j] * 4, [0j] * 4, 1.5 * _STEPS)
    assert [_STEPS * x for x in there_and_back] == pytest.approx([1, 0, -1, 0])


def test_longer_paths_blur_more_and_all_stay_inside():
    def spread(length):
        kernels = trajectory_kernels(100, torch.Generator().manual_seed(0), length=(length, length))
        return moments(kernels)[1].diagonal(0, 1, 2).sum(1).mean()

    spreads = [float(spread(length)) for length in (0, 5, 15, 40, 10_000)]
    assert spreads[0] == pytest.approx(0, abs=1e-6)
    assert spreads == sorted(spreads)
    mixed = trajectory_kernels(100, torch.Generator().manual_seed(0), length=(0, 40))
    own = moments(mixed)[1].diagonal(0, 1, 2).sum(1)
    assert own.min() < 1
    assert spreads[2] < own.mean() < spreads[3]
    kernels = trajectory_kernels(5, torch.Generator().manual_seed(0), size=7, length=(1e4, 1e4))
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(5))
    # Shrunk until the farthest point is in the outermost row or column.
    border = kernels.clone()
    border[:, 1:-1, 1:-1] = 0
    assert (border.sum((1, 2)) > 0).all()


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 135.0])
def test_linear_motion(angle):
    """A uniform density on a line of length L has variance L^2 / 12 along it, 0 across; bilinear
    shares add t (1 - t) an axis, at most 1 / 4."""
    (centre,), (covariance,) = moments(linear_kernels(torch.tensor([12.0]), torch.tensor([angle])))
    assert centre.tolist() == pytest.approx([15, 15], abs=1e-4)
    along = torch.tensor([math.cos(math.radians(angle)), -math.sin(math.radians(angle))]).double()
    across = along.flip(0) * torch.tensor([-1, 1])
    assert float(along @ covariance @ along) == pytest.approx(12, abs=0.26)
    assert 0 <= float(across @ covariance @ across) <= 0.26


def test_blur_is_a_convolution():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 2, 20, 26, dtype=torch.float64, generator=generator)
    kernels = torch.rand(3, 5, 5, dtype=torch.float64, generator=generator)
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate").transpose(0, 1)
    wanted = F.conv2d(padded, kernels.flip(1, 2)[:, None], groups=3).transpose(0, 1)
    torch.testing.assert_close(blur(images, kernels), wanted)
    # A flat image stays, whatever lies at its edges.
    torch.testing.assert_close(
        blur(torch.full((1, 1, 9, 9), 0.3), trajectory_kernels(1)), torch.full((1, 1, 9, 9), 0.3)
    )


def test_averaged_frames(tmp_path):
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(
        str(tmp_path / "in.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 12, (32, 24)
    )
    for level in (0, 60, 240, 10, 20, 30, 200):
        writer.write(np.full((24, 32, 3), (level, 0, 0), np.uint8))  # blue
    writer.release()
    pairs = list(averaged_frames(tmp_path / "in.avi", 3))
    assert len(pairs) == 2  # the last frame is left over
    for (sharp, blurred), middle, mean in zip(pairs, (60, 20), (100, 20)):
        assert sharp.shape == blurred.shape == (3, 24, 32)
        assert float(sharp[2].mean()) * 255 == pytest.approx(middle, abs=6)
        assert float(blurred[2].mean()) * 255 == pytest.approx(mean, abs=6)
    (tmp_path / "none.avi").write_bytes(b"none")
    with pytest.raises(RuntimeError, match=r"none\.avi must be a video"):
        next(averaged_frames(tmp_path / "none.avi"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trajectory_kernels(1, size=8), "trajectory_kernels: size must be odd"),
        (lambda: linear_kernels(torch.ones(1), torch.ones(1), size=0), "linear_kernels: size"),
        (lambda: trajectory_kernels(1, length=(5, 2)), "trajectory_kernels: length must be two"),
        (lambda: blur(torch.ones(2, 3, 8, 8), torch.ones(1, 3, 3)), "blur: images must be"),
        (lambda: blur(torch.ones(1, 3, 8, 8), torch.ones(1, 3, 5)), "k odd, got"),
        (lambda: blur(torch.ones(1, 3, 8, 8), torch.ones(1, 4, 4)), "k odd, got"),
        (lambda: next(averaged_frames("x.avi", 4)), "averaged_frames: count must be odd"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
