# SPDX-License-Identifier: BSD-3-Clause
"""pywino.conv2d takes what F.conv2d takes and refuses what it refuses."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import pywino
from pywino import _native as native
from pywino import backends, planner
from pywino.reference import winograd as reference


def same(*arguments, rtol=1e-4, **options):
    expected = F.conv2d(*arguments, **options)
    actual = pywino.conv2d(*arguments, **options)
    assert actual.dtype == expected.dtype
    atol = rtol * max(1, expected.detach().abs().max().item()) if expected.numel() else 0
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    return actual


X, W, B = torch.randn(2, 32, 20, 21), torch.randn(24, 32, 3, 3), torch.randn(24)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": (2, 0)},
        {"padding": [1, 2]},
        {"padding": [1]},
        {"padding": "same"},
        {"padding": "valid"},
        {"padding": "same", "dilation": (2, 3)},
        {"stride": 2, "padding": 1},
        {"stride": [1, 2]},
        {"dilation": 2, "padding": 2},
        {"padding": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["aten", "cpu"])
def test_arguments_of_conv2d(options, backend):
    for bias in (B, None):
        with planner.force(backend):
            same(X, W, bias, **options)
            same(X[0], W, bias, **options)


def test_groups_and_kernels_that_no_kernel_covers():
    same(X, torch.randn(24, 8, 3, 3), B, 1, 1, 1, 4)
    same(X, torch.randn(24, 32, 1, 1))
    same(X, torch.randn(24, 32, 5, 2), padding="same")
    same(X, torch.randn(32, 1, 3, 3), None, 1, 1, 1, 32)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64]
)
def test_dtypes(dtype):
    input, weight = (t.mul(4).to(dtype) for t in (X[:, :8], W[:, :8]))
    same(input, weight, padding=1, rtol=0.02 if dtype in (torch.bfloat16, torch.float16) else 1e-4)


def test_keywords_and_positions():
    assert torch.equal(
        pywino.conv2d(input=X, weight=W, bias=B, stride=1, padding=1, dilation=1, groups=1),
        pywino.conv2d(X, W, B, 1, 1, 1, 1),
    )


@pytest.mark.parametrize("algorithm", ["auto", "f2", "f4", "f6"])
def test_activation(algorithm):
    if algorithm != "auto" and not native.loaded:
        pytest.skip(native.reason)
    for padding in (1, (1, 2)):
        actual = pywino.conv2d(X, W, B, padding=padding, activation="relu", algorithm=algorithm)
        expected = F.conv2d(X, W, B, padding=padding).relu()
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    strided = pywino.conv2d(X, W, B, 2, activation="relu")
    torch.testing.assert_close(strided, F.conv2d(X, W, B, 2).relu())


@pytest.mark.native
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("plan", ["aten", "f4"])
def test_output_layout_is_that_of_pytorch(plan, compiled):
    """channels_last where input or weight is, whatever runs; also of one channel or pixel, which
    are in both formats."""
    last = torch.channels_last
    force = planner.force("aten") if plan == "aten" else planner.force("cpu", plan)
    conv = pywino.conv2d
    if compiled:
        conv = torch.compile(conv, backend="aot_eager", fullgraph=True)
    shapes = [(2, 8, 9, 7), (2, 1, 9, 7), (2, 8, 1, 1)]
    with force:
        for shape, of_input, of_weight in itertools.product(shapes, (False, True), (False, True)):
            input, weight = torch.randn(shape), torch.randn(16, shape[1], 3, 3)
            input = input.to(memory_format=last) if of_input and min(shape[1:]) > 1 else input
            weight = weight.to(memory_format=last) if of_weight else weight
            torch.compiler.reset()  # so many signatures are more than a function may have
            for context in (torch.no_grad, torch.enable_grad):
                with context():
                    leaf = weight.detach().requires_grad_()
                    output, peer = (f(input, leaf, padding=1) for f in (conv, F.conv2d))
                torch.testing.assert_close(output, peer, rtol=1e-4, atol=1e-4)
                if of_weight or min(shape[1:]) > 1:
                    assert backends.is_channels_last(output) == backends.is_channels_last(peer)


@pytest.mark.native
@pytest.mark.parametrize(
    "layer",
    [
        pywino.WinogradReLUConv2d,
        pywino.SparseConv2d,
        pywino.DilatedConv2d,
        functools.partial(pywino.WinogradConv2d, domain="winograd"),
    ],
    ids=["relu", "sparse", "dilated", "domain"],
)
def test_layers_in_channels_last_give_channels_last(layer):
    module = layer(8, 16, 3, padding=1)
    input = torch.randn(2, 8, 9, 7)
    expected = module(input)
    module.to(memory_format=torch.channels_last)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            output = module(input)
        assert backends.is_channels_last(output)
        assert not backends.is_channels_last(expected)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.native
def test_calls_that_differ_in_little_have_their_own_routes():
    """One after the other: what the first of them found must not serve the others."""
    leaf = W.clone().requires_grad_()
    doubles = (X.double(), W.double(), B.double())
    halves = [(X.to(t), W.to(t), B.to(t)) for t in (torch.bfloat16, torch.float16)]
    with planner.force("cpu", "f4"):
        for dtype in (None, torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                for arguments in ((X, W, B), (X, leaf, B), doubles, *halves, (X, W, B)):
                    for activation in (None, "relu"):
                        output = pywino.conv2d(*arguments, padding=1, activation=activation)
                        expected = F.conv2d(*arguments, padding=1)
                        expected = expected.relu() if activation else expected
                        assert output.dtype == expected.dtype
                        assert output.requires_grad == expected.requires_grad
                        scale = {torch.bfloat16: 0.02, torch.float16: 5e-3}
                        error = (output - expected).abs().max() / expected.abs().max()
                        assert error < scale.get(output.dtype, 1e-4)
                        if output.requires_grad:
                            ours, theirs = (
                                torch.autograd.grad(y.float().sum(), leaf)[0]
                                for y in (output, expected)
                            )
                            assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.native
def test_layout_of_one_channel():
    """Contiguous and channels_last at once: contiguous, by the rule."""
    for force in ("aten", "cpu"):
        with planner.force(force):
            input = torch.randn(2, 9, 8, 1).permute(0, 3, 1, 2)
            assert pywino.conv2d(input, torch.randn(16, 1, 3, 3), padding=1).is_contiguous()


# --- where PyTorch takes over ---


@pytest.fixture
def forced():
    """A kernel runs wherever PyTorch is not asked for a reason of its own."""
    with planner.force("cpu", "f4"):
        yield


@pytest.mark.parametrize("algorithm", ["auto", "f4"])
def test_functorch_transforms(algorithm, forced):
    def loss(weight, input):
        return pywino.conv2d(input, weight, padding=1, algorithm=algorithm).square().sum()

    def plain(weight, input):
        return F.conv2d(input, weight, padding=1).square().sum()

    weight, input = W[:4, :4].double(), X[:, :4, :7, :7].double()
    for transform in (
        torch.func.grad,
        torch.func.jacrev,
        torch.func.jacfwd,
        lambda f: torch.func.vmap(f, (None, 0)),
        lambda f: torch.func.vmap(torch.func.grad(f), (None, 0)),
    ):
        batch = input[:, None] if "vmap" in repr(transform.__code__.co_names) else input
        torch.testing.assert_close(transform(loss)(weight, batch), transform(plain)(weight, batch))


def graph_of(function, *inputs):
    """(output, source of the graph) of a compiled function."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)(*inputs), "".join(graphs)


