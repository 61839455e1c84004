# SPDX-License-Identifier: BSD-3-Clause
"""The convolutional LSTM cell in plain PyTorch, for any floating dtype: the specification."""

import torch
import torch.nn.functional as F


def conv_lstm_cell(input, state, weight, bias=None):
    """One step of a convolutional LSTM (Shi et al., NIPS 2015, without peepholes):

        a = conv([input, h]);   i, f, g, o = sigma(a_i), sigma(a_f), tanh(a_g), sigma(a_o)
        c' = f c + i g;         h' = o tanh(c')

    input (N, I, H, W); state (h, c), each (N, C, H, W), or None for zeros; bias (4 C,) or None;
    weight (4 C, I + C, k, k) with k odd, the gates in the order i, f, g, o. Returns (h', c')."""
    hidden, cell = (None, None) if state is None else state
    if hidden is None:
        weight = weight[:, : input.shape[1]]
    else:
        input = torch.cat((input, hidden), 1)
    gates = F.conv2d(input, weight, bias, padding=[k // 2 for k in weight.shape[2:]])
    return pointwise(gates, cell)


def pointwise(gates, cell):
    """(h', c') of the gates' arguments (N, 4 C, H, W) and c, None for zeros."""
    i, f, g, o = gates.chunk(4, 1)
    new = i.sigmoid() * g.tanh()
    if cell is not None:
        new = f.sigmoid() * cell + new
    return o.sigmoid() * new.tanh(), new


def pointwise_gradients(grad_hidden, grad_cell, gates, cell):
    """(gradient of gates, gradient of c). With e = dc' + dh' o (1 - tanh(c')^2):

    da_i = e g i (1 - i)    da_f = e c f (1 - f)    da_g = e i (1 - g^2)
    da_o = dh' tanh(c') o (1 - o)                   dc = e f
    """
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = torch.zeros_like(i) if cell is None else cell
    t = (f * c + i * g).tanh()
    e = grad_cell + grad_hidden * o * (1 - t * t)
    grads = (
        e * g * i * (1 - i), e * c * f * (1 - f), e * i * (1 - g * g), grad_hidden * t * o * (1 - o)
    )  # fmt: skip
    return torch.cat(grads, 1), e * f
