# SPDX-License-Identifier: BSD-3-Clause
"""Batches of the size that the optimizer asks for, without a new DataLoader."""

import math
from collections import deque
from collections.abc import Iterator, Sequence, Sized

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from pywino.optim.sgdm import DynamicBatchSGDM


class DynamicBatchSampler(Sampler[list[int]]):
    """A `batch_sampler` for `torch.utils.data.DataLoader` that takes each batch's size from
    `optimizer.batch_size` when it makes the batch.

    Args:
        dataset: what has the samples, or their number.
        optimizer: one batch is consumed by each of its steps.
        seed: the order of epoch e depends on (seed, e) alone.
        shuffle: a new random order in each epoch.
        drop_last: leave out a last batch that is smaller than the others.
        indices: take these samples of the dataset instead of all.
        rank, num_replicas: default to those of torch.distributed where it is initialized.

    Where the DataLoader prefetches (num_workers > 0), a new size comes through as many batches
    later as are under way. `state_dict()` counts the batches that were consumed by a step and keeps
    the sizes of those under way, so a run that is resumed with the same number of workers sees the
    same batches. Starting to iterate again without a `load_state_dict` in between starts the next
    epoch. The workers' random seeds come from torch's generator unless the DataLoader has its own
    (`generator=`): resume that one too if the dataset draws random numbers.

    Distributed: the batch of all ranks together has the size `optimizer.batch_size`. Where it does
    not divide evenly, ranks get one sample more or less, and each rank's gradient is scaled by
    (its samples) (ranks) / (all samples), so that DistributedDataParallel's mean over ranks is the
    mean over samples. This needs a loss that is a mean over samples. A rank for which there is no
    sample gets one with scale 0."""

    def __init__(
        self,
        dataset: Sized | int,
        optimizer: DynamicBatchSGDM,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        indices: Sequence[int] | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
    ):
        if indices is None:
            indices = range(dataset if isinstance(dataset, int) else len(dataset))
        self.indices = torch.as_tensor(indices, dtype=torch.int64)
        if len(self.indices) == 0:
            raise ValueError(
                "pywino.optim.DynamicBatchSampler: dataset must have samples, got an empty one"
            )
        if drop_last and len(self.indices) < optimizer.base_batch_size:
            raise ValueError(
                "pywino.optim.DynamicBatchSampler: with drop_last, dataset must have at least "
                f"batch_size={optimizer.base_batch_size} samples, got {len(self.indices)}, which "
                "make no batch; use drop_last=False or a smaller batch_size"
            )
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(
                f"pywino.optim.DynamicBatchSampler: seed must be an integer >= 0, got {seed!r}"
            )
        ready = dist.is_available() and dist.is_initialized()
        self.ranks = num_replicas or (dist.get_world_size() if ready else 1)
        self.rank = rank if rank is not None else (dist.get_rank() if ready else 0)
        if not 0 <= self.rank < self.ranks:
            raise ValueError(
                "pywino.optim.DynamicBatchSampler: rank must be in "
                f"[0, num_replicas={self.ranks}), got {self.rank}"
            )
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = -1  # of the batches that are made now; -1 before the first
        self.consumed = 0  # samples of this epoch, of all ranks
        self._pending: deque[int] = deque()  # sizes of batches that were made and not yet consumed
        self._resumed = False
        self._closed = False
        self._optimizer = optimizer
        optimizer.sampler = self
        optimizer._resize()
        if self.ranks > 1:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.requires_grad:
                        p.register_hook(self._scaled)

    def __len__(self) -> int:
        """Batches of a whole epoch at the present size."""
        batches = len(self.indices) / self._optimizer.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[list[int]]:
        made = list(self._pending) if self._resumed else []
        if not self._resumed:
            self.epoch += 1
            self.consumed = 0
            self._closed = False
        self._resumed = False
        self._pending.clear()
        order = self._order()
        position = self.consumed
        while left := len(order) - position:
            size = made.pop(0) if made else self._optimizer.batch_size
            if size > left:
                if self.drop_last:
                    return
                size = left
            batch = order[position : position + size]
            position += size
            self._pending.append(size)
            yield (batch[self.rank :: self.ranks] if self.rank < size else batch[:1]).tolist()

    def _order(self):
        if not self.shuffle:
            return self.indices
        # torch's generator takes 32 bits; these are mixed from both numbers.
        seed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        return self.indices[torch.randperm(len(self.indices), generator=generator)]

    def consume(self) -> int:
        """Counts the oldest batch as consumed and returns its size; the optimizer calls it."""
        if not self._pending:
            return 0
        size = self._pending.popleft()
        self.consumed += size
        return size

    def close(self) -> None:
        """The epoch is over; the controller calls it."""
        self._closed = True

    def _scaled(self, gradient):
        """This rank's mean gradient, for a mean over ranks that is the mean over samples."""
        size = self._pending[0] if self._pending else 0
        if size % self.ranks == 0:
            return gradient
        mine = len(range(self.rank, size, self.ranks))
        return gradient * (mine * self.ranks / size) if mine else torch.zeros_like(gradient)

    def state_dict(self) -> dict:
        """Plain numbers: the epoch, the samples that were consumed, the batches under way."""
        consumed = not self._pending and self.consumed == len(self.indices)
        return {
            "seed": self.seed,
            "samples": len(self.indices),
            "epoch": self.epoch,
            "consumed": self.consumed,
            "pending": list(self._pending),
            "closed": self._closed or (consumed and self._optimizer.controller is None),
        }

    def load_state_dict(self, state: dict) -> None:
        """The next iteration goes on with the epoch of `state`, or with the next one if that was
        over: closed by the controller's `step` or, without a controller, consumed to its end."""
        for name, mine in (("samples", len(self.indices)), ("seed", self.seed)):
            if state[name] != mine:
                raise ValueError(
                    f"pywino.optim.DynamicBatchSampler.load_state_dict: {name} must be {mine}, as "
                    f"here, got {state[name]}; use the data and the seed of the run that is resumed"
                )
        self.epoch = state["epoch"]
        self.consumed = state["consumed"]
        self._pending = deque(state["pending"])
        self._closed = state["closed"]
        self._resumed = self.epoch >= 0 and not self._closed
