# SPDX-License-Identifier: BSD-3-Clause
"""pywino::dilated_conv2d: `pywino::winograd_conv2d` by another name.

A dilated convolution is an undilated one on each of d x d interleaved grids, and the Winograd
kernels take their tiles from these (csrc/core/dilated_conv/README.md). So the op is a composite: it
decomposes into winograd_conv2d, whose gradients, autocast and plans are its own.
"""

import torch

from pywino.ops._library import library

_ops = torch.ops.pywino


def _dilated_conv2d(
    input, weight, bias, residual, padding, dilation, activation, algorithm, backend, precision
):
    return _ops.winograd_conv2d(
        input, weight, bias, residual, padding, dilation, activation, algorithm, backend, precision
    )


library.define(
    "dilated_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, "
    "int[2] padding, int[2] dilation, str? activation, "
    "str algorithm, str backend, str precision) -> Tensor"
)
library.impl("dilated_conv2d", _dilated_conv2d, "CompositeImplicitAutograd")
