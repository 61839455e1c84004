# SPDX-License-Identifier: BSD-3-Clause
"""How many samples fit into memory, found by trying, and batches in parts where they do not."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pywino.optim.sgdm import STEP

Loss = Callable[[Tensor, Tensor], Tensor]


def _is_out_of_memory(error: BaseException) -> bool:
    """A GPU's allocator has a class for it; the CPU's raises a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _release():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Puts buffers (BatchNorm's statistics), gradients and random states back."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices):
        try:
            model.zero_grad(set_to_none=True)
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for p, gradient in gradients:
                p.grad = gradient


def find_capacity(
    model: nn.Module,
    loss: Loss,
    input: Tensor,
    target: Tensor,
    *,
    start: int = STEP,
    limit: int = 1 << 16,
    margin: float = 0.1,
) -> int:
    """The largest batch whose forward and backward pass fit into memory, less `margin`.

    Args:
        model: the module itself, not DistributedDataParallel around it.
        loss: loss(model(x), y) with a scalar result.
        input, target: a batch of at least one sample, on the model's device; its first sample is
            repeated.
        start: the first size that is tried. It is doubled until memory runs out or `limit` is
            reached, then halved in between down to steps of 32 (of 1 below 32).
        margin: the part of the memory that is left for what differs from step to step.

    Returns `limit` if that fits, and the least of all ranks' results in a distributed run. The
    model, its gradients and the random state are as before. Raises torch.OutOfMemoryError if not
    even one sample fits. A CPU rarely runs out of memory before the system ends the process, so set
    `limit` there."""
    for name, value in (("start", start), ("limit", limit)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"pywino.optim.find_capacity: {name} must be an integer >= 1, got {value!r}"
            )
    if not 0 <= margin < 1:
        raise ValueError(f"pywino.optim.find_capacity: margin must be in [0, 1), got {margin!r}")

    def fits(size):
        try:
            with _unchanged(model):
                x, y = (t[:1].expand(size, *t.shape[1:]).contiguous() for t in (input, target))
                loss(model(x), y).backward()
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames hold the activations
        else:
            return True
        _release()
        return False

    capacity = _search(fits, min(start, limit), limit, margin)
    if dist.is_available() and dist.is_initialized():
        least = torch.tensor(capacity, device=input.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        capacity = int(least)
    if capacity == 0:
        raise torch.OutOfMemoryError(
            "pywino.optim.find_capacity: a batch must fit into memory, and one sample does not; "
            "use a smaller model or smaller images"
        )
    return capacity


def _search(fits, size, limit, margin) -> int:
    """The largest size that fits, less the margin; 0 if 1 does not."""
    good, bad = 0, None
    while good < limit and bad is None:  # upwards
        if fits(size):
            good, size = size, min(2 * size, limit)
        else:
            bad = size
    while good == 0 and bad > 1:  # downwards
        if fits(bad // 2):
            good = bad // 2
        else:
            bad //= 2
    if bad is None:
        return limit
    while bad - good > (STEP if good >= STEP else 1):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    reduced = int(good * (1 - margin))
    return reduced // STEP * STEP if reduced >= STEP else max(reduced, min(good, 1))


class MicroBatches:
    """Gradients of a batch that may not fit into memory at once, computed part by part.

        micro = MicroBatches(model, loss)
        value = micro.backward(x, y)      # instead of loss(model(x), y).backward()
        opt.step()

    The gradient is that of the whole batch, with loss(output, target) a mean over samples;
    BatchNorm sees the parts. `context()` is around each forward pass, for autocast. `size` is the
    largest part (None: the whole batch). When memory runs out, it is halved for good and the batch
    is done again. A DistributedDataParallel model waits for its other ranks in the middle of a
    backward pass, so there memory that runs out is an error: set `size` by `find_capacity`
    beforehand."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        size: int | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(
                f"pywino.optim.MicroBatches: size must be None or an integer >= 1, got {size!r}"
            )
        self.model = model
        self.loss = loss
        self.size = size
        self.context = context

    def backward(self, input: Tensor, target: Tensor) -> Tensor:
        """Sets the parameters' gradients to those of this batch, and returns its loss."""
        if len(input) == 0 or len(target) != len(input):
            raise ValueError(
                "pywino.optim.MicroBatches.backward: input and target must have equally many "
                f"samples, 1 or more, got {len(input)} and {len(target)}"
            )
        distributed = isinstance(self.model, nn.parallel.DistributedDataParallel)
        while True:
            self.model.zero_grad(set_to_none=True)
            size = min(self.size or len(input), len(input))
            before = [buffer.clone() for buffer in self.model.buffers()]
            try:
                return self._backward(input, target, size)
            except Exception as error:
                if not _is_out_of_memory(error) or size == 1 or distributed:
                    raise
                error.__traceback__ = None
            with torch.no_grad():
                for buffer, value in zip(self.model.buffers(), before):
                    buffer.copy_(value)
            self.size = -(-size // 2)
            self.model.zero_grad(set_to_none=True)
            _release()

    def _backward(self, input, target, size):
        total = torch.zeros((), device=input.device)
        for start in range(0, len(input), size):
            x, y = input[start : start + size], target[start : start + size]
            last = start + size >= len(input)
            # Ranks exchange gradients once, in the last part.
            wait = nullcontext() if last or not hasattr(self.model, "no_sync") else None
            with wait or self.model.no_sync():
                with self.context():
                    part = self.loss(self.model(x), y) * (len(x) / len(input))
                part.backward()
            total += part.detach()
        return total