@pytest.mark.native
def test_compiled_calls_that_a_kernel_covers_are_the_op():
    layer = pywino.WinogradConv2d(32, 24, 3, padding="same", dilation=2, algorithm="f4")
    relu = pywino.WinogradReLUConv2d(32, 24)
    for function, op in (
        (lambda x: pywino.conv2d(x, W, B, padding=1), "pywino.winograd_conv2d("),
        (lambda x: pywino.conv2d(x[0], W, B, padding=1), "pywino.winograd_conv2d("),
        (lambda x: layer(x), "pywino.winograd_conv2d("),
        (lambda x: relu(x), "pywino.winograd_relu_conv2d("),
    ):
        output, graph = graph_of(function, X)
        assert op in graph
        torch.testing.assert_close(output, function(X), rtol=1e-4, atol=1e-4)
    for function in (
        lambda x: pywino.conv2d(x, W, B, 2),
        lambda x: pywino.conv2d(x.double(), W.double()),
        lambda x: pywino.conv2d(x, W, backend="aten"),
        lambda x: torch.func.vmap(lambda x: pywino.conv2d(x, W[:, :1], padding=1))(x[:, :, None]),
    ):
        output, graph = graph_of(function, X)
        assert "pywino" not in graph
        torch.testing.assert_close(output, function(X), rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match="covers stride 1"):
        graph_of(lambda x: pywino.conv2d(x, W, stride=2, algorithm="f4"), X)


