# SPDX-License-Identifier: BSD-3-Clause
"""The four states, what leads from one to the next, and the momentum's two laws."""

import math
import statistics

import pytest
import torch
from torch import nn

from pywino.optim import DynamicBatchController, DynamicBatchSampler, DynamicBatchSGDM
from pywino.optim.controller import momentum_curve


def setup(n=100_000, epochs=20, batch_size=128, momentum=0.9, capacity=None, **options):
    opt = DynamicBatchSGDM(
        [nn.Parameter(torch.zeros(1))],
        lr=0.02,
        momentum=momentum,
        batch_size=batch_size,
        capacity=capacity,
    )
    sampler = DynamicBatchSampler(n, opt) if n else None
    return opt, sampler, DynamicBatchController(opt, epochs, **options)


def lr(opt):
    return opt.param_groups[0]["lr"]


def momentum(opt):
    return opt.param_groups[0]["momentum"]


def epoch(opt, sampler, control, accuracy):
    rows = []
    for _ in sampler:
        opt.step()
        rows.append((control.phase, lr(opt), momentum(opt), opt.batch_size))
    control.step(accuracy)
    return rows


# ----------------------------------------------------------------------------------- momentum law


def exact(t, k, m0=0.9, slope=0.5):
    """m'' = -k / m has the solution m = peak exp(-m'^2 / 2k), t a difference of error functions."""
    peak = m0 * math.exp(slope**2 / (2 * k))
    scale = peak / k * math.sqrt(math.pi * k / 2)
    value = math.erf(slope / math.sqrt(2 * k)) - t / scale
    s = math.sqrt(k) * statistics.NormalDist().inv_cdf((value + 1) / 2)  # sqrt(2k) erfinv(value)
    return peak * math.exp(-(s**2) / (2 * k))


@pytest.mark.parametrize("k", [1.3, 1.6, 1.75])
def test_drawn_law_is_its_closed_form(k):
    curve = momentum_curve(0.9, k, "m")
    for i in (0, 1, 100, 240, len(curve) - 1):
        assert curve[i] == pytest.approx(exact(i / 1000, k), abs=1e-12)


def test_drawn_law_has_the_papers_peak():
    """k = 1.6: the highest momentum, 0.9731, at 0.296 of the epochs."""
    curve = momentum_curve(0.9, 1.6, "m")
    assert (len(curve) - 1) / 1000 == pytest.approx(0.296, abs=1e-3)
    assert curve[-1] == pytest.approx(0.9731, abs=1e-4)


def test_printed_law():
    """y'' = k / y starts with y'' = k / 0.1 and ends at 0.9075 for k = 1.6."""
    curve = momentum_curve(0.9, 1.6, "y")
    assert curve[-1] == pytest.approx(0.9075, abs=1e-4)
    first, second, third = curve[:3]
    assert (third - 2 * second + first) / 1e-6 == pytest.approx(-1.6 / 0.1, rel=0.01)


def test_a_vanishing_k_is_a_straight_line():
    """m'(0) = 0.5, which the paper says by m = 1 at t = 0.2 for k = 0."""
    assert momentum_curve(0.9, 1e-6, "m")[200] == pytest.approx(1, abs=1e-6)


# ----------------------------------------------------------------------------------------- phases


def test_warm_up():
    """eta from 0.01 to 0.02 in the first tenth, per step, with the batch that it starts with."""
    opt, sampler, control = setup(n=12_800, epochs=20)
    assert (control.phase, lr(opt)) == ("warm-up", 0.01)
    rows = epoch(opt, sampler, control, 0.1)
    assert rows[49][1] == pytest.approx(0.0125)  # 50 of 200 batches
    rows += epoch(opt, sampler, control, 0.2)
    rates = [row[1] for row in rows]
    assert rates == sorted(rates)
    assert rates[-1] == 0.02
    assert {row[3] for row in rows} == {128}
    assert control.phase == "lr"
    assert [row["phase"] for row in control.history] == ["warm-up", "lr"]


