# SPDX-License-Identifier: BSD-3-Clause
"""What test_binding.py runs: the ops of a library whose CUDA kernels are emulated."""

import copy
import sys
import warnings

import pytest
import torch
from torch.library import opcheck

warnings.simplefilter("ignore")  # that PYWINO_PURE=1 is slow
torch.ops.load_library(sys.argv[1])

import pywino  # noqa: E402
from pywino.functional import winograd as functional  # noqa: E402
from pywino.models import sapnet  # noqa: E402
from pywino.ops import _packed  # noqa: E402
from pywino.ops import masked_conv as masked_ops  # noqa: E402
from pywino.ops import sparse_conv as sparse_ops  # noqa: E402
from pywino.ops._kernels import Kernel  # noqa: E402
from pywino.reference import channel_attention, conv_lstm, masked_conv  # noqa: E402
from pywino.reference import winograd as reference  # noqa: E402

ops = torch.ops.pywino
channels_last = torch.channels_last


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def refuses(match, function, *arguments):
    with pytest.raises(RuntimeError, match=match):
        function(*arguments)


def check_forward(tile, strict, dtype, bound, last, n=2, c=24, h=11, w=9, k=20, d=1):
    torch.manual_seed(tile + d)
    x = torch.randn(n, c, h, w).to(dtype)
    weight = (torch.randn(k, c, 3, 3) / (9 * c) ** 0.5).to(dtype)
    bias = torch.randn(k).to(dtype)
    residual = torch.randn(n, k, h, w).to(dtype)  # of another layout than the input's
    x = x.contiguous(memory_format=channels_last) if last else x
    kernel = Kernel("cuda", tile, strict)
    y = kernel.forward(x, kernel.filter(weight), bias, residual, k, (d, d), (d, d), True)
    expected = torch.conv2d(x.double(), weight.double(), bias.double(), 1, d, d)
    expected = (expected + residual.double()).relu()
    assert error(y, expected) <= bound, (tile, strict, dtype, error(y, expected))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=channels_last) == last

    # The input gradient is the same kernel with the turned filter.
    grad = torch.randn_like(y)
    grad = grad.contiguous(memory_format=channels_last) if last else grad.contiguous()
    turned = kernel.filter(weight, rotate=True)
    gradient = kernel.forward(grad, turned, None, None, c, (d, d), (d, d), False)
    expected = torch.nn.grad.conv2d_input(
        x.shape, weight.double(), grad.double(), padding=d, dilation=d
    )
    assert error(gradient, expected) <= bound, (tile, strict, dtype, error(gradient, expected))

    if tile > 1:
        dw = kernel.weight_gradient(grad, x, (d, d), (d, d))
        expected = torch.nn.grad.conv2d_weight(
            x.double(), weight.shape, grad.double(), padding=d, dilation=d
        )
        assert error(dw, expected) <= bound, (tile, strict, dtype, error(dw, expected))
        assert (dw.dtype, dw.is_contiguous()) == (dtype, True)


def check_winograd_relu():
    x, weight, bias = torch.randn(2, 10, 9, 8), torch.randn(12, 10, 6, 6), torch.randn(12)
    kernel = Kernel("cuda", 4, True, winograd_relu=True)
    y = kernel.forward(x, kernel.filter(weight), bias, None, 12, (1, 1), (1, 1), False)
    expected = reference.winograd_relu_conv2d(
        x.double(), weight.double(), bias.double(), 1, 1, tile=4
    )
    assert error(y, expected) <= 2.5e-6, error(y, expected)
    for dtype, strict, bound in ((torch.float32, True, 2.5e-6), (torch.bfloat16, False, 3e-3)):
        for last in (False, True):
            check_relu_gradients(dtype, strict, bound, last)