def test_forward_mode_ad(forced):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, X.cos())
        tangent = forward_ad.unpack_dual(pywino.conv2d(dual, W, padding=1)).tangent
    torch.testing.assert_close(tangent, F.conv2d(X.cos(), W, padding=1), rtol=1e-4, atol=1e-3)


def test_tensor_subclasses(forced):
    class Logged(torch.Tensor):
        seen = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    output = pywino.conv2d(X.as_subclass(Logged), W, padding=1)
    assert type(output) is Logged
    assert torch.conv2d in Logged.seen
    assert type(pywino.conv2d(X, W.as_subclass(Logged), padding=1)) is Logged


def test_modes(forced):
    class Counting(torch.overrides.TorchFunctionMode):
        seen = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen += function is torch.conv2d
            return function(*args, **(kwargs or {}))

    with Counting() as mode:
        pywino.conv2d(X, W, padding=1)
    assert mode.seen == 1
    with FlopCounterMode(display=False) as counter:
        pywino.conv2d(X, W, padding=1)
    assert counter.get_total_flops() == 2 * 2 * 24 * 32 * 9 * 20 * 21


@pytest.mark.native
def test_a_default_device_changes_nothing():
    choose, asked = planner.choose, []
    planner.choose = lambda *a: asked.append(a) or choose(*a)
    try:
        with torch.device("cpu"):
            pywino.conv2d(X[:, :, 2:], W)
    finally:
        planner.choose = choose
    assert asked


def test_tracing_and_export(forced):
    traced = torch.jit.trace(lambda x: pywino.conv2d(x, W, B, padding=1), X)
    assert "aten::_convolution" in str(traced.graph) or "aten::conv2d" in str(traced.graph)

    class Model(torch.nn.Module):
        def forward(self, input):
            return pywino.conv2d(input, W, B, padding=1)

    program = torch.export.export(Model(), (X,))
    torch.testing.assert_close(
        program.module()(X), F.conv2d(X, W, B, padding=1), rtol=1e-4, atol=1e-3
    )


def test_meta_tensors():
    output = pywino.conv2d(X.to("meta"), W.to("meta"), padding=1)
    assert (output.device.type, output.shape) == ("meta", (2, 24, 20, 21))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    for leaf in (W, W.clone().requires_grad_()):
        with torch.autocast("cpu", dtype):
            same(X, leaf, B, padding=1, rtol=0.02)
            same(X.double(), leaf.detach().double(), padding=1)
            mixed = pywino.conv2d(X.to(dtype), leaf, B, padding=1)
        assert mixed.dtype == dtype


@pytest.mark.parametrize("algorithm", ["auto", "f4"])
def test_gradients(algorithm):
    if algorithm != "auto" and not native.loaded:
        pytest.skip(native.reason)
    grads = []
    for function, options in ((F.conv2d, {}), (pywino.conv2d, {"algorithm": algorithm})):
        leaves = [t.clone().requires_grad_() for t in (X, W, B)]
        output = function(*leaves, padding=1, **options)
        grads.append(torch.autograd.grad(output.sin().sum(), leaves))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=2e-2)


# --- refusals ---

