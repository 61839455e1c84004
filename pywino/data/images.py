# SPDX-License-Identifier: BSD-3-Clause
"""Images and their labels in memory."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Images(Dataset):
    """images: (N, C, H, W) uint8; labels: (N,) int64 in [0, len(classes)).

    `dataset[i]` is a pair of (C, H, W) float32, (pixel / 255 - mean) / std, and an int;
    `dataset.batch(indices)` is many of them at once. `mean` and `std` (C,) are 0 and 1 until
    `normalise_` sets them. `name` says in errors where the data are from."""

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str], name: str = "data"):
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"pywino.data: images of {name} must be (N, C, H, W) uint8, "
                f"got {tuple(images.shape)} {images.dtype}"
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"pywino.data: labels of {name} must be one an image ({len(images)}), "
                f"got {tuple(labels.shape)}"
            )
        labels = labels.to(torch.int64)
        wrong = ((labels < 0) | (labels >= len(classes))).nonzero()
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(
                f"pywino.data: labels of {name} must be in [0, {len(classes)}), got "
                f"{int(labels[i])} for image {i}, and {len(wrong)} such in all"
            )
        self.images = images
        self.labels = labels
        self.classes = tuple(classes)
        self.name = name
        self.mean = torch.zeros(images.shape[1])
        self.std = torch.ones(images.shape[1])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = self._normalised(self.images[index])
        return x, int(self.labels[index])

    def batch(
        self, indices: Sequence[int] | Tensor, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) float32 and (B,) int64 of these images."""
        indices = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)
        images, labels = self.images[indices].to(device), self.labels[indices].to(device)
        return self._normalised(images), labels

    def to(self, device: torch.device | str) -> "Images":
        """The same images on a device, where `batch` then gathers them."""
        moved = copy.copy(self)
        for name in ("images", "labels", "mean", "std"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def _normalised(self, images):
        mean, std = (t.to(images.device).view(-1, 1, 1) for t in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def normalise_(self, like: "Images | None" = None) -> "Images":
        """Sets `mean` and `std` of each channel to those of `like`, or of these images themselves,
        and returns the data set."""
        images = (like or self).images
        # From a histogram of each channel's 256 values: exact counts, so no order matters.
        channels = images.transpose(0, 1).flatten(1)
        counts = torch.stack([row.bincount(minlength=256) for row in channels]).double()
        share = counts / counts.sum(1, keepdim=True)
        value = torch.arange(256, dtype=torch.float64) / 255
        mean = share @ value
        variance = (share * (value - mean[:, None]) ** 2).sum(1)
        self.mean, self.std = mean.float(), variance.clamp_min(1e-12).sqrt().float()
        return self

    def subset(self, indices: Sequence[int] | Tensor) -> "Images":
        """Some of the images, normalised alike."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        part = Images(self.images[indices], self.labels[indices], self.classes, self.name)
        part.mean, part.std = self.mean, self.std
        return part

    def split(self, fraction: float, seed: int = 0) -> tuple["Images", "Images"]:
        """(the rest, round(N * fraction) random images of them), for a held-out part."""
        if not 0 <= fraction < 1:
            raise ValueError(f"pywino.data: fraction must be in [0, 1), got {fraction!r}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held_out = round(len(self) * fraction)
        return self.subset(order[held_out:].sort()[0]), self.subset(order[:held_out].sort()[0])
