# SPDX-License-Identifier: BSD-3-Clause
"""Mini-batch SGD with momentum and dynamic batch size, Algorithm 1 of "Efficient ensemble sparse
convolutional neural networks with dynamic batch size" (Zheng et al.):

    B = Stepwise(clip(round(eta (1 - m_0) / (eta_0 (1 - m)) B_0), B_min, B_max)),   B_min = B_0
    v = m v + eta g,    g the mean gradient of the B samples
    theta = theta - v

eta B_0 / (B (1 - m)), the noise of SGD, stays what it is at the start while eta and m grow.
"""

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

STEP = 32  # batch sizes move in multiples of this
_HYSTERESIS = STEP // 2


def batch_size(
    lr: float,
    momentum: float,
    *,
    base_lr: float,
    base_momentum: float,
    base_batch_size: int,
    max_batch_size: int | None = None,
) -> int:
    """B of Algorithm 1 for eta = `lr` and m = `momentum`: a multiple of 32, rounded down, never
    below B_0 = `base_batch_size` and, where B_0 allows it, never above `max_batch_size`."""
    target = _target(lr, momentum, base_lr, base_momentum, base_batch_size)
    return _stepwise(target, base_batch_size, max_batch_size)


def _target(lr, momentum, base_lr, base_momentum, base_batch_size) -> int:
    return round(lr * (1 - base_momentum) / (base_lr * (1 - momentum)) * base_batch_size)