REFUSED = {
    "input of rank 2": (lambda: ((X[0, 0], W), {}), r"input must be \(N, C, H, W\)"),
    "input of rank 5": (lambda: ((X[None], W), {}), "input must be"),
    "weight of rank 3": (lambda: ((X, W[0]), {}), "weight must be"),
    "channels": (lambda: ((X, W[:, :5]), {}), r"input must be of 5 channels, got \(2, 32"),
    "channels and groups": (lambda: ((X, W), {"groups": 2}), "of 64 channels"),
    "groups do not divide": (lambda: ((X, W[:9, :16]), {"groups": 2}), "divisible by groups=2"),
    "groups 0": (lambda: ((X, W), {"groups": 0}), "groups must be >= 1"),
    "bias": (lambda: ((X, W, B[:3]), {}), r"bias must be \(24,\)"),
    "bias of rank 2": (lambda: ((X, W, B[None]), {}), r"bias must be \(24,\)"),
    "dtypes": (lambda: ((X, W.double()), {}), "weight must be of input's dtype"),
    "bias dtype": (lambda: ((X, W, B.double()), {}), "bias must be of input's dtype"),
    "negative padding": (lambda: ((X, W), {"padding": -1}), "padding must be >= 0, got -1"),
    "negative padding of one side": (lambda: ((X, W), {"padding": (1, -1)}), "padding must be"),
    "zero stride": (lambda: ((X, W), {"stride": 0}), "stride must be >= 1, got 0"),
    "negative stride": (lambda: ((X, W), {"stride": -1}), "stride must be >= 1"),
    "zero dilation": (lambda: ((X, W), {"dilation": 0}), "dilation must be >= 1"),
    "three paddings": (lambda: ((X, W), {"padding": (1, 1, 1)}), "padding must be"),
    "three strides": (lambda: ((X, W), {"stride": (1, 1, 1)}), "stride must be"),
    "unknown padding": (lambda: ((X, W), {"padding": "full"}), "'same' or 'valid', got 'full'"),
    "same with stride": (lambda: ((X, W), {"padding": "same", "stride": 2}), "stride must be 1"),
    "empty kernel": (lambda: ((X, W[:, :, :0]), {}), "weight must be without empty"),
    "no output channels": (lambda: ((X, W[:0]), {}), "weight must be without empty"),
    "kernel too large": (lambda: ((X[:, :, :2], W), {}), "padded height >= the kernel's 3, got 2"),
    "dilated kernel too large": (lambda: ((X, W), {"dilation": 11}), "padded height >= the kernel"),
    "float padding": (lambda: ((X, W), {"padding": 1.5}), "padding must be an integer or two"),
    "nan stride": (lambda: ((X, W), {"stride": float("nan")}), "stride must be an integer"),
    "float groups": (lambda: ((X, W), {"groups": 1.0}), "groups must be an integer"),
    "a set of strides": (lambda: ((X, W), {"stride": {1}}), "stride must be an integer or two"),
    "a nested list": (lambda: ((X, W), {"padding": ([1], 1)}), "padding must be an integer or"),
    "list input": (lambda: (([1.0], W), {}), "input must be a tensor, got list"),
    "none weight": (lambda: ((X, None), {}), "weight must be a tensor, got NoneType"),
    "string bias": (lambda: ((X, W, "b"), {}), "bias must be a tensor, got str"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_conv2d_refuses_by_the_same_type(name):
    make, message = REFUSED[name]
    arguments, options = make()
    with pytest.raises(Exception) as theirs:
        F.conv2d(*arguments, **options)
    kind = RuntimeError if issubclass(theirs.type, RuntimeError) else theirs.type
    with pytest.raises(kind, match=message) as ours:
        pywino.conv2d(*arguments, **options)
    assert str(ours.value).startswith("pywino.conv2d: ")
    assert "; " in str(ours.value)  # what to do instead


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backend": "opencl"},
            "backend must be one of 'auto', .*'aten', got 'opencl'; use 'auto'",
        ),
        ({"algorithm": "f3"}, "algorithm must be one of 'auto'.* got 'f3'"),
        ({"algorithm": float("nan")}, "algorithm must be .* got nan"),
        ({"precision": "low"}, "precision must be one of 'default', 'fast', got 'low'"),
        ({"activation": "gelu"}, "activation must be one of None, 'relu', got 'gelu'"),
        ({"backend": "aten", "algorithm": "f4"}, "PyTorch chooses its own algorithm"),
        ({"backend": "cuda"}, "'cuda'.*the tensors are on cpu; use"),
        ({"backend": "triton"}, "the tensors are on cpu"),
        ({"algorithm": "f4", "stride": 2}, r"cannot run this call: .*(stride 1|not loaded)"),
        ({"backend": "cpu", "stride": 2}, r"cannot run this call: .*(stride 1|not loaded)"),
        ({"algorithm": "direct"}, r"cannot run this call: .*(f2, f4 and f6|not loaded)"),
    ],
    ids=str,
)
def test_refuses_a_choice_that_cannot_run(options, message):
    for _ in range(2):  # not only at the first call
        with pytest.raises(RuntimeError, match=message):
            pywino.conv2d(X, W, **options)


