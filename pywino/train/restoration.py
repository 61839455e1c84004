# SPDX-License-Identifier: BSD-3-Clause
"""Training of networks that restore pictures: deraining, deblurring.

A recipe (`DerainRecipe`) says what is trained on what. It builds a `Learner`, which knows what a
step is; the run does the rest: data, learning rate, log, pictures, checkpoints.

The batch of a step depends on the recipe's seed, the rank, and the step alone (or, with a dynamic
batch, the samples before it), so a resumed run sees the same ones.
"""

import hashlib
import io
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pywino.data.pairs import Pairs, paired_photos
from pywino.data.photos import photos
from pywino.losses import psnr, ssim
from pywino.models.weights import load_weights
from pywino.optim import DynamicBatchController, DynamicBatchSampler, DynamicBatchSGDM
from pywino.train.checkpoint import write_whole
from pywino.train.fields import Fields, option
from pywino.train.run import Listener, Run, connected, own_plan, total

Loss = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
_SAMPLES = 4  # pictures a sheet
_WORKERS = 4  # threads that make batches for a GPU


class Learner:
    """A network, its loss and its optimizer. A method that trains several networks (a
    discriminator) overrides `__init__` and `step`.

    loss: (restored, clean, degraded) -> its terms, weighted: their sum is minimised.

    The run reads `networks` and `optimizers`, by name; the first network restores. It puts
    DistributedDataParallel's wrappers into `models` where there are several ranks, and sets
    `autocast`: call the networks by `models`, inside `with self.autocast():`."""

    def __init__(self, net: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer):
        self.networks: dict[str, nn.Module] = {"model": net}
        self.optimizers: dict[str, torch.optim.Optimizer] = {"optimizer": optimizer}
        self.models = dict(self.networks)
        self.autocast: Callable[[], AbstractContextManager] = nullcontext
        self.loss = loss

    def to(self, device: torch.device) -> None:
        """Moves the networks, and the loss where it is a module. A method whose loss has modules of
        its own moves these too."""
        for module in (*self.networks.values(), self.loss):
            if isinstance(module, nn.Module):
                module.to(device)

    def step(self, degraded: Tensor, clean: Tensor) -> dict[str, Tensor]:
        """Trains on a batch (in 0..1). Returns the terms of the loss."""
        with self.autocast():
            restored = self.models["model"](degraded)
        terms = self.loss(restored.float(), clean, degraded)
        optimizer = self.optimizers["optimizer"]
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

    def restore(self, degraded: Tensor) -> Tensor:
        """Pictures in 0..1 -> the same restored, in 0..1."""
        with self.autocast():
            restored = next(iter(self.networks.values()))(degraded)
        return restored.float().clamp(0, 1)


