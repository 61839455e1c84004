# SPDX-License-Identifier: BSD-3-Clause
"""swap_, plan, explain, restore_, fuse_ and convert_ keep what docs/swap.md promises."""

import copy
import gc
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import pywino
from pywino import planner
from pywino.nn import WinogradConv2d, WinogradReLUConv2d
from pywino.swap import Report, last_report

TRAIN = "train the model before you use it"


@pytest.fixture(autouse=True)
def _static_plans(monkeypatch):
    """Nothing is measured here, except where a test says so."""
    monkeypatch.setenv("PYWINO_PLAN", "static")
    planner.reset()
    yield
    planner.reset()


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Plans are measured, into a file of this test."""
    monkeypatch.setenv("PYWINO_PLAN", str(tmp_path / "plans.json"))
    planner.reset()


class Block(nn.Module):
    """A basic block of ResNet, as torchvision writes it: one ReLU module for two calls."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.layer1 = nn.Sequential(Block(8, 8), Block(8, 16))
        self.layer2 = Block(16, 16, stride=2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


SWAPPED = [
    "stem.0",
    "layer1.0.conv1",
    "layer1.0.conv2",
    "layer1.1.conv1",
    "layer1.1.conv2",
    "layer2.conv2",
]
LEFT = ["layer1.1.downsample.0", "layer2.conv1", "layer2.downsample.0"]


def make_net(model=None, training=False):
    """A net whose BatchNorms have statistics and weights that matter."""
    torch.manual_seed(0)
    model = Net() if model is None else model
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model.train(training)


def vgg():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(inplace=True),
    )


def images(n=2, size=12, channels=3):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


def names_of(model, kind):
    return [name for name, module in model.named_modules() if type(module) is kind]


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- swap_ ---


def test_swap_replaces_the_3x3_convolutions_and_keeps_the_function():
    net, x = make_net(), images()
    before = net(x)
    assert pywino.swap_(net) is net
    assert names_of(net, WinogradConv2d) == SWAPPED
    assert names_of(net, nn.Conv2d) == LEFT
    close(net(x), before)
    assert {m.algorithm for m in net.modules() if type(m) is WinogradConv2d} == {"auto"}


def test_swap_runs_winograd_and_not_something_equal(monkeypatch):
    """The function alone cannot tell; Winograd's rounding errors can."""
    conv = nn.Conv2d(4, 4, 3, padding=1)
    layer = pywino.swap_(conv, pywino.Winograd(tile=4))
    assert layer is not conv
    assert layer.algorithm == "f4"
    x = images(channels=4)
    reference = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    error = (layer(x).double() - reference).norm() / reference.norm()
    assert 0 < error < 1e-5


def test_swap_keeps_parameters_names_training_device_and_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        net = make_net(training=True).to(dtype)
        net.layer1[0].conv1.eval()
        before = dict(net.named_parameters())
        state = {key: value.clone() for key, value in net.state_dict().items()}
        training = {name: module.training for name, module in net.named_modules()}
        pywino.swap_(net)
        after = dict(net.named_parameters())
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)
        assert {name: m.training for name, m in net.named_modules()} == training
        assert list(net.state_dict()) == list(state)
        assert all(torch.equal(net.state_dict()[key], state[key]) for key in state)
        assert isinstance(net.stem[0], nn.Conv2d)


def test_swap_keeps_the_optimizer_and_trains_like_torch():
    plain, x = make_net(training=True), images(4)
    swapped = copy.deepcopy(plain)
    losses = []
    for net in (plain, swapped):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        if net is swapped:
            pywino.swap_(net)  # after the optimizer was made
        for _ in range(3):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss)
    assert names_of(swapped, WinogradConv2d) == SWAPPED
    close(losses[1], losses[0])
    close(swapped.stem[0].weight, plain.stem[0].weight)


