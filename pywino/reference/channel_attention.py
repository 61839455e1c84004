# SPDX-License-Identifier: BSD-3-Clause
"""Channel (residual) attention in plain PyTorch, for any floating dtype: the specification."""

import torch


def channel_residual_attention(
    x, w1, w2, w3=None, b1=None, b2=None, residual=None, activation=None, residual_activation=None
):
    """y = act(x g) with g = sigmoid(W2 relu(W1 z + b1) + W3 z + b2), z the mean of x over its
    pixels; with a residual, act'(y + residual).

    x, residual (N, C, H, W); w1 (R, C); w2 (C, R); w3 (C, C) or None; b1 (R,), b2 (C,) or None.

    With W3 it is the channel residual attention of SAPNet (Zheng, Lu and Narasimhan, WACV 2022).
    Without, it is squeeze-and-excitation (Hu et al., CVPR 2018) and the channel attention of RCAN
    (Zhang et al., ECCV 2018)."""
    y = x * gate(x.mean((2, 3)), w1, w2, w3, b1, b2)[:, :, None, None]
    if activation == "relu":
        y = y.relu()
    if residual is not None:
        y = y + residual
        if residual_activation == "relu":
            y = y.relu()
    return y


def gate(z, w1, w2, w3=None, b1=None, b2=None):
    """g of the means z: (N, C) -> (N, C)."""
    u = torch.relu(_add(z @ w1.T, b1)) @ w2.T
    if w3 is not None:
        u = u + z @ w3.T
    return torch.sigmoid(_add(u, b2))


def _add(x, bias):
    return x if bias is None else x + bias


def gradients(grad, x, mean, gate, w1, w2, w3, b1, activation):
    """(gradient of x, gradient of the sigmoid's argument) for `grad`, that of act(x g).

    With D = grad where the ReLU let it through, S the sum over the pixels:

        du = g (1 - g) S(D x)      dz = W3^T du + W1^T ((W2^T du) . (W1 z + b1 > 0))
        dx = D g + dz / (H W)
    """
    g = gate[:, :, None, None]
    if activation == "relu":
        grad = grad * (x * g > 0)
    du = gate * (1 - gate) * (grad * x).sum((2, 3))
    dz = (du @ w2 * (_add(mean @ w1.T, b1) > 0)) @ w1
    if w3 is not None:
        dz = dz + du @ w3
    return grad * g + (dz / (x.shape[2] * x.shape[3]))[:, :, None, None], du