@dataclass(frozen=True)
class RestorationRecipe(Fields):
    """What recipes of restoration have in common. A subclass adds its own fields, and defines
    `build()` and, for pairs that are made from clean photos, `degrade()`."""

    data: str = option("", "Folder or archive (.zip, .whl, .tar) of the photos.")
    only: tuple[str, ...] = option((), "Patterns, one of which a photo's name must match.")
    paired: bool = option(False, "DATA has degraded pictures too (rain and norain, …).")
    held_out: float = option(0.2, "Part of the photos that is never trained on.")
    epochs: int = option(100, "An epoch is --steps steps of --batch-size crops.")
    steps: int = option(100, "Steps an epoch; fewer where the batch grows.")
    batch_size: int = option(4, "Of all ranks together, at the start.")
    crop: int = option(64, "Pixels a side.")
    lr: float = option(1e-3, "At the start.")
    schedule: str = option(
        "steps", "lr of Adam: constant; times 0.2 after 30, 50, 80 % (steps); to 0 (cosine)."
    )
    optimizer: str = option("adam", "adam, or sgdm: the one with the dynamic batch.")
    momentum: float = option(0.9, "Of sgdm.")
    dynamic_batch: bool = option(False, "Let lr, momentum and batch of sgdm grow.")
    amp: bool = option(False, "Forward passes in bfloat16.")
    init: str | None = option(None, "Weights to start from.")
    validate: int = option(8, "Held-out photos that are scored after each epoch.")
    largest: int = option(256, "Pixels a side of what is scored of them.")
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not self.data:
            self.refuse("data", "a folder or an archive of photos")
        if not 0 < self.held_out < 1:
            self.refuse("held_out", "between 0 and 1")
        self.at_least_one("epochs", "steps", "batch_size", "crop", "validate")
        for name, known in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                self.refuse(name, f"one of {', '.join(known)}")
        if self.dynamic_batch and self.optimizer != "sgdm":
            self.refuse("dynamic_batch", "off for adam (sgdm has the dynamic batch)")

    def read_data(self) -> tuple[Pairs, Pairs]:
        """(pairs to train on, held-out pairs)."""
        if self.paired:
            pairs = paired_photos(self.data)
        else:
            pairs = Pairs(photos(self.data, only=self.only), *self.degrade())
        return pairs.split(self.held_out)

    def degrade(self) -> tuple:
        """What `Pairs` takes behind the clean photos: (function,) or (function, margin)."""
        raise ValueError(
            "pywino.train: paired must be set for this recipe: it degrades no pictures itself"
        )

    def build(self) -> Learner:
        """The learner, its network with fresh weights or those of `init`."""
        raise NotImplementedError

    def optimize(self, net: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the network that restores."""
        if self.optimizer == "adam":
            return torch.optim.Adam(net.parameters(), self.lr, fused=True)
        return DynamicBatchSGDM(
            net.parameters(), lr=self.lr, momentum=self.momentum, batch_size=self.batch_size
        )

    def metadata(self) -> dict[str, str]:
        """What the files of weights say of the network beside its tensors."""
        return {}

    def started(self, net: nn.Module) -> nn.Module:
        """`net` with the weights of `init`."""
        return net if self.init is None else load_weights(net, self.init)


OPTIMIZERS = ("adam", "sgdm")
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    # PReNet's and SAPNet's: at epochs 30, 50 and 80 of 100.
    "steps": lambda done: 0.2 ** sum(done >= milestone for milestone in (0.3, 0.5, 0.8)),
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


def train_restoration(
    recipe: RestorationRecipe,
    out: str | os.PathLike,
    *,
    data: tuple[Pairs, Pairs] | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    timeout_seconds: float = 300.0,
    listener: Listener | None = None,
) -> list[dict]:
    """Trains by the recipe into the folder `out`, and returns a row an epoch. Beside what
    `pywino.train.run` says, the folder gets samples/, a sheet an epoch of held-out pictures: as
    they were, restored, the truth (needs Pillow).

    data: (pairs to train on, held-out pairs) instead of the recipe's. The other arguments, and what
    is raised, are those of `classify`.

    A row has epoch, loss and each of its terms, as in l1_loss (means of training), psnr and ssim
    (means over the held-out pictures, RGB), input_psnr and input_ssim (of the degraded ones), lr
    (at the end; with sgdm also momentum and batch_size), steps and seconds (of training alone)."""
    out = Path(out)
    with connected(device, timeout_seconds) as (rank, ranks, device), own_plan(out, ranks):
        run = _Run(recipe, out, data, device, rank, ranks, listener or Listener())
        return run.train(resume, checkpoint_seconds)


class _Run(Run):
    panels = {  # noqa: RUF012
        "PSNR, dB": ("psnr", "input_psnr"),
        "SSIM": ("ssim", "input_ssim"),
        "loss": ("loss",),
        "learning rate": ("lr",),
    }

    def __init__(self, recipe, out, data, device, rank, ranks, listener):
        super().__init__(recipe, out, device, rank, ranks, listener)
        self.title = f"{type(recipe).__name__.removesuffix('Recipe')}, seed {recipe.seed}"
        if recipe.batch_size % ranks:
            recipe.refuse("batch_size", f"a multiple of the {ranks} ranks")
        self.pairs, self.held_out = recipe.read_data() if data is None else data
        if not len(self.pairs) or not len(self.held_out):
            raise ValueError(
                "pywino.train: held_out must leave a photo or more on either side, got "
                f"{len(self.pairs)} to train on and {len(self.held_out)} held out"
            )
        torch.manual_seed(recipe.seed)
        self.learner = recipe.build()
        self.networks = self.learner.networks
        self.learner.to(device)
        torch.manual_seed(recipe.seed + rank)  # dropout differs between ranks
        if ranks > 1:
            self.learner.models = {
                name: nn.parallel.DistributedDataParallel(net)
                for name, net in self.networks.items()
            }
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp)
        self.learner.autocast = lambda: autocast
        self.metadata = recipe.metadata()
        self.main = next(iter(self.learner.optimizers.values()))
        self.sampler = self.control = None  # of a dynamic batch
        if isinstance(self.main, DynamicBatchSGDM):
            self.sampler = DynamicBatchSampler(self.samples, self.main, shuffle=False)
            self.control = DynamicBatchController(
                self.main, recipe.epochs, grow=recipe.dynamic_batch
            )
        self.first_lr = {
            name: [group["lr"] for group in optimizer.param_groups]
            for name, optimizer in self.learner.optimizers.items()
            if optimizer is not self.main or self.control is None
        }
        self.best = -math.inf

    def new_epoch(self):
        super().new_epoch()
        self.terms: dict[str, Tensor] = {}

    @property
    def done(self):
        return len(self.rows) >= self.recipe.epochs

    # ---------------------------------------------------------------------------------- training

    @property
    def samples(self) -> int:
        """Crops an epoch, of all ranks."""
        return self.recipe.steps * self.recipe.batch_size

    @property
    def consumed(self) -> int:
        """How many of them were trained on."""
        if self.sampler is None:
            return self.steps * self.recipe.batch_size
        return self.sampler.consumed if self.sampler.epoch == len(self.rows) else 0

    def batches(self):
        learner, epoch = self.learner, len(self.rows)
        for net in self.networks.values():
            net.train()
        self.listener.begin(epoch, self.recipe.epochs, self.samples, self.consumed)
        for degraded, clean in self._crops():
            before = self.consumed
            self._set_lr((epoch + before / self.samples) / self.recipe.epochs)
            values = {"lr": self.main.param_groups[0]["lr"]}
            terms = learner.step(degraded.to(self.device), clean.to(self.device))
            if self.sampler is None:
                samples = self.recipe.batch_size
            else:
                if self.consumed == before:  # the learner has made no step of its optimizer
                    self.main.batch_done()
                samples = self.consumed - before
                values["batch"] = samples
            loss = sum(terms.values()).double()
            self.loss = self.loss.to(loss.device) + loss * len(clean)
            for name, term in terms.items():
                self.terms[name] = self.terms.get(name, 0) + term.double() * len(clean)
            yield samples, values

    def _set_lr(self, done: float) -> None:
        """lr after this part of all steps, of the optimizers that have no controller."""
        factor = SCHEDULES[self.recipe.schedule](done)
        for name, first in self.first_lr.items():
            for group, lr in zip(self.learner.optimizers[name].param_groups, first):
                group["lr"] = lr * factor

    def _crops(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches that are left of the epoch, of this rank."""
        if self.device.type == "cpu":  # the network needs the cores itself
            yield from (self._batch(*one) for one in self._draws())
            return
        with ThreadPoolExecutor(_WORKERS) as pool:
            ahead = deque()
            for one in self._draws():
                ahead.append(pool.submit(self._batch, *one))
                if len(ahead) > 2 * _WORKERS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _draws(self) -> Iterator[tuple[int, int]]:
        """(what a batch's crops are drawn by, their number)."""
        epoch, recipe = len(self.rows), self.recipe
        if self.sampler is None:
            for step in range(epoch * recipe.steps + self.steps, (epoch + 1) * recipe.steps):
                yield step, recipe.batch_size // self.ranks
            return
        for indices in self.sampler:
            yield epoch * self.samples + indices[0], len(indices)

    def _batch(self, place: int, count: int) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        digest = hashlib.sha256(f"{recipe.seed}:{place}:{self.rank}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return self.pairs.crops(count, recipe.crop, generator)

    # -------------------------------------------------------------------------------- evaluation

    def close(self):
        loss = float(total(self.loss.to(self.device), self.ranks)) / self.samples
        terms = {
            f"{name}_loss": float(total(term, self.ranks)) / self.samples
            for name, term in self.terms.items()
        }
        scores = self._scores()
        group = self.main.param_groups[0]
        row = {"epoch": len(self.rows), "loss": loss, **terms, **scores, "lr": group["lr"]}
        if self.control is not None:
            row |= {"momentum": group["momentum"], "batch_size": self.main.batch_size}
            self.control.step(scores["psnr"])
        improved = scores["psnr"] > self.best
        self.best = max(scores["psnr"], self.best)
        return row, improved

    @torch.no_grad()
    def _scores(self) -> dict[str, float]:
        for net in self.networks.values():
            net.eval()
        count = min(self.recipe.validate, len(self.held_out))
        names = ("psnr", "ssim", "input_psnr", "input_ssim")
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        sheet = []
        for i in range(self.rank, count, self.ranks):
            degraded, clean = (
                x[None].to(self.device) for x in self.held_out.picture(i, self.recipe.largest)
            )
            restored = self.learner.restore(degraded)
            sums += torch.stack(
                [
                    score
                    for x in (restored, degraded)
                    for score in (psnr(x, clean)[0], ssim(x, clean, "valid")[0])
                ]
            )
            if len(sheet) < _SAMPLES:
                sheet.append(torch.cat([degraded, restored, clean], 3)[0].cpu())
        if self.rank == 0:
            self._write_samples(sheet)
        return dict(zip(names, (total(sums, self.ranks) / count).tolist()))

    def _write_samples(self, sheet: list[Tensor]) -> None:
        try:
            from PIL import Image
        except ImportError:
            return
        height = sum(row.shape[1] for row in sheet)
        width = max(row.shape[2] for row in sheet)
        canvas, top = torch.ones(3, height, width), 0
        for row in sheet:
            canvas[:, top : top + row.shape[1], : row.shape[2]] = row
            top += row.shape[1]
        pixels = canvas.mul(255).round().byte().permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        write_whole(self.out / "samples" / f"epoch-{len(self.rows) + 1:04}.png", buffer.getvalue())

    # --------------------------------------------------------------------------------- the state

    def state(self):
        optimizers = {name: o.state_dict() for name, o in self.learner.optimizers.items()}
        state = {**optimizers, "terms": self.terms}
        if self.control is None:
            return state
        return state | {
            "sampler": self.sampler.state_dict(),
            "control": self.control.state_dict(),
        }

    def set_state(self, state):
        for name, optimizer in self.learner.optimizers.items():
            optimizer.load_state_dict(state[name])
        self.terms = {name: term.to(self.device) for name, term in state["terms"].items()}
        if self.control is not None:
            self.sampler.load_state_dict(state["sampler"])
            self.control.load_state_dict(state["control"])
