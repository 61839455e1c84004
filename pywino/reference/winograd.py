# SPDX-License-Identifier: BSD-3-Clause
"""Winograd convolution F(m x m, 3 x 3) in plain PyTorch: the specification that every kernel is
held against.

    Y = A^T [ (G g G^T) . (B^T d B) ] A          Lavin & Gray, CVPR 2016
    Y = A^T [ W . ReLU(B^T d B) ] A              Liu et al., ICLR 2018: W is a free parameter
    Y = A^T [ W . (B^T d B) ] A                  the same without a ReLU, for pruned W

d is an a x a patch of the input, a = m + 2; g a 3 x 3 filter; Y m x m outputs; the products are
summed over input channels. float32 and float64 are computed as they are, 16-bit floats in float32.
Everything here is differentiable by autograd."""

from fractions import Fraction
from functools import cache

import torch
import torch.nn.functional as F

# The finite interpolation points; infinity comes last. docs/winograd.md says why these.
POINTS = {
    2: (0, 1, -1),
    4: (0, Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)),
    6: (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2)),
}


@cache
def exact_matrices(tile):
    """(B^T, G, A^T) of F(tile, 3) as tuples of rows of `Fraction`, by the Toom-Cook construction.

    The product s of two polynomials is found from its values at the points:

        s(x) = sum_i s(a_i) L_i(x) + s(inf) M(x)
        L_i = prod_{k != i} (x - a_k) / (a_i - a_k),  M = prod_k (x - a_k)

    A correlation is the transpose of that, so B^T holds the coefficients of the L_i and of M, G and
    A^T the powers of the points. The denominators of the L_i are moved into G.
    """
    points = [Fraction(p) for p in POINTS[tile]]
    size = tile + 2
    bt, g, at_columns = [], [], []
    for i, a in enumerate(points):
        others = points[:i] + points[i + 1 :]
        numerator = _from_roots(others)
        denominator = Fraction(1)
        for b in others:
            denominator *= a - b
        # The row of 0 starts with a positive number.
        sign = -1 if a == 0 and numerator[0] < 0 else 1
        bt.append([sign * c for c in numerator] + [Fraction(0)])
        g.append([sign * a**j / denominator for j in range(3)])
        at_columns.append([a**p for p in range(tile)])
    sign = -1 if tile == 2 else 1  # F(2,3) as Lavin and Liu write it: (0, 1, 0, -1)
    bt.append([sign * c for c in _from_roots(points)])
    g.append([Fraction(0), Fraction(0), Fraction(1)])
    at_columns.append([Fraction(0)] * (tile - 1) + [Fraction(sign)])
    at = [[at_columns[i][p] for i in range(size)] for p in range(tile)]
    return tuple(map(tuple, bt)), tuple(map(tuple, g)), tuple(map(tuple, at))


