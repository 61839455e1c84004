# SPDX-License-Identifier: BSD-3-Clause
"""A classifier's training run."""

import importlib.util
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from pywino.data import Images
from pywino.models import WeightedAverageStack
from pywino.optim import (
    DynamicBatchController,
    DynamicBatchSampler,
    DynamicBatchSGDM,
    MicroBatches,
)
from pywino.train.checkpoint import write_whole
from pywino.train.curves import write_kernels
from pywino.train.recipe import Recipe
from pywino.train.run import Listener, Run, connected, own_plan, total

_EVALUATION_BATCH = 500
STACK = ("convpool_cnn_c", "all_cnn_c")  # members beside the recipe's own model


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
    plot_kernels: bool = False,
) -> list[dict]:
    """Trains by the recipe into the folder `out`, and returns a row an epoch.

    data: (training images, test images) instead of the recipe's. resume: go on where the run in
    `out` was, from the start if there is none; without it a folder that has a run is refused.
    checkpoint_seconds: the least time between two checkpoints inside an epoch (0: after each step);
    one is written after each epoch in any case. timeout_seconds: how long a rank waits for others.
    plot_kernels: draw kernels of the second layer at the end, at each sparsity (`write_kernels`).

    Started by torchrun it trains on all ranks: the batch size is that of all together, rank 0
    writes the files, and checkpoints are written after epochs only.

    A row has epoch, phase, loss (of training), held_out_accuracy, test_accuracy, lr, momentum,
    batch_size (at the end of the epoch), steps and seconds (of training alone); with
    `recipe.sparsity` the sparsity of the pruned layers too. Then best.safetensors is the best of
    the present sparsity, and sparsity-30.safetensors, say, has the weights after the last epoch
    with that many per cent of zeros.

    Raises FloatingPointError when the loss is no number; the last checkpoint stays, and it is one
    of finite weights."""
    if plot_kernels and importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(
            "pywino.train: plot_kernels needs matplotlib; type `pip install matplotlib`"
        )
    out = Path(out)
    with connected(device, timeout_seconds) as (rank, ranks, device), own_plan(out, ranks):
        run = _Run(recipe, out, data, device, rank, ranks, listener or Listener())
        rows = run.train(resume, checkpoint_seconds)
        if plot_kernels and rank == 0:
            write_kernels(out, run.net)
        return rows