def test_warm_up_may_end_inside_an_epoch():
    opt, sampler, control = setup(n=12_800, epochs=5)
    rows = epoch(opt, sampler, control, 0.1)
    assert [row[0] for row in rows].count("warm-up") == 49
    assert (rows[-1][0], lr(opt)) == ("lr", 0.02)


def test_lr_doubles_until_accuracy_falls():
    opt, sampler, control = setup(warmup=0)
    seen = []
    for accuracy in (0.1, 0.2, 0.3, 0.3, 0.4, 0.39):
        seen.append((lr(opt), opt.batch_size))
        epoch(opt, sampler, control, accuracy)
    assert seen == [(0.02, 128)] * 2 + [(0.04, 256)] * 2 + [(0.08, 512)] * 2
    assert (control.phase, control.reason) == ("momentum", "validation accuracy fell")
    assert lr(opt) == 0.08


def test_momentum_rises_to_its_peak():
    opt, sampler, control = setup(epochs=20, warmup=0)
    for accuracy in (0.2, 0.1):
        epoch(opt, sampler, control, accuracy)
    assert control.phase == "momentum"
    epochs = [epoch(opt, sampler, control, 0.2 + i / 100) for i in range(7)]
    values = [row[2] for rows in epochs for row in rows]
    assert values == sorted(values)
    # After two epochs of 20, t = 0.1 since the momentum began to rise.
    assert epochs[1][-1][2] == pytest.approx(exact(0.1, 1.6), abs=1e-6)
    assert momentum(opt) == pytest.approx(0.9731, abs=1e-4)
    assert opt.batch_size == 448
    assert lr(opt) == 0.02
    assert (control.phase, control.reason) == ("plateau", "momentum is at its highest")


def test_momentum_stops_where_accuracy_falls():
    opt, sampler, control = setup(warmup=0)
    for accuracy in (0.2, 0.1, 0.3, 0.2):
        epoch(opt, sampler, control, accuracy)
    held = momentum(opt)
    assert 0.9 < held < 0.97
    assert (control.phase, control.reason) == ("plateau", "validation accuracy fell")
    epoch(opt, sampler, control, 0.1)
    assert momentum(opt) == held


def test_the_largest_batch_ends_growth():
    """N / 10 = 300: 512 is not tried, and momentum stops just below 300."""
    opt, sampler, control = setup(n=3000, warmup=0)
    for i in range(12):
        epoch(opt, sampler, control, i / 100)
    assert lr(opt) == 0.04
    assert control.phase == "plateau"
    assert control.reason == "the batch is the largest"
    assert 256 <= opt.unlimited_batch_size(lr(opt), momentum(opt)) <= 300
    assert opt.batch_size == 256 + 32


def test_no_room_at_all():
    """Below 1280 samples the batch stays B_0, and so do eta and m."""
    opt, sampler, control = setup(n=1000, warmup=0)
    for i in range(5):
        epoch(opt, sampler, control, i / 100)
    assert (lr(opt), momentum(opt), opt.batch_size) == (0.02, 0.9, 128)
    assert control.phase == "plateau"


def test_plateau():
    opt, sampler, control = setup(n=1000, epochs=40, warmup=0, patience=3)
    while control.phase != "plateau":
        epoch(opt, sampler, control, control.epoch / 1000)
    seen = []
    for accuracy in (0.5, 0.5, 0.4, 0.45, 0.6, 0.5, 0.5, 0.5, 0.6, 0.6, 0.6):
        epoch(opt, sampler, control, accuracy)
        seen.append(round(lr(opt) / 0.02, 6))
    # The gains are at 0.5 and 0.6; an equal accuracy is none.
    assert seen == [1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001]
    assert opt.batch_size == 128


def test_without_a_sampler():
    """Per epoch instead of per step, and no limit by N."""
    opt, _, control = setup(n=None, epochs=10)
    control.step(0.1)
    assert (control.phase, lr(opt)) == ("lr", 0.02)
    control.step(0.2)
    control.step(0.3)
    assert (lr(opt), opt.batch_size) == (0.04, 256)


