# SPDX-License-Identifier: BSD-3-Clause
"""The layers: every way to change a weight, and everything that nn.Conv2d can do."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pywino
from pywino import planner
from pywino.nn import winograd as layers
from pywino.nn.winograd import FilterCache, WinogradConv2d, WinogradReLUConv2d
from pywino.ops import _kernels as kernels
from pywino.reference import winograd as reference

ALGORITHM = "f4"  # of the tests of the cache, so that there is a filter to be kept


@pytest.fixture
def conv():
    return nn.Conv2d(16, 24, 3, padding=1).eval()


@pytest.fixture
def layer(conv):
    return WinogradConv2d.from_dense(conv, algorithm=ALGORITHM)


@pytest.fixture
def input():
    return torch.randn(2, 16, 14, 15)


def check(layer, input, weight=None, bias=None):
    """The layer computes the convolution of the weights that it has now; twice, to use what it has
    kept."""
    weight = layer.weight if weight is None else weight
    bias = layer.bias if bias is None else bias
    with torch.no_grad():
        expected = F.conv2d(input, weight, bias, 1, 1)
        for _ in range(2):
            torch.testing.assert_close(layer(input), expected, rtol=1e-4, atol=1e-4)


# --- every way to change a weight ---


def in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


def in_place_on_a_view(layer):
    with torch.no_grad():
        layer.weight[3].add_(1)


def detached(layer):
    layer.weight.detach().mul_(-1)


def data_and_invalidate(layer):
    layer.weight.data.mul_(2)
    pywino.invalidate_(layer)


def data_assigned(layer):
    layer.weight.data = torch.randn(24, 16, 3, 3)


def another_parameter(layer):
    layer.weight = nn.Parameter(torch.randn(24, 16, 3, 3))


def frozen_parameter(layer):
    layer.weight = nn.Parameter(torch.randn(24, 16, 3, 3), requires_grad=False)


def initialised(layer):
    nn.init.normal_(layer.weight)


def load_state_dict(layer):
    layer.load_state_dict(nn.Conv2d(16, 24, 3).state_dict())


def load_state_dict_by_assignment(layer):
    layer.load_state_dict(nn.Conv2d(16, 24, 3).state_dict(), assign=True)


def set_in_place(layer):
    with torch.no_grad():
        layer.weight.set_(torch.randn(24, 16, 3, 3))


def swapped(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(24, 16, 3, 3)))


def through_numpy_and_invalidate(layer):
    layer.weight.detach().numpy()[:] += 1
    pywino.invalidate_(nn.Sequential(layer))


def applied(layer):
    layer.apply(lambda module: nn.init.ones_(module.weight))


def moved(layer):
    layer.double()
    layer.float()
    layer.weight.data.mul_(3)  # after _apply nothing is kept
    layer.float()


def step_of(make, **options):
    def step(layer):
        optimizer = make(layer.parameters(), lr=0.5, **options)
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    return step


CHANGES = {
    change.__name__: change
    for change in (
        in_place,
        in_place_on_a_view,
        detached,
        data_and_invalidate,
        data_assigned,
        another_parameter,
        frozen_parameter,
        initialised,
        load_state_dict,
        load_state_dict_by_assignment,
        set_in_place,
        swapped,
        through_numpy_and_invalidate,
        applied,
        moved,
    )
} | {
    "sgd": step_of(torch.optim.SGD),
    "foreach sgd": step_of(torch.optim.SGD, foreach=True),
    "fused sgd": step_of(torch.optim.SGD, fused=True),
    "fused adam": step_of(torch.optim.Adam, fused=True),
    "fused adamw": step_of(torch.optim.AdamW, fused=True),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_used(layer, input, change, mode):
    with mode():
        check(layer, input)
    before = layer.weight.detach().clone()
    CHANGES[change](layer)
    assert not torch.equal(before, layer.weight)
    with mode():
        check(layer, input)


@pytest.mark.native
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_winograd_relu_weight_is_used(input, change):
    layer = WinogradReLUConv2d(16, 24, tile=4).eval()
    if change.startswith(
        ("load_state_dict", "another", "frozen", "data_assigned", "set", "swapped")
    ):
        # these make 3 x 3 weights: the same with this layer's shape
        def renew(layer):
            layer.load_state_dict(
                WinogradReLUConv2d(16, 24, tile=4).state_dict(), assign=change.endswith("ment")
            )
    else:
        renew = CHANGES[change]
    for act in (lambda layer: None, renew):
        act(layer)
        with torch.no_grad():
            expected = reference.winograd_relu_conv2d(input, layer.weight, tile=4)
            for _ in range(2):
                torch.testing.assert_close(layer(input), expected, rtol=1e-3, atol=1e-3)


def test_functional_call(layer, input):
    check(layer, input)
    for weight in (torch.randn(24, 16, 3, 3), nn.Parameter(torch.randn(24, 16, 3, 3))):
        with torch.no_grad():
            actual = torch.func.functional_call(layer, {"weight": weight}, input)
            expected = F.conv2d(input, weight, layer.bias, 1, 1)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        check(layer, input)


def test_parametrized(layer, input):
    nn.utils.parametrizations.weight_norm(layer)
    check(layer, input)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    check(layer, input)
    assert not layer._filters.filters  # a weight that is made anew in every call


def test_deepcopy_has_its_own_filters(layer, input):
    check(layer, input)
    twin = copy.deepcopy(layer)
    assert not twin._filters.filters
    in_place(twin)
    check(twin, input)
    check(layer, input)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()


def test_inference_tensors_as_weights(conv, input):
    with torch.inference_mode():
        layer = WinogradConv2d(16, 24, 3, padding=1, algorithm=ALGORITHM)
        check(layer, input)
        layer.weight.mul_(2)  # no version counts this
        check(layer, input)


def test_training_steps_follow_pytorch(conv, input):
    """Train and eval in turns, as one does with a validation set."""
    layer = WinogradConv2d(16, 24, 3, padding=1, algorithm=ALGORITHM)
    layer.load_state_dict(conv.state_dict())
    modules = [layer, conv]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in modules]
    target = torch.randn(2, 24, 14, 15)
    for _ in range(3):
        outputs = []
        for module, optimizer in zip(modules, optimizers):
            optimizer.zero_grad()
            (module.train()(input) - target).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                outputs.append(module.eval()(input))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.weight, conv.weight, rtol=1e-4, atol=1e-4)


@pytest.mark.native
def test_filters_are_kept_until_a_change(layer, input, monkeypatch):
    made = []
    transform = layers._transformed
    monkeypatch.setattr(layers, "_transformed", lambda *a: made.append(a[1]) or transform(*a))
    with torch.no_grad():
        for _ in range(3):
            layer(input)
        assert len(made) == 1
        layer(input.to(memory_format=torch.channels_last))
        layer(input[:, :, 1:])
        assert len(made) == 1
        in_place(layer)
        layer(input), layer(input)
        assert len(made) == 2
        layer.train(), layer.eval()
        layer(input)
        assert len(made) == 3
    layer(input)  # the weight gets a gradient: transformed in the op
    assert len(made) == 3
    layer.requires_grad_(False)
    layer(input)
    assert len(made) == 3  # requires_grad_ does not change the weight


@pytest.mark.native
def test_filters_belong_to_an_instruction_set(layer, input):
    from pywino import _native, testing

    for name in _native.host.isas() + _native.host.isas():
        with testing.force_isa(name):
            check(layer, input)


@pytest.mark.native
def test_shared_memory_weights_are_not_cached(layer, input):
    layer.share_memory()
    check(layer, input)
    assert not layer._filters.filters


def test_cache_is_no_part_of_the_state(layer, input):
    check(layer, input)
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    assert not list(layer.buffers())
    twin = pickle.loads(pickle.dumps(layer))
    assert isinstance(twin._filters, FilterCache)
    assert not twin._filters.filters
    check(twin, input)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    check(torch.load(file, weights_only=False), input)


def test_checkpoints_load_both_ways(conv, layer, input):
    other, dense = WinogradConv2d(16, 24, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
    other.load_state_dict(conv.state_dict())
    check(other, input, conv.weight, conv.bias)
    dense.load_state_dict(layer.state_dict())
    assert torch.equal(dense(input), conv(input))


def test_conversions_that_swap_tensors(layer, input):
    """They refuse a tensor that has weak references."""
    check(layer, input)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double().float()
        check(layer, input)
        load_state_dict(layer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    check(layer, input)


# --- means of the output beside it ---


@pytest.mark.native
def test_with_mean_where_it_costs_no_pass():
    layer = WinogradConv2d(16, 24, 3, padding=1, algorithm=ALGORITHM).eval()
    image = torch.randn(1, 16, 14, 15).contiguous(memory_format=torch.channels_last)
    two = torch.randn(2, 16, 14, 15).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        output, mean = layer.with_mean(image)
        assert torch.equal(output, layer(image))
        torch.testing.assert_close(mean, output.mean((2, 3)), rtol=1e-4, atol=1e-5)
        out = torch.empty_like(output)
        again, mean = layer.with_mean(image, out=out)
        assert again is out
        assert torch.equal(again, output)
        gate = torch.rand(1, 16)
        gated = torch.relu(image * gate[:, :, None, None])
        actual, expected = layer.with_mean(image, gate), layer.with_mean(gated)
        assert all(map(torch.equal, actual, expected))
        for other in (image.contiguous(), two, image.double()[0]):
            layer.to(other.dtype)
            output, mean = layer.with_mean(other)
            assert mean is None
            assert torch.equal(output, layer(other))
        layer.float()
        gate = torch.rand(2, 16)
        gated = torch.relu(two * gate[:, :, None, None])
        assert torch.equal(layer.with_mean(two, gate)[0], layer(gated))
        layer.float()
    assert layer.with_mean(image)[1] is None  # the weight gets a gradient
    calls = []
    layer.register_forward_hook(lambda *arguments: calls.append(arguments))
    with torch.no_grad():
        assert layer.with_mean(image)[1] is None
        gated = layer.with_mean(image, torch.zeros(1, 16))[0]
        torch.testing.assert_close(gated, layer.bias[None, :, None, None].expand_as(gated))
    assert len(calls) == 2


# --- the drop-in ---


def test_from_dense_and_back_share_everything(conv, input):
    calls = []
    conv.register_forward_hook(lambda *args: calls.append("hook"))
    layer = WinogradConv2d.from_dense(conv)
    assert isinstance(layer, nn.Conv2d)
    assert layer.weight is conv.weight
    check(layer, input)
    assert calls
    dense = layer.to_dense()
    assert type(dense) is nn.Conv2d
    assert dense.weight is conv.weight
    assert vars(dense).keys() == vars(conv).keys()
    assert torch.equal(dense(input), conv(input))
    layer.weight = nn.Parameter(torch.zeros(24, 16, 3, 3))
    assert conv.weight is layer.weight


GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": "valid", "bias": False},
    {"kernel_size": 3, "padding": (2, 0), "dilation": (1, 2)},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 3, "groups": 4, "padding": 1},
    {"kernel_size": 1},
    {"kernel_size": (3, 5), "padding": "same"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "replicate"},
    {"kernel_size": 3, "dtype": torch.float64},
]


@pytest.mark.parametrize("algorithm", ["auto", "f4"])
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_it_is_a_conv2d(options, algorithm):
    torch.manual_seed(1)
    dense = nn.Conv2d(8, 12, **options)
    torch.manual_seed(1)
    layer = WinogradConv2d(8, 12, **options, algorithm=algorithm)
    assert torch.equal(layer.weight, dense.weight)
    for shape in ((2, 8, 12, 13), (8, 12, 13)):
        input = torch.randn(shape, dtype=dense.weight.dtype)
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                torch.testing.assert_close(layer(input), dense(input), rtol=1e-4, atol=1e-4)


def test_residual_and_activation(layer, input):
    layer.activation = "relu"
    dense = layer.to_dense()
    for residual in (
        torch.randn(2, 24, 14, 15),
        torch.randn(2, 24, 1, 1),
        torch.randn(24, 1, 15, dtype=torch.float64),
    ):
        actual = layer(input, residual)
        torch.testing.assert_close(actual, (dense(input) + residual).relu(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(input), dense(input).relu(), rtol=1e-4, atol=1e-4)


def test_an_explicit_backend_that_cannot_run_says_why():
    layer = WinogradConv2d(8, 8, 3, backend="cuda")
    with pytest.raises(RuntimeError, match=r"backend='cuda'.* cannot run .*; use"):
        layer(torch.randn(1, 8, 9, 9))


def test_repr_and_settings():
    layer = WinogradConv2d(
        4, 8, 3, padding=1, activation="relu", algorithm="f2", backend="cpu", precision="fast"
    )
    text = "4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), algorithm=f2, activation=relu"
    assert repr(layer) == f"WinogradConv2d({text}, backend=cpu, precision=fast)"
    relu = WinogradReLUConv2d(4, 8, dilation=2, padding=2)
    text = "4, 8, kernel_size=(3, 3), padding=(2, 2), dilation=(2, 2), bias=False, tile=2"
    assert repr(relu) == f"WinogradReLUConv2d({text})"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(layer, input, dtype):
    dense = layer.to_dense()
    for context in (torch.enable_grad, torch.no_grad):
        with context(), torch.autocast("cpu", dtype):
            actual, expected = layer(input), dense(input)
        assert actual.dtype == expected.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_layers(input, dtype):
    layer = WinogradConv2d(16, 24, 3, padding=1, algorithm=ALGORITHM).to(dtype)
    with torch.no_grad():
        actual = layer(input.to(dtype))
    expected = F.conv2d(input.to(dtype).double(), layer.weight.double(), layer.bias.double(), 1, 1)
    torch.testing.assert_close(actual, expected.to(dtype), rtol=0.02, atol=0.02)


# --- torch.compile and freeze_ ---


@pytest.mark.parametrize("algorithm", ["auto", "f4"])
def test_compile(conv, input, algorithm):
    model = nn.Sequential(
        WinogradConv2d.from_dense(conv, algorithm=algorithm),
        nn.ReLU(),
        WinogradConv2d(24, 8, 3, padding="same", dilation=2, activation="relu"),
        WinogradReLUConv2d(8, 8, tile=4, bias=True),
        WinogradConv2d(8, 8, 3, stride=2),
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (model, compiled):
        model.zero_grad()
        function(input).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(input), model(input), rtol=1e-3, atol=1e-3)
            model[0].weight.mul_(2)  # the graph reads the weight as it is now


def test_compiled_layers_do_not_recompile_for_another_size():
    model = nn.Sequential(
        WinogradConv2d(8, 16, 3, padding=1, activation="relu"),
        WinogradReLUConv2d(16, 8, tile=4),
        WinogradConv2d(8, 8, 3, stride=2),
    )
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(torch.randn(2, 8, 12, 13))
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in ((3, 8, 12, 13), (5, 8, 20, 15)):
            input = torch.randn(size)
            torch.testing.assert_close(compiled(input), model(input), rtol=1e-3, atol=1e-3)


@pytest.mark.native
def test_frozen_layers_transform_once_in_a_compiled_graph(conv, input, monkeypatch):
    made = []
    transform = layers._transformed
    monkeypatch.setattr(layers, "_transformed", lambda *a: made.append(a[1]) or transform(*a))
    layer = pywino.freeze_(WinogradConv2d.from_dense(conv, algorithm=ALGORITHM))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = conv(input)
        for _ in range(3):
            torch.testing.assert_close(compiled(input), expected, rtol=1e-4, atol=1e-4)
        assert len(made) == 1
        layer.weight.mul_(2)
        pywino.invalidate_(layer)
        torch.testing.assert_close(compiled(input), conv(input), rtol=1e-4, atol=1e-4)
        layer.train()
        layer.weight.mul_(2)
        torch.testing.assert_close(compiled(input), conv(input), rtol=1e-4, atol=1e-4)
    compiled(input).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.native
def test_frozen_winograd_relu_layers_pack_once(input, monkeypatch):
    made = []
    transform = layers._transformed
    monkeypatch.setattr(layers, "_transformed", lambda *a: made.append(a[1]) or transform(*a))
    layer = pywino.freeze_(WinogradReLUConv2d(16, 24, tile=4, bias=True))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            expected = reference.winograd_relu_conv2d(input, layer.weight, layer.bias, tile=4)
            torch.testing.assert_close(compiled(input), expected, rtol=1e-3, atol=1e-3)
    assert [kernel.tile for kernel in made] == [4]
    compiled(input).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.native
def test_a_frozen_graph_outlives_its_layer(conv, input):
    layer = pywino.freeze_(WinogradConv2d.from_dense(conv, algorithm=ALGORITHM))
    arguments = (input, conv.weight, conv.bias, None, (1, 1), (1, 1), None, "f4", "auto", "default")
    token = layer._filters.token
    with torch.no_grad():
        for _ in range(2):
            actual = torch.ops.pywino._winograd_conv2d_frozen(*arguments, token)
            torch.testing.assert_close(actual, conv(input), rtol=1e-4, atol=1e-4)
            layer = None


# --- Winograd-ReLU ---


@pytest.mark.parametrize("tile", [2, 4, 6])
def test_winograd_relu_layer(tile):
    layer = WinogradReLUConv2d(8, 12, 3, 1, (1, 2), 2, bias=True, tile=tile)
    nn.init.normal_(layer.bias)
    for shape in ((2, 8, 13, 9), (8, 13, 9)):
        input = torch.randn(shape)
        batch = input if input.dim() == 4 else input[None]
        expected = reference.winograd_relu_conv2d(
            batch, layer.weight, layer.bias, (1, 2), (2, 2), tile
        )
        assert (
            expected.shape[2:]
            == F.conv2d(batch, torch.ones(1, 8, 3, 3), None, 1, (1, 2), 2).shape[2:]
        )
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                actual = layer(input)
            torch.testing.assert_close(actual, expected.view(actual.shape), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tile", [2, 4, 6])
def test_fresh_winograd_relu_layers_keep_the_variance(tile):
    layer = WinogradReLUConv2d(64, 64, tile=tile)
    with torch.no_grad():
        variance = layer(torch.randn(4, 64, 48, 48)).var()
    assert 0.85 < variance < 1.15
    if tile == 2:  # all rows of B^T are alike, and the border columns of A^T are half as long
        deviations = layer.weight.detach().std((0, 1))
        assert 1.9 < deviations[0, 0] / deviations[1, 1] < 2.1


def test_winograd_relu_from_dense(conv, input):
    layer = WinogradReLUConv2d.from_dense(conv, tile=4)
    expected = reference.winograd_transform_filter(conv.weight, 4)
    torch.testing.assert_close(layer.weight.detach(), expected.detach())
    assert layer.bias is conv.bias
    assert not layer.training
    assert layer(input).shape == conv(input).shape
    with pytest.raises(RuntimeError, match=r"padding must be numbers .*'same'"):
        WinogradReLUConv2d.from_dense(nn.Conv2d(4, 4, 3, padding="same"))
    with pytest.raises(RuntimeError, match=r"stride must be \(1, 1\), got \(2, 2\); use"):
        WinogradReLUConv2d.from_dense(nn.Conv2d(4, 4, 3, stride=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 5}, r"kernel_size must be \(3, 3\), got \(5, 5\)"),
        ({"stride": 2}, r"stride must be \(1, 1\), got \(2, 2\)"),
        ({"groups": 2}, "groups must be 1, got 2"),
        ({"tile": 3}, "tile must be 2, 4 or 6, got 3"),
        ({"tile": float("nan")}, "tile must be 2, 4 or 6, got nan"),
    ],
)
def test_winograd_relu_refuses(options, message):
    with pytest.raises(RuntimeError, match=message):
        WinogradReLUConv2d(4, 4, **options)


def test_winograd_relu_state(input):
    layer = WinogradReLUConv2d(16, 16, tile=2, bias=True)
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    twin = pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin(input), layer(input))
    assert torch.equal(copy.deepcopy(layer)(input), layer(input))
    meta = WinogradReLUConv2d(16, 16, device="meta", dtype=torch.bfloat16)
    assert (meta.weight.device.type, meta.weight.dtype) == ("meta", torch.bfloat16)


def test_layers_do_not_plan_twice_for_one_signature(layer, input, monkeypatch):
    layer.algorithm = "auto"
    asked = []
    choose = planner.choose
    monkeypatch.setattr(planner, "choose", lambda *a: asked.append(a) or choose(*a))
    with torch.no_grad():
        for _ in range(3):
            layer(input)
    assert len(asked) == 1


# --- weights of the Winograd domain ---


@pytest.fixture
def domain_layer(conv):
    layer = WinogradConv2d.from_dense(copy.deepcopy(conv))
    return layer.to_winograd_domain_(4)


def prune(layer, sparsity=0.8):
    with torch.no_grad():
        layer.winograd_weight.mul_(torch.rand_like(layer.winograd_weight) > sparsity)
    return layer


def check_domain(layer, input):
    weight = layer.winograd_weight
    with torch.no_grad():
        expected = reference.winograd_domain_conv2d(input, weight, layer.bias, 1, 1, layer.tile)
        for _ in range(2):
            torch.testing.assert_close(layer(input), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tile", [2, 4, 6])
def test_into_the_winograd_domain(conv, input, tile):
    layer = WinogradConv2d.from_dense(copy.deepcopy(conv)).to_winograd_domain_(tile)
    assert (layer.domain, layer.tile) == ("winograd", tile)
    assert sorted(layer.state_dict()) == ["bias", "winograd_weight"]
    assert f"domain=winograd, tile={tile}" in repr(layer)
    torch.testing.assert_close(layer(input), conv(input), rtol=1e-4, atol=1e-4)
    check_domain(prune(layer), input)
    assert layer.to_winograd_domain_(tile) is layer


def test_built_in_the_winograd_domain(input):
    layer = WinogradConv2d(16, 24, 3, padding="same", domain="winograd", tile=2)
    assert layer.winograd_weight.shape == (24, 16, 4, 4)
    check_domain(layer, input)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(input), layer(input))


@pytest.mark.native
def test_a_pruned_filter_is_packed_once_a_version(domain_layer, input, monkeypatch):
    made = []
    pack = kernels.pack
    monkeypatch.setattr(kernels, "pack", lambda *a: made.append(pack(*a)) or made[-1])
    with torch.no_grad():
        domain_layer(input), domain_layer(input)
        assert [filter.dtype for filter in made] == [torch.float32]
        prune(domain_layer)
        domain_layer(input), domain_layer(input)
        assert [filter.dtype for filter in made[1:]] == [torch.int32]
    check_domain(domain_layer, input)
    optimizer = torch.optim.SGD(domain_layer.parameters(), 0.1)
    domain_layer(input).square().mean().backward()
    optimizer.step()
    check_domain(domain_layer, input)
    assert len(made) == 4  # the third in the call with gradients, which keeps nothing


@pytest.mark.native
def test_a_pruned_winograd_relu_layer_skips_its_zeros(input):
    layer = WinogradReLUConv2d(16, 24, tile=4)
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) > 0.8)
        expected = reference.winograd_relu_conv2d(input, layer.weight, tile=4)
        torch.testing.assert_close(layer(input), expected, rtol=1e-4, atol=1e-4)
    ((_, _, filter),) = layer._filters.filters.values()
    assert filter.dtype == torch.int32
    torch.testing.assert_close(layer(input), expected, rtol=1e-4, atol=1e-4)  # with gradients


def test_epilogues_of_the_winograd_domain(domain_layer, input):
    layer = prune(domain_layer)
    plain = layer(input)
    residual = torch.randn_like(plain)
    layer.activation = "relu"
    for extra in (None, residual, residual[:, :1], residual.double()):
        for context in (torch.no_grad, torch.enable_grad):
            with context():
                expected = plain if extra is None else plain + extra
                torch.testing.assert_close(layer(input, extra), expected.relu())
    torch.testing.assert_close(layer(input[0]), layer(input)[0])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(input).dtype == torch.bfloat16
    batched = torch.vmap(layer)(input.unsqueeze(1))
    torch.testing.assert_close(batched.squeeze(1), layer(input), rtol=1e-4, atol=1e-4)


def test_training_in_the_winograd_domain(domain_layer, input):
    prune(domain_layer)
    domain_layer(input).square().sum().backward()
    exact = [p.detach().double().requires_grad_() for p in domain_layer.parameters()]
    bias, weight = exact if exact[0].dim() == 1 else exact[::-1]
    output = reference.winograd_domain_conv2d(input.double(), weight, bias, 1, 1, 4)
    output.square().sum().backward()
    for ours, theirs in zip(domain_layer.parameters(), exact):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-3)


def test_checkpoints_of_the_other_domain_say_so(conv, domain_layer):
    spatial = WinogradConv2d(16, 24, 3, padding=1)
    with pytest.raises(RuntimeError, match="must have winograd_weight, got weight"):
        domain_layer.load_state_dict(conv.state_dict())
    with pytest.raises(RuntimeError, match=r'must have weight, got winograd_weight.*domain="win'):
        spatial.load_state_dict(domain_layer.state_dict())
    with pytest.raises(RuntimeError, match="winograd_weight"):
        conv.load_state_dict(domain_layer.state_dict())


@pytest.mark.parametrize(
    "make", [WinogradReLUConv2d, lambda *n: WinogradConv2d(*n, 3, domain="winograd")]
)
def test_empty_batches_in_the_winograd_domain(make):
    layer, empty = make(16, 24), torch.randn(0, 16, 9, 8, requires_grad=True)
    layer(empty).sum().backward()
    assert empty.grad.shape == empty.shape
    assert all(p.grad.count_nonzero() == 0 for p in layer.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: WinogradConv2d(4, 4, 3),
        lambda: WinogradConv2d(4, 4, 3, domain="winograd"),
        lambda: WinogradReLUConv2d(4, 4, padding=0),
        lambda: pywino.SparseConv2d(4, 4, 3),
    ],
)
def test_layers_on_the_meta_device(make):
    x = torch.randn(1, 4, 5, 6, device="meta")
    assert make().to("meta")(x).shape == (1, 4, 3, 4)


def test_layers_that_stay_in_space():
    for arguments, match in (
        ({"kernel_size": 5, "domain": "winograd"}, "3x3 kernel"),
        ({"kernel_size": 3, "stride": 2, "domain": "winograd"}, "stride 1"),
        ({"kernel_size": 3, "domain": "winograd", "tile": 3}, "tile must be 2, 4 or 6, got 3"),
        ({"kernel_size": 3, "domain": "fourier"}, "'spatial' or 'winograd', got 'fourier'"),
    ):
        with pytest.raises(RuntimeError, match=match):
            WinogradConv2d(16, 16, **arguments)


def test_the_winograd_domain_has_no_way_back(domain_layer, input):
    with pytest.raises(RuntimeError, match="no 3x3 kernel equals"):
        domain_layer.to_dense()
    model = nn.Sequential(domain_layer)
    with pytest.warns(UserWarning, match="weight is in the Winograd domain"):
        pywino.restore_(model)
    assert model[0] is domain_layer
    with pytest.raises(RuntimeError, match="no counterpart"):
        pywino.restore_(model, strict=True)
    report = pywino.plan(model, example=input)  # nothing to choose
    assert report[""].reason if "" in [r.fqn for r in report] else report["0"].reason
