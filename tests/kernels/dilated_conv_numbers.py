# SPDX-License-Identifier: BSD-3-Clause
"""The numbers of the Triton direct convolution, against float64. test_rooms_triton.py runs this
file in a process of its own."""

import pytest
import torch

from pywino import backends
from pywino.kernels import dilated_conv
from pywino.ops._kernels import Kernel

pytest.importorskip("triton")
from interpreted import DEVICE, prepare

prepare(dilated_conv)

# One rounding to the tensors' dtype, of fp32 sums of products: three TF32 ones on a GPU, exact in
# the interpreter.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
OF_LARGEST = 1e-6
# n, c, h, w, k, padding, dilation: several blocks of pixels, of channels in and out; less than one;
# a dilation beyond the image, another in each direction
SHAPES = [
    (2, 70, 9, 11, 20, (1, 1), (1, 1)),
    (1, 3, 13, 12, 140, (2, 0), (2, 3)),
    (1, 33, 6, 5, 40, (16, 16), (16, 16)),
    (3, 1, 1, 1, 1, (4, 4), (4, 4)),
]


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


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_input_gradient(shape, last, dtype):
    n, c, h, w, k, padding, dilation = shape
    x = tensor(n, c, h, w, dtype=dtype, last=last)
    weight, bias = tensor(k, c, 3, 3, dtype=dtype), tensor(k, dtype=dtype)
    kernel = Kernel("triton", 1, True)
    doubles = [t.double().cpu() for t in (x, weight, bias)]
    exact = torch.conv2d(*doubles, 1, padding, dilation)
    residual = tensor(*exact.shape, dtype=dtype)
    y = kernel.forward(x, kernel.filter(weight), bias, residual, k, padding, dilation, True)
    assert_close(y, (exact + residual.double().cpu()).relu(), x)
    plain = kernel.forward(x, kernel.filter(weight), None, None, k, padding, dilation, False)
    assert_close(plain, exact - doubles[2][:, None, None], x)

    full = [2 * d - p for p, d in zip(padding, dilation)]
    if min(full) < 0:
        return
    grad = tensor(*exact.shape, dtype=dtype, last=last)
    turned = kernel.filter(weight, rotate=True)
    gradient = kernel.forward(grad, turned, None, None, c, full, dilation, False)
    expected = torch.nn.grad.conv2d_input(
        x.shape, doubles[1], grad.double().cpu(), padding=padding, dilation=dilation
    )
    assert_close(gradient, expected, grad)


def test_not_a_number_stays():
    """In the pixels that see it, also through the ReLU."""
    x = tensor(1, 16, 8, 8, last=True)
    x[0, 3, 1, 1] = float("nan")
    filter = dilated_conv.transform_filter(tensor(8, 16, 3, 3))
    y = dilated_conv.forward(x, filter, None, None, (1, 1), (1, 1), True, True)
    assert y[0, :, :3, :3].isnan().all()
    assert not y[0, :, 3:, 3:].isnan().any()