class _Run(Run):
    panels = {  # noqa: RUF012
        "accuracy": ("test_accuracy", "held_out_accuracy"),
        "batch size": ("batch_size",),
        "learning rate": ("lr",),
        "momentum": ("momentum",),
    }

    def __init__(self, recipe, out, data, device, rank, ranks, listener):
        super().__init__(recipe, out, device, rank, ranks, listener)
        self.title = f"{recipe.model}, {recipe.conv}, {recipe.data}, seed {recipe.seed}"
        train, test = recipe.read_data() if data is None else data
        self.images, self.held_out, self.test = (
            _near(images, device) for images in (*_prepared(train, test, recipe), test)
        )
        torch.manual_seed(recipe.seed)
        net = recipe.build(len(train.classes), train.images.shape[1])
        self.net = net.to(device, memory_format=torch.channels_last)
        self.networks = {"model": self.net}
        self.pruner = recipe.pruner(self.net)
        if self.pruner is not None:
            self.panels = self.panels | {"sparsity": ("sparsity",), "loss": ("loss",)}
        torch.manual_seed(recipe.seed + rank)  # dropout differs between ranks
        # Parameters and buffers are the network's own either way.
        model = torch.compile(self.net) if recipe.compile else self.net
        if ranks > 1:
            model = nn.parallel.DistributedDataParallel(model)
        self.opt = DynamicBatchSGDM(
            self.net.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            batch_size=recipe.batch_size,
            weight_decay=recipe.weight_decay,
        )
        self.sampler = DynamicBatchSampler(self.images, self.opt, seed=recipe.seed)
        self.control = DynamicBatchController(
            self.opt, recipe.all_epochs, every=recipe.every, k=recipe.k, grow=recipe.dynamic_batch
        )
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp)
        self.micro = MicroBatches(model, F.cross_entropy, recipe.micro_batch, lambda: autocast)
        self.best = -math.inf

    @property
    def done(self):
        return self.control.done

    def _prune(self):
        """Prunes to what is due in this epoch: at its start, once."""
        pruned_epochs = self.control.epoch - self.recipe.epochs
        if self.pruner is None or pruned_epochs < 0:
            return
        while self.pruner.position <= pruned_epochs // self.recipe.prune_epochs:
            self.pruner.step()
            self.best = -math.inf  # a network with fewer zeros is no rival

    def batches(self):
        self._prune()
        self.net.train()
        group = self.opt.param_groups[0]
        consumed = self.sampler.consumed if self.sampler.epoch == self.control.epoch else 0
        self.listener.begin(self.control.epoch, self.control.epochs, len(self.images), consumed)
        for indices in self.sampler:
            x, y = self.images.batch(indices, self.device)
            if self.recipe.augment:
                x = _augmented(x)
            loss = self.micro.backward(x, y)
            consumed = self.sampler.consumed
            self.opt.step()
            self.loss = self.loss.to(loss.device) + loss.double() * len(indices)
            now = {name: group[name] for name in ("lr", "momentum")}
            yield self.sampler.consumed - consumed, {"batch": self.opt.batch_size, **now}

    def close(self):
        loss = total(self.loss.to(self.device), self.ranks)
        held_out, test = (self._accuracy(images) for images in (self.held_out, self.test))
        self.control.step(held_out)
        decided = self.control.history[-1]
        row = {
            "epoch": decided["epoch"],
            "phase": decided["phase"],
            "loss": float(loss) / len(self.images),
            "held_out_accuracy": held_out,
            "test_accuracy": test,
            **{name: decided[name] for name in ("lr", "momentum", "batch_size")},
        }
        self.keep = None
        if self.pruner is not None:
            row["sparsity"] = self.pruner.sparsity
            trained = self.control.epoch - self.recipe.epochs  # epochs since the first pruning
            if trained >= 0 and trained % self.recipe.prune_epochs == 0:
                per_cent = 100 * self.recipe.sparsity[self.pruner.position - 1] if trained else 0
                self.keep = f"sparsity-{per_cent:g}"
        improved = held_out > self.best
        self.best = max(held_out, self.best)
        return row, improved

    @torch.no_grad()
    def _accuracy(self, images: Images) -> float:
        self.net.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        mine = torch.arange(self.rank, len(images), self.ranks)
        for indices in mine.split(_EVALUATION_BATCH):
            x, y = images.batch(indices, self.device)
            with self.micro.context():
                right += (self.net(x).argmax(1) == y).sum()
        return int(total(right, self.ranks)) / len(images)

    def state(self):
        return {
            "optimizer": self.opt.state_dict(),
            "sampler": self.sampler.state_dict(),
            "controller": self.control.state_dict(),
            "micro_batch": self.micro.size,
            "pruner": self.pruner and self.pruner.state_dict(),
        }

    def set_state(self, state):
        self.opt.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.control.load_state_dict(state["controller"])
        self.micro.size = state["micro_batch"]
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])


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


def _near(images: Images, device: torch.device) -> Images:
    """In the GPU's memory, where a quarter of what is free holds them: no copy in any step."""
    if device.type != "cuda" or images.images.nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return images
    return images.to(device)


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
        init = recipe.init and str(Path(recipe.init) / name / "last.safetensors")
        own = replace(recipe, model=name, width=width, init=init)
        rows = classify(
            own, out / name, data=(train, test), device=device, listener=listen(name), **options
        )
        test_accuracy[name] = rows[-1]["test_accuracy"]
        network = replace(own, init=None).build(len(train.classes), train.images.shape[1])
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
