# SPDX-License-Identifier: BSD-3-Clause
"""The two memory formats of tensors: what every op keeps to."""

import torch

from pywino import backends


def memory_format(like):
    return torch.channels_last if backends.is_channels_last(like) else torch.contiguous_format


def dense(tensor):
    """What the native kernels read: the tensor itself, or a contiguous copy of a strided one."""
    return tensor if backends.is_channels_last(tensor) else tensor.contiguous()


def laid_as(tensor, like):
    """The tensor in the memory format of another."""
    return tensor.contiguous(memory_format=memory_format(like))


def empty(size, like):
    """A new tensor in dtype, device and memory format of another."""
    return torch.empty(
        size, dtype=like.dtype, device=like.device, memory_format=memory_format(like)
    )