def check_relu_gradients(dtype, strict, bound, last):
    x, weight = torch.randn(2, 10, 9, 8).to(dtype), torch.randn(12, 10, 6, 6).to(dtype)
    grad = torch.randn(2, 12, 9, 8).to(dtype)
    if last:
        x, grad = (t.contiguous(memory_format=channels_last) for t in (x, grad))
    kernel = Kernel("cuda", 4, strict, winograd_relu=True)
    x64, w64, g64 = (t.double() for t in (x, weight, grad))
    dw = kernel.weight_gradient(grad, x, (1, 1), (1, 1))
    expected = reference.winograd_relu_backward_weight(g64, x64, 1, 1, 4)
    assert error(dw, expected) <= bound, (dtype, error(dw, expected))
    dx = kernel.domain_input_gradient(grad, x, weight, (1, 1), (1, 1))
    expected = reference.winograd_relu_backward_input(g64, x64, w64, 1, 1, 4)
    assert error(dx, expected) <= bound, (dtype, error(dx, expected))
    assert (dx.dtype, dx.stride()) == (dtype, x.stride())


def check_domain(dtype, strict, bound, last):
    """A weight in the Winograd domain: whole, in blocks, and 2:4."""
    torch.manual_seed(0)
    x, bias, residual = torch.randn(2, 72, 9, 8), torch.randn(70), torch.randn(2, 70, 9, 8)
    weight, grad = torch.randn(70, 72, 6, 6) / 25, torch.randn(2, 70, 9, 8)
    if last:
        x, grad = (t.contiguous(memory_format=channels_last) for t in (x, grad))
    x, bias, residual, weight, grad = (t.to(dtype) for t in (x, bias, residual, weight, grad))
    whole = Kernel("cuda", 4, strict, domain=True)
    kernel = whole._replace(skips=True)
    blocks, fours = weight.clone(), weight.clone()
    blocks[:, :64, :, 1:] = 0
    fours[:, 1::4] = fours[:, 2::4] = 0
    for w, dims in ((weight, None), (blocks, 1), (fours, None if strict else 4)):
        filter = kernel.filter(w)
        assert dims == (None if filter.places is None else filter.places.dim())
        y = kernel.forward(x, filter, bias, residual, 70, (1, 1), (1, 1), True)
        expected = reference.winograd_domain_conv2d(
            *(t.double() for t in (x, w, bias)), 1, 1, 4
        ).add(residual.double()).relu()  # fmt: skip
        assert error(y, expected) <= bound, (dtype, dims, error(y, expected))
        assert (y.dtype, y.is_contiguous()) == (dtype, not last)
        filter = kernel._replace(domain=False, winograd_relu=True).filter(w)
        y = kernel._replace(winograd_relu=True).forward(
            x, filter, bias, None, 70, (1, 1), (1, 1), False
        )
        expected = reference.winograd_relu_conv2d(
            *(t.double() for t in (x, w, bias)), 1, 1, tile=4
        )  # fmt: skip
        assert error(y, expected) <= bound, (dtype, dims, error(y, expected))
    dx = whole.domain_input_gradient(grad, x * torch.nan, weight, (1, 1), (1, 1))
    expected = reference.winograd_domain_backward_input(grad.double(), weight.double(), 1, 1, 4)
    assert error(dx, expected) <= bound, (dtype, error(dx, expected))
    dw = whole.weight_gradient(grad, x, (1, 1), (1, 1))
    expected = reference.winograd_domain_backward_weight(grad.double(), x.double(), 1, 1, 4)
    assert error(dw, expected) <= bound, (dtype, error(dw, expected))
    rest = (None, None, 70, 4, (1, 1), (1, 1), False, False, strict, 1 << 28)
    forward = ops._winograd_cuda_forward
    tests = ("test_schema", "test_faketensor")
    opcheck(forward.default, (x, *kernel.filter(blocks), *rest), test_utils=tests)
    u, scale, places = kernel.filter(blocks)
    for wrong in ((u[1:], scale, places), (u, scale, places.long()), (u, scale, places[None])):
        refuses("made for other channels", forward, x, *wrong, *rest)


