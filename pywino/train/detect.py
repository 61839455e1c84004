# SPDX-License-Identifier: BSD-3-Clause
"""Training of detectors: YOLOv3 and the small one, on a folder of pictures with boxes or on scenes
that are composed while it goes on."""

import io
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pywino.data.detection import LabelledPictures, Scenes, Stamps, collate
from pywino.data.drawing import TRUTH, color_of, draw_boxes, to_image
from pywino.data.photos import photos
from pywino.metrics import average_precision
from pywino.models import YOLO, load_darknet, load_weights, small_yolo, yolov3
from pywino.models.yolo import STRIDE, Detections
from pywino.optim import (
    DynamicBatchController,
    DynamicBatchSampler,
    DynamicBatchSGDM,
    MicroBatches,
)
from pywino.swap import swap_
from pywino.train.checkpoint import write_whole
from pywino.train.fields import Fields, option
from pywino.train.run import Listener, Run, connected, own_plan, total

MODELS = {"small": 18, "yolov3": 6}  # and the layers of their trunks
OPTIMIZERS = ("adamw", "sgdm")
_WARMUP = 0.03  # of all steps, of AdamW
_LAST_LR = 0.01  # of the first one
_THRESHOLD = 0.01  # for average precision, which wants the whole curve
_DRAWN = 0.3
_SAMPLES = 6  # pictures a sheet


