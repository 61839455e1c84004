# SPDX-License-Identifier: BSD-3-Clause
"""Who changes learning rate and momentum, and so the batch size: a machine of four states.

    warm-up     eta rises linearly, step by step, from eta_0 / 2 to eta_0 in the first tenth of the
                epochs.
    lr          eta doubles every 2 epochs, until validation accuracy falls.
    momentum    m rises along m'' = -k / m to its highest value, until validation accuracy falls.
    plateau     eta is divided by 10 after 5 epochs without a gain in accuracy.

Both growing states also end where the batch reaches B_max.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from pywino.optim.sgdm import DynamicBatchSGDM

_SLOPE = 0.5  # m'(0), of the paper
_DT = 1e-3  # of the table of m(t)
_LARGEST_MOMENTUM = 0.999


def momentum_curve(momentum: float, k: float, law: str = "m") -> list[float]:
    """m(t) at t = 0, 0.001, … (fractions of all epochs) up to where it is highest.

    m(0) = `momentum`, m'(0) = 0.5. law "m": m'' = -k / m, with which the paper's figure 5(b) is
    drawn. law "y": y'' = k / y for y = 1 - m, which the paper prints. Both have an energy, so the
    highest m is known: m_0 exp(m'(0)^2 / (2 k)) and 1 - (1 - m_0) exp(-m'(0)^2 / (2 k))."""
    accelerations: dict[str, Callable[[float], float]] = {
        "m": lambda m: -k / m,
        "y": lambda m: -k / (1 - m),
    }
    acceleration = accelerations[law]
    m, v, curve = momentum, _SLOPE, [momentum]
    while len(curve) * _DT <= 1:  # the classical Runge-Kutta step of (m, v)' = (v, acceleration(m))
        k1 = v, acceleration(m)
        k2 = v + _DT / 2 * k1[1], acceleration(m + _DT / 2 * k1[0])
        k3 = v + _DT / 2 * k2[1], acceleration(m + _DT / 2 * k2[0])
        k4 = v + _DT * k3[1], acceleration(m + _DT * k3[0])
        m += _DT / 6 * (k1[0] + 2 * k2[0] + 2 * k3[0] + k4[0])
        v += _DT / 6 * (k1[1] + 2 * k2[1] + 2 * k3[1] + k4[1])
        if v <= 0:
            break
        curve.append(m)
    return curve


def _highest(momentum, k, law):
    gain = _SLOPE**2 / (2 * k)
    return momentum * math.exp(gain) if law == "m" else 1 - (1 - momentum) * math.exp(-gain)


def _least_k(momentum, law):
    """The k at which the highest momentum is the largest that is allowed."""
    largest = _LARGEST_MOMENTUM
    ratio = largest / momentum if law == "m" else (1 - momentum) / (1 - largest)
    return _SLOPE**2 / (2 * math.log(ratio))


class DynamicBatchController:
    """Call `step(accuracy)` once an epoch, with the validation accuracy (any number that is larger
    when the model is better); `optimizer.step()` tells it of the samples in between.

    Args:
        optimizer: its `lr` and `momentum` are eta_0 and m_0; several groups keep their ratios.
        epochs: of the whole schedule, which ends there: `done` is True, and one more step raises.
        warmup: the part of the epochs that the warm-up takes; 0 for none.
        every: epochs between two doublings of eta.
        grow: False keeps the batch: the plateau follows the warm-up, and nothing doubles or rises.
        k: of the momentum's law; a smaller one takes m higher.
        law: "m" (m'' = -k / m, as drawn in the paper) or "y" ((1 - m)'' = k / (1 - m), as printed).
        patience, decay: on the plateau eta is multiplied by `decay` after `patience` epochs without
            a new best accuracy.

    `phase`, `reason` (why it is in this phase) and `history` (a dict an epoch) say what it did. In
    a distributed run it decides by the mean of the ranks' accuracies, on all of them alike."""

    PHASES = ("warm-up", "lr", "momentum", "plateau")

    def __init__(
        self,
        optimizer: DynamicBatchSGDM,
        epochs: int,
        *,
        warmup: float = 0.1,
        every: int = 2,
        grow: bool = True,
        k: float = 1.6,
        law: str = "m",
        patience: int = 5,
        decay: float = 0.1,
    ):
        if not isinstance(optimizer, DynamicBatchSGDM):
            raise TypeError(
                "pywino.optim.DynamicBatchController: optimizer must be a DynamicBatchSGDM, got "
                f"{type(optimizer).__name__}; its batch size is what the controller grows"
            )
        for name, value in (("epochs", epochs), ("every", every), ("patience", patience)):
            _require(isinstance(value, int) and value >= 1, name, "an integer >= 1", value)
        _require(0 <= warmup < 1, "warmup", "in [0, 1)", warmup)
        _require(0 < decay < 1, "decay", "between 0 and 1", decay)
        _require(law in ("m", "y"), "law", "'m' or 'y'", law)
        _require(math.isfinite(k) and k > 0, "k", "a finite number above 0", k)
        base_momentum = optimizer.param_groups[0]["base_momentum"]
        # Without momentum there is nothing that these laws could raise.
        rises = 0 < base_momentum < _LARGEST_MOMENTUM
        if rises:
            least = _least_k(base_momentum, law)
            must = f"at least {least:.4g}, where momentum {base_momentum} rises to "
            _require(k >= least, "k", must + f"{_LARGEST_MOMENTUM}", k)
        self.optimizer = optimizer
        self.epochs = epochs
        self.warmup = warmup
        self.every = every
        self.patience = patience
        self.decay = decay
        self._curve = momentum_curve(base_momentum, k, law) if rises else [base_momentum]
        self._highest = _highest(base_momentum, k, law) if rises else base_momentum

        self.epoch = 0  # finished ones
        self._after_warmup = "lr" if grow else "plateau"
        self.phase = "warm-up" if warmup else self._after_warmup
        self.reason = "start"
        self.best = -math.inf
        self.history: list[dict] = []
        self._samples = 0  # since the last epoch's end
        self._factor = 0.5 if warmup else 1.0  # eta / eta_0
        self._momentum = base_momentum
        self._last = -math.inf  # accuracy of the epoch before
        self._waited = 0  # epochs: since a doubling, or without a gain
        self._rises_since = 0.0  # t at which the momentum began to rise
        optimizer.controller = self
        self._set()
        optimizer._resize()

    @property
    def done(self) -> bool:
        """Have all epochs passed?"""
        return self.epoch >= self.epochs

    @property
    def t(self) -> float:
        """The fraction of the schedule that has passed."""
        sampler = self.optimizer.sampler
        part = min(1.0, self._samples / len(sampler.indices)) if sampler is not None else 0.0
        return min(1.0, (self.epoch + part) / self.epochs)

    def advance(self, samples: int) -> None:
        """Called by `optimizer.step()`: so many more samples were consumed."""
        self._samples += samples
        if self.phase == "warm-up":
            self._warm_up()
        elif self.phase == "momentum":
            self._raise_momentum()
        else:
            return
        self._set()

    def step(self, accuracy: float) -> None:
        """An epoch has ended with this validation accuracy."""
        if self.done:
            raise RuntimeError(
                f"pywino.optim.DynamicBatchController.step: the schedule has epochs={self.epochs}, "
                "and all of them have passed; stop, or make a controller of more"
            )
        accuracy = self._agreed(float(accuracy))
        _require(math.isfinite(accuracy), "accuracy", "a finite number", accuracy)
        group = self.optimizer.param_groups[0]
        self.history.append(
            {
                "epoch": self.epoch,
                "phase": self.phase,
                "accuracy": accuracy,
                "lr": group["lr"],
                "momentum": group["momentum"],
                "batch_size": self.optimizer.batch_size,
            }
        )
        self.epoch += 1
        self._samples = 0
        if self.optimizer.sampler is not None:
            self.optimizer.sampler.close()
        fell = accuracy < self._last
        gained = accuracy > self.best
        self._last, self.best = accuracy, max(accuracy, self.best)

        if self.phase == "warm-up":
            self._warm_up()
        elif self.phase == "lr":
            self._grow_lr(fell)
        elif self.phase == "momentum":
            if fell:
                self._enter("plateau", "validation accuracy fell")
            else:
                self._raise_momentum()
        else:
            self._wait(gained)
        self._set()
        self.optimizer._resize()

    # ----------------------------------------------------------------------------- the machine

    def _enter(self, phase, reason):
        self.phase, self.reason, self._waited = phase, reason, 0
        if phase == "momentum":
            self._rises_since = self.t

    def _warm_up(self):
        passed = self.t / self.warmup
        self._factor = min(1.0, 0.5 + 0.5 * passed)
        if passed >= 1:
            self._enter(self._after_warmup, "warm-up has passed")

    def _grow_lr(self, fell):
        if fell:
            self._enter("momentum", "validation accuracy fell")
            return
        self._waited += 1
        if self._waited < self.every:
            return
        if self._fits(2 * self._factor, self._momentum):
            self._factor *= 2
            self._waited = 0
        else:
            self._enter("momentum", "a doubled batch would be above the largest")

    def _raise_momentum(self):
        place = (self.t - self._rises_since) / _DT
        index = math.floor(place)
        if index + 1 < len(self._curve):
            low, high = self._curve[index : index + 2]
            momentum = low + (place - index) * (high - low)
        else:
            momentum = self._highest
        if not self._fits(self._factor, momentum):
            self._enter("plateau", "the batch is the largest")
            return
        self._momentum = momentum
        if momentum == self._highest:
            self._enter("plateau", "momentum is at its highest")

    def _wait(self, gained):
        self._waited = 0 if gained else self._waited + 1
        if self._waited == self.patience:
            self._factor *= self.decay
            self._waited = 0
            self.reason = f"no gain for {self.patience} epochs"

    def _fits(self, factor, momentum):
        largest = self.optimizer.max_batch_size
        if largest is None:
            return True
        lr = factor * self.optimizer.param_groups[0]["base_lr"]
        return self.optimizer.unlimited_batch_size(lr, momentum) <= largest

    def _set(self):
        groups = self.optimizer.param_groups
        first = groups[0]["base_momentum"]
        # 1 - m of all groups by one factor, as eta.
        change = 1 - (1 - self._momentum) / (1 - first)
        for group in groups:
            base = group["base_momentum"]
            group["lr"] = self._factor * group["base_lr"]
            group["momentum"] = self._momentum if base == first else base + (1 - base) * change

    def _agreed(self, accuracy):
        if not (dist.is_available() and dist.is_initialized()):
            return accuracy
        device = self.optimizer.param_groups[0]["params"][0].device
        total = torch.tensor(accuracy, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()

    # ---------------------------------------------------------------------------------- states

    _STATE = (
        *("epochs", "epoch", "phase", "reason", "best"),
        *("_samples", "_factor", "_momentum", "_last", "_waited", "_rises_since"),
    )

    def state_dict(self) -> dict:
        """Plain numbers, texts and the history."""
        state = {name: getattr(self, name) for name in self._STATE}
        return state | {"history": [dict(row) for row in self.history]}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state` was taken; the number of epochs must be the same."""
        if state["epochs"] != self.epochs:
            raise ValueError(
                "pywino.optim.DynamicBatchController.load_state_dict: epochs must be "
                f"{self.epochs}, as here, got {state['epochs']}; a schedule of another length is "
                "another schedule"
            )
        for name in self._STATE:
            setattr(self, name, state[name])
        self.history = [dict(row) for row in state["history"]]
        self._set()
        self.optimizer._resize()


def _require(good, argument, must, got):
    if not good:
        raise ValueError(
            f"pywino.optim.DynamicBatchController: {argument} must be {must}, got {got!r}"
        )
