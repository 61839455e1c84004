# SPDX-License-Identifier: BSD-3-Clause
"""`dilated_conv2d`: `conv2d` for any dilation."""

from pywino.functional.winograd import run_conv2d


def dilated_conv2d(
    input,
    weight,
    bias=None,
    padding="same",
    dilation=2,
    *,
    residual=None,
    activation=None,
    backend="auto",
    algorithm="auto",
    precision="default",
):
    """A convolution whose kernel takes every dilation-th pixel, of stride 1 and one group.

    Args:
        input: (N, C, H, W) or (C, H, W), any floating dtype. 3 x 3 kernels run by Winograd's
            algorithm on dilation x dilation interleaved grids, on the CPU, in float32, bfloat16 and
            float16; F.conv2d takes the rest, and what would pad too much.
        weight: (K, C, kernel height, kernel width).
        bias: (K,) or None.
        padding: an integer, two, "same" or "valid"; it may exceed the image, as dilation may.
        dilation: an integer or two.
        residual: like the output or None, added before the activation.
        activation: None or "relu".
        backend, algorithm, precision: as in `pywino.conv2d`.

    Returns:
        (N, K, H_out, W_out) in input's dtype; channels_last iff input or weight is where a kernel
        covers the call. The same plan gives the same bits. Differentiable twice.

    Raises:
        RuntimeError, TypeError: whatever F.conv2d refuses, and an explicit backend or algorithm
            that cannot run the call.
    """
    return run_conv2d(
        input, weight, bias, residual, 1, padding, dilation, 1, activation, backend, algorithm,
        precision,
    )  # fmt: skip