def check_alignment():
    """Tensors that begin in the middle of a word, as slices of larger ones may."""

    def shifted(*size):
        flat = torch.randn(torch.Size(size).numel() + 1).half()[1:]
        n, c, h, w = size
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)

    x, residual, grad = shifted(1, 8, 9, 8), shifted(1, 16, 9, 8), shifted(1, 16, 9, 8)
    weight = torch.randn(16, 8, 3, 3).half() / 8
    kernel = Kernel("cuda", 4, False)
    y = kernel.forward(x, kernel.filter(weight), None, residual, 16, (1, 1), (1, 1), False)
    expected = torch.conv2d(x.double(), weight.double(), None, 1, 1) + residual.double()
    assert error(y, expected) <= 2e-3, error(y, expected)
    dw = kernel.weight_gradient(grad, x, (1, 1), (1, 1))
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=1)
    assert error(dw, expected) <= 2e-3, error(dw, expected)
    weight = torch.randn(16, 8, 6, 6).half()
    dx = kernel._replace(winograd_relu=True).domain_input_gradient(grad, x, weight, (1, 1), (1, 1))
    exact = (t.double() for t in (grad, x, weight))
    expected = reference.winograd_relu_backward_input(*exact, 1, 1, 4)
    assert error(dx, expected) <= 2e-3, error(dx, expected)


def check_opcheck():
    tests = ("test_schema", "test_faketensor")
    x = torch.randn(2, 8, 7, 6).contiguous(memory_format=channels_last)
    weight = torch.randn(9, 8, 3, 3)
    for tile, strict in ((1, True), (2, False), (4, True)):
        filter_arguments = (weight, tile, strict, False, True)
        opcheck(ops._winograd_cuda_filter.default, filter_arguments, test_utils=tests)
        u, scale = ops._winograd_cuda_filter(*filter_arguments)
        if tile == 1:
            arguments = (x, u, None, None, 9, (1, 1), (1, 1), True, True)
            op = ops._winograd_cuda_direct.default
        else:
            arguments = (x, u, scale, None, None, None, 9, tile, (1, 1), (1, 1), True, False)
            arguments = (*arguments, strict, 1 << 28)
            op = ops._winograd_cuda_forward.default
        opcheck(op, arguments, test_utils=tests)
    grad = torch.randn(2, 9, 7, 6).contiguous(memory_format=channels_last)
    geometry = (4, (1, 1), (1, 1))
    arguments = (grad, x, None, None, *geometry, True, False, True, 1 << 28)
    opcheck(ops._winograd_cuda_backward_weight.default, arguments, test_utils=tests)
    turned = ops._winograd_cuda_filter(torch.randn(9, 8, 6, 6), 4, True, True, False)
    arguments = (grad, x, *turned, *geometry, True, True, 1 << 28)
    opcheck(ops._winograd_cuda_domain_backward_input.default, arguments, test_utils=tests)


def check_refusals():
    x, weight = torch.randn(1, 8, 8, 8), torch.randn(8, 8, 3, 3)
    u, scale = ops._winograd_cuda_filter(weight, 4, True, False, True)
    rest = (None, None, None, 8, 4, (1, 1), (1, 1), False, False)
    forward = ops._winograd_cuda_forward
    refuses("workspace_limit must be at least", forward, x, u, scale, *rest, True, 1000)
    refuses("another tile or another precision", forward, x, u, scale, *rest, False, 1 << 28)
    refuses("must be float32, bfloat16 or float16", forward, x.double(), u, scale, *rest, True, 1)
    refuses("tile must be 1, 2, 4 or 6, got 3", ops._winograd_cuda_filter, weight, 3, 1, 0, 1)
    by_weight = ops._winograd_cuda_backward_weight
    grad, rest = torch.randn(1, 8, 8, 8), (4, (1, 1), (1, 1), True, False)
    refuses("grad must be of the output's size", by_weight, grad[:, :, :7].clone(), x, None, None,
            *rest, True, 1 << 28)  # fmt: skip
    turned = grad.contiguous(memory_format=channels_last)
    refuses("input's memory format", by_weight, turned, x, None, None, *rest, True, 1 << 28)
    refuses(
        "float32 number for each channel", by_weight, grad, x, None, None, *rest, False, 1 << 28
    )
    refuses("workspace_limit must be", by_weight, grad, x, None, None, *rest, True, 1000)
    by_input = ops._winograd_cuda_domain_backward_input
    rest = (4, (1, 1), (1, 1), True, True, 1 << 28)
    refuses("made for other channels", by_input, grad.repeat(1, 2, 1, 1), x, u, scale, *rest)
    u, _ = ops._winograd_cuda_filter(weight, 1, True, False, True)
    direct = (u, None, None, 8, (1, 1), (1, 1), False, True)
    refuses("input must be channels_last", ops._winograd_cuda_direct, x, *direct)


