# SPDX-License-Identifier: BSD-3-Clause
"""The update of Algorithm 1, its three paths, and the batch size that follows eta and m."""

import copy
import pickle

import pytest
import torch

from pywino.optim import DynamicBatchSampler, DynamicBatchSGDM, batch_size

BASES = {"base_lr": 0.02, "base_momentum": 0.9, "base_batch_size": 128}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((3, 4), (5,), ())
    ]


def run(optimizer, params, steps=6):
    """Steps with other gradients, learning rates and momenta each time."""
    generator = torch.Generator().manual_seed(1)
    for i in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = 0.02 * (1 + i % 3), 0.9 + 0.02 * (i % 2)
        optimizer.step()


def algorithm_1(params, steps=6, weight_decay=0.0, nesterov=False):
    """The loop as the paper has it, on copies."""
    generator = torch.Generator().manual_seed(1)
    params = [p.detach().clone() for p in params]
    velocities = [torch.zeros_like(p) for p in params]
    for i in range(steps):
        eta, m = 0.02 * (1 + i % 3), 0.9 + 0.02 * (i % 2)
        for j, theta in enumerate(params):
            g = torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
            g = g + weight_decay * theta
            velocities[j] = m * velocities[j] + eta * g
            change = m * velocities[j] + eta * g if nesterov else velocities[j]
            params[j] = theta - change
    return params