@dataclass(frozen=True)
class DetectRecipe(Fields):
    """All that decides what a training run of a detector computes."""

    data: str = option("", "Folder with images/ and labels/; with --stamps, photos to paste on.")
    only: tuple[str, ...] = option((), "Patterns, one of which a photo's name must match.")
    stamps: str | None = option(None, "Folder of cut-outs, <class>/*.png: compose scenes.")
    classes: tuple[str, ...] = option((), "Names; with --stamps, the folders to take.")
    held_out: float = option(0.2, "Part of photos, cut-outs, pictures that is never trained on.")
    scenes: int = option(1000, "Scenes an epoch.")
    objects: int = option(4, "The most cut-outs of a scene.")
    validate: int = option(200, "Held-out scenes or pictures that are scored after each epoch.")
    model: str = option("small", "small (MobileNetV2) or yolov3.")
    trunk: str | None = option(None, "MobileNetV2's ImageNet file, or darknet53.conv.74.")
    init: str | None = option(None, "Weights of the whole model to start from.")
    freeze: int = option(0, "So many of the trunk's first layers stay as they are.")
    size: int = option(320, "Pixels a side.")
    augment: bool = option(True, "Mirrored, zoomed, shifted, brighter or darker by chance.")
    epochs: int = option(30, "")
    batch_size: int = option(16, "Of all ranks together, at the start.")
    optimizer: str = option("adamw", "adamw, or sgdm: the one with the dynamic batch.")
    lr: float = option(1e-3, "The largest of AdamW's cosine; at the start, of sgdm.")
    momentum: float = option(0.9, "Of sgdm.")
    weight_decay: float = option(1e-4, "")
    dynamic_batch: bool = option(False, "Let lr, momentum and batch of sgdm grow.")
    swap: bool = option(True, "pywino's layers in the place of torch's.")
    amp: bool = option(False, "Forward passes in bfloat16.")
    micro_batch: int | None = option(None, "Samples that are computed at once.")
    workers: int = option(0, "Processes that make samples.")
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not self.data:
            self.refuse("data", "a folder of pictures with boxes, or photos with stamps")
        for name, known in (("model", MODELS), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                self.refuse(name, f"one of {', '.join(known)}")
        if not 0 < self.held_out < 1:
            self.refuse("held_out", "between 0 and 1")
        self.at_least_one("scenes", "objects", "validate", "epochs", "batch_size")
        if not 0 <= self.freeze <= MODELS[self.model]:
            self.refuse("freeze", f"0 to {MODELS[self.model]} for {self.model}")
        if self.workers < 0:
            self.refuse("workers", "0 or more")
        if self.size < STRIDE or self.size % STRIDE:
            self.refuse("size", f"a multiple of {STRIDE}")
        if self.dynamic_batch and self.optimizer != "sgdm":
            self.refuse("dynamic_batch", "off for adamw (sgdm has the dynamic batch)")

    def read_data(self) -> tuple[Dataset, Dataset]:
        """(samples to train on, held-out ones), `LabelledPictures` or `Scenes`."""
        if self.stamps is None:
            pictures = LabelledPictures(
                self.data,
                self.size,
                classes=self.classes or None,
                augment=self.augment,
                seed=self.seed,
            )
            return pictures.split(self.held_out)
        parts = []
        both = photos(self.data, only=self.only).split(self.held_out)
        cut_outs = Stamps(self.stamps, self.classes or None).split(self.held_out)
        for i, (backgrounds, stamps) in enumerate(zip(both, cut_outs)):
            parts.append(
                Scenes(
                    backgrounds,
                    stamps,
                    self.size,
                    count=(self.scenes, self.validate)[i],
                    objects=self.objects,
                    seed=2 * self.seed + i,
                    frozen=bool(i),
                )
            )
        return parts[0], parts[1]

    def build(self, num_classes: int) -> YOLO:
        """The model, with fresh weights or those of `init`, its trunk with those of `trunk`."""
        if self.model == "small":
            model = small_yolo(num_classes, imagenet=self.trunk)
        else:
            model = yolov3(num_classes=num_classes)
            if self.trunk is not None:
                load_darknet(model.trunk, self.trunk)
        return model if self.init is None else load_weights(model, self.init)


class _FixedBatch(torch.optim.AdamW):
    """AdamW in the place that `DynamicBatchSampler` has for its optimizer."""

    sampler = controller = None

    def __init__(self, parameters, lr, weight_decay, batch_size):
        super().__init__(parameters, lr, weight_decay=weight_decay)
        self.batch_size = self.base_batch_size = batch_size

    def _resize(self):
        pass

    def step(self, closure=None):
        result = super().step(closure)
        self.sampler.consume()
        return result


class _Samples(Dataset):
    """The samples of one epoch."""

    def __init__(self, data, epoch):
        self.data, self.epoch = data, epoch

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data.sample(index, self.epoch)


def detect(
    recipe: DetectRecipe,
    out: str | os.PathLike,
    *,
    data: tuple[Dataset, Dataset] | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    timeout_seconds: float = 300.0,
    listener: Listener | None = None,
) -> list[dict]:
    """Trains by the recipe into the folder `out`, and returns a row an epoch. Beside what
    `pywino.train.run` says, the folder gets classes.txt (a name a line) and samples/, a sheet an
    epoch of held-out pictures with what was found and, in white, what is there.

    data: (samples to train on, held-out ones) instead of the recipe's. The other arguments, and
    what is raised, are those of `classify`.

    A row has epoch, loss (of training), map50 and map (held out, `average_precision`), ap50_<class>
    each, lr, momentum and batch_size (at the end), steps and seconds (of training alone)."""
    out = Path(out)
    with connected(device, timeout_seconds) as (rank, ranks, device), own_plan(out, ranks):
        run = _Run(recipe, out, data, device, rank, ranks, listener or Listener())
        return run.train(resume, checkpoint_seconds)


class _Run(Run):
    panels = {  # noqa: RUF012
        "average precision": ("map50", "map"),
        "loss": ("loss",),
        "learning rate": ("lr",),
        "batch size": ("batch_size",),
    }

    def __init__(self, recipe, out, data, device, rank, ranks, listener):
        super().__init__(recipe, out, device, rank, ranks, listener)
        self.title = f"{recipe.model} detector, seed {recipe.seed}"
        self.data, self.held_out = recipe.read_data() if data is None else data
        self.classes = self.data.classes
        average_precision([], [], self.classes)  # raises now where its library is missing
        torch.manual_seed(recipe.seed)
        self.net = recipe.build(len(self.classes))
        if recipe.swap:
            swap_(self.net)
        self.net.to(device, memory_format=torch.channels_last)
        self.networks = {"model": self.net}
        layers = getattr(self.net.trunk, "features", self.net.trunk).children()
        self.frozen = list(layers)[: recipe.freeze]
        for layer in self.frozen:
            layer.requires_grad_(False)
        torch.manual_seed(recipe.seed + rank)
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        model = nn.parallel.DistributedDataParallel(self.net) if ranks > 1 else self.net
        if recipe.optimizer == "adamw":
            self.opt = _FixedBatch(parameters, recipe.lr, recipe.weight_decay, recipe.batch_size)
            self.control = None
        else:
            self.opt = DynamicBatchSGDM(
                parameters,
                lr=recipe.lr,
                momentum=recipe.momentum,
                batch_size=recipe.batch_size,
                weight_decay=recipe.weight_decay,
            )
            self.control = DynamicBatchController(
                self.opt, recipe.epochs, grow=recipe.dynamic_batch
            )
        self.sampler = DynamicBatchSampler(self.data, self.opt, seed=recipe.seed)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp)
        self.micro = MicroBatches(model, self.net.loss, recipe.micro_batch, lambda: autocast)
        self.best = -math.inf

    @property
    def done(self):
        return len(self.rows) >= self.recipe.epochs

    # ---------------------------------------------------------------------------------- training

    def batches(self):
        self.net.train()
        for layer in self.frozen:
            layer.eval()
        epoch, group = len(self.rows), self.opt.param_groups[0]
        consumed = self.sampler.consumed if self.sampler.epoch == epoch else 0
        self.listener.begin(epoch, self.recipe.epochs, len(self.data), consumed)
        loader = DataLoader(
            _Samples(self.data, epoch),
            batch_sampler=self.sampler,
            collate_fn=collate,
            num_workers=self.recipe.workers,
            generator=torch.Generator(),  # samples have their own seeds
        )
        for images, targets in loader:
            images = images.to(self.device, memory_format=torch.channels_last)
            loss = self.micro.backward(images, targets.to(self.device))
            consumed = self.sampler.consumed
            if self.control is None:
                group["lr"] = self.recipe.lr * _cosine(
                    (epoch + consumed / len(self.data)) / self.recipe.epochs
                )
            self.opt.step()
            self.loss = self.loss.to(loss.device) + loss.double() * len(images)
            yield (
                self.sampler.consumed - consumed,
                {"batch": self.opt.batch_size, "lr": group["lr"]},
            )

    # -------------------------------------------------------------------------------- evaluation

    def close(self):
        loss = float(total(self.loss.to(self.device), self.ranks)) / len(self.data)
        scores = self._scores()
        group = self.opt.param_groups[0]
        row = {
            "epoch": len(self.rows),
            "loss": loss,
            "map50": scores["map50"],
            "map": scores["map"],
            **{f"ap50_{name}": value for name, value in scores["classes"].items()},
            "lr": group["lr"],
            "momentum": group["momentum"] if self.control else self.opt.defaults["betas"][0],
            "batch_size": self.opt.batch_size,
        }
        quality = 0.0 if math.isnan(scores["map50"]) else scores["map50"]
        if self.control is not None:
            self.control.step(quality)
        improved = quality > self.best
        self.best = max(quality, self.best)
        return row, improved

    @torch.no_grad()
    def _scores(self) -> dict:
        self.net.eval()
        count = min(self.recipe.validate, len(self.held_out))
        mine: dict[int, tuple[Detections, Tensor]] = {}
        sheet = []
        for index in range(self.rank, count, self.ranks):
            image, boxes = self.held_out.sample(index)
            with self.micro.context():
                batch = image[None].to(self.device, memory_format=torch.channels_last)
                (found,) = self.net.detect(batch, threshold=_THRESHOLD)
            found = Detections(*(part.cpu() for part in found))
            mine[index] = (found, boxes)
            if len(sheet) < _SAMPLES:
                sheet.append((image, found, boxes))
        everyone = [mine]
        if self.ranks > 1:
            everyone = [None] * self.ranks
            dist.all_gather_object(everyone, mine)
        if self.rank == 0:
            self._write_samples(sheet)
            write_whole(self.out / "classes.txt", ("\n".join(self.classes) + "\n").encode())
        both = {index: pair for part in everyone for index, pair in part.items()}
        found, boxes = zip(*(both[index] for index in sorted(both)))
        return average_precision(found, boxes, self.classes)

    def _write_samples(self, sheet) -> None:
        try:
            from PIL import Image
        except ImportError:
            return
        side = self.recipe.size
        canvas = Image.new("RGB", (3 * side, -(-len(sheet) // 3) * side))
        for i, (pixels, found, truth) in enumerate(sheet):
            image = to_image(pixels)
            draw_boxes(image, truth[:, :4].tolist(), [""] * len(truth), [TRUTH] * len(truth))
            seen = found.scores > _DRAWN
            labels, scores = found.classes[seen].tolist(), found.scores[seen].tolist()
            texts = [f"{self.classes[c]} {s:.2f}" for c, s in zip(labels, scores)]
            draw_boxes(image, found.boxes[seen].tolist(), texts, list(map(color_of, labels)))
            canvas.paste(image, (i % 3 * side, i // 3 * side))
        buffer = io.BytesIO()
        canvas.save(buffer, "PNG")
        write_whole(self.out / "samples" / f"epoch-{len(self.rows) + 1:04}.png", buffer.getvalue())

    # --------------------------------------------------------------------------------- the state

    def state(self):
        state = {
            "optimizer": self.opt.state_dict(),
            "sampler": self.sampler.state_dict(),
            "micro_batch": self.micro.size,
        }
        return state if self.control is None else state | {"control": self.control.state_dict()}

    def set_state(self, state):
        self.opt.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.micro.size = state["micro_batch"]
        if self.control is not None:
            self.control.load_state_dict(state["control"])


def _cosine(done: float) -> float:
    """lr after this part of all steps: up in a line, down in half a cosine."""
    if done < _WARMUP:
        return max(done / _WARMUP, _LAST_LR)
    return _LAST_LR + (1 - _LAST_LR) * (1 + math.cos(math.pi * done)) / 2