def check_attention(dtype, bound, last):
    x, residual, grad = (torch.randn(2, 12, 9, 7).to(dtype) for _ in range(3))
    if last:
        x, residual, grad = (t.contiguous(memory_format=channels_last) for t in (x, residual, grad))
    w1, w2, w3, b1 = (torch.randn(s).to(dtype) / 3 for s in ((3, 12), (12, 3), (12, 12), (3,)))
    forward, backward = ops._channel_attention_forward, ops._channel_attention_backward
    arguments = (x, w1, b1, w2, None, w3, residual, True, True)
    y, mean, gate = forward(*arguments)
    x64, w64, r64, g64 = x.double(), [t.double() for t in (w1, w2, w3, b1)], residual, grad.double()
    expected = channel_attention.channel_residual_attention(
        x64, *w64, None, r64.double(), "relu", "relu"
    )
    assert error(y, expected) <= bound, (dtype, error(y, expected))
    assert (y.dtype, y.stride()) == (dtype, x.stride())
    dx, du = backward(grad, x, mean, gate, w1, b1, w2, w3, True)
    saved = mean.double(), gate.double()
    by_input, by_logit = channel_attention.gradients(g64, x64, *saved, *w64, "relu")
    assert error(dx, by_input) <= bound, (dtype, error(dx, by_input))
    assert error(du, by_logit) <= 1e-5, (dtype, error(du, by_logit))
    assert (dx.dtype, dx.stride()) == (dtype, x.stride())
    opcheck(forward.default, arguments, test_utils=("test_schema", "test_faketensor"))
    refuses("residual must", forward, *arguments[:6], residual[:1], True, True)
    refuses("does not fit input's channels", forward, x, w1, b1, w3, *arguments[4:])


def check_known_mean(dtype, bound, last):
    """The gate of means that a convolution has made, and what it makes of the tensor, in place."""
    x, residual = (torch.randn(2, 12, 9, 7).to(dtype) for _ in range(2))
    if last:
        x, residual = (t.contiguous(memory_format=channels_last) for t in (x, residual))
    w1, w2, w3, b1 = (torch.randn(s).to(dtype) / 3 for s in ((3, 12), (12, 3), (12, 12), (3,)))
    mean, layers = x.float().mean((2, 3)), (w1, b1, w2, None, w3)
    exact = [t.double() for t in (w1, w2, w3, b1)]
    gate = ops._channel_attention_gate(mean, *layers)
    assert error(gate, channel_attention.gate(mean.double(), *exact)) <= 1e-6
    expected = channel_attention.channel_residual_attention(
        x.double(), *exact, None, residual.double(), "relu", "relu"
    )
    arguments = (x, mean, *layers, residual, True, True)
    y = ops._channel_attention_apply(*arguments)
    assert error(y, expected) <= bound, (dtype, error(y, expected))
    assert (y.dtype, y.stride()) == (dtype, x.stride())
    tests = ("test_schema", "test_faketensor")
    opcheck(ops._channel_attention_apply.default, arguments, test_utils=tests)
    opcheck(ops._channel_attention_gate.default, (mean, *layers), test_utils=tests)
    ops._channel_attention_apply_(*arguments)
    assert torch.equal(x, y)
    refuses("mean must be contiguous float32", ops._channel_attention_apply, x, mean[:1], *layers,
            None, True, True)  # fmt: skip
    refuses("mean must be contiguous", ops._channel_attention_gate, mean.double(), *layers)


