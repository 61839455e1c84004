# SPDX-License-Identifier: BSD-3-Clause
"""What the numbers of the Triton convolutions share: tensors, and how near float64 they must be."""

import pytest
import torch
from interpreted import DEVICE

from pywino import backends

# One rounding to the tensors' dtype, of fp32 sums of products: three TF32 ones on a GPU, exact in
# the interpreter.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
OF_LARGEST = 1e-6


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Whatever the kernels read must have been written: empty tensors are full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def tensor(*shape, dtype=torch.float32, last=False):
    x = torch.randn(shape).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def assert_close(actual, expected, like):
    assert actual.dtype == like.dtype
    assert backends.is_channels_last(actual) == backends.is_channels_last(like)
    error = (actual.double().cpu() - expected).abs()
    limit = 1.01 * ROUNDING[like.dtype] * expected.abs() + OF_LARGEST * expected.abs().max()
    assert (error <= limit).all(), (error - limit).max()