def test_checkpoints_load_both_ways():
    plain, other = make_net(), make_net(Net())
    swapped = pywino.swap_(copy.deepcopy(plain))
    file = io.BytesIO()
    torch.save(swapped.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    x = images()
    assert torch.equal(other(x), plain(x))

    torch.manual_seed(5)
    trained = make_net(Net())
    with torch.no_grad():
        trained.stem[0].weight.mul_(2)
    swapped(x)  # fills what a layer may keep
    swapped.load_state_dict(trained.state_dict())
    close(swapped(x), trained(x))


def test_hooks_stay_and_get_the_new_module():
    net, seen = make_net(), []
    conv = net.stem[0]
    conv.register_forward_hook(lambda module, args, output: seen.append(("forward", module)))
    conv.register_forward_pre_hook(lambda module, args: seen.append(("pre", module)))
    conv.register_full_backward_hook(lambda module, gi, go: seen.append(("backward", module)))
    conv.register_load_state_dict_pre_hook(lambda module, *args: seen.append(("load", module)))
    pywino.swap_(net)
    del conv
    gc.collect()
    net(images()).sum().backward()
    net.load_state_dict(net.state_dict())
    assert [name for name, _ in seen] == ["pre", "forward", "backward", "load"]
    assert {module for _, module in seen} == {net.stem[0]}
    seen.clear()
    pywino.restore_(net)
    gc.collect()
    net.load_state_dict(net.state_dict())
    assert seen == [("load", net.stem[0])]


def test_the_root_itself_is_replaced():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    layer = pywino.swap_(conv)
    assert type(layer) is WinogradConv2d
    assert layer.weight is conv.weight
    back = pywino.restore_(layer)
    assert type(back) is nn.Conv2d
    assert back.weight is conv.weight


def test_a_module_used_in_two_places_stays_one():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    before = net(images(channels=4))
    pywino.swap_(net)
    assert type(net[0]) is WinogradConv2d
    assert net[0] is net[2][0]
    close(net(images(channels=4)), before)
    report = last_report(net)
    assert len(report) == 1
    assert "2.0" in report["0"].reason
    pywino.restore_(net)
    assert type(net[0]) is nn.Conv2d
    assert net[0] is net[2][0]


def test_shared_parameters_stay_shared():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    net[1].weight = net[0].weight
    pywino.swap_(net)
    assert net[0] is not net[1]
    assert net[0].weight is net[1].weight


def test_swapping_twice_is_swapping_once():
    net = pywino.swap_(make_net())
    before = list(net.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pywino.swap_(net)
    assert all(a is b for a, b in zip(before, net.modules(), strict=True))
    pywino.swap_(net, pywino.Winograd(tile=2))
    assert all(a is b for a, b in zip(before, net.modules(), strict=True))
    assert {m.algorithm for m in net.modules() if type(m) is WinogradConv2d} == {"f2"}
    assert last_report(net)["stem.0"].action == "update"


def test_globs_give_each_layer_its_own_config():
    net = pywino.swap_(
        make_net(),
        {
            "layer1.0.*": None,
            "layer1.1.conv2": pywino.Winograd(tile=4),
            "layer1.*": pywino.Winograd(tile=2),
            "stem.*": pywino.Winograd(tile=6),
        },
    )
    found = {n: m.algorithm for n, m in net.named_modules() if type(m) is WinogradConv2d}
    assert found == {"stem.0": "f6", "layer1.1.conv1": "f2", "layer1.1.conv2": "f4"}
    report = last_report(net)
    assert "'layer1.0.*' says None" in report["layer1.0.conv1"].reason
    assert "no glob" in report["layer2.conv2"].reason


def test_a_glob_that_matches_nothing_warns():
    with pytest.warns(UserWarning, match=r"no layer was chosen by 'laye1\.\*'"):
        pywino.swap_(make_net(), {"laye1.*": None, "*": pywino.Winograd()})


def test_a_none_wins_for_a_shared_module():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    net = nn.ModuleDict({"a": shared, "b": nn.Conv2d(4, 4, 3), "c": shared})
    pywino.swap_(net, {"c": None, "*": pywino.Winograd()})
    assert names_of(net, WinogradConv2d) == ["b"]


def test_filter_fn_gets_module_and_name():
    calls = []

    def keep(module, fqn):
        calls.append((module, fqn))
        return fqn.endswith("conv2")

    net = make_net()
    convs = {n: m for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    pywino.swap_(net, filter_fn=keep)
    assert {fqn: module for module, fqn in calls} == convs
    assert names_of(net, WinogradConv2d) == [name for name in SWAPPED if name.endswith("conv2")]


class Doubling(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


def _bound(conv):
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) + 1
    return conv


def _parametrized(conv):
    parametrize.register_parametrization(conv, "weight", nn.Tanh())
    return conv


def _compiled(conv):
    conv.compile(backend="eager")
    return conv


class Sub(torch.Tensor):
    pass


def _subclass_weight(conv):
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Sub))
    return conv


def _recomputed(conv):
    weight = conv._parameters.pop("weight")
    conv.raw = weight
    conv.weight = weight * 2
    return conv


def conv(**kwargs):
    return nn.Conv2d(4, 4, **{"kernel_size": 3, "padding": 1, **kwargs})


LEAVE_ALONE = {
    "its kernel is 1x1": lambda: conv(kernel_size=1),
    "its kernel is 5x5": lambda: conv(kernel_size=5),
    "its kernel is 3x1": lambda: conv(kernel_size=(3, 1)),
    r"its stride is \(2, 2\)": lambda: conv(stride=2),
    r"its stride is \(1, 2\)": lambda: conv(stride=(1, 2)),
    "it has 2 groups": lambda: conv(groups=2),
    "padding mode is 'reflect'": lambda: conv(padding_mode="reflect"),
    "torch.float64": lambda: conv().double(),
    "it is a Doubling": lambda: Doubling(4, 4, 3, padding=1),
    "another forward is bound": lambda: _bound(conv()),
    "weight is parametrized": lambda: _parametrized(conv()),
    "weight is parametrized; swap after torch.nn.utils.parametrize": lambda: (
        parametrizations.weight_norm(conv())
    ),
    "weight is pruned": lambda: prune.l1_unstructured(conv(), "weight", 0.5),
    "bias is pruned": lambda: prune.l1_unstructured(conv(), "bias", 0.5),
    "weight is weight-normed": lambda: torch.nn.utils.weight_norm(conv()),
    "weight is spectrally normed": lambda: torch.nn.utils.spectral_norm(conv()),
    "weight is computed": lambda: _recomputed(conv()),
    "weight is a .*tensor subclass": lambda: _subclass_weight(conv()),
    "it was compiled on its own": lambda: _compiled(conv()),
    "it is lazy": lambda: nn.LazyConv2d(4, 3, padding=1),
    "TorchScript": lambda: torch.jit.trace(conv(), images(channels=4)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("reason", LEAVE_ALONE)
def test_other_convolutions_are_left_alone_and_named(reason):
    odd = LEAVE_ALONE[reason]()
    net = nn.ModuleList([odd, conv()])
    kind = type(odd)
    report = pywino.plan(net)
    assert report["0"].action == "leave"
    pywino.swap_(net)
    assert net[0] is odd
    assert type(odd) is kind
    assert type(net[1]) is WinogradConv2d
    row = last_report(net)["0"]
    assert row.action == "leave"
    with pytest.raises(RuntimeError, match=reason):
        pywino.swap_(nn.ModuleList([conv(), odd]), strict=True)


@pytest.mark.parametrize("pruned", ["weight", "bias"])
def test_a_pruned_convolution_still_computes_what_it_did(pruned):
    net = nn.Sequential(prune.l1_unstructured(conv(), pruned, 0.5), conv())
    x = images(channels=4)
    before = net(x)
    close(pywino.swap_(net)(x), before)


def test_strict_changes_nothing_before_it_raises():
    net = make_net()
    before = kinds(net)
    with pytest.raises(
        RuntimeError, match=r"strict=True.*layer1\.1\.downsample\.0: its kernel is 1x1"
    ):
        pywino.swap_(net, strict=True)
    assert kinds(net) == before
    pywino.swap_(net, strict=True, filter_fn=lambda module, fqn: fqn in SWAPPED)
    assert names_of(net, WinogradConv2d) == SWAPPED


def test_a_swap_that_changes_nothing_warns():
    with pytest.warns(UserWarning, match=r"swap_ changed nothing: 0: its kernel is 1x1"):
        pywino.swap_(nn.Sequential(conv(kernel_size=1)))
    with pytest.warns(UserWarning, match="changed nothing: the model has no torch.nn.Conv2d"):
        pywino.swap_(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="nothing to change"):
        pywino.swap_(nn.Linear(2, 2), strict=True)


def test_a_swap_that_changes_something_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pywino.swap_(make_net())


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (pywino.WinogradReLU(), TypeError, "changes the function.*convert_"),
        ({"*": pywino.WinogradReLU()}, TypeError, "changes the function"),
        (pywino.Winograd, TypeError, "an instance, not the class"),
        ("f4", TypeError, "config must be one of"),
        ({3: pywino.Winograd()}, TypeError, "globs over names, got 3"),
    ],
)
def test_wrong_configs_are_refused(config, error, words):
    with pytest.raises(error, match=words):
        pywino.swap_(make_net(), config)


@pytest.mark.parametrize("tile", [0, 3, 4.0, True, "4", None, float("nan"), 8])
def test_tiles_that_do_not_exist_are_refused(tile):
    with pytest.raises(RuntimeError, match=r"Winograd: tile must be one of .*, got"):
        pywino.Winograd(tile=tile)
    with pytest.raises(RuntimeError, match="WinogradReLU: tile must be one of"):
        pywino.WinogradReLU(tile=tile)


def test_other_wrong_arguments_are_refused():
    with pytest.raises(RuntimeError, match="precision must be 'default' or 'fast', got 'low'"):
        pywino.Winograd(precision="low")
    with pytest.raises(RuntimeError, match="init must be 'transform' or 'fresh', got 'zero'"):
        pywino.WinogradReLU(init="zero")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        pywino.swap_([conv()])
    with pytest.raises(AttributeError):
        pywino.Winograd().tile = 2


def test_nothing_is_bound_and_no_class_of_torch_is_touched():
    before = dict(vars(nn.Conv2d)), dict(vars(nn.Module))
    net = pywino.swap_(make_net())
    assert (dict(vars(nn.Conv2d)), dict(vars(nn.Module))) == before
    assert not any("forward" in vars(module) for module in net.modules())


def test_deepcopy_and_pickle_of_a_swapped_model():
    net, x = pywino.swap_(make_net(), pywino.Winograd(tile=4)), images()
    with torch.inference_mode():
        before = net(x)
    clone = copy.deepcopy(net)
    again = pickle.loads(pickle.dumps(net))
    with torch.no_grad():
        net.stem[0].weight.zero_()
    for other in (clone, again):
        assert names_of(other, WinogradConv2d) == SWAPPED
        assert other.stem[0].algorithm == "f4"
        with torch.inference_mode():
            close(other(x), before)


def test_compile_of_a_swapped_model_fullgraph():
    torch._dynamo.reset()
    net, x = pywino.swap_(make_net(training=True)), images(4)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    expected = copy.deepcopy(net)
    loss = expected(x).square().mean()
    loss.backward()
    result = compiled(x).square().mean()
    result.backward()
    close(result, loss)
    close(net.stem[0].weight.grad, expected.stem[0].weight.grad)


@pytest.mark.slow
def test_compile_of_a_swapped_model_with_inductor():
    torch._dynamo.reset()
    net, x = pywino.swap_(make_net()), images()
    with torch.no_grad():
        close(torch.compile(net, fullgraph=True)(x), net(x))


def test_swapping_inside_a_compiled_model_takes_effect():
    torch._dynamo.reset()
    net, x = make_net(), images()
    compiled = torch.compile(net, backend="eager")
    before = compiled(x)
    pywino.swap_(compiled)
    assert names_of(net, WinogradConv2d) == SWAPPED
    close(compiled(x), before)


def test_plan_of_a_compiled_model():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x = images()
    compiled = torch.compile(make_net(), backend=backend)
    compiled(x)
    count = len(graphs)
    report = pywino.plan(compiled, example=x)
    assert len(graphs) == count  # it ran, but was not compiled anew with the hooks of the plan
    assert report["_orig_mod.stem.0"].calls == 1
    assert report["_orig_mod.stem.0"].shape == "2x3x12x12 -> 8"
    assert [row.reason for row in report if row.action == "swap"] == [""] * len(SWAPPED)


def test_a_compiled_convolution_alone_is_left():
    compiled = torch.compile(conv(), backend="eager")
    with pytest.warns(UserWarning, match="compiled on its own"):
        pywino.swap_(compiled)


def ddp_before_and_after(store):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    x = images(4)
    expected = make_net(training=True)
    expected(x).square().mean().backward()
    for late in (False, True):
        net = make_net(training=True)
        if not late:
            pywino.swap_(net)
        ddp = nn.parallel.DistributedDataParallel(net)
        if late:
            pywino.swap_(ddp)
        assert names_of(ddp.module, WinogradConv2d) == SWAPPED
        ddp(x).square().mean().backward()
        close(ddp.module.stem[0].weight.grad, expected.stem[0].weight.grad)
        assert list(ddp.state_dict()) == [f"module.{key}" for key in expected.state_dict()]
    print("held", flush=True)
    os._exit(0)


def test_ddp_before_and_after(tmp_path):
    # In a process that leaves without destructors: gloo's was seen to wait for ever.
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['ddp_before_and_after'](sys.argv[2])"
    done = subprocess.run(
        [sys.executable, "-c", code, __file__, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("held\n")


# --- with an example ---


@pytest.mark.native
def test_an_example_measures_now(measured):
    net = pywino.swap_(make_net(), example=images())
    assert len(planner._plans.plans) > 0
    count = len(planner._plans.plans)
    with torch.no_grad():
        net(images())
    assert len(planner._plans.plans) == count


@pytest.mark.native
def test_without_an_example_nothing_is_measured_before_the_first_call(measured):
    net = pywino.swap_(make_net())
    assert len(planner._plans.plans) == 0
    with torch.no_grad():
        net(images())
    assert len(planner._plans.plans) > 0


def test_the_example_may_be_a_tuple_or_a_dict():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()
            self.calls = 0

        def forward(self, x, scale):
            return self.conv(x) * scale

    for example in ((images(channels=4), 2), {"x": images(channels=4), "scale": 2}):
        report = pywino.plan(Two(), example=example)
        assert report["conv"].calls == 1


def test_progress_is_shown_when_asked_for(capsys, monkeypatch):
    pywino.swap_(make_net(), example=images(), progress=True)
    assert "measuring" in capsys.readouterr().err
    pywino.swap_(make_net(), example=images())
    assert capsys.readouterr().err == ""  # stderr is no terminal here
    pywino.swap_(make_net(), example=images(), progress=False)
    assert capsys.readouterr().err == ""


class Stateful(nn.Module):
    """Everything that a forward can leave behind."""

    def __init__(self, fails=False):
        super().__init__()
        self.conv = conv()
        self.bn = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.fails = fails
        self.count = 0
        self.seen = []
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        self.last = x
        self.seen.append(x)
        self.steps += 1
        self.running = torch.rand(3)
        x = F.dropout(self.dropout(self.bn(self.conv(x))), 0.5)
        if self.fails:
            raise ValueError("the model's own")
        return x


def everything(model):
    return {
        name: (
            type(module),
            module.training,
            {
                k: copy.copy(v) if isinstance(v, (list, dict)) else v
                for k, v in vars(module).items()
            },
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("run", ["plan", "explain", "swap_"])
def test_the_example_leaves_no_trace(run, fails):
    net = Stateful(fails).train()
    net.dropout.eval()
    if run == "swap_":
        pywino.swap_(net)
    before = everything(net)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    random = torch.get_rng_state()
    grad = torch.is_grad_enabled()
    function = getattr(pywino, run)
    x = images(channels=4)
    if fails:
        with pytest.raises(ValueError, match="the model's own"):
            function(net, example=x)
    else:
        function(net, example=x)
    after = everything(net)
    assert after.keys() == before.keys()
    for name in before:
        assert after[name][:2] == before[name][:2]
        assert after[name][2].keys() == before[name][2].keys(), name
        for key, value in before[name][2].items():
            now = after[name][2][key]
            if isinstance(value, (list, dict)):
                assert len(now) == len(value), key
            else:
                assert now is value, key
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled() == grad
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_example_runs_in_eval_mode_without_gradients():
    seen = []

    class Watch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            seen.append((self.training, self.conv.training, torch.is_grad_enabled()))
            return self.conv(x)

    net = Watch().train()
    for function in (pywino.plan, pywino.swap_, pywino.explain):
        function(net, example=images(channels=4))
    assert seen == [(False, False, False)] * 3


@pytest.mark.parametrize("function", [pywino.plan, pywino.swap_, pywino.explain])
def test_an_example_with_a_lazy_model_is_refused(function):
    net = nn.Sequential(conv(), nn.LazyLinear(3))
    with pytest.raises(
        RuntimeError, match="1 is a lazy layer without parameters yet; run the model once"
    ):
        function(net, example=images(channels=4))
    assert type(net[1]) is nn.LazyLinear
    assert type(net[0]) is nn.Conv2d


# --- plan and explain ---


def test_plan_without_an_example():
    net = make_net()
    before = kinds(net)
    report = pywino.plan(net)
    assert kinds(net) == before
    assert [row.fqn for row in report if row.action == "swap"] == SWAPPED
    assert {row.fqn: row.reason for row in report.left()} == {
        "layer1.1.downsample.0": "its kernel is 1x1, not 3x3",
        "layer2.conv1": "its stride is (2, 2), not 1",
        "layer2.downsample.0": "its kernel is 1x1, not 3x3",
    }
    assert all(row.before is None for row in report)


@pytest.mark.native
def test_plan_with_an_example_has_times_and_shapes(measured):
    net, x = make_net(), images()
    report = pywino.plan(net, example=x)
    row = report["layer1.1.conv1"]
    assert row.shape == "2x8x12x12 -> 16"
    assert row.calls == 1
    assert row.before > 0
    assert row.after > 0
    assert row.channels_last > 0
    assert row.chosen in ("aten", "f2", "f4", "f6")
    assert row.after <= row.before
    names = {(c["algorithm"], c["layout"]) for c in row.candidates}
    assert {("aten", ""), ("f4", ""), ("aten", "channels_last")} <= names
    assert all(
        (c["seconds"] is None) != (c["reason"] is None) or c["seconds"] for c in row.candidates
    )
    total = report.totals()
    assert total["before"] == pytest.approx(sum(r.before for r in report if r.action == "swap"))
    assert "x)" in report.summary()


def test_plan_keeps_the_memory_format():
    net = make_net().to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    report = pywino.plan(net, example=x)
    assert {c["layout"] for c in report["stem.0"].candidates} == {"channels_last"}
    assert net.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    pywino.swap_(net, example=x)
    assert net.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not net.stem[0].weight.is_contiguous()


@pytest.mark.native
def test_plan_counts_calls_and_names_layers_that_are_not_reached(measured):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = conv(), conv()

        def forward(self, x):
            return self.used(self.used(input=self.used(x)))

    report = pywino.plan(Loop(), example=images(channels=4))
    assert report["used"].calls == 3
    single = pywino.plan(nn.Sequential(conv()), example=images(channels=4))["0"]
    assert report["used"].before == pytest.approx(3 * single.before)
    assert report["unused"].calls == 0
    assert "the example does not reach it" in report["unused"].reason


def test_plan_sees_the_dtype_of_autocast():
    net = nn.Sequential(conv())
    seen = []
    original, planner_choose = planner.choose, None
    del planner_choose

    def choose(call, *args):
        seen.append(call.dtype)
        return original(call, *args)

    planner.choose = choose
    try:
        with torch.autocast("cpu", torch.bfloat16):
            pywino.plan(net, example=images(channels=4))
    finally:
        planner.choose = original
    assert set(seen) == {torch.bfloat16}


def test_a_report_prints_as_a_table_and_as_markdown_and_as_json(monkeypatch):
    net = nn.ModuleDict({"a[red]|b": conv(), "long": conv(kernel_size=1)})
    report = pywino.plan(net)
    assert isinstance(report, Report)
    text = str(report)
    assert "a[red]|b" in text
    assert "its kernel is 1x1, not 3x3" in text
    assert max(map(len, text.splitlines())) < 100
    lines = report.to_markdown().splitlines()
    assert lines[2] == "| layer | kind | action | reason |"
    assert lines[4].startswith("| a[red]\\|b | Conv2d | swap |")
    assert json.loads(json.dumps(report.to_dict()))["layers"][1]["action"] == "leave"
    assert "1 swap, 1 leave" in repr(report)

    import builtins

    real = builtins.__import__

    def without_rich(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    plain = str(report)
    assert plain != text
    assert "its kernel is 1x1, not 3x3" in plain
    pywino.swap_(net, example=None, progress=True)


@pytest.mark.native
def test_explain_names_every_candidate(measured):
    net, x = make_net(), images()
    before = kinds(net)
    text = pywino.explain(net, x)
    assert kinds(net) == before
    assert isinstance(text, str)
    assert text.count("> ") >= len(SWAPPED)
    for name in SWAPPED + LEFT:
        assert f"{name}: Conv2d" in text
    assert "its stride is (2, 2)" in text
    assert " ms" in text
    assert "f6" in text
    assert text.to_dict()["layers"]
    assert repr(text) == str(text)


@pytest.mark.native
def test_explain_takes_a_layer_and_a_swapped_model():
    x = images(channels=4)
    plain = pywino.explain(conv(), x)
    assert plain.startswith("(root): Conv2d 2x4x12x12 -> 4")
    layer = pywino.swap_(conv(), pywino.Winograd(tile=2))
    text = pywino.explain(layer, x)
    chosen = [line.split()[1] for line in text.splitlines() if line.startswith("  >")]
    assert chosen[0] == "f2"
    assert layer.algorithm == "f2"


def test_reports_are_logged(caplog):
    with caplog.at_level(logging.INFO, "pywino.swap"):
        pywino.swap_(make_net())
    assert "layer2.conv1" in caplog.text


# --- restore_ ---


def test_restore_gives_back_what_was_there_with_all_training():
    net, x = make_net(training=True), images(4)
    before = kinds(net)
    attributes = {name: set(vars(module)) for name, module in net.named_modules()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pywino.swap_(net)
    net(x).square().mean().backward()
    optimizer.step()
    parameters = dict(net.named_parameters())
    trained = copy.deepcopy(net)
    assert pywino.restore_(net) is net
    assert kinds(net) == before
    assert {name: set(vars(module)) for name, module in net.named_modules()} == attributes
    assert all(parameters[name] is value for name, value in net.named_parameters())
    assert all(module.training for module in net.modules())
    close(net.eval()(x), trained.eval()(x))
    assert not any("pywino" in type(module).__module__ for module in net.modules())


def test_restore_takes_layers_that_were_built_so():
    net = nn.Sequential(pywino.WinogradConv2d(3, 4, 3, padding=1), nn.ReLU())
    x = images()
    before = net(x)
    pywino.restore_(net)
    assert type(net[0]) is nn.Conv2d
    close(net(x), before)


def test_restore_names_layers_without_a_counterpart():
    net = nn.Sequential(pywino.WinogradConv2d(4, 4, 3, padding=1), pywino.WinogradReLUConv2d(4, 4))
    with pytest.raises(RuntimeError, match=r"restore_.*1: torch has no such layer"):
        pywino.restore_(net, strict=True)
    assert type(net[0]) is WinogradConv2d
    with pytest.warns(UserWarning, match="1: torch has no such layer"):
        pywino.restore_(net)
    assert type(net[0]) is nn.Conv2d
    assert type(net[1]) is WinogradReLUConv2d


def test_restore_leaves_a_relu_of_its_own():
    net = nn.Sequential(pywino.WinogradConv2d(4, 4, 3, padding=1))
    net[0].activation = "relu"
    with pytest.warns(UserWarning, match="a ReLU of its own"):
        pywino.restore_(net)
    assert type(net[0]) is WinogradConv2d
    assert net[0].activation == "relu"


def test_restore_leaves_a_parametrized_layer():
    net = pywino.swap_(nn.Sequential(conv()))
    _parametrized(net[0])
    with pytest.warns(UserWarning, match="parametrized"):
        pywino.restore_(net)
    assert parametrize.is_parametrized(net[0])


def test_restore_of_a_plain_model_is_silent():
    net = make_net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pywino.restore_(net) is net


# --- fuse_ ---


def fused(model, x, tolerance=1e-4):
    """Fuses a model and returns it; it computes what it did, also after deepcopy and pickle."""
    with torch.no_grad():
        before = model(x.clone())
        inputs = x.clone()
        model = pywino.fuse_(model)
        close(model(inputs), before, tolerance)
        assert torch.equal(inputs, x)
        close(copy.deepcopy(model)(x.clone()), before, tolerance)
        close(pickle.loads(pickle.dumps(model))(x.clone()), before, tolerance)
    return model


def test_fuse_a_vgg_in_place():
    net, x = pywino.swap_(vgg()).eval(), images()
    out = fused(net, x)
    assert out is net
    assert [net[i].activation for i in (0, 2, 5)] == ["relu"] * 3
    assert all(isinstance(net[i], nn.Identity) for i in (1, 3, 6))
    assert list(net.state_dict()) == list(vgg().state_dict())
    with torch.no_grad():
        assert net[0](x).min() == 0
    assert [row.action for row in last_report(net)] == ["fuse"] * 3


def test_fuse_a_resnet():
    net, x = pywino.swap_(make_net()), images()
    out = fused(net, x)
    assert out is net
    assert type(net) is Net
    assert type(net.stem[1]) is nn.Identity
    assert isinstance(net.stem[2], nn.Identity)
    for name in ("layer1.0", "layer1.1", "layer2"):
        block = net.get_submodule(name)
        assert isinstance(block, torch.fx.GraphModule), name
        assert type(block.bn1) is type(block.bn2) is nn.Identity
        assert block.conv2.activation == "relu"
        assert block.stride == (2 if name == "layer2" else 1)
        targets = [str(node.target) for node in block.graph.nodes]
        assert not any("add" in target for target in targets), targets
    # The strided convolution of layer2 is PyTorch's: its ReLU stays, its BatchNorm does not.
    assert "relu" in [node.target for node in net.layer2.graph.nodes]
    assert net.layer2.conv1.bias is not None
    assert type(net.layer2.downsample[1]) is nn.Identity
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def test_fuse_compiles_fullgraph():
    torch._dynamo.reset()
    net, x = pywino.fuse_(pywino.swap_(make_net())), images()
    with torch.no_grad():
        close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x))


def test_fuse_then_restore_gives_plain_torch_of_the_same_function():
    for make, x in ((make_net, images()), (lambda: vgg().eval(), images())):
        net = make()
        with torch.no_grad():
            before = net(x)
            net = copy.deepcopy(pywino.fuse_(pywino.swap_(net)))
            pywino.restore_(net, strict=True)
            assert not any("pywino" in type(module).__module__ for module in net.modules())
            close(net(x), before)


@pytest.mark.parametrize("name", ["vgg16", "resnet50", "sapnet"])
def test_fuse_the_models_of_the_package(name):
    """Small inputs: the graph is what counts here."""
    models = pytest.importorskip("pywino.models")
    torch.manual_seed(0)
    if name == "vgg16":
        net, x, expected = models.vgg16().features, images(1, 32), 13
    elif name == "resnet50":
        net, x, expected = make_net(models.resnet50()), images(1, 64), 13
    else:
        # Its forward calls pywino's functions, which torch.fx cannot trace: it fuses for itself.
        net, x, expected = models.sapnet(stages=2), images(1, 16), 0
    net = pywino.swap_(net.eval())
    with torch.no_grad():
        before = net(x)
    net = fused(net, x, 1e-3)
    layers = [m for m in net.modules() if type(m) is WinogradConv2d]
    assert sum(layer.activation == "relu" for layer in layers) == expected
    with torch.no_grad():
        close(net(x), before, 1e-3)


def test_fuse_refuses_train_mode():
    net = pywino.swap_(make_net(training=True))
    with pytest.raises(
        RuntimeError, match=r"fuse_: the model must be in eval mode.*call model\.eval\(\)"
    ):
        pywino.fuse_(net)
    net.eval()
    net.stem[1].train()
    with pytest.raises(RuntimeError, match="eval mode"):
        pywino.fuse_(net)


class Body(nn.Module):
    """Makes a module of a function of (self, x), with two convolutions, a BatchNorm and a ReLU."""

    def __init__(self, function, inplace=False):
        super().__init__()
        self.c1, self.c2 = conv(), conv()
        self.bn, self.relu, self.eye = nn.BatchNorm2d(4), nn.ReLU(inplace), nn.Identity()
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def iadd_residual(m, x):
    y = m.relu(x)
    y += m.c1(x)
    return F.relu(y)


def mutate_between(m, x):
    h = m.c1(x)
    y = m.c2(h)
    h.relu_()
    return F.relu(y + h)


def mutate_residual(m, x):
    r = m.c1(x)
    y = m.c2(x)
    r.mul_(2)
    return y + r


FUSIONS = {
    # name: (forward, activations of c1 and c2 after fusing, is it a GraphModule?)
    "functional": (lambda m, x: m.c2(F.relu(m.c1(x))), ("relu", None), True),
    "torch.relu": (lambda m, x: m.c2(torch.relu(m.c1(x))), ("relu", None), True),
    "method": (lambda m, x: m.c2(m.c1(x).relu_()), ("relu", None), True),
    "inplace": (lambda m, x: m.c2(F.relu(m.c1(x), inplace=True)), ("relu", None), True),
    "module": (lambda m, x: m.c2(m.relu(m.c1(x))), ("relu", None), False),
    "bn": (lambda m, x: m.c2(m.relu(m.bn(m.c1(x)))), ("relu", None), False),
    "relu twice": (lambda m, x: m.relu(m.c2(m.relu(m.c1(x)))), ("relu", "relu"), True),
    "bn twice": (lambda m, x: m.bn(m.c2(m.bn(m.c1(x)))), (None, None), True),
    "add": (lambda m, x: m.c2(x) + m.c1(x), (None, None), True),
    "add relu": (lambda m, x: F.relu(torch.add(x, m.c1(x))), ("relu", None), True),
    "add broadcast": (
        lambda m, x: F.relu(m.c2(x).mean((2, 3), keepdim=True) + m.c1(x)),
        ("relu", None),
        True,
    ),
    "add later": (lambda m, x: F.relu(m.c2(m.c1(x)) + m.relu(x)), (None, "relu"), True),
    "relu then add": (lambda m, x: F.relu(F.relu(m.c1(x)) + x), ("relu", None), True),
    "add larger": (lambda m, x: F.relu(m.c1(x[:1]) + x), ("relu", None), True),
    "add wider": (lambda m, x: F.relu(x.double() + m.c1(x)), ("relu", None), True),
    "add input": (lambda m, x: F.relu(m.c1(m.relu(x)) + x), ("relu", None), True),
    # and what must stay
    "used twice": (lambda m, x: m.relu(y := m.c1(x)) + y, (None, None), False),
    "add scaled": (lambda m, x: F.relu(torch.add(m.c1(x), x, alpha=2)), (None, None), False),
    "add number": (lambda m, x: F.relu(m.c1(x) + 1), (None, None), False),
    "add itself": (lambda m, x: F.relu((y := m.c1(x)) + y), (None, None), False),
    "add into residual": (iadd_residual, (None, None), False),
    "mutated input": (mutate_between, (None, None), False),
    "called twice": (lambda m, x: m.relu(m.c1(m.c1(x))), (None, None), False),
    "weights read": (lambda m, x: m.relu(m.c1(x)) * m.c1.weight.mean(), (None, None), False),
    "other activation": (lambda m, x: F.relu6(m.c1(x)), (None, None), False),
}


@pytest.mark.parametrize("name", FUSIONS)
def test_fuse_patterns(name):
    function, activations, rewritten = FUSIONS[name]
    net = make_net(Body(function))
    pywino.swap_(net)
    x = images(channels=4)
    with torch.no_grad():
        before = net(x.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        net = pywino.fuse_(net)
    with torch.no_grad():
        close(net(x.clone()), before)
    assert (net.c1.activation, net.c2.activation) == activations
    assert isinstance(net, torch.fx.GraphModule) == rewritten
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        close(pywino.restore_(net)(x.clone()), before)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, pywino.nn.InstanceNorm2d])
def test_fuse_takes_instance_norms_that_keep_statistics(norm):
    """In eval mode they are the affine map that a BatchNorm is; one without statistics is not."""
    torch.manual_seed(0)
    kept, own = (norm(4, track_running_stats=track) for track in (True, False))
    kept.running_mean.normal_()
    kept.running_var.uniform_(0.5, 2)
    first, second = pywino.DilatedConv2d(3, 4, 3, padding=2, dilation=2), conv()
    net = pywino.swap_(nn.Sequential(first, kept, nn.ReLU(), second, own).eval())
    x = images()
    with torch.no_grad():
        before = net(x)
        net = pywino.fuse_(net)
        close(net(x), before)
    assert type(net[1]) is nn.Identity
    assert first.activation == "relu"
    assert type(net[4]) is norm
    report = str(pywino.swap.last_report(net))
    assert "the InstanceNorm after it has no running statistics" in report


def test_fuse_does_not_move_a_read_before_a_write():
    net = pywino.swap_(make_net(Body(mutate_residual)))
    x = images(channels=4)
    with torch.no_grad():
        before = net(x.clone())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            net = pywino.fuse_(net)
        close(net(x.clone()), before)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = vgg()
        self.inner = Body(lambda m, x: m.relu(m.c1(x)))

    def forward(self, x):
        taps = []
        for layer in self.features:
            x = layer(x)
            taps.append(x)
        return x if x.sum() > 0 else x + taps[0].mean()


def test_fuse_leaves_what_cannot_be_traced():
    """That forward uses what lies between the layers of a Sequential."""
    net = pywino.swap_(Untraceable()).eval()
    with pytest.warns(UserWarning, match=r"cannot trace: the model cannot be traced: TraceError"):
        pywino.fuse_(net)
    assert all(m.activation is None for m in net.modules() if type(m) is WinogradConv2d)
    assert all(type(m) is nn.ReLU for m in (net.features[1], net.inner.relu))
    assert last_report(net).notes
    assert "its caller was not traced" in last_report(net)["features.0"].reason


class Reader(nn.Module):
    """Calls the layers of a Sequential one by one, and hands out what lies between."""

    def __init__(self):
        super().__init__()
        self.features = vgg()

    def forward(self, x):
        y = self.features[0](x)
        return y, self.features[2](self.features[1](y))


def test_fuse_sees_who_reads_what_lies_between():
    net = pywino.swap_(Reader()).eval()
    x = images()
    with torch.no_grad():
        before = net(x)
        before = [t.clone() for t in before]
        with pytest.warns(UserWarning, match="changed nothing"):
            pywino.fuse_(net)
        for a, b in zip(net(x), before, strict=True):
            close(a, b)


class Switch(nn.Module):
    """One ReLU module behind one convolution or the other."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.relu = conv(), conv(), nn.ReLU()

    def forward(self, x, second=False):
        return self.relu(self.c2(x) if second else self.c1(x))


def test_fuse_leaves_a_relu_that_serves_two_ways():
    net = pywino.swap_(Switch()).eval()
    net.c2.register_forward_hook(lambda *args: None)
    x = images(channels=4)
    with torch.no_grad():
        before = net(x), net(x, second=True)
        with pytest.warns(UserWarning, match="changed nothing"):
            pywino.fuse_(net)
        close(net(x), before[0])
        close(net(x, second=True), before[1])


def test_fuse_keeps_in_place_adds_in_place():
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Body(lambda m, x: F.relu(m.c1(x)))
            self.block = Body(iadd_input)

        def forward(self, x):
            x = self.first(x)
            return self.block(x) * x

    net, x = pywino.swap_(Caller()).eval(), images(channels=4)
    with torch.no_grad():
        before = net(x)
        pywino.fuse_(net)
        close(net(x), before)
    assert isinstance(net.block, torch.fx.GraphModule)  # for its other ReLU
    assert net.block.c1.activation is None
    assert net.block.c2.activation == "relu"


def iadd_input(m, x):
    x += m.c1(x)
    return F.relu(m.c2(x))


class Optional_(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.tapped, self.act1, self.act2 = conv(), conv(), nn.ReLU(), nn.ReLU()

    def forward(self, x, taps=False):
        x = self.act1(self.plain(x))
        tap = self.tapped(x)
        y = self.act2(tap)
        return (y, tap) if taps else y


def test_fuse_holds_for_every_value_of_optional_arguments():
    net = pywino.swap_(Optional_()).eval()
    x = images(channels=4)
    with torch.no_grad():
        before, both = net(x), net(x, taps=True)
        pywino.fuse_(net)
        close(net(x), before)
        for a, b in zip(net(x, taps=True), both, strict=True):
            close(a, b)
    assert net.plain.activation == "relu"
    assert net.tapped.activation is None
    assert "optional argument" in last_report(net)["tapped"].reason


def test_fuse_leaves_modules_with_hooks():
    net = pywino.swap_(vgg()).eval()
    seen = []
    net[0].register_forward_hook(lambda m, a, out: seen.append(out))
    net[3].register_forward_hook(lambda m, a, out: seen.append(out))
    pywino.fuse_(net)
    assert [net[i].activation for i in (0, 2, 5)] == [None, None, "relu"]
    assert last_report(net)["0"].reason == "it has hooks"
    assert last_report(net)["2"].reason == "the ReLU after it has hooks"


def test_fuse_calls_the_hooks_of_an_identity():
    net = pywino.swap_(nn.Sequential(conv(), nn.Identity(), nn.ReLU())).eval()
    seen, x = [], images(channels=4)
    net[1].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        before = net(x)
        close(pywino.fuse_(net)(x), before)
    close(seen[1], seen[0])


def test_fuse_leaves_a_norm_that_is_read_elsewhere():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv(), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)), self.bn.weight.abs().sum()

    net = pywino.swap_(Reads()).eval()
    before, x = net.bn, images(channels=4)
    pywino.fuse_(net)
    assert net.bn is before
    assert "BatchNorm after it are read elsewhere" in last_report(net)["conv"].reason
    net(x)


def test_swap_of_layers_on_the_meta_device():
    with torch.device("meta"):
        net = nn.Sequential(conv(), nn.ReLU(), conv(kernel_size=1, padding=0))
    pywino.swap_(net)
    assert [type(m) for m in net] == [pywino.WinogradConv2d, nn.ReLU, nn.Conv2d]
    pywino.swap_(net, pywino.Sparse())
    assert "meta device" in last_report(net)["2"].reason


def test_fuse_leaves_a_shared_relu_to_others():
    act = nn.ReLU()
    net = nn.Sequential(nn.Sequential(conv(), act), nn.Sequential(nn.BatchNorm2d(4), act))
    net = make_net(net)
    x = images(channels=4)
    with torch.no_grad():
        before = net(x)
        net = pywino.fuse_(pywino.swap_(net))
        close(net(x), before)
    assert net[1][1] is act


def test_fuse_does_not_keep_what_a_trace_wrote():
    class Writes(Stateful):
        def forward(self, x):
            self.last = x
            self.seen.append(x)
            return F.relu(self.conv(x))

    net = pywino.swap_(Writes()).eval()
    with pytest.warns(UserWarning, match="sets attributes"):
        pywino.fuse_(net)
    assert not hasattr(net, "last")
    assert net.seen == []


# --- convert_ ---


def test_convert_a_sequential():
    net = vgg()
    bias = net[2].bias
    with pytest.warns(
        UserWarning, match=r"changed the function of 1 layers \(2\): train the model.*Left: 0: "
    ):
        out = pywino.convert_(net, pywino.WinogradReLU(tile=2), example=images())
    assert out is net
    assert type(net[1]) is nn.Identity
    layer = net[2]
    assert type(layer) is WinogradReLUConv2d
    assert layer.weight.shape == (8, 8, 4, 4)
    assert layer.bias is bias
    assert type(net[0]) is type(net[5]) is nn.Conv2d
    report = last_report(net)
    assert report["0"].reason == "its input does not come from a ReLU"
    assert report["5"].reason == "its input does not come from a ReLU"  # but from a MaxPool2d
    net(images()).square().mean().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_convert_runs_the_example():
    with (
        pytest.warns(UserWarning, match=TRAIN),
        pytest.raises(RuntimeError, match="channels"),
    ):
        pywino.convert_(vgg(), example=images(channels=5))


def test_convert_starts_from_the_transform_or_fresh():
    for tile in (2, 4):
        dense = nn.Sequential(nn.ReLU(), conv())
        weight = dense[1].weight.detach().clone()
        with pytest.warns(UserWarning, match=TRAIN):
            net = pywino.convert_(copy.deepcopy(dense), pywino.WinogradReLU(tile))
        g = pywino.reference.winograd.transform_matrices(tile)[1]
        expected = torch.einsum("ai,kcij,bj->kcab", g, weight.double(), g).float()
        close(net[1].weight.detach(), expected, 1e-6)
        with pytest.warns(UserWarning, match=TRAIN):
            fresh = pywino.convert_(copy.deepcopy(dense), pywino.WinogradReLU(tile, init="fresh"))
        assert fresh[1].weight.shape == expected.shape
        assert not torch.allclose(fresh[1].weight, expected, atol=1e-3)
        assert not torch.equal(fresh[1].bias, dense[1].bias)


def test_convert_computes_the_layer_of_the_paper():
    net = nn.Sequential(nn.ReLU(), conv(dilation=2, padding=2))
    weight, bias, x = net[1].weight, net[1].bias, images(channels=4)
    with pytest.warns(UserWarning, match=TRAIN):
        pywino.convert_(net)
    transformed = pywino.ops.winograd.winograd_transform_filter(weight.detach(), 2)
    expected = pywino.reference.winograd.winograd_relu_conv2d(
        x.double(), transformed.double(), bias.double(), 2, 2
    )
    close(net(x).double(), expected)


def test_convert_keeps_dtype_training_and_requires_grad():
    net = nn.Sequential(nn.ReLU(), conv(padding="same", bias=False)).bfloat16().train()
    net[1].weight.requires_grad_(False)
    net[1].eval()
    with pytest.warns(UserWarning, match=TRAIN):
        pywino.convert_(net)
    assert net[1].weight.dtype == torch.bfloat16
    assert not net[1].weight.requires_grad
    assert not net[1].training
    assert net[1].bias is None
    assert net[1](images(channels=4).bfloat16()).shape == (2, 4, 12, 12)


def test_convert_a_resnet_by_tracing():
    net, x = make_net(training=True), images()
    with pytest.warns(UserWarning, match="layer1.0.conv2"):
        out = pywino.convert_(net)
    assert out is net
    # conv1 -> bn1 -> ReLU -> conv2 in each block; conv1's input is the output of another module.
    assert names_of(net, WinogradReLUConv2d) == ["layer1.0.conv2", "layer1.1.conv2", "layer2.conv2"]
    calls = [node.target for node in net.layer1[0].graph.nodes if node.op == "call_module"]
    assert calls == ["conv1", "bn1", "conv2", "bn2", "relu"]
    net(x).square().mean().backward()
    assert net.layer1[0].bn1.num_batches_tracked == 1
    net.eval()
    net(x)
    assert net.layer1[0].bn1.num_batches_tracked == 1


CONVERSIONS = {
    # name: (forward, is c2 converted?, words of the reason if not)
    "module": (lambda m, x: m.c2(m.relu(m.c1(x))), True, ""),
    "functional": (lambda m, x: m.c2(F.relu(m.c1(x))), True, ""),
    "relu elsewhere": (lambda m, x: m.relu(m.c2(m.relu(m.c1(x)))), True, ""),
    "of the input": (lambda m, x: m.c2(m.relu(x)), True, ""),
    "feeds two": (lambda m, x: m.c2(y := m.relu(m.c1(x))) + y, False, "feeds something else"),
    "in place on the input": (lambda m, x: m.c2(F.relu_(x)), False, "in place"),
    "in place on a shared": (lambda m, x: m.c2(F.relu_(y := m.c1(x))) + y, False, "in place"),
    "in place": (lambda m, x: m.c2(F.relu_(m.bn(m.c1(x)))), True, ""),
    "in place through a module": (lambda m, x: m.c2(F.relu_(m.eye(m.c1(x)))), True, ""),
    "in place on an alias": (
        lambda m, x: m.c2(F.relu_(m.eye(y := m.c1(x)))) + y,
        False,
        "in place",
    ),
    "no relu": (lambda m, x: m.c2(m.c1(x)), False, "does not come from a ReLU"),
    "other": (lambda m, x: m.c2(F.relu6(m.c1(x))), False, "does not come from a ReLU"),
    "twice": (lambda m, x: m.c2(m.c2(m.relu(x))), False, "called more than once"),
    "training": (
        lambda m, x: F.dropout(m.c2(F.relu(m.c1(x))), 0.5, m.training),
        False,
        "depends on the training flag",
    ),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_convert_pairs(name):
    function, converted, reason = CONVERSIONS[name]
    net = Body(function)
    planned = pywino.plan(net, pywino.WinogradReLU())
    assert type(net.c2) is nn.Conv2d
    assert type(net.relu) is nn.ReLU
    with pytest.warns(UserWarning, match="convert_ changed"):
        net = pywino.convert_(net)
    assert (type(net.c2) is WinogradReLUConv2d) == converted
    row = last_report(net)["c2"]
    assert row.action == ("convert" if converted else "leave")
    assert reason in row.reason
    assert (planned["c2"].action, planned["c2"].reason) == (row.action, row.reason)
    net(images(channels=4)).sum().backward()
    if name == "training":
        net.eval()
        assert torch.equal(net(images(channels=4)), net(images(channels=4)))


def test_convert_neighbours_under_a_forward_that_cannot_be_traced():
    net = Untraceable()
    with pytest.warns(UserWarning, match="convert_ changed the function of 1 layers"):
        pywino.convert_(net)
    assert type(net.features[2]) is WinogradReLUConv2d
    report = last_report(net)
    assert "neighbours in a Sequential" in report["features.2"].reason
    assert "cannot be traced" in report.notes[0]


def test_convert_strict_filter_and_globs():
    net = vgg()
    with pytest.raises(
        RuntimeError, match=r"convert_\(strict=True\).*0: its input does not come from a ReLU"
    ):
        pywino.convert_(net, strict=True)
    assert type(net[1]) is nn.ReLU
    assert type(net[2]) is nn.Conv2d
    with pytest.warns(UserWarning, match="changed nothing"):
        pywino.convert_(net, filter_fn=lambda module, fqn: fqn != "2")
    with pytest.warns(UserWarning, match="changed nothing"):
        pywino.convert_(net, {"2": None, "*": pywino.WinogradReLU()})
    with pytest.warns(UserWarning, match="train the model"):
        pywino.convert_(net, {"2": pywino.WinogradReLU(tile=4)}, strict=False)
    assert net[2].weight.shape[2:] == (6, 6)
    with pytest.raises(TypeError, match=r"keeps the function of a layer; use pywino\.swap_"):
        pywino.convert_(vgg(), pywino.Winograd())


def test_convert_a_swapped_and_a_fused_model():
    net = pywino.swap_(vgg())
    with pytest.warns(UserWarning, match="train the model"):
        pywino.convert_(net)
    assert type(net[2]) is WinogradReLUConv2d
    net = pywino.fuse_(pywino.swap_(vgg()).eval())
    with pytest.warns(UserWarning, match=r"2: a ReLU is fused into it; convert before fusing"):
        pywino.convert_(net)


def test_a_converted_model_trains_pickles_and_compiles():
    torch._dynamo.reset()
    net, x = make_net(Block(3, 8), training=True), images(4)
    with pytest.warns(UserWarning, match=TRAIN):
        net = pywino.convert_(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (net(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    net.eval()
    again = pickle.loads(pickle.dumps(net))
    with torch.no_grad():
        close(again(x), net(x))
        close(copy.deepcopy(net)(x), net(x))
        close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x))


# --- configs of later kinds ---


def test_a_later_kind_registers_itself(monkeypatch):
    from dataclasses import dataclass

    from pywino.swap import configs

    class FastLinear(nn.Linear):
        def to_dense(self):
            dense = nn.Linear.__new__(nn.Linear)
            dense.__dict__ = self.__dict__
            return dense

    @dataclass(frozen=True)
    class Fast:
        pass

    def make(linear, config):
        new = FastLinear.__new__(FastLinear)
        new.__dict__ = linear.__dict__
        return new

    monkeypatch.setattr(configs, "HANDLERS", configs.HANDLERS)
    pywino.swap.register(
        Fast,
        pywino.swap.Handler(
            speaks_of=nn.Linear,
            layer=FastLinear,
            refuse=lambda module, config: "too small" if module.in_features < 4 else None,
            make=make,
        ),
    )
    try:
        net = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(2, 2), "c": conv()})
        report = pywino.plan(net)
        assert {row.fqn: row.action for row in report} == {"a": "swap", "b": "leave", "c": "swap"}
        assert report["b"].reason == "too small"
        pywino.swap_(net, {"a": Fast(), "c": None})
        assert [type(m) for m in net.values()] == [FastLinear, nn.Linear, nn.Conv2d]
        pywino.restore_(net)
        assert type(net["a"]) is nn.Linear
    finally:
        del configs.HANDLERS[Fast]


def test_the_page_for_users_runs():
    page = Path(__file__).parents[1] / "docs" / "swap.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 4
    space = {}
    for number, block in enumerate(blocks):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"pywino\.convert_ changed the function")
            exec(compile(block, f"docs/swap.md, block {number}", "exec"), space)


def test_swap_is_a_module_and_swap__a_function():
    import types

    assert isinstance(pywino.swap, types.ModuleType)
    assert callable(pywino.swap_)
    assert pywino.swap_ is pywino.swap.swap_


def test_no_environment_is_left(measured):
    assert os.environ["PYWINO_PLAN"].endswith("plans.json")