def check_mean(tile, strict, dtype, bound, last, k=20, d=1):
    """relu(gate input) convolved, and the means of its channels, by the kernels' own interface."""
    torch.manual_seed(tile)
    x, gate = torch.randn(1, 24, 13, 11).to(dtype), torch.rand(1, 24)
    x = x.contiguous(memory_format=channels_last) if last else x
    weight = (torch.randn(k, 24, 3, 3) / 15).to(dtype)
    bias = torch.randn(k).to(dtype)
    kernel = Kernel("cuda", tile, strict)
    assert kernel.gives_mean(x)
    assert kernel.takes_gate(x)
    for g in (gate, None):
        y, mean = kernel.forward_mean(x, g, kernel.filter(weight), bias, k, (d, d), (d, d))
        gated = x.double() if g is None else (x.double() * g[:, :, None, None].double()).relu()
        expected = torch.conv2d(gated, weight.double(), bias.double(), 1, d, d)
        assert error(y, expected) <= bound, (tile, strict, dtype, error(y, expected))
        assert error(mean, expected.mean((2, 3))) <= 10 * bound, error(mean, expected.mean((2, 3)))
        assert (y.dtype, y.is_contiguous(memory_format=channels_last)) == (dtype, last)
    forward = ops._winograd_cuda_forward_mean
    u, scale, _ = kernel.filter(weight)
    arguments = (x, gate, u, scale, bias.float(), k, tile, (d, d), (d, d), strict, 1 << 28)
    opcheck(forward.default, arguments, test_utils=("test_schema", "test_faketensor"))
    refuses("gate must be a float32 number", forward, x, gate[:, 1:], *arguments[2:])
    two = torch.cat((x, x))
    refuses("input must be one image", forward, two, gate, *arguments[2:])
    assert not kernel.gives_mean(two)
    assert not kernel._replace(winograd_relu=True).gives_mean(x)


def check_conv_lstm(dtype, strict, bound):
    """The step as one kernel, by the kernels' own interface; the first step has no state."""
    x, hidden, cell = (torch.randn(2, c, 7, 9).to(dtype) for c in (16, 24, 24))
    x = x.contiguous(memory_format=channels_last)
    weight, bias = (torch.randn(96, 40, 3, 3) / 12).to(dtype), torch.randn(96).to(dtype)
    kernel = Kernel("cuda", 1, strict)
    assert kernel.takes_lstm(x, 24)
    assert not kernel.takes_lstm(x, 25)
    assert not kernel.takes_lstm(x.contiguous(), 24)
    assert not kernel._replace(tile=4).takes_lstm(x, 24)
    for state, part in (((hidden, cell), weight), (None, weight[:, :16])):
        filter = kernel.lstm_filter(part)
        found = kernel.conv_lstm(x, *(state or (None, None)), filter, bias, 24)
        doubles = None if state is None else tuple(t.double() for t in state)
        expected = conv_lstm.conv_lstm_cell(x.double(), doubles, part.double(), bias.double())
        for a, e in zip(found, expected):
            assert error(a, e) <= bound, (dtype, error(a, e))
            assert (a.dtype, a.stride()) == (
                dtype,
                torch.empty_like(a, memory_format=channels_last).stride(),
            )
    op, states = ops._winograd_cuda_conv_lstm, [t.contiguous(memory_format=channels_last)
                                                for t in (hidden, cell)]  # fmt: skip
    u = kernel.lstm_filter(weight)[0]
    opcheck(op.default, (x, *states, u, bias.float(), 24, strict),
            test_utils=("test_schema", "test_faketensor"))  # fmt: skip
    refuses("hidden and cell must be channels_last", op, x, hidden, None, u, None, 24, strict)
    refuses("made for other channels", op, x, None, None, u, None, 24, strict)
    refuses("channels must be even", op, x, None, None, u, None, 23, strict)


def check_residual_block(tile):
    """SAPNet's, whose convolutions are emulated: the first sums its output, the second gates it."""
    block = sapnet(stages=1).eval().res_conv2
    x = torch.randn(1, 32, 9, 14).contiguous(memory_format=channels_last)
    chosen, calls = functional.inference_kernel, []

    class Watched(Kernel):
        def forward_mean(self, input, gate, *arguments):
            calls.append(gate is not None)
            return super().forward_mean(input, gate, *arguments)

    functional.inference_kernel = lambda *arguments: Watched("cuda", tile, True)
    try:
        with torch.no_grad():
            y = block(x)
    finally:
        functional.inference_kernel = chosen
    exact = pywino.restore_(copy.deepcopy(block)).double()(x.double()).detach()
    assert calls == [False, True]
    assert error(y, exact) <= 3e-6, error(y, exact)