@pytest.mark.parametrize(
    "path",
    [
        {},
        {"foreach": True},
        {"foreach": False},
        {"fused": True},
        {"nesterov": True},
        {"nesterov": True, "foreach": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_update_is_algorithm_1(path, weight_decay):
    params = parameters()
    wanted = algorithm_1(params, weight_decay=weight_decay, nesterov="nesterov" in path)
    run(DynamicBatchSGDM(params, lr=0.02, weight_decay=weight_decay, **path), params)
    for p, q in zip(params, wanted):
        torch.testing.assert_close(p.detach(), q, rtol=1e-13, atol=1e-14)


def test_constant_learning_rate_is_torch_sgd():
    ours, theirs = parameters(), parameters()
    optimizers = (
        DynamicBatchSGDM(ours, lr=0.1, momentum=0.8),
        torch.optim.SGD(theirs, lr=0.1, momentum=0.8),
    )
    for params, optimizer in zip((ours, theirs), optimizers):
        for i in range(4):
            for p in params:
                p.grad = torch.full_like(p, 1.0 + i)
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("path", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_without_momentum(path):
    """And back: v = eta g is there when momentum returns."""
    params, plain = parameters(), parameters()
    for tensors, options in ((params, path), (plain, {"foreach": False})):
        optimizer = DynamicBatchSGDM(tensors, lr=0.1, momentum=0.0, weight_decay=0.1, **options)
        for momentum in (0.0, 0.5):
            optimizer.param_groups[0]["momentum"] = momentum
            for p in tensors:
                p.grad = torch.ones_like(p)
            optimizer.step()
    for p, q in zip(params, plain):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)


def test_closure_and_missing_gradients():
    used, unused = parameters()[:2]
    optimizer = DynamicBatchSGDM([used, unused], lr=0.1)
    before = unused.detach().clone()

    def closure():
        loss = used.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    optimizer.zero_grad()
    assert optimizer.step(closure) < first
    assert torch.equal(unused.detach(), before)


# ------------------------------------------------------------------------------------ batch size


@pytest.mark.parametrize(
    ("lr", "momentum", "wanted"),
    [
        (0.02, 0.9, 128),
        (0.01, 0.9, 128),  # never below B_0
        (0.04, 0.9, 256),
        (0.03, 0.9, 192),
        (0.029, 0.9, 160),  # 185.6, stepwise down
        (0.02, 0.95, 256),
        (0.02, 0.9731, 448),  # the paper's factor 3.72 of its k = 1.6
        (0.08, 0.95, 1024),
    ],
)
def test_batch_size(lr, momentum, wanted):
    assert batch_size(lr, momentum, **BASES) == wanted
    assert batch_size(lr, momentum, **BASES, max_batch_size=300) == min(wanted, 288)


def test_limit_below_the_first_batch():
    assert batch_size(0.08, 0.9, **BASES, max_batch_size=100) == 128
    assert batch_size(0.02, 0.9, **(BASES | {"base_batch_size": 50})) == 50


def step(optimizer, lr):
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    return optimizer.batch_size


def test_size_follows_the_learning_rate():
    optimizer = DynamicBatchSGDM(parameters(), lr=0.02)
    assert optimizer.batch_size == 128
    assert [step(optimizer, lr) for lr in (0.02, 0.04, 0.08, 0.02)] == [128, 256, 512, 128]


def test_hysteresis():
    """160 is reached at 0.025; around it, and down to 144 = 0.0225, the size stays."""
    optimizer = DynamicBatchSGDM(parameters(), lr=0.02)
    sizes = [step(optimizer, lr) for lr in (0.0249, 0.0251, 0.0249, 0.0251, 0.0227, 0.0224, 0.0249)]
    assert sizes == [128, 160, 160, 160, 160, 128, 128]


def test_capacity_and_data_limit():
    optimizer = DynamicBatchSGDM(parameters(), lr=0.02, capacity=400)
    assert optimizer.max_batch_size == 400
    assert step(optimizer, 0.2) == 384
    DynamicBatchSampler(2000, optimizer)
    assert optimizer.max_batch_size == 200
    assert optimizer.batch_size == 192  # at once: it may not fit
    optimizer.capacity = 64
    assert optimizer.batch_size == 128
    optimizer.capacity = None
    assert step(optimizer, 0.2) == 192


# ---------------------------------------------------------------------------------------- states


def test_state_resumes_bit_for_bit():
    params = parameters()
    optimizer = DynamicBatchSGDM(params, lr=0.02, capacity=640)
    run(optimizer, params)
    other = parameters(5)
    with torch.no_grad():
        for p, q in zip(other, params):
            p.copy_(q)
    resumed = DynamicBatchSGDM(other, lr=0.5, momentum=0.1, batch_size=32)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert (resumed.batch_size, resumed.capacity) == (optimizer.batch_size, 640)
    for tensors, opt in ((params, optimizer), (other, resumed)):
        run(opt, tensors)
    assert all(torch.equal(p, q) for p, q in zip(params, other))
    assert resumed.batch_size == optimizer.batch_size


def test_copies_keep_the_size():
    optimizer = DynamicBatchSGDM(parameters(), lr=0.02)
    DynamicBatchSampler(100_000, optimizer)
    step(optimizer, 0.04)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.batch_size == 256
        assert other.sampler is None


def test_state_of_another_optimizer():
    params = parameters()
    with pytest.raises(ValueError, match="must be one of a DynamicBatchSGDM"):
        DynamicBatchSGDM(params, lr=0.1).load_state_dict(torch.optim.SGD(params).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be a finite number above 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be"),
        ({"capacity": 0}, "capacity must be None or an integer >= 1"),
        ({"fused": True, "nesterov": True}, "fused=True must be without nesterov=True"),
        ({"fused": True, "foreach": True}, "fused=True must be without foreach=True"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicBatchSGDM(parameters(), **({"lr": 0.1} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be a finite number above 0, got 0.0"),
        ({"lr": -1.0}, "lr must be a finite number above 0, got -1.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number"),
        ({"fused": True, "nesterov": True}, "fused=True must be without nesterov=True"),
    ],
)
def test_refusals_in_a_group(options, message):
    """A group's own options are checked as the defaults are, at once and when it comes later."""
    first, *others = parameters()
    with pytest.raises(ValueError, match=message):
        DynamicBatchSGDM([{"params": [first], **options}, {"params": others}], lr=0.1)
    optimizer = DynamicBatchSGDM([first], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": others, **options})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="gradients must be dense"):
        DynamicBatchSGDM(embedding.parameters(), lr=0.1).step()
