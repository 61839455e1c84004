# SPDX-License-Identifier: BSD-3-Clause
"""Batches that change their size under a running DataLoader, and runs that are resumed."""

import copy
from itertools import chain

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pywino.optim import DynamicBatchController, DynamicBatchSampler, DynamicBatchSGDM


def optimizer(**options):
    return DynamicBatchSGDM([nn.Parameter(torch.zeros(2))], lr=0.02, **options)


def set_lr(opt, lr):
    opt.param_groups[0]["lr"] = lr


def epoch(sampler, opt, lr=None):
    """All batches of an epoch, each consumed by a step."""
    batches = []
    for batch in sampler:
        batches.append(batch)
        if lr is not None:
            set_lr(opt, lr)
        opt.step()
    return batches


def test_every_sample_once():
    opt = optimizer()
    sampler = DynamicBatchSampler(1000, opt)
    assert len(sampler) == 8
    batches = epoch(sampler, opt)
    assert [len(batch) for batch in batches] == [128] * 7 + [104]
    assert sorted(chain.from_iterable(batches)) == list(range(1000))
    assert sampler.state_dict()["consumed"] == 1000


def test_order_depends_on_seed_and_epoch():
    def two_epochs(**options):
        opt = optimizer()
        sampler = DynamicBatchSampler(500, opt, **options)
        return epoch(sampler, opt), epoch(sampler, opt)

    first, second = two_epochs(seed=3)
    assert first != second
    assert (first, second) == two_epochs(seed=3)
    assert first != two_epochs(seed=4)[0]
    assert two_epochs(shuffle=False)[1][0] == list(range(128))


def test_size_changes_between_steps():
    opt = optimizer(batch_size=32)
    sampler = DynamicBatchSampler(2000, opt)
    sizes = []
    for i, batch in enumerate(sampler):
        sizes.append(len(batch))
        set_lr(opt, 0.02 * (1 + i))
        opt.step()
    assert sizes[:7] == [32, 32, 64, 96, 128, 160, 192]
    assert max(sizes) == 192  # N / 10 = 200
    assert sum(sizes) == 2000


def test_a_subset():
    opt = optimizer(batch_size=2)
    sampler = DynamicBatchSampler(10, opt, indices=[5, 7, 9])
    assert sorted(chain.from_iterable(epoch(sampler, opt))) == [5, 7, 9]


def test_fewer_samples_than_a_batch():
    opt = optimizer()
    assert [len(batch) for batch in epoch(DynamicBatchSampler(50, opt), opt)] == [50]


def test_drop_last():
    opt = optimizer()
    sampler = DynamicBatchSampler(300, opt, drop_last=True)
    assert [len(batch) for batch in epoch(sampler, opt)] == [128, 128]
    assert len(sampler) == 2


def test_state_at_the_end_of_an_epoch():
    """Without a controller the next epoch comes next; with one, the rest of the old one, which is
    nothing, until it is closed."""
    opt = optimizer()
    sampler = DynamicBatchSampler(300, opt)
    epoch(sampler, opt)
    sampler.load_state_dict(sampler.state_dict())
    assert (len(epoch(sampler, opt)), sampler.epoch) == (3, 1)
    control = DynamicBatchController(opt, 9)
    sampler.load_state_dict(sampler.state_dict())
    assert (len(epoch(sampler, opt)), sampler.epoch) == (0, 1)
    control.step(0.5)
    sampler.load_state_dict(sampler.state_dict())
    assert (len(epoch(sampler, opt)), sampler.epoch) == (3, 2)


