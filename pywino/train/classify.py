# SPDX-License-Identifier: BSD-3-Clause
"""A classifier's training run that can be killed at any moment and goes on exactly.

A run is a folder:

    recipe.json         what is trained
    checkpoint.pt       weights, optimizer, sampler, controller, random numbers, plan
    last.safetensors    the weights of the last whole epoch
    best.safetensors    those of the best held-out accuracy
    log.jsonl, curves.csv, curves.png     a row an epoch
    plan.json           the kernels that were chosen (docs/swap.md)

On the CPU, with the same number of threads and the same plan, the weights after a resumed run are
those of an uninterrupted one, bit for bit.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from pywino import planner
from pywino.data import Images
from pywino.models import WeightedAverageStack
from pywino.optim import (
    DynamicBatchController,
    DynamicBatchSampler,
    DynamicBatchSGDM,
    MicroBatches,
)
from pywino.train.checkpoint import clear_leftovers, load_checkpoint, save_checkpoint, write_whole
from pywino.train.curves import write_curves
from pywino.train.recipe import Recipe

_EVALUATION_BATCH = 500
_STEPS_BETWEEN_CHECKS = 20  # of the loss: a GPU need not wait in every step
STACK = ("convpool_cnn_c", "all_cnn_c")  # members beside the recipe's own model


class Listener:
    """What a run tells while it goes on; a progress bar overrides these."""

    def begin(self, epoch: int, epochs: int, samples: int, consumed: int) -> None:
        """An epoch of so many samples, of which some were consumed by the run that is resumed."""

    def step(self, samples: int, batch_size: int, lr: float, momentum: float) -> None:
        """A batch was consumed."""

    def end(self, row: dict) -> None:
        """An epoch has ended; `row` is its line of the log."""


def classify(
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    data: tuple[Images, Images] | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    timeout_seconds: float = 300.0,
    listener: Listener | None = None,
) -> list[dict]:
    """Trains by the recipe into the folder `out`, and returns a row an epoch.

    data: (training images, test images) instead of the recipe's. resume: go on where the run in
    `out` was, from the start if there is none; without it a folder that has a run is refused.
    checkpoint_seconds: the least time between two checkpoints inside an epoch (0: after each step);
    one is written after each epoch in any case. timeout_seconds: how long a rank waits for others.

    Started by torchrun it trains on all ranks: the batch size is that of all together, rank 0
    writes the files, and checkpoints are written after epochs only.

    A row has epoch, phase, loss (of training), held_out_accuracy, test_accuracy, lr, momentum,
    batch_size (at the end of the epoch), steps and seconds (of training alone).

    Raises FloatingPointError when the loss is no number; the last checkpoint stays, and it is one
    of finite weights."""
    out = Path(out)
    with _ranks(device, timeout_seconds) as (rank, ranks, device), _plan(out, ranks):
        run = _Run(recipe, out, data, device, rank, ranks, listener or Listener())
        if (out / "checkpoint.pt").exists():
            if not resume:
                raise FileExistsError(
                    f"pywino.train: out must be a new folder, and {out} has a run already; "
                    "resume it, or give another folder"
                )
            run.load()
        if rank == 0:
            clear_leftovers(out)
        try:
            while not run.control.done:
                run.epoch(checkpoint_seconds)
        except RuntimeError as error:
            if ranks > 1:
                error.add_note(
                    f"pywino.train: rank {rank} of {ranks} stops. If another rank has ended, its "
                    "own message says why; start all of them again with resume"
                )
            raise
        return run.rows


class _Run:
    def __init__(self, recipe, out, data, device, rank, ranks, listener):
        self.recipe, self.out, self.listener = recipe, out, listener
        self.device, self.rank, self.ranks = device, rank, ranks
        train, self.test = recipe.read_data() if data is None else data
        self.train, self.held_out = _prepared(train, self.test, recipe)
        torch.manual_seed(recipe.seed)
        self.net = recipe.build(len(train.classes), train.images.shape[1]).to(device)
        torch.manual_seed(recipe.seed + rank)  # dropout differs between ranks
        model = nn.parallel.DistributedDataParallel(self.net) if ranks > 1 else self.net
        self.opt = DynamicBatchSGDM(
            self.net.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            batch_size=recipe.batch_size,
            weight_decay=recipe.weight_decay,
        )
        self.sampler = DynamicBatchSampler(self.train, self.opt, seed=recipe.seed)
        self.control = DynamicBatchController(
            self.opt, recipe.epochs, every=recipe.every, k=recipe.k, grow=recipe.dynamic_batch
        )
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp)
        self.micro = MicroBatches(model, F.cross_entropy, recipe.micro_batch, lambda: autocast)
        self.rows: list[dict] = []
        self.best = -math.inf
        self._new_epoch()

    def _new_epoch(self):
        self.loss = torch.zeros((), dtype=torch.float64)  # summed over the epoch's samples
        self.steps = 0
        self.seconds = 0.0

    # -------------------------------------------------------------------------------- an epoch

    def epoch(self, checkpoint_seconds):
        self.net.train()
        group = self.opt.param_groups[0]
        begun = written = time.perf_counter()
        before = self.seconds
        consumed = self.sampler.consumed if self.sampler.epoch == self.control.epoch else 0
        self.listener.begin(self.control.epoch, self.recipe.epochs, len(self.train), consumed)
        for indices in self.sampler:
            x, y = self.train.batch(indices, self.device)
            if self.recipe.augment:
                x = _augmented(x)
            loss = self.micro.backward(x, y)
            consumed = self.sampler.consumed
            self.opt.step()
            self.loss = self.loss.to(loss.device) + loss.double() * len(indices)
            self.steps += 1
            now = time.perf_counter()
            self.seconds = before + now - begun
            samples = self.sampler.consumed - consumed
            self.listener.step(samples, self.opt.batch_size, group["lr"], group["momentum"])
            if self.ranks == 1:
                if self.steps % _STEPS_BETWEEN_CHECKS == 0:
                    self._check()
                if now - written >= checkpoint_seconds:
                    self.save()
                    written = time.perf_counter()
        self._check()
        self._check_weights()
        self._close()

    def _close(self):
        loss = _sum(self.loss.to(self.device), self.ranks)
        held_out, test = (self._accuracy(images) for images in (self.held_out, self.test))
        self.control.step(held_out)
        decided = self.control.history[-1]
        row = {
            "epoch": decided["epoch"],
            "phase": decided["phase"],
            "loss": float(loss) / len(self.train),
            "held_out_accuracy": held_out,
            "test_accuracy": test,
            **{name: decided[name] for name in ("lr", "momentum", "batch_size")},
            "steps": self.steps,
            "seconds": self.seconds,
        }
        self.rows.append(row)
        self._new_epoch()
        improved = held_out > self.best
        self.best = max(held_out, self.best)
        if self.rank == 0:
            weights = to_safetensors({k: v.contiguous() for k, v in self.net.state_dict().items()})
            write_whole(self.out / "last.safetensors", weights)
            if improved:
                write_whole(self.out / "best.safetensors", weights)
            self._write_rows()
        self.save()  # last: what a kill before this leaves half done is done again
        self.listener.end(row)

    def _write_rows(self):
        write_whole(
            self.out / "recipe.json", (json.dumps(self.recipe.as_dict(), indent=1) + "\n").encode()
        )
        recipe = self.recipe
        write_curves(
            self.out, self.rows, f"{recipe.model}, {recipe.conv}, {recipe.data}, seed {recipe.seed}"
        )

    def _check(self):
        if not math.isfinite(float(_sum(self.loss, self.ranks))):
            raise FloatingPointError(
                f"pywino.train: the loss must be finite, got {float(self.loss)} in epoch "
                f"{self.control.epoch + 1}, step {self.steps}; {self.out / 'checkpoint.pt'} is "
                "from before it. Use a smaller lr"
            )

    def _check_weights(self):
        if not all(bool(p.isfinite().all()) for p in self.net.parameters()):
            raise FloatingPointError(
                f"pywino.train: weights must be finite, got others in epoch "
                f"{self.control.epoch + 1}; {self.out / 'checkpoint.pt'} is from before. "
                "Use a smaller lr"
            )

    @torch.no_grad()
    def _accuracy(self, images: Images) -> float:
        self.net.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        mine = torch.arange(self.rank, len(images), self.ranks)
        for indices in mine.split(_EVALUATION_BATCH):
            x, y = images.batch(indices, self.device)
            with self.micro.context():
                right += (self.net(x).argmax(1) == y).sum()
        return int(_sum(right, self.ranks)) / len(images)

    # ------------------------------------------------------------------------------ the state

    def save(self):
        random = self._random_states()
        if self.rank != 0:
            return
        self._check_weights()
        plan = self.out / "plan.json"
        state = {
            "recipe": self.recipe.as_dict(),
            "ranks": self.ranks,
            "threads": torch.get_num_threads(),
            "plan": plan.read_text() if plan.exists() else None,
            "model": self.net.state_dict(),
            "optimizer": self.opt.state_dict(),
            "sampler": self.sampler.state_dict(),
            "controller": self.control.state_dict(),
            "random": random,
            "micro_batch": self.micro.size,
            "loss": self.loss,
            "steps": self.steps,
            "seconds": self.seconds,
            "best": self.best,
            "rows": self.rows,
        }
        save_checkpoint(self.out / "checkpoint.pt", state)

    def load(self):
        state = load_checkpoint(self.out / "checkpoint.pt")
        mine = {**self.recipe.as_dict(), "ranks": self.ranks}
        theirs = {**state["recipe"], "ranks": state["ranks"]}
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
        self.net.load_state_dict(state["model"])
        self.opt.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.control.load_state_dict(state["controller"])
        cpu, *gpu = state["random"][self.rank]
        torch.set_rng_state(cpu)
        if gpu:
            torch.cuda.set_rng_state(gpu[0], self.device)
        self.micro.size = state["micro_batch"]
        self.loss, self.steps, self.seconds = state["loss"], state["steps"], state["seconds"]
        self.best, self.rows = state["best"], state["rows"]
        if self.rows and self.rank == 0:  # these may be one epoch behind the checkpoint
            self._write_rows()

    def _random_states(self):
        """One list of states a rank."""
        mine = [torch.get_rng_state()]
        if self.device.type == "cuda":
            mine.append(torch.cuda.get_rng_state(self.device))
        if self.ranks == 1:
            return [mine]
        states = []
        for state in mine:
            gathered = [torch.empty_like(state, device=self.device) for _ in range(self.ranks)]
            dist.all_gather(gathered, state.to(self.device))
            states.append([one.cpu() for one in gathered])
        return [list(one) for one in zip(*states)]


def _prepared(train: Images, test: Images, recipe: Recipe) -> tuple[Images, Images]:
    if recipe.limit is not None and recipe.limit < len(train):
        train = train.subset(range(recipe.limit))
    rest, held_out = train.split(recipe.held_out, recipe.seed)
    if not len(held_out):
        raise ValueError(
            f"pywino.train: held_out must leave an image or more, got {recipe.held_out} of "
            f"{len(train)} images"
        )
    rest.normalise_()
    held_out.normalise_(rest)
    test.normalise_(rest)
    return rest, held_out


def _augmented(x: Tensor) -> Tensor:
    """Each image shifted by up to an eighth of its side, and mirrored or not."""
    n, _, height, width = x.shape
    reach_y, reach_x = height // 8, width // 8
    dy = torch.randint(0, 2 * reach_y + 1, (n,), device=x.device)
    dx = torch.randint(0, 2 * reach_x + 1, (n,), device=x.device)
    mirrored = torch.rand(n, device=x.device) < 0.5
    rows = dy[:, None] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(n, width)
    columns = dx[:, None] + torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(x, (reach_x, reach_x, reach_y, reach_y))
    every = torch.arange(n, device=x.device)
    # Advanced indices around the slice come first: (n, height, width, channels).
    shifted = padded[every[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2).contiguous()


def _sum(value: Tensor, ranks: int) -> Tensor:
    if ranks > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


@contextlib.contextmanager
def _ranks(
    device: torch.device | str, timeout_seconds: float
) -> Iterator[tuple[int, int, torch.device]]:
    """(rank, ranks, this rank's device), connected where torchrun has started several."""
    device = torch.device(device)
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
def _plan(out: Path, ranks: int) -> Iterator[None]:
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


def classify_stack(
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    data: tuple[Images, Images] | None = None,
    device: torch.device | str = "cpu",
    listen: Callable[[str], Listener] = lambda member: Listener(),
    **options,
) -> dict:
    """Trains the recipe's model, ConvPool-CNN-C and All-CNN-C, each by `classify` in a folder of
    its own in `out`, and stacks them with weights that are chosen on the held-out images.

    Writes stack.safetensors and stack.json, and returns what is in the latter: the members'
    weights, and the accuracies of each member and of the stack. Not for several ranks. `listen`
    gives the listener of a member; `options` are those of `classify`."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RuntimeError(
            "pywino.train: a stack must be trained by one process, got WORLD_SIZE="
            f"{os.environ['WORLD_SIZE']}; train the members one by one"
        )
    out = Path(out)
    train, test = recipe.read_data() if data is None else data
    _, held_out = _prepared(train, test, recipe)
    members, networks, test_accuracy = [recipe.model], [], {}
    members += [name for name in STACK if name != recipe.model]
    for name in members:
        width = recipe.width if name in STACK else 1.0
        own = replace(recipe, model=name, width=width)
        rows = classify(
            own, out / name, data=(train, test), device=device, listener=listen(name), **options
        )
        test_accuracy[name] = rows[-1]["test_accuracy"]
        network = own.build(len(train.classes), train.images.shape[1])
        network.load_state_dict(load_file(out / name / "last.safetensors"))
        networks.append(network.to(device).eval())
    stack = WeightedAverageStack(networks).to(device).eval()

    def batches(images):
        for indices in torch.arange(len(images)).split(_EVALUATION_BATCH):
            yield images.batch(indices, device)

    held_out_accuracy = stack.fit_(batches(held_out))
    with torch.no_grad():
        right = sum(int((stack(x).argmax(1) == y).sum()) for x, y in batches(test))
    result = {
        "members": members,
        "weights": stack.weights.tolist(),
        "member_test_accuracy": test_accuracy,
        "held_out_accuracy": held_out_accuracy,
        "test_accuracy": right / len(test),
    }
    write_whole(out / "stack.safetensors", to_safetensors(stack.state_dict()))
    write_whole(out / "stack.json", (json.dumps(result, indent=1) + "\n").encode())
    return result