@pytest.mark.native
def test_explicit_choices_say_what_they_lack():
    for input, weight, message in (
        (X.double(), W.double(), "it computes float32, bfloat16 and float16, not float64"),
        (X, torch.randn(4, 32, 5, 5), "it covers 3x3 kernels, not 5x5"),
        (X[:0], W, "the call is empty"),
    ):
        with pytest.raises(RuntimeError, match=message):
            pywino.conv2d(input, weight, algorithm="f4")
    with pytest.raises(RuntimeError, match="the tensors are on meta"):
        pywino.conv2d(X.to("meta"), W.to("meta"), algorithm="f4")


def test_refuses_tensors_on_two_devices():
    with pytest.raises(
        RuntimeError, match="weight must be on input's device cpu, got meta; move it"
    ):
        pywino.conv2d(X, W.to("meta"))


def test_without_the_native_library_an_explicit_algorithm_says_so(monkeypatch):
    monkeypatch.setattr(native, "loaded", False)
    monkeypatch.setattr(native, "reason", "it was never built")
    planner.reset()
    with pytest.raises(RuntimeError, match="not loaded: it was never built"):
        pywino.conv2d(X, W, algorithm="f4")
    torch.testing.assert_close(pywino.conv2d(X, W), F.conv2d(X, W))
    layer = pywino.WinogradConv2d(32, 24, 3, algorithm="f4")
    torch.testing.assert_close(layer(X), layer.to_dense()(X))
    relu = pywino.WinogradReLUConv2d(32, 24)
    torch.testing.assert_close(relu(X), reference.winograd_relu_conv2d(X, relu.weight))


# --- Winograd-ReLU ---


def test_winograd_relu_conv2d():
    weight = torch.randn(24, 32, 6, 6)
    for padding, dilation in ((1, 1), ((0, 2), (1, 2))):
        expected = reference.winograd_relu_conv2d(X, weight, B, padding, dilation, 4)
        actual = pywino.winograd_relu_conv2d(X, weight, B, padding, dilation, tile=4)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-2)
        one = pywino.winograd_relu_conv2d(X[0], weight, B, padding, dilation, tile=4)
        torch.testing.assert_close(one, expected[0], rtol=1e-3, atol=1e-2)


def test_winograd_relu_conv2d_under_functorch():
    weight, input = torch.randn(4, 4, 4, 4).double(), X[:, :4, :7, :7].double()
    grads = torch.func.grad(lambda w: pywino.winograd_relu_conv2d(input, w).square().sum())(weight)
    leaf = weight.clone().requires_grad_()
    pywino.winograd_relu_conv2d(input, leaf).square().sum().backward()
    torch.testing.assert_close(grads, leaf.grad)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"tile": 3}, RuntimeError, "tile must be 2, 4 or 6, got 3; use tile=2"),
        ({"tile": float("nan")}, TypeError, "tile must be 2, 4 or 6, got nan"),
        (
            {"tile": 4},
            RuntimeError,
            r"weight must be \(K, 32, 6, 6\) for tile=4, got \(24, 32, 4, 4\)",
        ),
        ({"padding": -1}, RuntimeError, "padding must be >= 0"),
        ({"dilation": 0}, RuntimeError, "dilation must be >= 1"),
        ({"dilation": 30}, RuntimeError, "padded height >= the kernel's 61"),
        ({"backend": "cuda"}, RuntimeError, "the tensors are on cpu"),
        ({"backend": "none"}, RuntimeError, "backend must be one of"),
    ],
    ids=str,
)
def test_winograd_relu_conv2d_refuses(options, kind, message):
    with pytest.raises(kind, match=message) as error:
        pywino.winograd_relu_conv2d(X, torch.randn(24, 32, 4, 4), **options)
    assert str(error.value).startswith("pywino.winograd_relu_conv2d: ")
