# SPDX-License-Identifier: BSD-3-Clause
"""Masks: what each spec prunes, that training keeps it, and every refusal."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import pywino
from pywino.pruning import LIU_SCHEDULE, NM, Block, Magnitude, Pruner, check, prune_


def net(channels=32):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.Sequential(nn.Conv2d(channels, 8, 1)),
    )


def zeros(weight):
    return 1 - weight.count_nonzero().item() / weight.numel()


def convs(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


# --- what is pruned ---


def test_magnitude_prunes_the_smallest_of_each_layer():
    conv = nn.Conv2d(4, 2, 1, bias=False)
    conv.weight.data = torch.tensor([[0.1, -3, 0.2, 2], [-0.3, 4, 5, 6]]).reshape(2, 4, 1, 1)
    prune_(conv, Magnitude(3 / 8))
    expected = torch.tensor([[0, -3, 0, 2], [0, 4, 5, 6.0]]).reshape(2, 4, 1, 1)
    assert torch.equal(conv.weight.data, expected)


def test_magnitude_global_compares_layers():
    model = net()
    with torch.no_grad():
        model[3].weight.add_(100)
    prune_(model, Magnitude(0.1, scope="global"))
    assert zeros(model[3].weight) == 0
    weights = torch.cat([conv.weight.flatten() for conv in convs(model)])
    assert zeros(weights) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.8, 0.999])
def test_sparsity_is_what_was_asked_for(sparsity):
    model = net()
    prune_(model, Magnitude(sparsity))
    for conv in convs(model):
        assert zeros(conv.weight) == pytest.approx(sparsity, abs=1 / conv.weight.numel())
        assert conv.weight.count_nonzero() > 0


def test_equal_weights_are_pruned_in_their_order():
    conv = nn.Conv2d(4, 1, 1, bias=False)
    nn.init.ones_(conv.weight)
    prune_(conv, Magnitude(0.5))
    assert conv.weight.flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("channels", [8, 7, 3])
def test_two_of_four_channels_stay(channels):
    conv = nn.Conv2d(channels, 5, 3)
    before = conv.weight.detach().clone()
    prune_(conv, NM(2, 4))
    for start in range(0, channels, 4):
        group, kept = before[:, start : start + 4].abs(), conv.weight[:, start : start + 4] != 0
        assert (kept.sum(1) == min(2, group.shape[1])).all()
        smallest_kept = group.masked_fill(~kept, torch.inf).amin(1)
        assert (group.masked_fill(kept, 0).amax(1) <= smallest_kept).all()


def test_a_spatial_block_is_whole_filters():
    conv = nn.Conv2d(10, 40, 3)
    with torch.no_grad():
        conv.weight[16:32, 7] *= 0.01
        conv.weight[32:, 2] *= 0.001  # the block at the end has eight output channels
    prune_(conv, Block(2 / 30))
    pruned = (conv.weight == 0).all(3).all(2)
    expected = torch.zeros(40, 10, dtype=torch.bool)
    expected[16:32, 7] = expected[32:, 2] = True
    assert torch.equal(pruned, expected)


def test_a_small_block_at_the_end_is_judged_by_its_mean():
    conv = nn.Conv2d(1, 20, 1, bias=False)
    with torch.no_grad():
        conv.weight[:16], conv.weight[16:] = 1, 1.5  # the smaller sum, the larger mean
    prune_(conv, Block(0.5))
    assert conv.weight.flatten().tolist() == [0] * 16 + [1.5] * 4


def test_a_winograd_block_is_one_position():
    layer = pywino.WinogradReLUConv2d(4, 32, tile=2)
    with torch.no_grad():
        layer.weight.copy_(torch.rand_like(layer.weight) + 1)
        layer.weight[16:, 3, 1, 2] = 0.5
    prune_(layer, Block(1 / 128), domain="winograd")
    expected = torch.zeros(32, 4, 4, 4, dtype=torch.bool)
    expected[16:, 3, 1, 2] = True
    assert torch.equal(layer.weight == 0, expected)


def test_a_spec_may_leave_a_filter_empty():
    conv = nn.Conv2d(16, 16, 3)
    with torch.no_grad():
        conv.weight[5] *= 1e-6
    prune_(conv, Magnitude(0.5))
    assert conv.weight[5].count_nonzero() == 0
    out = conv(torch.randn(1, 16, 8, 8))
    torch.testing.assert_close(out[:, 5], conv.bias[5].expand_as(out[:, 5]))


def test_prune_keeps_class_and_keys():
    model = net()
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    assert prune_(model, Magnitude(0.5)) is model
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == kinds
    assert [id(p) for p in model.parameters()] == parameters
    pickle.loads(pickle.dumps(model))


def test_filter_fn_chooses_layers():
    model = net()
    prune_(model, Magnitude(0.5), filter_fn=lambda module, name: name == "3")
    assert [zeros(conv.weight) > 0.4 for conv in convs(model)] == [False, True, False]


def test_winograd_domain_of_a_spatial_layer():
    conv = nn.Conv2d(16, 16, 3, padding=1)
    layer = pywino.WinogradConv2d.from_dense(copy.deepcopy(conv))
    input = torch.randn(1, 16, 12, 12)
    prune_(layer, Magnitude(0), domain="winograd", tile=2)
    assert sorted(layer.state_dict()) == ["bias", "winograd_weight"]
    assert layer.winograd_weight.shape == (16, 16, 4, 4)
    torch.testing.assert_close(layer(input), conv(input), rtol=1e-4, atol=1e-4)
    prune_(layer, Magnitude(0.6), domain="winograd")
    assert zeros(layer.winograd_weight) == pytest.approx(0.6, abs=1e-3)


# --- masks hold during training ---


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "nesterov foreach": lambda p: torch.optim.SGD(
        p, 0.1, momentum=0.9, nesterov=True, foreach=True
    ),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "fused adam": lambda p: torch.optim.Adam(p, 0.01, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_hold_against_momentum_from_before(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)  # fills the momentum of weights that are pruned then
    pruner = Pruner(model, Magnitude(0.7))
    pruner.step()
    before = model[3].weight.detach().clone()
    train(model, optimizer)
    model.zero_grad()
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    for conv, mask in zip(convs(model), pruner.masks.values()):
        assert conv.weight[~mask].count_nonzero() == 0
        assert conv.weight.grad[~mask].count_nonzero() == 0
        assert conv.weight.grad[mask].count_nonzero() > 0
    assert not torch.equal(model[3].weight, before)  # the rest is trained


def test_finalize_lets_go():
    model = net()
    pruner = Pruner(model, Magnitude(0.7))
    pruner.step()
    assert pruner.finalize() is model
    train(model, torch.optim.SGD(model.parameters(), 0.1))
    assert zeros(model[3].weight) < 0.1
    assert not model[3].weight._backward_hooks
    with pytest.raises(RuntimeError, match="finalized"):
        pruner.step()


def test_a_frozen_weight_that_is_trained_later():
    conv = nn.Conv2d(4, 8, 3).requires_grad_(False)
    pruner = Pruner(conv, Magnitude(0.5))
    pruner.step()
    mask = conv.weight != 0
    assert not conv.weight.requires_grad
    assert 0 < mask.sum() < mask.numel()
    conv(torch.randn(2, 4, 6, 6).requires_grad_()).sum().backward()
    assert conv.weight.grad is None
    for _ in range(2):  # frozen and trained again
        conv.requires_grad_()
        conv.zero_grad()
        conv(torch.randn(2, 4, 6, 6)).sum().backward()
        assert conv.weight.grad[~mask].count_nonzero() == 0
        assert conv.weight.grad[mask].count_nonzero() > 0
        conv.requires_grad_(False)
    pruner.finalize()
    conv.requires_grad_().zero_grad()
    conv(torch.randn(2, 4, 6, 6)).sum().backward()
    assert conv.weight.grad[~mask].count_nonzero() > 0


def test_a_replaced_parameter_is_held_too():
    model = net()
    pruner = Pruner(model, Magnitude(0.7))
    pruner.step()
    model[3].weight = nn.Parameter(model[3].weight.detach().clone())
    train(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    assert model[3].weight[~pruner.masks["3"]].count_nonzero() == 0


def test_another_models_optimizer_is_left_alone():
    model, other = net(), net()
    Pruner(model, Magnitude(0.5)).step()
    train(other, torch.optim.SGD(other.parameters(), 0.1))
    assert zeros(other[3].weight) == 0


def test_copies_are_free():
    model = net()
    pruner = Pruner(model, Magnitude(0.5))
    pruner.step()
    twin = copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))
    twin.load_state_dict(net().state_dict())  # dense: no Pruner holds the copy
    train(twin, torch.optim.SGD(twin.parameters(), 0.1))
    assert zeros(twin[3].weight) < 0.1
    assert zeros(model[3].weight) == pytest.approx(0.5, abs=1e-3)


# --- schedules and resuming ---


@pytest.mark.parametrize("kind", [Magnitude, Block])
def test_a_schedule_prunes_more_each_time(kind):
    model = net(64)
    pruner = Pruner(model, kind(0.9), schedule=LIU_SCHEDULE)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    last = None
    for sparsity in LIU_SCHEDULE:
        assert not pruner.done
        reached = pruner.step()
        assert reached == pytest.approx(sparsity, abs=0.02) == pruner.sparsity
        mask = pruner.masks["3"]
        assert last is None or not (mask & ~last).any()  # nothing comes back
        last = mask
        train(model, optimizer, 1)
    assert pruner.done
    with pytest.raises(RuntimeError, match="10 steps"):
        pruner.step()


def test_exact_resume(tmp_path):
    def start():
        torch.manual_seed(1)
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        return model, optimizer, Pruner(model, Magnitude(0.8), schedule=[0.3, 0.6, 0.8])

    def go_on(model, optimizer, pruner):
        torch.manual_seed(3)
        while not pruner.done:
            pruner.step()
            train(model, optimizer)
        return model.state_dict()

    model, optimizer, pruner = start()
    pruner.step()
    train(model, optimizer)
    parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "c.pt")
    expected = go_on(model, optimizer, pruner)

    model, optimizer, pruner = start()
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    pruner.load_state_dict(saved["pruner"])
    assert pruner.position == 1
    for name, value in go_on(model, optimizer, pruner).items():
        assert torch.equal(value, expected[name]), name


def test_a_dense_checkpoint_into_a_pruned_model():
    model = net()
    pruner = Pruner(model, Magnitude(0.5))
    pruner.step()
    with pytest.raises(RuntimeError, match=r"'0'.*first in filter \d+: a dense checkpoint"):
        model.load_state_dict(net().state_dict())
    assert zeros(model[0].weight) == pytest.approx(0.5, abs=0.01)  # nothing of it is there
    pruner.finalize()
    dense = net()
    model.load_state_dict(dense.state_dict())  # the right result: dense weights
    assert torch.equal(model[3].weight, dense[3].weight)


def test_new_parameters_are_masked_too():
    model = net()
    pruner = Pruner(model, Magnitude(0.5))
    pruner.step()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    for name, mask in pruner.masks.items():
        grad = model.get_submodule(name).weight.grad
        assert grad.count_nonzero() > 0
        assert grad[~mask].count_nonzero() == 0


def test_back_to_an_earlier_checkpoint():
    model = net()
    pruner = Pruner(model, Magnitude(0.8), [0.5, 0.8])
    pruner.step()
    weights, state = copy.deepcopy(model.state_dict()), pruner.state_dict()
    pruner.step()
    with pytest.raises(RuntimeError, match="an earlier one, the Pruner's state first"):
        model.load_state_dict(weights)
    pruner.load_state_dict(state)
    model.load_state_dict(weights)
    assert zeros(model[0].weight) == pytest.approx(0.5, abs=0.01)
    assert pruner.position == 1


def test_masks_into_a_dense_model():
    model = net()
    pruner = Pruner(model, Magnitude(0.5))
    pruner.step()
    other = Pruner(net(), Magnitude(0.5))
    with pytest.raises(RuntimeError, match="must be zero where its mask has pruned"):
        other.load_state_dict(pruner.state_dict())
    other.model.load_state_dict(model.state_dict())
    other.load_state_dict(pruner.state_dict())
    assert other.sparsity == pruner.sparsity


def test_a_state_of_something_else():
    state = Pruner(net(), Magnitude(0.5)).state_dict()
    for other, match in (
        (Pruner(net(), Magnitude(0.6)), "spec must be"),
        (Pruner(net(), Magnitude(0.5), [0.2, 0.5]), "schedule must be"),
    ):
        with pytest.raises(RuntimeError, match=match):
            other.load_state_dict(state)
    pruner = Pruner(net(), Magnitude(0.5))
    pruner.step()
    state = pruner.state_dict()
    other = Pruner(net(), Magnitude(0.5), filter_fn=lambda module, name: name == "0")
    with pytest.raises(RuntimeError, match="difference at '3'"):
        other.load_state_dict(state)
    state["masks"]["3"] = state["masks"]["3"].float()
    with pytest.raises(RuntimeError, match=r"'3' must be a bool tensor, got torch\.float32"):
        pruner.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"from Pruner\.state_dict"):
        pruner.load_state_dict({})


# --- masks from torch ---


def test_masks_of_torch_prune():
    model = net()
    prune.l1_unstructured(model[3], "weight", 0.5)
    prune.ln_structured(model[0], "weight", 0.25, n=2, dim=0)
    expected = model[3].weight.detach().clone()
    pruner = Pruner.from_torch(model)
    assert set(pruner.masks) == {"0", "3"}
    assert "weight" in model[3]._parameters
    assert torch.equal(model[3].weight, expected)
    train(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    assert model[3].weight[~pruner.masks["3"]].count_nonzero() == 0
    assert zeros(model[0].weight) == pytest.approx(0.25)


def test_masks_of_torch_ao():
    from torch.ao.pruning.sparsifier.utils import FakeSparsity

    model = net()
    mask = (torch.rand(32, 32, 3, 3) > 0.5).float()
    parametrize.register_parametrization(model[3], "weight", FakeSparsity(mask))
    expected = model[3].weight.detach().clone()
    pruner = Pruner.from_torch(model)
    assert not parametrize.is_parametrized(model[3])
    assert torch.equal(model[3].weight, expected)
    assert pruner.masks["3"].dtype == torch.bool
    assert torch.equal(model[3].weight != 0, mask.bool())


def test_masks_of_nobody():
    with pytest.raises(RuntimeError, match="got none"):
        Pruner.from_torch(net())


def test_masks_by_name():
    model = net()
    mask = torch.rand(32, 32, 3, 3) > 0.5
    pruner = Pruner.from_masks(model, {"3": mask})
    assert torch.equal(model[3].weight != 0, mask)
    assert pruner.done
    for masks, match in (
        ({"3": mask.float()}, "must be a bool tensor, got torch.float32"),
        ({"3": mask[0]}, r"must be \(32, 32, 3, 3\).*got \(32, 3, 3\)"),
        ({"3": [True]}, "must be a bool tensor, got list"),
        ({"7": mask}, "got '7'"),
    ):
        with pytest.raises(RuntimeError, match=match):
            Pruner.from_masks(net(), masks)


# --- refusals ---


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, "0.5", True, float("nan")])
@pytest.mark.parametrize("kind", [Magnitude, Block])
def test_bad_sparsity(kind, sparsity):
    with pytest.raises(RuntimeError, match=rf"{kind.__name__}: sparsity must be .*\[0, 1\)"):
        kind(sparsity)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Magnitude(0.5, scope="model"), "scope must be 'layer' or 'global', got 'model'"),
        (lambda: NM(4, 4), "1 <= n < m"),
        (lambda: NM(0, 4), "1 <= n < m"),
        (lambda: NM(2.0, 4), "integers"),
        (lambda: Block(0.5, block=(16,)), "two integers >= 1"),
        (lambda: Block(0.5, block=(0, 1)), "two integers >= 1"),
        (lambda: Pruner(net(), Magnitude(0.5), []), "one sparsity or more"),
        (lambda: Pruner(net(), Magnitude(0.5), [0.5, 0.4]), "none smaller"),
        (lambda: Pruner(net(), Magnitude(0.5), [0.5, 1]), r"\[0, 1\)"),
        (lambda: Pruner(net(), NM(2, 4), [0.5]), "schedule must be None"),
        (lambda: Pruner(net(), Magnitude(0.5), domain="fourier"), "'spatial' or 'winograd'"),
        (lambda: Pruner(nn.ReLU(), Magnitude(0.5)), "got none"),
        (lambda: Pruner(net(), Magnitude(0.5), domain="winograd"), "use pywino.swap_"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(RuntimeError, match=match):
        make()


def test_bad_types():
    with pytest.raises(TypeError, match="an instance, not the class"):
        prune_(net(), Magnitude)
    with pytest.raises(TypeError, match="spec must be one of"):
        prune_(net(), 0.5)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got dict"):
        prune_({}, Magnitude(0.5))


def test_weights_that_are_not_finite():
    model = net()
    model[3].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="'3' must be finite"):
        prune_(model, Magnitude(0.5))
    assert zeros(model[0].weight) == 0  # nothing was done


def test_a_weight_that_is_computed():
    model = net()
    prune.l1_unstructured(model[3], "weight", 0.5)
    with pytest.raises(RuntimeError, match=r"'3' must be a plain Parameter.*from_torch"):
        prune_(model, Magnitude(0.5))


@pytest.mark.parametrize("spec", [Magnitude(0.5), NM(2, 4), Block(0.5)])
def test_check_names_layer_and_filter(spec):
    model = net(64)
    prune_(model, spec)
    check(model, spec)
    with torch.no_grad():
        model[3].weight[37] = 1
    with pytest.raises(RuntimeError, match=r"'3' must have the pattern of .* got filter (37|32)"):
        check(model, spec)


def test_state_dict_survives_a_file():
    pruner = Pruner(net(), Block(0.5), [0.25, 0.5])
    pruner.step()
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["schedule"] == [0.25, 0.5]
    assert torch.equal(state["masks"]["3"], pruner.masks["3"])


# --- the report ---


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        (Magnitude(0), "dense"),
        (Magnitude(0.7), "unstructured"),
        (NM(2, 4), "2:4"),
        (Block(0.75), "16x1 blocks"),
    ],
)
def test_report_finds_the_pattern(spec, pattern):
    model = nn.Sequential(nn.Conv2d(32, 32, 3), pywino.WinogradReLUConv2d(32, 32))
    prune_(model, spec)
    prune_(model, spec, domain="winograd")
    for row, weight in zip(pywino.pruning.report(model), (model[0].weight, model[1].weight)):
        assert row.pattern == pattern
        assert row.sparsity == pytest.approx(zeros(weight))
        assert row.dense is row.pruned is row.ratio is None


def test_report_measures_and_leaves_the_model_alone(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        pywino.WinogradReLUConv2d(16, 16),
        pywino.WinogradConv2d(16, 16, 3, padding=1, domain="winograd"),
    )
    state = copy.deepcopy(model.state_dict())
    found = pywino.pruning.report(model, torch.randn(1, 3, 16, 16))
    assert all(row.dense > 0 and row.pruned > 0 for row in found if row.name == "0")
    assert all(row.pruned > 0 for row in found)
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    text = str(found)
    for word in ("layer", "16x16x6x6", "WinogradReLUConv2d", "ms"):
        assert word in text
    assert found.to_dict()["layers"][0]["ratio"] == found.layers[0].ratio
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not any(module._forward_pre_hooks for module in model.modules())
