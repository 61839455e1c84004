# SPDX-License-Identifier: BSD-3-Clause
"""The numbers of the Triton direct convolution, against float64. test_rooms_triton.py runs this
file in a process of its own."""

import pytest
import torch

from pywino.kernels import dilated_conv
from pywino.ops._kernels import Kernel

pytest.importorskip("triton")
from convolutions import ROUNDING, assert_close, poisoned_memory, tensor  # noqa: F401
from interpreted import prepare

prepare(dilated_conv)

# n, c, h, w, k, padding, dilation: several blocks of pixels, of channels in and out; less than one;
# a dilation beyond the image, another in each direction
SHAPES = [
    (2, 70, 9, 11, 20, (1, 1), (1, 1)),
    (1, 3, 13, 12, 140, (2, 0), (2, 3)),
    (1, 33, 6, 5, 40, (16, 16), (16, 16)),
    (3, 1, 1, 1, 1, (4, 4), (4, 4)),
]


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
