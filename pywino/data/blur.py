# SPDX-License-Identifier: BSD-3-Clause
"""Motion blur: kernels of random camera shake and of straight motion, and averages of frames.

    generator = torch.Generator().manual_seed(0)
    kernels = trajectory_kernels(8, generator)      # (8, 31, 31)
    blurred = blur(sharp, kernels)                  # (8, 3, H, W) -> the same

Camera shake is the random motion of Boracchi and Foi ("Modeling the performance of image
restoration from motion blur", IEEE TIP 2012) that DeblurGAN (Kupyn et al., CVPR 2018) trains on. A
point moves at constant speed along a path x(s), 0 <= s <= 1, in the complex plane. In each of n
steps its direction u, |u| = 1, is changed by tremor, by a pull back to where it started, and now
and then by a jerk that turns it round:

    u <- u + j z / sqrt(n) - p x / n        z a complex normal number
    u <- u - 2 u exp(i a)                   with probability k / n, a uniform in -1/2 .. 1/2
    u <- u / |u|,   x <- x + u / n

The amounts j, p and k of an exposure are products of its nervousness and of a uniform number each.
The path, scaled to its length in pixels, is the kernel: every step puts 1 / n on the four pixels
around it, bilinearly. A kernel's centre of mass is its middle, so that a blurred image lies where
the sharp one does.

Everything is in the values of the pixels as they are (sRGB), as DeblurGAN has it; light itself
would be averaged in linear values.
"""

import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 31  # pixels a side of a kernel
LENGTH = (10.0, 60.0)  # pixels of a path: the shortest and the longest
_STEPS = 512
# The largest j, p and k, for a nervousness of 1.
_TREMOR, _PULL, _JERKS = 4.0, 120.0, 4.0


def trajectory_kernels(
    count: int,
    generator: torch.Generator | None = None,
    *,
    size: int = SIZE,
    length: tuple[float, float] = LENGTH,
) -> Tensor:
    """`count` kernels of random camera shake: (count, size, size) float32, not negative, of sum 1,
    with the centre of mass in the middle.

    size: odd. length: the paths' lengths are uniform between these two numbers of pixels. A path
    that leaves the kernel is shrunk until it fits."""
    _check_size("trajectory_kernels", size)
    if not 0 <= length[0] <= length[1] < math.inf:
        raise ValueError(
            "pywino.data.trajectory_kernels: length must be two numbers of pixels, 0 <= shortest "
            f"<= longest, got {length!r}"
        )

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    nervousness = 0.3 + 0.7 * uniform(count)
    tremor, pull, jerks = (most * nervousness * uniform(count) for most in (_TREMOR, _PULL, _JERKS))
    normal = torch.randn(_STEPS, count, 2, generator=generator, dtype=torch.float64)
    noise = torch.view_as_complex(normal) * (tremor / math.sqrt(_STEPS))
    turns = -2 * torch.exp(1j * (uniform(_STEPS, count) - 0.5))
    turns *= uniform(_STEPS, count) < jerks / _STEPS
    starts = torch.exp(2j * math.pi * uniform(count))
    walks = (starts, noise.T, turns.T, pull / _STEPS)
    points = [_walk(*one) for one in zip(*(part.tolist() for part in walks))]
    path = torch.tensor(points, dtype=torch.complex128).view(count, _STEPS)
    longest, shortest = length[1], length[0]
    return _kernels(path * (shortest + (longest - shortest) * uniform(count, 1)), size)


def _walk(u: complex, noise: list[complex], turns: list[complex], pull: float) -> list[complex]:
    """The point x after each step. In numbers: for a few paths at a time, as training takes them,
    tensors would spend forty times as long on calls."""
    x, path = 0j, []
    for z, turn in zip(noise, turns):
        u += z - pull * x + turn * u
        u /= abs(u)
        x += u / _STEPS
        path.append(x)
    return path