def _from_roots(roots):
    """Coefficients, lowest first, of prod (x - root)."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, Fraction(0)])]
    return coefficients


def transform_matrices(tile, dtype=torch.float64, device=None):
    """(B^T, G, A^T) of F(tile x tile, 3 x 3): (a, a), (a, 3) and (tile, a), with a = tile + 2."""
    return tuple(
        torch.tensor([[float(x) for x in row] for row in matrix], dtype=dtype, device=device)
        for matrix in exact_matrices(tile)
    )


def winograd_transform_filter(weight, tile):
    """G g G^T: (K, C, 3, 3) -> (K, C, tile + 2, tile + 2)."""
    _, g, _ = transform_matrices(tile, torch.float64, weight.device)
    # In float64 always: a filter is transformed once, and its error would be in every output.
    return torch.einsum("ai,kcij,bj->kcab", g, weight.double(), g).to(weight.dtype)


def winograd_conv2d(input, weight, bias=None, padding=0, dilation=1, tile=4):
    """`F.conv2d` of a (N, C, H, W) input and a (K, C, 3, 3) weight with stride 1, by F(tile x tile,
    3 x 3)."""
    weight = winograd_transform_filter(weight.to(_compute_dtype(input)), tile)
    return _in_domain(input, weight, bias, _pair(padding), _pair(dilation), tile, relu=False)


def winograd_relu_conv2d(input, weight, bias=None, padding=1, dilation=1, tile=2):
    """The Winograd-ReLU layer: (N, C, H, W) and a (K, C, tile + 2, tile + 2) weight -> the size of
    the 3 x 3 convolution.

    It is not a convolution followed by a ReLU in any order. Tiles start at output (0, 0); rows and
    columns of the last tiles that stick out are cropped.
    """
    weight = weight.to(_compute_dtype(input))
    return _in_domain(input, weight, bias, _pair(padding), _pair(dilation), tile, relu=True)


def winograd_domain_conv2d(input, weight, bias=None, padding=1, dilation=1, tile=4):
    """A^T [ sum_c W . (B^T d B) ] A: the convolution where W = G g G^T, and more where W is free.

    (N, C, H, W) and a (K, C, tile + 2, tile + 2) weight -> the size of the 3 x 3 convolution."""
    weight = weight.to(_compute_dtype(input))
    return _in_domain(input, weight, bias, _pair(padding), _pair(dilation), tile, relu=False)


# Axes of an array of tiles: n, c, then (tile row t, phase r), (tile column u, phase s), then the
# patch (i, j) or (a, b).


def _in_domain(input, weight, bias, padding, dilation, tile, relu):
    """A^T [ sum_c weight . V ] A for all tiles, with V = B^T d B or its ReLU."""
    compute = _compute_dtype(input)
    v = _transformed(input.to(compute), padding, dilation, tile)
    m = torch.einsum("kcab,nctrusab->nktrusab", weight, v.relu() if relu else v)
    _, _, at = transform_matrices(tile, compute, input.device)
    y = torch.einsum("pa,nktrusab,qb->nktpruqs", at, m, at)
    height, width = _output_size(input, padding, dilation)
    y = y.reshape(*y.shape[:2], y.shape[2] * tile * dilation[0], y.shape[5] * tile * dilation[1])
    y = y[:, :, :height, :width]
    if bias is not None:
        y = y + bias.to(compute).reshape(1, -1, 1, 1)
    return y.to(input.dtype).contiguous()


def winograd_relu_backward_input(grad, input, weight, padding=1, dilation=1, tile=2):
    """The gradient of `winograd_relu_conv2d` by its input; grad is that of the output."""
    padding, dilation = _pair(padding), _pair(dilation)
    v = _transformed(input.to(_compute_dtype(input)), padding, dilation, tile)
    return _backward_input(grad, input.shape, weight, padding, dilation, tile, v > 0)


def winograd_domain_backward_input(grad, weight, padding=1, dilation=1, tile=4):
    """The gradient of `winograd_domain_conv2d` by its input."""
    padding, dilation = _pair(padding), _pair(dilation)
    height, width = (s - 2 * p + 2 * d for s, p, d in zip(grad.shape[2:], padding, dilation))
    size = (grad.shape[0], weight.shape[1], height, width)
    return _backward_input(grad, size, weight, padding, dilation, tile)


def _backward_input(grad, size, weight, padding, dilation, tile, mask=1):
    """sum over tiles B [ (W^T (A dY A^T)) . mask ] B^T, in a tensor of the input's size."""
    compute = _compute_dtype(grad)
    bt, _, _ = transform_matrices(tile, compute, grad.device)
    grad_m = _transformed_grad(grad.to(compute), size, padding, dilation, tile)
    grad_v = torch.einsum("kcab,nktrusab->nctrusab", weight.to(compute), grad_m) * mask
    grad_patches = torch.einsum("ai,nctrusab,bj->nctrusij", bt, grad_v, bt)
    (rows, _), (columns, _) = _grid(size, padding, dilation, tile)
    padded = grad_v.new_zeros(*size[:2], rows, dilation[0], columns, dilation[1])
    for i in range(tile + 2):
        for j in range(tile + 2):  # patches overlap by two rows and columns
            padded[:, :, i : rows - tile - 1 + i : tile, :, j : columns - tile - 1 + j : tile] += (
                grad_patches[..., i, j]
            )
    padded = padded.reshape(*size[:2], rows * dilation[0], columns * dilation[1])
    (top, left), (height, width) = padding, size[2:]
    return padded[:, :, top : top + height, left : left + width].to(grad.dtype).contiguous()


