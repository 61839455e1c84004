# SPDX-License-Identifier: BSD-3-Clause
"""The two memory formats of tensors: what every op keeps to."""

import torch

from pywino import backends


def memory_format(like):
    return torch.channels_last if backends.is_channels_last(like) else torch.contiguous_format


def asks_for_channels_last(weight):
    """Whether the strides of a (K, C, height, width) weight are those of channels_last, as after
    `model.to(memory_format=torch.channels_last)`: F.conv2d's output is so where input or weight is.
    Those of one input channel too, where the numbers lie the same in both formats."""
    c, height, width = weight.shape[1:]
    return (
        c * height * width > 1
        and weight.stride(1) == 1
        and weight.stride(3) == c
        and weight.is_contiguous(memory_format=torch.channels_last)
    )


def following(input, weight):
    """A convolution's input in channels_last, where its weight asks for that. One channel, or one
    pixel, stays: it is in both formats."""
    if not backends.is_channels_last(input) and asks_for_channels_last(weight):
        return input.contiguous(memory_format=torch.channels_last)
    return input


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
