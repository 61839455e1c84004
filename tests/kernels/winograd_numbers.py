# SPDX-License-Identifier: BSD-3-Clause
"""The numbers of the Triton Winograd kernels. test_winograd_triton.py runs this file in a process
of its own, since TRITON_INTERPRET counts when Triton is imported; where there is a GPU it runs on
that.

Two references. The *staged* one is float64 that rounds exactly where the kernel rounds: V and U to
the domain, M to the domain. What is left is the fp32 arithmetic of transforms and sums, and where
that takes a number across a rounding boundary. The other one is the float64 convolution; its bounds
are what the domain costs."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from pywino.kernels import winograd
from pywino.reference import winograd as reference
from pywino.testing import relative_l2

pytest.importorskip("triton")

from interpreted import DEVICE, prepare

prepare(winograd)

GEOMETRIES = [  # padding, dilation, (h, w)
    ((1, 1), (1, 1), (9, 11)),
    ((2, 0), (2, 1), (13, 11)),
    ((0, 2), (1, 3), (10, 17)),
    ((2, 2), (3, 2), (14, 9)),
    ((0, 0), (1, 1), (3, 3)),
    ((1, 1), (1, 1), (1, 1)),
]
KINDS = [
    ("f32", torch.float32),
    ("f16", torch.float32),
    ("f16", torch.bfloat16),
    ("f16", torch.float16),
]
# Relative L2 distance to float64. F6 in 16 bits is nobody's default.
BOUNDS = {
    ("f32", torch.float32): {2: 7e-7, 4: 2.5e-6, 6: 7e-6},
    ("f16", torch.float32): {2: 7e-4, 4: 2e-3, 6: 7.5e-3},
    ("f16", torch.float16): {2: 8e-4, 4: 2e-3, 6: 7.5e-3},
    ("f16", torch.bfloat16): {2: 2.6e-3, 4: 3e-3, 6: 8e-3},
}
# The same to the staged reference. In "f32" it is fp32 arithmetic, which F6 does on larger numbers.
# In "f16", where a number in a thousand is rounded the other way, the square root of that, 3 %, of
# what the roundings themselves do; held to a tenth.
NEAR = {"f32": {2: 5e-7, 4: 1e-6, 6: 4e-6}, "f16": {2: 7e-5, 4: 2e-4, 6: 1e-3}}
EPSILON = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Whatever the kernels read must have been written: empty tensors are full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def large_blocks(monkeypatch):
    """The interpreter's time is that of its calls: few large blocks."""
    monkeypatch.setattr(winograd, "transform_block", lambda *arguments: (128, 32))
    monkeypatch.setattr(winograd, "FILTER_BLOCK", dict.fromkeys((2, 4, 6), (32, 32)))


def tensor(*shape, dtype=torch.float32, channels_last=False):
    x = torch.randn(shape).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


# --- the staged reference ---


def patches(x, padding, dilation, tile):
    """All a x a patches: n, c, (tile row, phase), (tile column, phase), (i, j)."""
    (rows, below), (columns, right) = reference._grid(x.shape, padding, dilation, tile)
    x = F.pad(x, (padding[1], right, padding[0], below))
    x = x.reshape(*x.shape[:2], rows, dilation[0], columns, dilation[1])
    return x.unfold(2, tile + 2, tile).unfold(4, tile + 2, tile)