def winograd_relu_backward_weight(grad, input, padding=1, dilation=1, tile=2):
    """The gradient of `winograd_relu_conv2d` by its weight: (K, C, tile + 2, tile + 2)."""
    return _backward_weight(grad, input, _pair(padding), _pair(dilation), tile, relu=True)


def winograd_domain_backward_weight(grad, input, padding=1, dilation=1, tile=4):
    """The gradient of `winograd_domain_conv2d` by its weight: (K, C, tile + 2, tile + 2)."""
    return _backward_weight(grad, input, _pair(padding), _pair(dilation), tile, relu=False)


def _backward_weight(grad, input, padding, dilation, tile, relu):
    compute = _compute_dtype(input)
    v = _transformed(input.to(compute), padding, dilation, tile)
    grad_m = _transformed_grad(grad.to(compute), input.shape, padding, dilation, tile)
    return torch.einsum("nktrusab,nctrusab->kcab", grad_m, v.relu() if relu else v).to(input.dtype)


def _transformed(input, padding, dilation, tile):
    """V = B^T d B of all a x a patches d, zeros outside the input.

    A convolution of dilation d is d x d interleaved ones of dilation 1. Output o = d q + r belongs
    to phase r and is row q mod m of tile q // m; row i of that tile's patch is input row d (m (q //
    m) + i) + r - padding."""
    bt, _, _ = transform_matrices(tile, input.dtype, input.device)
    (rows, below), (columns, right) = _grid(input.shape, padding, dilation, tile)
    padded = F.pad(input, (padding[1], right, padding[0], below))
    phases = padded.reshape(*input.shape[:2], rows, dilation[0], columns, dilation[1])
    patches = phases.unfold(2, tile + 2, tile).unfold(4, tile + 2, tile)
    return torch.einsum("ai,nctrusij,bj->nctrusab", bt, patches, bt)


def _transformed_grad(grad, size, padding, dilation, tile):
    """A y A^T of all m x m tiles y of an output gradient, zeros where tiles stick out; `size` is
    the input's."""
    _, _, at = transform_matrices(tile, grad.dtype, grad.device)
    (rows, _), (columns, _) = _grid(size, padding, dilation, tile)
    height, width = (rows - 2) * dilation[0], (columns - 2) * dilation[1]
    y = F.pad(grad, (0, width - grad.shape[3], 0, height - grad.shape[2]))
    tiles = (rows - 2) // tile, (columns - 2) // tile
    y = y.reshape(*y.shape[:2], tiles[0], tile, dilation[0], tiles[1], tile, dilation[1])
    return torch.einsum("pa,nktpruqs,qb->nktrusab", at, y, at)


def _grid(size, padding, dilation, tile):
    """For both axes of an input's size, the padded rows of one phase and how much of the padding
    lies behind the input."""
    grid = []
    for pixels, p, d in zip(size[2:], padding, dilation):
        tiles = -(-(pixels + 2 * p - 2 * d) // (d * tile))
        rows = tiles * tile + 2
        grid.append((rows, rows * d - pixels - p))
    return grid


def _output_size(input, padding, dilation):
    return tuple(size + 2 * p - 2 * d for size, p, d in zip(input.shape[2:], padding, dilation))


def _compute_dtype(input):
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)