def test_without_momentum():
    opt, sampler, control = setup(momentum=0.0, warmup=0)
    for accuracy in (0.2, 0.1, 0.1):
        epoch(opt, sampler, control, accuracy)
    assert momentum(opt) == 0.0
    assert control.phase == "plateau"


def test_without_growth():
    opt, sampler, control = setup(grow=False, patience=2, epochs=10)
    for accuracy in (0.1, 0.2, 0.3, 0.3, 0.2):
        epoch(opt, sampler, control, accuracy)
        assert control.phase == "plateau"
        assert (momentum(opt), opt.batch_size) == (0.9, 128)
    assert lr(opt) == pytest.approx(0.002)
    assert setup(grow=False, warmup=0)[2].phase == "plateau"


def test_groups_keep_their_ratio():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    opt = DynamicBatchSGDM([{"params": [a]}, {"params": [b], "lr": 0.002}], lr=0.02)
    control = DynamicBatchController(opt, 10, warmup=0, every=1)
    control.step(0.1)
    assert [group["lr"] for group in opt.param_groups] == [0.04, 0.004]


def test_groups_keep_their_momentum():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [{"params": [p], "momentum": m} for p, m in zip(parameters, (0.9, 0.5, 0.9))]
    opt = DynamicBatchSGDM(groups, lr=0.02)
    control = DynamicBatchController(opt, 10, warmup=0, every=1)
    assert [group["momentum"] for group in opt.param_groups] == [0.9, 0.5, 0.9]
    for accuracy in (0.2, 0.1, 0.3):
        control.step(accuracy)
    rises, other, same = (group["momentum"] for group in opt.param_groups)
    assert rises == same > 0.9
    # 1 - m by one factor, as the batch's size has it.
    assert (1 - other) / (1 - 0.5) == pytest.approx((1 - rises) / (1 - 0.9))


# ---------------------------------------------------------------------------------------- its end


def test_the_schedule_ends():
    _, _, control = setup(epochs=2)
    control.step(0.1)
    assert not control.done
    control.step(0.1)
    assert control.done
    with pytest.raises(RuntimeError, match="epochs=2, and all of them have passed"):
        control.step(0.1)


def test_state_round_trip():
    first = setup(warmup=0.1, epochs=20)
    for i in range(6):
        epoch(*first, i / 10)
    second = setup(warmup=0.1, epochs=20)
    for a, b in zip(first, second):
        b.load_state_dict(a.state_dict())
    for i in range(6):
        accuracy = 0.3 + (-1) ** i / 10
        assert epoch(*first, accuracy) == epoch(*second, accuracy)
    assert first[2].state_dict() == second[2].state_dict()


def test_state_of_another_length():
    state = setup(epochs=3)[2].state_dict()
    with pytest.raises(ValueError, match="epochs must be 4"):
        setup(epochs=4)[2].load_state_dict(state)


@pytest.mark.parametrize("accuracy", [float("nan"), float("inf")])
def test_accuracy_must_be_finite(accuracy):
    with pytest.raises(ValueError, match="accuracy must be a finite number"):
        setup()[2].step(accuracy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer >= 1"),
        ({"epochs": float("inf")}, "epochs must be an integer >= 1, got inf"),
        ({"warmup": 1}, "warmup must be in"),
        ({"every": 0}, "every must be"),
        ({"patience": 0}, "patience must be"),
        ({"decay": 1.0}, "decay must be between 0 and 1"),
        ({"law": "x"}, "law must be 'm' or 'y'"),
        ({"k": 1.1}, "k must be at least 1.198, where momentum 0.9 rises to 0.999, got 1.1"),
        ({"k": 0.01, "law": "y"}, "k must be at least 0.02714"),
        ({"k": 0}, "k must be a finite number above 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        setup(**options)


def test_another_optimizer_is_refused():
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(TypeError, match="optimizer must be a DynamicBatchSGDM, got SGD"):
        DynamicBatchController(sgd, epochs=4)
