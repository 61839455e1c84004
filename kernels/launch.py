# SPDX-License-Identifier: BSD-3-Clause
"""What all Triton kernels and their launches share."""

from __future__ import annotations

import contextlib
from functools import cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # every module here can be imported; its functions say what is missing
    triton, missing = None, str(error)

if triton is None:

    def jit(function):
        return function

else:
    jit = triton.jit


# The lanes of a block run along its last axis: channels of a channels_last tensor, else pixels, or
# tiles of them.


@jit
def on_pixels(x, CHANNELS_LAST: tl.constexpr):
    return x[:, None] if CHANNELS_LAST else x[None, :]


@jit
def on_channels(x, CHANNELS_LAST: tl.constexpr):
    return x[None, :] if CHANNELS_LAST else x[:, None]


def why_not() -> str | None:
    """Why no Triton kernel can run, or None."""
    if triton is None:
        return f"Triton is not installed ({missing}); type: pip install triton"
    return None


def on_device_of(tensor):
    """Triton launches on the current device."""
    if tensor.is_cuda and torch.cuda.is_available():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@cache
def processors(device):
    """Multiprocessors of a GPU; in the interpreter a few."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_channels_last(tensor):
    """The layout rule of every op: its output is channels_last iff this holds for its input."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