def test_a_broken_loop_starts_a_new_epoch():
    opt = optimizer()
    sampler = DynamicBatchSampler(500, opt)
    for _ in sampler:
        opt.step()
        break
    assert sum(map(len, epoch(sampler, opt))) == 500
    assert sampler.epoch == 1


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (0, {}, "dataset must have samples"),
        (100, {"drop_last": True}, "at least batch_size=128 samples, got 100"),
        (100, {"seed": -1}, "seed must be an integer >= 0"),
        (100, {"rank": 2, "num_replicas": 2}, r"rank must be in \[0, num_replicas=2\), got 2"),
    ],
)
def test_refusals(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        DynamicBatchSampler(dataset, optimizer(), **options)


@pytest.mark.parametrize(("n", "seed", "name"), [(101, 0, "samples"), (100, 1, "seed")])
def test_state_of_other_data(n, seed, name):
    state = DynamicBatchSampler(100, optimizer()).state_dict()
    with pytest.raises(ValueError, match=f"{name} must be"):
        DynamicBatchSampler(n, optimizer(), seed=seed).load_state_dict(state)


# ------------------------------------------------------------------------------------------ ranks


@pytest.mark.parametrize("n", [1000, 1001, 385])
def test_ranks_share_a_batch(n):
    """Every sample once over all ranks; a rank without one gets a repeated sample, scaled to 0."""
    shares = []
    for rank in range(3):
        opt = optimizer()
        sampler = DynamicBatchSampler(n, opt, num_replicas=3, rank=rank)
        shares.append([])
        for batch in sampler:
            scale = float(sampler._scaled(torch.ones(())))
            shares[-1].append((batch, scale))
            opt.step()
    seen = []
    for together in zip(*shares):
        size = sum(len(batch) for batch, scale in together if scale)
        seen += [i for batch, scale in together if scale for i in batch]
        for batch, scale in together:
            assert scale == pytest.approx(len(batch) * 3 / size if scale else 0)
            assert batch
    assert sorted(seen) == list(range(n))


# ----------------------------------------------------------------------- the loop of the manual


def data(n=1000):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


class Training:
    """The loop that the manual shows, which can be stopped after any step and resumed."""

    def __init__(self, workers, batch_size=32, epochs=3):
        torch.manual_seed(0)
        self.data = data()
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))
        self.opt = DynamicBatchSGDM(self.model.parameters(), lr=0.02, batch_size=batch_size)
        self.sampler = DynamicBatchSampler(self.data, self.opt, seed=0)
        self.control = DynamicBatchController(self.opt, epochs=epochs, every=1)
        self.generator = torch.Generator().manual_seed(0)
        self.loader = DataLoader(
            self.data, batch_sampler=self.sampler, num_workers=workers, generator=self.generator
        )
        self.parts = (self.model, self.opt, self.sampler, self.control)
        self.sizes = []

    def run(self, steps=None):
        while not self.control.done:
            for x, y in self.loader:
                self.opt.zero_grad()
                nn.functional.cross_entropy(self.model(x), y).backward()
                self.opt.step()
                self.sizes.append(len(x))
                if len(self.sizes) == steps:
                    return self
            self.control.step(float(self.control.epoch))  # a gain each time: eta and m grow
        return self

    def state(self):
        return copy.deepcopy([part.state_dict() for part in self.parts] + [torch.get_rng_state()])

    def resume(self, state):
        for part, saved in zip(self.parts, state):
            part.load_state_dict(saved)
        torch.set_rng_state(state[-1])
        return self


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_exactly(workers):
    whole = Training(workers).run()
    assert len(set(whole.sizes)) > 2, "the sizes never changed, so nothing was tested"
    growth = whole.sizes.index(96)  # in the middle of an epoch
    for steps in (1, 32, growth - 2, growth + 2):
        begun = Training(workers).run(steps)
        state = begun.state()
        resumed = Training(workers)
        torch.rand(7)  # the random state is taken from the checkpoint
        resumed.resume(state).run()
        assert begun.sizes + resumed.sizes == whole.sizes
        for p, q in zip(whole.model.parameters(), resumed.model.parameters()):
            assert torch.equal(p, q)
        assert resumed.control.history == whole.control.history


def test_prefetched_batches_are_not_consumed():
    training = Training(workers=2).run(steps=3)
    state = training.sampler.state_dict()
    assert state["consumed"] == 96
    assert state["pending"] == [32] * 4  # two workers fetch two batches each ahead


def test_the_loop_of_the_manual():
    """As the package's page has it, word by word; it learns."""
    dataset = data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    opt = DynamicBatchSGDM(model.parameters(), lr=0.02, batch_size=128)
    sampler = DynamicBatchSampler(dataset, opt, seed=0)
    control = DynamicBatchController(opt, epochs=30)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2)
    for _ in range(30):
        for x, y in loader:
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        accuracy = float((model(dataset.tensors[0]).argmax(1) == dataset.tensors[1]).float().mean())
        control.step(accuracy)

    assert accuracy > 0.9
    assert control.done
    assert [row["epoch"] for row in control.history] == list(range(30))
