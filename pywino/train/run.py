# SPDX-License-Identifier: BSD-3-Clause
"""What every training run does: it owns a folder, can be killed at any moment, goes on exactly,
trains on several ranks, and stops when a number is none.

A run is a folder:

    recipe.json         what is trained
    checkpoint.pt       the whole state, the kernels that were chosen (docs/swap.md) among it
    last.safetensors    the weights of the last whole epoch
    best.safetensors    those of the best held-out score
    log.jsonl, curves.csv, curves.png     a row an epoch
    plan.json           the kernels that were chosen

On the CPU, with the same number of threads and the same plan, the weights after a resumed run are
those of an uninterrupted one, bit for bit.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from pywino import planner
from pywino.train.checkpoint import clear_leftovers, load_checkpoint, save_checkpoint, write_whole
from pywino.train.curves import write_curves

_STEPS_BETWEEN_CHECKS = 20  # of the loss: a GPU need not wait in every step


class Listener:
    """What a run tells while it goes on; a progress bar overrides these."""

    def begin(self, epoch: int, epochs: int, samples: int, consumed: int) -> None:
        """An epoch of so many samples, of which some were consumed by the run that is resumed."""

    def step(self, samples: int, values: dict[str, float]) -> None:
        """A batch was consumed; `values` (the learning rate and the like) are its own."""

    def end(self, row: dict) -> None:
        """An epoch has ended; `row` is its line of the log."""


class Run:
    """The part that runs have in common. A subclass sets `networks` (name -> module; the first is
    what is trained for), `best` and whatever it needs, and defines

    done                     whether all epochs were trained
    batches()                trains on the rest of an epoch, and yields (samples, values) a step;
                             it adds to `loss`, the sum over the epoch's samples
    close() -> (row, bool)   evaluates; the row of the epoch, and whether it is the best so far
    state(), set_state()     what it would miss after a kill
    """

    title = ""
    metadata: dict[str, str] = {}  # noqa: RUF012  of the files of weights
    panels: dict[str, tuple[str, ...]]
    keep: str | None = None  # a name, set by close(): the weights of this epoch stay in that file

    def __init__(self, recipe, out, device, rank, ranks, listener):
        self.recipe, self.out, self.listener = recipe, out, listener
        self.device, self.rank, self.ranks = device, rank, ranks
        self.networks: dict[str, nn.Module] = {}
        self.rows: list[dict] = []
        self.new_epoch()

    def new_epoch(self):
        self.loss = torch.zeros((), dtype=torch.float64)
        self.steps = 0
        self.seconds = 0.0

    def train(self, resume: bool, checkpoint_seconds: float) -> list[dict]:
        """All epochs that are left. Returns a row an epoch."""
        if (self.out / "checkpoint.pt").exists():
            if not resume:
                raise FileExistsError(
                    f"pywino.train: out must be a new folder, and {self.out} has a run already; "
                    "resume it, or give another folder"
                )
            self.load()
        if self.rank == 0:
            clear_leftovers(self.out)
        try:
            while not self.done:
                self._epoch(checkpoint_seconds)
        except RuntimeError as error:
            if self.ranks > 1:
                error.add_note(
                    f"pywino.train: rank {self.rank} of {self.ranks} stops. If another rank has "
                    "ended, its own message says why; start all of them again with resume"
                )
            raise
        return self.rows

    def _epoch(self, checkpoint_seconds):
        begun = written = time.perf_counter()
        before = self.seconds
        for samples, values in self.batches():
            self.steps += 1
            now = time.perf_counter()
            self.seconds = before + now - begun
            self.listener.step(samples, values)
            if self.ranks == 1:
                if self.steps % _STEPS_BETWEEN_CHECKS == 0:
                    self._check_loss()
                if now - written >= checkpoint_seconds:
                    self.save()
                    written = time.perf_counter()
        self._check_loss()
        self._check_weights()
        row, improved = self.close()
        row |= {"steps": self.steps, "seconds": self.seconds}
        self.rows.append(row)
        self.new_epoch()
        if self.rank == 0:
            net = next(iter(self.networks.values()))
            tensors = {name: value.contiguous() for name, value in net.state_dict().items()}
            weights = to_safetensors(tensors, self.metadata or None)
            write_whole(self.out / "last.safetensors", weights)
            if improved:
                write_whole(self.out / "best.safetensors", weights)
            if self.keep:
                write_whole(self.out / f"{self.keep}.safetensors", weights)
            self._write_rows()
        self.save()  # last: what a kill before this leaves half done is done again
        self.listener.end(row)

    def _write_rows(self):
        recipe = json.dumps(self.recipe.as_dict(), indent=1) + "\n"
        write_whole(self.out / "recipe.json", recipe.encode())
        write_curves(self.out, self.rows, self.title, self.panels)

    def _check_loss(self):
        if not math.isfinite(float(total(self.loss.to(self.device), self.ranks))):
            raise FloatingPointError(
                f"pywino.train: the loss must be finite, got {float(self.loss)} in epoch "
                f"{len(self.rows) + 1}, step {self.steps}; {self.out / 'checkpoint.pt'} is "
                "from before it. Use a smaller lr"
            )

    def _check_weights(self):
        values = [v for net in self.networks.values() for v in net.state_dict().values()]
        if not all(bool(v.isfinite().all()) for v in values):
            raise FloatingPointError(
                f"pywino.train: weights must be finite, got others in epoch "
                f"{len(self.rows) + 1}; {self.out / 'checkpoint.pt'} is from before. "
                "Use a smaller lr"
            )

    # ------------------------------------------------------------------------------ the state

    def save(self):
        random = _random_states(self.device, self.ranks)
        if self.rank != 0:
            return
        self._check_weights()
        plan = self.out / "plan.json"
        state = {
            "recipe": self.recipe.as_dict(),
            "ranks": self.ranks,
            "threads": torch.get_num_threads(),
            "plan": plan.read_text() if plan.exists() else None,
            **{name: net.state_dict() for name, net in self.networks.items()},
            "random": random,
            "loss": self.loss,
            "steps": self.steps,
            "seconds": self.seconds,
            "best": self.best,
            "rows": self.rows,
            **self.state(),
        }
        save_checkpoint(self.out / "checkpoint.pt", state)

    def load(self):
        state = load_checkpoint(self.out / "checkpoint.pt")
        mine = {**self.recipe.as_dict(), "ranks": self.ranks}
        # What a recipe did not have yet when the checkpoint was written is as if it was not given.
        defaults = {field.name: field.default for field in fields(self.recipe)}
        theirs = {**defaults, **state["recipe"], "ranks": state["ranks"]}
        other = [name for name in mine if mine[name] != theirs.get(name)]
        if other:
            text = ", ".join(f"{n} {theirs.get(n)!r} (here {mine[n]!r})" for n in other)
            raise ValueError(
                f"pywino.train: checkpoint {self.out / 'checkpoint.pt'} must be of this recipe, "
                f"got one with {text}; resume with that recipe or give another folder"
            )
        if state["plan"] is not None and self.rank == 0:
            write_whole(self.out / "plan.json", state["plan"].encode())
            planner.reset()
        for name, net in self.networks.items():
            net.load_state_dict(state[name])
        cpu, *gpu = state["random"][self.rank]
        torch.set_rng_state(cpu)
        if gpu:
            torch.cuda.set_rng_state(gpu[0], self.device)
        self.loss, self.steps, self.seconds = state["loss"], state["steps"], state["seconds"]
        self.best, self.rows = state["best"], state["rows"]
        self.set_state(state)
        if self.rows and self.rank == 0:  # these may be one epoch behind the checkpoint
            self._write_rows()


def _random_states(device: torch.device, ranks: int) -> list[list[Tensor]]:
    """One list of states a rank."""
    mine = [torch.get_rng_state()]
    if device.type == "cuda":
        mine.append(torch.cuda.get_rng_state(device))
    if ranks == 1:
        return [mine]
    states = []
    for state in mine:
        gathered = [torch.empty_like(state, device=device) for _ in range(ranks)]
        dist.all_gather(gathered, state.to(device))
        states.append([one.cpu() for one in gathered])
    return [list(one) for one in zip(*states)]


def total(value: Tensor, ranks: int) -> Tensor:
    """The sum over ranks."""
    if ranks > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def _device(device: torch.device | str) -> torch.device:
    """cpu or a GPU that is there, else a ValueError that says so."""
    try:
        known = torch.device(device)
    except RuntimeError:  # torch's own message lists twenty types
        known = None
    if known is None or known.type not in ("cpu", "cuda"):
        raise ValueError(f"pywino.train: device must be cpu or cuda, got {str(device)!r}")
    if known.type == "cuda" and (known.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        must = f"cuda:0 to cuda:{count - 1}" if count else "cpu, as torch finds no GPU here"
        raise ValueError(f"pywino.train: device must be {must}, got {str(device)!r}")
    return known


@contextlib.contextmanager
def connected(
    device: torch.device | str, timeout_seconds: float
) -> Iterator[tuple[int, int, torch.device]]:
    """(rank, ranks, this rank's device), connected where torchrun has started several."""
    device = _device(device)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1 or dist.is_initialized():
        started = dist.is_available() and dist.is_initialized()
        yield (dist.get_rank(), dist.get_world_size(), device) if started else (0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        yield dist.get_rank(), ranks, device
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def own_plan(out: Path, ranks: int) -> Iterator[None]:
    """The run's own file of kernel choices, unless the user has named one. Several ranks measure
    nothing, so that they choose alike."""
    if "PYWINO_PLAN" in os.environ:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    os.environ["PYWINO_PLAN"] = "static" if ranks > 1 else str(out / "plan.json")
    planner.reset()
    try:
        yield
    finally:
        del os.environ["PYWINO_PLAN"]
        planner.reset()