def check_cell(dtype, bound, last):
    gates = torch.randn(2, 20, 6, 7).to(dtype)
    cell, grad_hidden, grad_cell = (torch.randn(2, 5, 6, 7).to(dtype) for _ in range(3))
    tensors = [grad_hidden, grad_cell, gates, cell]
    if last:
        tensors = [t.contiguous(memory_format=channels_last) for t in tensors]
    for with_cell in (True, False):
        if not with_cell:
            tensors[3] = None
        exact = [t if t is None else t.double() for t in tensors]
        found = [*ops._conv_lstm_forward(*tensors[2:]), *ops._conv_lstm_backward(*tensors)]
        expected = conv_lstm.pointwise(*exact[2:]) + conv_lstm.pointwise_gradients(*exact)
        for a, e in zip(found, expected):
            assert error(a, e) <= bound, (dtype, error(a, e))
            assert (a.dtype, a.is_contiguous()) == (dtype, not last)
    refuses("a quarter of gates' channels", ops._conv_lstm_forward, gates, gates)


def check_masked(dtype, bound, last, c):
    x, weight, bias = torch.randn(2, c, 9, 7).to(dtype), torch.randn(12, c, 3, 3), torch.randn(12)
    x = x.contiguous(memory_format=channels_last) if last else x
    weight = (weight / (9 * c) ** 0.5).to(dtype)
    for mask in (torch.rand(2, 1, 9, 7) < 0.3, torch.rand(1, 1, 9, 7) < 0.6):
        filter = masked_ops.pack(weight, "cuda")
        y = masked_ops.gpu_forward(x, mask, filter, bias, (1, 1), (1, 1), "cuda")
        expected = masked_conv.masked_conv2d(x.double(), mask, weight.double(), bias.double())
        assert error(y, expected) <= bound, (dtype, error(y, expected))
        assert (y.dtype, y.is_contiguous()) == (dtype, not last)
    given = (x, mask.expand(2, 1, 9, 7).contiguous(), filter, bias, (1, 1), (1, 1), True)
    forward = ops._masked_cuda_forward
    opcheck(forward.default, given, test_utils=("test_schema", "test_faketensor"))
    refuses("mask must be contiguous and bool", forward, x, mask, *given[2:])
    refuses("filter must be", forward, *given[:2], weight, *given[3:])
    # From the middle of a word, as slices of larger tensors may begin.
    flat = torch.empty(x.numel() + 1, dtype=dtype)[1:].as_strided(x.shape, x.stride())
    assert torch.equal(forward(flat.copy_(x), *given[1:]), forward(*given))


def check_sparse(dtype, bound, last, c):
    x, weight, bias = torch.randn(2, c, 9, 7).to(dtype), torch.randn(70, c, 3, 3), torch.randn(70)
    x = x.contiguous(memory_format=channels_last) if last else x
    weight = (weight / (9 * c) ** 0.5).to(dtype)
    weight[:64, :, :2] = 0
    filter, where = sparse_ops.pack(weight, "cuda"), ((3, 3), (1, 2), (1, 1), (1, 1))
    y = sparse_ops.run("cuda", x, filter, bias, 70, *where)
    expected = torch.conv2d(x.double(), weight.double(), bias.double(), *where[1:])
    assert error(y, expected) <= bound, (dtype, error(y, expected))
    assert (y.dtype, y.is_contiguous()) == (dtype, not last)
    flat = torch.empty(x.numel() + 1, dtype=dtype)[1:].as_strided(x.shape, x.stride())
    assert torch.equal(sparse_ops.run("cuda", flat.copy_(x), filter, bias, 70, *where), y)
    if last and c == 16:
        given, forward = (x, *filter, bias, 70, *where, True), ops._sparse_cuda_forward
        tests = ("test_schema", "test_faketensor")
        opcheck(forward.default, given, test_utils=tests)
        refuses("input must be channels_last", forward, x.contiguous(), *given[1:])
        refuses("multiple of 16 bytes", forward, x[:, :15].contiguous(memory_format=channels_last),
                *given[1:])  # fmt: skip
        refuses("packed for another weight", forward, *given[:4], None, 200, *given[6:])
    if dtype == torch.float32:
        check_csr(x, weight, bias, bound, last, *where)
    weight[:, ::2] = 0
    filter = sparse_ops.pack(weight, "cuda")
    assert isinstance(filter, _packed.TwoOfFour) == (dtype != torch.float32)
    y = sparse_ops.run("cuda", x, filter, bias, 70, *where)
    expected = torch.conv2d(x.double(), weight.double(), bias.double(), *where[1:])
    assert error(y, expected) <= bound, (dtype, error(y, expected))
    assert (y.dtype, y.is_contiguous()) == (dtype, not last)
    if last and c == 16 and dtype != torch.float32:
        given, forward = (x, *filter, bias, 70, *where), ops._sparse_cuda_two_of_four
        opcheck(forward.default, given, test_utils=tests)
        refuses("packed for another weight", forward, *given[:3], None, 200, *given[5:])
        refuses("must be float16 or bfloat16", forward, x.float(), *given[1:])


