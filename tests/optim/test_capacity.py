# SPDX-License-Identifier: BSD-3-Clause
"""Memory that runs out, simulated: a layer that refuses batches above a size."""

import gc
import weakref

import pytest
import torch
from torch import nn

from pywino.optim import MicroBatches, find_capacity

CPU_TEXT = "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"


class Limited(nn.Module):
    """Fits `most` samples; keeps weak references to what it saw."""

    def __init__(self, most, error=torch.OutOfMemoryError):
        super().__init__()
        self.most = most
        self.error = error
        self.seen = []
        self.tried = []

    def forward(self, x):
        self.tried.append(len(x))
        self.seen.append(weakref.ref(x))
        if len(x) > self.most:
            raise self.error(CPU_TEXT)
        return x


def network(most, error=torch.OutOfMemoryError):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), Limited(most, error), nn.Linear(4, 3)
    )


def sample(n=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator), torch.arange(n) % 3


def capacity(model, **options):
    return find_capacity(model, nn.functional.cross_entropy, *sample(), **options)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_capacity(error):
    """700 fit; found to 32, less a tenth, in steps of 32."""
    model = network(700, error)
    found = capacity(model)
    assert found == 576  # 672 was the largest that was tried
    assert max(size for size in model[3].tried if size <= 700) >= 700 - 32


@pytest.mark.parametrize(
    ("most", "options", "wanted"),
    [
        (1 << 20, {"limit": 500}, 500),  # the limit fits: no margin is needed
        (700, {"margin": 0}, 672),
        (20, {}, 18),  # the first try does not fit
        (2, {}, 1),
        (700, {"start": 4096}, 576),
        (10, {"limit": 16, "margin": 0}, 10),
    ],
)
def test_capacity_options(most, options, wanted):
    model = network(most)
    if most == 2:  # BatchNorm needs two samples; this is about one
        model[1] = nn.Identity()
    assert capacity(model, **options) == wanted


def test_nothing_fits():
    model = network(0)
    model[1] = nn.Identity()
    with pytest.raises(torch.OutOfMemoryError, match="one sample does not"):
        capacity(model)


def test_nothing_changes_and_nothing_leaks():
    model = network(100)
    model(sample()[0]).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random = torch.get_rng_state()
    capacity(model)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
    gc.collect()
    assert not any(ref() is not None for ref in model[3].seen)


def test_other_errors_come_through():
    with pytest.raises(RuntimeError, match="no such thing"):
        find_capacity(
            network(9), lambda y, t: (_ for _ in ()).throw(RuntimeError("no such thing")), *sample()
        )


@pytest.mark.parametrize(
    "options", [{"start": 0}, {"limit": 0}, {"margin": 1.0}, {"start": 1.5}], ids=str
)
def test_capacity_refusals(options):
    with pytest.raises(ValueError, match=f"find_capacity: {next(iter(options))} must be"):
        capacity(network(9), **options)


# ---------------------------------------------------------------------------------- micro-batches


def plain(most):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Limited(most), nn.Linear(4, 3)).double()


@pytest.mark.parametrize(("size", "most", "ends"), [(None, 99, None), (4, 99, 4), (None, 3, 2)])
def test_micro_batches_give_the_whole_gradient(size, most, ends):
    x, y = sample(7)
    whole, parts = plain(99), plain(most)
    loss = nn.functional.cross_entropy(whole(x.double()), y)
    loss.backward()
    micro = MicroBatches(parts, nn.functional.cross_entropy, size)
    value = micro.backward(x.double(), y)
    assert micro.size == ends
    torch.testing.assert_close(value.double(), loss.detach(), rtol=1e-6, atol=0)
    for p, q in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


def test_micro_batches_take_back_what_a_failed_try_did():
    """BatchNorm's statistics of the first layers, which had run already."""
    model, again = network(3), network(3)
    model[2], again[2] = nn.Identity(), nn.Identity()
    x, y = sample(6)
    MicroBatches(model, nn.functional.cross_entropy).backward(x, y)
    MicroBatches(again, nn.functional.cross_entropy, 3).backward(x, y)
    assert torch.equal(model[1].running_mean, again[1].running_mean)
    assert model[1].num_batches_tracked == 2


def test_micro_batches_give_up_at_one_sample():
    micro = MicroBatches(plain(0), nn.functional.cross_entropy)
    with pytest.raises(torch.OutOfMemoryError):
        micro.backward(sample()[0].double(), sample()[1])


def test_micro_batches_refuse():
    with pytest.raises(ValueError, match="size must be None or an integer >= 1, got 0"):
        MicroBatches(plain(1), nn.functional.cross_entropy, 0)
    micro = MicroBatches(plain(1), nn.functional.cross_entropy)
    for samples, targets in ((0, 0), (3, 2)):
        with pytest.raises(ValueError, match=f"1 or more, got {samples} and {targets}"):
            micro.backward(torch.randn(samples, 4), torch.zeros(targets, dtype=torch.long))