def linear_kernels(length: Tensor, angle: Tensor, *, size: int = SIZE) -> Tensor:
    """Kernels of straight motion at constant speed: (N, size, size) float32 for (N,) lengths in
    pixels and (N,) angles in degrees, from the horizontal, counter-clockwise. A motion that leaves
    the kernel is shrunk until it fits."""
    _check_size("linear_kernels", size)
    length = torch.as_tensor(length, dtype=torch.float64).reshape(-1, 1)
    angle = torch.as_tensor(angle, dtype=torch.float64).reshape(-1, 1)
    steps = (torch.arange(_STEPS, dtype=torch.float64) + 0.5) / _STEPS - 0.5
    # Rows count downwards.
    return _kernels(length * steps * torch.exp(-1j * torch.deg2rad(angle)), size)


def _check_size(function: str, size: int) -> None:
    if not isinstance(size, int) or size < 1 or size % 2 == 0:
        raise ValueError(f"pywino.data.{function}: size must be odd and positive, got {size!r}")


def _kernels(path: Tensor, size: int) -> Tensor:
    """(N, n) complex paths in pixels -> (N, size, size): what they leave on the pixels."""
    points = torch.view_as_real(path - path.mean(1, keepdim=True))  # (column, row)
    middle = size // 2
    reach = points.abs().amax((1, 2), keepdim=True)
    points = points * (middle / reach.clamp_min(max(middle, 1e-12))) + middle
    points = points.clamp(0, size - 1)  # against rounding
    low = points.floor()
    share = points - low
    kernels = torch.zeros(len(path), size * size, dtype=torch.float64)
    for right in (0, 1):
        for below in (0, 1):
            column = (low[..., 0] + right).clamp_max(size - 1)
            row = (low[..., 1] + below).clamp_max(size - 1)
            weight = (share[..., 0] if right else 1 - share[..., 0]) * (
                share[..., 1] if below else 1 - share[..., 1]
            )
            kernels.scatter_add_(1, (row * size + column).long(), weight)
    return (kernels / path.shape[1]).view(-1, size, size).float()


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """(N, C, H, W) images, each blurred by its kernel of (N, k, k): (N, C, H, W). The images go on
    beyond their edges as their outermost pixels do."""
    square = kernels.ndim == 3 and kernels.shape[1] == kernels.shape[2] and kernels.shape[1] % 2
    if images.ndim != 4 or not square or len(images) != len(kernels):
        raise ValueError(
            "pywino.data.blur: images must be (N, C, H, W) and kernels (N, k, k), k odd, got "
            f"{tuple(images.shape)} and {tuple(kernels.shape)}"
        )
    side = kernels.shape[-1]
    padded = F.pad(images, (side // 2,) * 4, mode="replicate")
    # A convolution is a product of spectra; that of a flipped kernel is what conv2d computes.
    shape = padded.shape[-2:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(kernels.to(padded.dtype), shape)[:, None]
    blurred = torch.fft.irfft2(spectrum, shape)
    # The first side - 1 rows and columns are wrapped around.
    return blurred[..., side - 1 :, side - 1 :]


def averaged_frames(path: str | os.PathLike, count: int = 7) -> Iterator[tuple[Tensor, Tensor]]:
    """(sharp, blurred) pairs of a video, (3, H, W) float32 in 0..1: the mean of `count` frames in a
    row, as if the shutter had been open for all of them, and the middle one (Nah et al., CVPR
    2017). Each frame is in one pair at most. Needs OpenCV."""
    if not isinstance(count, int) or count < 1 or count % 2 == 0:
        raise ValueError(
            f"pywino.data.averaged_frames: count must be odd and positive, got {count!r}"
        )
    try:
        import cv2
    except ImportError as error:
        raise RuntimeError(
            "pywino.data.averaged_frames: reading a video needs OpenCV; type "
            "`pip install opencv-python-headless`"
        ) from error
    video = cv2.VideoCapture(os.fspath(path))
    try:
        if not video.isOpened():
            raise RuntimeError(
                f"pywino.data.averaged_frames: {path} must be a video that OpenCV reads"
            )
        frames: list[Tensor] = []
        while (read := video.read())[0]:
            rgb = torch.from_numpy(read[1]).flip(2).permute(2, 0, 1)
            frames.append(rgb.float() / 255)
            if len(frames) == count:
                yield frames[count // 2], torch.stack(frames).mean(0)
                frames.clear()
    finally:
        video.release()