def check_csr(x, weight, bias, bound, last, *where):
    weight = weight * (torch.rand_like(weight) < 0.1)
    filter = sparse_ops.pack(weight, "cuda")
    assert isinstance(filter, _packed.Csr)
    y = sparse_ops.run("cuda", x, filter, bias, 70, *where)
    expected = torch.conv2d(x.double(), weight.double(), bias.double(), *where[1:])
    assert error(y, expected) <= bound, error(y, expected)
    assert y.is_contiguous() == (not last)
    given, forward = (x.contiguous(), *filter, bias, *where[:2], where[3]), ops._sparse_cuda_csr
    opcheck(forward.default, given, test_utils=("test_schema", "test_faketensor"))
    refuses("float32 and contiguous", forward, x.half().contiguous(), *given[1:])
    refuses("int32 entries", forward, given[0], filter.values, filter.entries[1:], *given[3:])


for last in (True, False):
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 4e-4), (torch.bfloat16, 3e-3)):
        check_attention(dtype, bound, last)
        check_known_mean(dtype, bound, last)
        check_cell(dtype, bound, last)
        for c in (16, 11):
            check_masked(dtype, bound, last, c)
            check_sparse(dtype, bound, last, c)
for last in (True, False):
    check_forward(2, False, torch.float16, 8e-4, last)
    check_forward(4, False, torch.bfloat16, 3e-3, last, d=2)
    check_forward(4, False, torch.float32, 2e-3, last)
    check_forward(4, True, torch.float32, 2.5e-6, last, c=72, k=70)
    check_forward(6, True, torch.float32, 7e-6, last, h=19)
for strict, dtype, bound in (
    (True, torch.float32, 3e-7),
    (False, torch.float32, 4e-4),
    (False, torch.bfloat16, 2.5e-3),
    (False, torch.float16, 3e-4),
):
    check_forward(1, strict, dtype, bound, True, k=16)
    rounding = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}.get(dtype, 0)  # of relu(gate x)
    check_mean(1, strict, dtype, bound + rounding, True)
    check_conv_lstm(dtype, strict, 2 * bound + rounding)
for last in (True, False):
    check_mean(2, False, torch.bfloat16, 2.6e-3, last)
    check_mean(4, False, torch.float16, 2e-3, last, d=2)
    check_mean(4, True, torch.float32, 2.5e-6, last, k=300)
    check_mean(6, True, torch.float32, 7e-6, last)
for d in (8, 16):  # also beyond the image
    check_forward(1, False, torch.bfloat16, 2.5e-3, True, k=16, d=d)
    check_forward(2, False, torch.bfloat16, 2.6e-3, True, d=d)
    check_forward(4, True, torch.float32, 2.5e-6, False, d=d)
for tile in (1, 4):
    check_residual_block(tile)
check_winograd_relu()
for last in (True, False):
    check_domain(torch.float32, True, 2.5e-6, last)
    check_domain(torch.float16, False, 2e-3, last)
    check_domain(torch.bfloat16, False, 3e-3, last)
check_alignment()
check_opcheck()
check_refusals()
print("all checks passed")