def _stepwise(target, least, most) -> int:
    if most is not None:
        target = min(target, most)
    return max(target // STEP * STEP, least)


class DynamicBatchSGDM(Optimizer):
    """SGD with momentum that says how large the next batch should be: `opt.batch_size`.

    Args:
        params: as for every torch optimizer. The batch size follows the first group.
        lr, momentum: eta_0 and m_0. Whatever changes a group's "lr" or "momentum" later (a
            `DynamicBatchController`, a scheduler of torch's, your own code) changes the batch size.
        batch_size: B_0, the global batch at the start and the least one. None is 128.
        weight_decay: adds weight_decay * theta to g.
        nesterov: theta -= m v + eta g instead of v.
        capacity: the largest batch that fits into memory (`find_capacity`), None for no limit. With
            a sampler the limit is min(capacity, N / 10) for N samples. A limit below B_0 does not
            lower the batch: `MicroBatches` computes one that does not fit in parts.
        foreach: update all parameters of a group by one call (default: where all are on a GPU).
        fused: one kernel a group, torch's own for SGD; not with nesterov.

    The buffer v holds the learning rates of the past, as Algorithm 1 has it: torch.optim.SGD, with
    theta -= eta v, computes the same while eta is constant and something else when it changes.

    Hysteresis: the size grows as soon as Algorithm 1 gives a larger multiple of 32, and shrinks
    only when it gives 16 less than the present size, so that noise in eta or m does not make it
    flutter. It changes in `step()` and in `load_state_dict()` only.
    """

    sampler = None  # sets itself; is told of each step
    controller = None

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.9,
        *,
        batch_size: int | None = None,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        capacity: int | None = None,
        foreach: bool | None = None,
        fused: bool = False,
    ):
        batch_size = 128 if batch_size is None else batch_size
        _require(
            isinstance(batch_size, int) and batch_size >= 1,
            "batch_size",
            "an integer >= 1",
            batch_size,
        )
        _require_capacity(capacity)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "foreach": foreach,
            "fused": fused,
        }
        _require_options(defaults)
        super().__init__(params, defaults)
        self._base_batch_size = batch_size
        self._batch_size = batch_size
        self._capacity = capacity

    def add_param_group(self, param_group):
        _require_options(self.defaults | param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("base_lr", group["lr"])
        group.setdefault("base_momentum", group["momentum"])

    # ------------------------------------------------------------------------------- batch size

    @property
    def batch_size(self) -> int:
        """Samples of the next batch, over all ranks together."""
        return self._batch_size

    @property
    def base_batch_size(self) -> int:
        """B_0."""
        return self._base_batch_size

    @property
    def capacity(self) -> int | None:
        """The largest batch that fits into memory; None for no limit."""
        return self._capacity

    @capacity.setter
    def capacity(self, value: int | None) -> None:
        _require_capacity(value)
        self._capacity = value
        self._resize()

    @property
    def max_batch_size(self) -> int | None:
        """B_max = min(capacity, N / 10), at least B_0; None while neither is known."""
        limits = [] if self._capacity is None else [self._capacity]
        if self.sampler is not None:
            limits.append(round(len(self.sampler.indices) / 10))
        return max(min(limits), self._base_batch_size) if limits else None

    def unlimited_batch_size(self, lr: float, momentum: float) -> int:
        """What Algorithm 1 asks for before the limits and the multiple of 32."""
        group = self.param_groups[0]
        bases = group["base_lr"], group["base_momentum"]
        return _target(lr, momentum, *bases, self._base_batch_size)

    def _resize(self):
        group = self.param_groups[0]
        target = self.unlimited_batch_size(group["lr"], group["momentum"])
        size = _stepwise(target, self._base_batch_size, self.max_batch_size)
        lowest = max(self._batch_size - _HYSTERESIS, self._base_batch_size)
        within_limit = self.max_batch_size is None or self._batch_size <= self.max_batch_size
        if size > self._batch_size or target <= lowest or not within_limit:
            self._batch_size = size

    # ------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure=None):
        """One update, then the size of the next batch. Returns what `closure` (if given) does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        self.batch_done()
        return loss

    def batch_done(self) -> None:
        """Counts a batch as consumed. `step` does it; call it yourself for a batch without a step,
        such as one that a GradScaler skips."""
        samples = self.sampler.consume() if self.sampler is not None else 0
        if self.controller is not None:
            self.controller.advance(samples)
        self._resize()

    def _update(self, params: list[Tensor], group: dict) -> None:
        for p in params:
            if p.grad.is_sparse:
                raise RuntimeError(
                    "pywino.optim.DynamicBatchSGDM: gradients must be dense, got a sparse one; "
                    "use torch.optim.SGD for this parameter"
                )
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(
                    p, memory_format=torch.preserve_format
                )
        grads = [p.grad for p in params]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        foreach = group["foreach"]
        if foreach is None:
            foreach = all(p.is_cuda for p in params)
        how = _fused if group["fused"] else _foreach if foreach else _one_by_one
        how(params, grads, buffers, group)

    # ----------------------------------------------------------------------------------- states

    def state_dict(self):
        batch = {
            "size": self._batch_size,
            "base": self._base_batch_size,
            "capacity": self._capacity,
        }
        return super().state_dict() | {"batch": batch}

    def load_state_dict(self, state_dict):
        """Takes the state of an optimizer of the same parameters, batch sizes included."""
        if "batch" not in state_dict:
            raise ValueError(
                "pywino.optim.DynamicBatchSGDM.load_state_dict: state_dict must be one of a "
                f"DynamicBatchSGDM, got keys {sorted(state_dict)}; load the parameters only"
            )
        super().load_state_dict(state_dict)
        batch = state_dict["batch"]
        self._batch_size = batch["size"]
        self._base_batch_size = batch["base"]
        self._capacity = batch["capacity"]

    def __getstate__(self):
        names = ("_batch_size", "_base_batch_size", "_capacity")
        return super().__getstate__() | {name: getattr(self, name) for name in names}


def _one_by_one(params, grads, buffers, group):
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    for p, g, v in zip(params, grads, buffers):
        if decay:
            g = g.add(p, alpha=decay)
        v.mul_(momentum).add_(g, alpha=lr)
        if group["nesterov"]:
            p.sub_(v, alpha=momentum).sub_(g, alpha=lr)
        else:
            p.sub_(v)


def _foreach(params, grads, buffers, group):
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    if decay:
        grads = torch._foreach_add(grads, params, alpha=decay)
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, grads, alpha=lr)
    if group["nesterov"]:
        torch._foreach_sub_(params, buffers, alpha=momentum)
        torch._foreach_sub_(params, grads, alpha=lr)
    else:
        torch._foreach_sub_(params, buffers)


def _fused(params, grads, buffers, group):
    """torch's kernel computes v = m v + (1 - dampening) g, theta -= lr v (without momentum: theta
    -= lr g): Algorithm 1 is lr = 1 and dampening = 1 - eta."""
    lr, momentum = group["lr"], group["momentum"]
    if not momentum:
        for v, g, p in zip(buffers, grads, params):  # v = eta g, for when momentum comes back
            torch.add(g, p, alpha=group["weight_decay"], out=v).mul_(lr)
        buffers = []
    torch._fused_sgd_(
        params,
        grads,
        buffers,
        weight_decay=group["weight_decay"],
        momentum=momentum,
        lr=1.0 if momentum else lr,
        dampening=1 - lr if momentum else 0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def _require(good, argument, must, got):
    if not good:
        raise ValueError(f"pywino.optim.DynamicBatchSGDM: {argument} must be {must}, got {got!r}")


def _require_options(group):
    """What a group may ask for: B of Algorithm 1 divides by eta_0 and by 1 - m."""
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    _require(math.isfinite(lr) and lr > 0, "lr", "a finite number above 0", lr)
    _require(0 <= momentum < 1, "momentum", "in [0, 1)", momentum)
    good = math.isfinite(decay) and decay >= 0
    _require(good, "weight_decay", "a finite number, at least 0", decay)
    if group["fused"] and (group["nesterov"] or group["foreach"]):
        what = "nesterov" if group["nesterov"] else "foreach"
        raise ValueError(
            f"pywino.optim.DynamicBatchSGDM: fused=True must be without {what}=True; "
            "use foreach=True with fused=False"
        )


def _require_capacity(value):
    good = value is None or (isinstance(value, int) and value >= 1)
    _require(good, "capacity", "None or an integer >= 1", value)