def gradient_tiles(grad, input, padding, dilation, tile):
    (rows, _), (columns, _) = reference._grid(input.shape, padding, dilation, tile)
    size = ((rows - 2) * dilation[0], (columns - 2) * dilation[1])
    y = F.pad(grad, (0, size[1] - grad.shape[3], 0, size[0] - grad.shape[2]))
    shape = (-1, tile, dilation[0], (columns - 2) // tile, tile, dilation[1])
    return y.reshape(*y.shape[:2], *shape).permute(0, 1, 2, 4, 5, 7, 3, 6)


def tap_scale(matrix):
    """(a, a): rows of the matrix are brought up to the largest one by powers of two."""
    rows = matrix.abs().sum(1)
    shift = torch.exp2(torch.floor(torch.log2(rows.max() / rows) + 1e-9))
    return shift[:, None] * shift


def in_domain(d, matrix, dims, domain, relu=False, taps=1.0):
    """(X d X^T rounded to the domain, its scale): one scale for what differs in `dims` alone, and
    `taps`, which are divided out again."""
    v = torch.einsum("ai,...ij,bj->...ab", matrix, d, matrix)
    v = v.relu() if relu else v
    if domain == "f32":
        return v.float().double(), torch.ones((), dtype=torch.float64)
    growth = torch.log2(matrix.abs().sum(1).max() ** 2).ceil()
    peak = d.abs().amax(dims, keepdim=True)
    scale = torch.where(peak > 0, torch.exp2(torch.floor(torch.log2(peak)) + 1 + growth), 1.0)
    return (v / scale * taps).half().double() / taps, scale


def rounded(m, domain):
    return m.to(winograd.DOMAINS[domain]).double()


def staged_filter(weight, tile, domain, spatial):
    g = reference.transform_matrices(tile)[1]
    taps = tap_scale(g) if tile == 6 else 1.0
    matrix = g if spatial else torch.eye(tile + 2).double()
    return in_domain(weight.double(), matrix, (1, 2, 3), domain, taps=taps)


def staged_forward(input, weight, bias, residual, tile, padding, dilation, relu, layer, domain):
    """Before the rounding of the output to its dtype; layer: Winograd-ReLU."""
    bt, _, at = reference.transform_matrices(tile)
    d = patches(input.double(), padding, dilation, tile)
    v, v_scale = in_domain(d, bt, (1, 6, 7), domain, layer)
    u, u_scale = staged_filter(weight, tile, domain, not layer)
    taps = tap_scale(reference.transform_matrices(tile)[1]) if tile == 6 else 1.0
    m = rounded(torch.einsum("kcab,nctrusab->nktrusab", u, v) * taps, domain) / taps
    m = m * v_scale * u_scale.reshape(1, -1, 1, 1, 1, 1, 1, 1)
    y = torch.einsum("pa,nktrusab,qb->nktpruqs", at, m, at)
    height, width = reference._output_size(input, padding, dilation)
    y = y.reshape(*y.shape[:2], y.shape[2] * tile * dilation[0], -1)[:, :, :height, :width]
    if bias is not None:
        y = y + bias.double().reshape(1, -1, 1, 1)
    y = y if residual is None else y + residual.double()
    return y.relu() if relu else y


def staged_weight_gradient(grad, input, tile, padding, dilation, layer, domain):
    bt, g, at = reference.transform_matrices(tile)
    d = patches(input.double(), padding, dilation, tile)
    v, v_scale = in_domain(d, bt, (0, 2, 3, 4, 5, 6, 7), domain, layer)
    y = gradient_tiles(grad.double(), input, padding, dilation, tile)
    m, m_scale = in_domain(y, at.T, (0, 2, 3, 4, 5, 6, 7), domain, taps=tap_scale(at.T))
    s = torch.einsum("nktrusab,nctrusab->kcab", m, v)
    s = s * m_scale.reshape(-1, 1, 1, 1) * v_scale.reshape(1, -1, 1, 1)
    return s if layer else torch.einsum("ai,kcab,bj->kcij", g, s, g)


def assert_close(actual, staged, exact, domain, tile):
    """Against the staged reference, then against float64."""
    dtype = actual.dtype
    actual = actual.cpu().double()
    assert actual.isfinite().all()
    # One rounding to the output's dtype is at most half a unit in the last place: epsilon.
    error = (actual - staged).abs() - EPSILON[dtype] * staged.abs()
    assert error.clamp(min=0).norm() <= NEAR[domain][tile] * staged.norm()
    # Tiles that are mostly padding cancel more than those of an image.
    assert relative_l2(actual, exact) <= 1.5 * BOUNDS[domain, dtype][tile]


def cases():
    """Every tile, domain, dtype and layout, with the geometries in turn."""
    i = 0
    for tile in (2, 4, 6):
        for domain, dtype in KINDS:
            for last in (False, True) if tile < 6 else (i % 2 == 1,):
                yield tile, domain, dtype, last, *GEOMETRIES[i % len(GEOMETRIES)], i % 2 == 0
                i += 1
            i += 1


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize(
    ("tile", "domain", "dtype", "last", "padding", "dilation", "size", "epilogue"), list(cases())
)
def test_forward(tile, domain, dtype, last, padding, dilation, size, epilogue):
    n, c, k = 2, 20, 7
    x, w = tensor(n, c, *size, dtype=dtype, channels_last=last), tensor(k, c, 3, 3, dtype=dtype)
    bias = residual = None
    exact = F.conv2d(x.double().cpu(), w.double().cpu(), None, 1, padding, dilation)
    if epilogue:
        bias, residual = tensor(k), tensor(*exact.shape, dtype=dtype)
        exact = (exact + bias.cpu().reshape(1, -1, 1, 1) + residual.cpu()).relu()
    u, scale = winograd.transform_filter(w, tile, domain)
    geometry = (tile, padding, dilation)
    y = winograd.forward(x, u, scale, bias, residual, k, *geometry, epilogue, False, domain)
    assert y.dtype == dtype
    layout = torch.channels_last if last else torch.contiguous_format
    assert y.stride() == torch.empty(exact.shape, memory_format=layout).stride()
    x, w, bias, residual = (t if t is None else t.cpu() for t in (x, w, bias, residual))
    staged = staged_forward(x, w, bias, residual, *geometry, epilogue, False, domain)
    assert_close(y, staged, exact, domain, tile)


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize("tile", [2, 4, 6])
@pytest.mark.parametrize("domain", ["f32", "f16"])
def test_gradients(tile, domain):
    padding, dilation, size = GEOMETRIES[{2: 1, 4: 2, 6: 0}[tile]]
    n, c, k, last = 2, 6, 35, domain == "f16"
    x, w = tensor(n, c, *size, channels_last=last), tensor(k, c, 3, 3)
    exact_x = x.double().cpu().requires_grad_()
    exact_w = w.double().cpu().requires_grad_()
    output = F.conv2d(exact_x, exact_w, None, 1, padding, dilation)
    grad = tensor(*output.shape, channels_last=last)
    output.backward(grad.double().cpu())

    u, scale = winograd.transform_filter(w, tile, domain, rotate=True)
    full = [2 * d - p for p, d in zip(padding, dilation)]
    dx = winograd.forward(grad, u, scale, None, None, c, tile, full, dilation, False, False, domain)
    turned = w.cpu().flip(2, 3).transpose(0, 1)
    staged = staged_forward(
        grad.cpu(), turned, None, None, tile, full, dilation, False, False, domain
    )
    assert_close(dx, staged, exact_x.grad, domain, tile)

    dw = winograd.weight_gradient(grad, x, tile, padding, dilation, False, domain)
    geometry = (tile, padding, dilation)
    staged = staged_weight_gradient(grad.cpu(), x.cpu(), *geometry, False, domain)
    assert_close(dw, staged, exact_w.grad, domain, tile)


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize(
    ("tile", "domain"), [(2, "f32"), (2, "f16"), (4, "f32"), (4, "f16"), (6, "f16")]
)
def test_winograd_relu(tile, domain):
    padding, dilation, size = GEOMETRIES[1 if (tile == 2) == (domain == "f32") else 2]
    n, c, k, last = 2, 5, 7, domain == "f32"
    x, w = tensor(n, c, *size, channels_last=last), tensor(k, c, tile + 2, tile + 2)
    bias, geometry = tensor(k), (tile, padding, dilation)
    u, scale = winograd.transform_filter(w, tile, domain, spatial=False)
    y = winograd.forward(x, u, scale, bias, None, k, *geometry, False, True, domain)
    x64, w64, b64 = x.double().cpu(), w.double().cpu(), bias.double().cpu()
    exact = reference.winograd_relu_conv2d(x64, w64, b64, padding, dilation, tile)
    staged = staged_forward(x.cpu(), w.cpu(), bias.cpu(), None, *geometry, False, True, domain)
    assert_close(y, staged, exact, domain, tile)

    grad = tensor(*y.shape, channels_last=last)
    dw = winograd.weight_gradient(grad, x, *geometry, True, domain)
    g64 = grad.double().cpu()
    exact = reference.winograd_relu_backward_weight(g64, x64, padding, dilation, tile)
    staged = staged_weight_gradient(grad.cpu(), x.cpu(), *geometry, True, domain)
    assert_close(dw, staged, exact, domain, tile)

    u, scale = winograd.transform_filter(w, tile, domain, rotate=True, spatial=False)
    dx = winograd.relu_input_gradient(grad, x, u, scale, *geometry, domain)
    assert dx.stride() == x.stride()
    exact = reference.winograd_relu_backward_input(g64, x64, w64, padding, dilation, tile)
    assert relative_l2(dx.cpu().double(), exact) <= BOUNDS[domain, torch.float32][tile]


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize("tile", [2, 4, 6])
@pytest.mark.parametrize(("domain", "dtype"), KINDS)
def test_error_class(tile, domain, dtype):
    x = tensor(1, 64, 16, 16, dtype=dtype, channels_last=True).relu()
    w = (tensor(16, 64, 3, 3) / 17).to(dtype)
    u, scale = winograd.transform_filter(w, tile, domain)
    y = winograd.forward(x, u, scale, None, None, 16, tile, (1, 1), (1, 1), False, False, domain)
    exact = F.conv2d(x.double().cpu(), w.double().cpu(), None, 1, 1)
    assert relative_l2(y.cpu().double(), exact) <= BOUNDS[domain, dtype][tile]


def test_the_blocks_of_the_rules():
    # 70 and 130 channels are several blocks of transforms and products; 27 tiles no whole block.
    x, w = tensor(1, 70, 5, 17, dtype=torch.float16), tensor(130, 70, 3, 3, dtype=torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    u, scale = winograd.transform_filter(w, 2, "f16")
    y = winograd.forward(x, u, scale, None, None, 130, 2, (1, 1), (1, 1), False, False, "f16")
    exact = F.conv2d(x.double().cpu(), w.double().cpu(), None, 1, 1)
    assert relative_l2(y.cpu().double(), exact) <= BOUNDS["f16", torch.float16][2]


@pytest.mark.usefixtures("large_blocks")
def test_strided_input():
    x = tensor(2, 9, 24, 12)[:, 1:7, ::2, 1::3]
    w = tensor(8, 12, 3, 3).transpose(0, 1)[:5, :6].flip(2)
    u, scale = winograd.transform_filter(w, 4, "f32")
    y = winograd.forward(x, u, scale, None, None, 5, 4, (1, 1), (1, 1), False, False, "f32")
    exact = F.conv2d(x.double(), w.double(), None, 1, 1)
    assert y.is_contiguous()
    assert relative_l2(y.double(), exact) <= BOUNDS["f32", torch.float32][4]


@pytest.mark.usefixtures("large_blocks")
def test_more_than_two_to_the_31_elements():
    # Rows 2^29 elements apart: of the memory, only what is read becomes real.
    torch.use_deterministic_algorithms(False)
    try:
        memory = torch.empty(7 * 2**29 + 64, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"this machine lends no 7 GB: {error}")
    x = memory.as_strided((1, 4, 8, 5), (4, 1, 2**29, 4))
    values = tensor(1, 4, 8, 5, dtype=torch.float16)
    x.copy_(values)
    w = tensor(3, 4, 3, 3, dtype=torch.float16)
    u, scale = winograd.transform_filter(w, 2, "f16")
    y = winograd.forward(x, u, scale, None, None, 3, 2, (0, 0), (1, 1), False, False, "f16")
    exact = F.conv2d(values.double().cpu(), w.double().cpu())
    assert relative_l2(y.cpu().double(), exact) <= BOUNDS["f16", torch.float16][2]


@pytest.mark.usefixtures("large_blocks")
def test_chunks():
    """A workspace limit changes nothing in a forward pass, and the order of sums in a weight
    gradient; the same call gives the same bits."""
    x, w = tensor(3, 3, 16, 16), tensor(4, 3, 3, 3)
    u, scale = winograd.transform_filter(w, 2, "f16")
    geometry = (2, (1, 1), (1, 1))  # 3 images of 64 tiles
    per_tile = 16 * (32 + 32) * 2

    def forward(*limit):
        return winograd.forward(x, u, scale, None, None, 4, *geometry, True, False, "f16", *limit)

    y = forward()
    assert torch.equal(forward(128 * per_tile + 1000), y)

    def gradient(*limit):
        return winograd.weight_gradient(y, x, *geometry, False, "f16", *limit)

    dw = gradient()
    assert torch.equal(gradient(), dw)
    assert torch.equal(gradient(128 * per_tile), gradient(128 * per_tile))
    torch.testing.assert_close(gradient(128 * per_tile), dw, rtol=1e-5, atol=1e-4)

    weight = tensor(4, 3, 4, 4)
    u, scale = winograd.transform_filter(weight, 2, "f16", rotate=True, spatial=False)

    def input_gradient(*limit):
        return winograd.relu_input_gradient(y, x, u, scale, *geometry, "f16", *limit)

    per_tile = 16 * ((32 + 32) * 2 + 32 * 4) + 4
    assert torch.equal(input_gradient(128 * per_tile), input_gradient())


@pytest.mark.usefixtures("large_blocks")
def test_limits_that_are_too_small():
    x, w = tensor(1, 3, 16, 40), tensor(4, 3, 3, 3)
    u, scale = winograd.transform_filter(w, 2, "f16")
    arguments = (x, u, scale, None, None, 4, 2, (1, 1), (1, 1), False, False, "f16")
    least = 128 * (16 * 64 * 2 + 4)
    with pytest.raises(RuntimeError, match=f"workspace_limit must be at least {least} bytes, for"):
        winograd.forward(*arguments, workspace_limit=least - 1)
    winograd.forward(*arguments, workspace_limit=least)

    u, scale = winograd.transform_filter(tensor(4, 3, 4, 4), 2, "f16", True, False)
    arguments = (tensor(1, 4, 16, 40), x, u, scale, 2, (1, 1), (1, 1), "f16")
    least = 256 * (16 * (64 * 2 + 32 * 4) + 4)  # one image: 160 tiles, in whole blocks
    with pytest.raises(RuntimeError, match=rf"at least {least} bytes, for one image .* got 9000;"):
        winograd.relu_input_gradient(*arguments, workspace_limit=9000)
    winograd.relu_input_gradient(*arguments, workspace_limit=least)


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize("magnitude", [1e-30, 1e-7, 1e5, 1e18])
def test_range(magnitude):
    """Scales keep fp32 tensors of any size within fp16."""
    x, w = magnitude * tensor(1, 8, 6, 6), tensor(8, 8, 3, 3)
    x[:, :, 5:] *= 1e-4  # tiles have scales of their own
    u, scale = winograd.transform_filter(w / magnitude, 4, "f16")
    y = winograd.forward(x, u, scale, None, None, 8, 4, (1, 1), (1, 1), False, False, "f16")
    exact = F.conv2d(x.double(), w.double() / magnitude, None, 1, 1)
    assert relative_l2(y.double(), exact) <= BOUNDS["f16", torch.float32][4]


@pytest.mark.usefixtures("large_blocks")
def test_zeros_infinities_and_nans():
    x, w = torch.zeros(1, 2, 4, 24, device=DEVICE), tensor(3, 2, 3, 3)
    x[0, 0, 0, 9], x[0, 1, 0, 20] = float("inf"), float("nan")
    u, scale = winograd.transform_filter(w, 4, "f16")
    y = winograd.forward(x, u, scale, None, None, 3, 4, (1, 1), (1, 1), True, False, "f16")
    assert torch.equal(y[..., :4], torch.zeros_like(y[..., :4]))
    assert not y[0, :, :2, 8:11].isfinite().any()
    assert y[0, :, :2, 19:22].isnan().all()


@pytest.mark.usefixtures("large_blocks")
def test_schemas():
    x, w = tensor(1, 3, 5, 6), tensor(4, 3, 3, 3)
    ops, geometry = torch.ops.pywino, (2, [1, 1], [1, 1])
    u, scale = ops._winograd_triton_filter(w, 2, "f32")
    forward = (x, u, scale, None, None, 4, *geometry, False, True, "f32")
    y = ops._winograd_triton_forward(*forward)
    turned = ops._winograd_triton_filter(tensor(4, 3, 4, 4), 2, "f32", True, False)
    for name, arguments in {
        "filter": (w, 2, "f32"),
        "forward": forward,
        "weight_gradient": (y, x, *geometry, False, "f32"),
        "relu_input_gradient": (y, x, *turned, *geometry, "f32"),
    }.items():
        op = getattr(ops, f"_winograd_triton_{name}").default
        opcheck(op, arguments, test_utils="test_schema")


def test_an_empty_batch():
    x, w = tensor(0, 3, 5, 6), tensor(4, 3, 3, 3)
    u, scale = winograd.transform_filter(w, 2, "f16")
    geometry = (2, (1, 1), (1, 1))
    y = winograd.forward(x, u, scale, None, None, 4, *geometry, False, False, "f16")
    assert y.shape == (0, 4, 5, 6)
    assert not winograd.weight_gradient(y, x, *geometry, False, "f16").any()
