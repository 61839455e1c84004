# SPDX-License-Identifier: BSD-3-Clause
"""YOLOv3 (Redmon and Farhadi, 2018), and a small detector with the same heads on MobileNetV2.

A scale is a map of cells of s x s pixels with three anchors (p_w, p_h) each. Per cell (c_x, c_y)
and anchor the network gives t_x, t_y, t_w, t_h, one objectness o and a logit k_i per class:

    b_x = (sigmoid(t_x) + c_x) s      b_w = p_w exp(t_w)
    b_y = (sigmoid(t_y) + c_y) s      b_h = p_h exp(t_h)
    score of class i = sigmoid(o) sigmoid(k_i)

    model = yolov3("yolov3.weights").eval()
    boxes, scores, classes = model.detect(images)[0]
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from pywino.models import boxes as box
from pywino.models.darknet import load_darknet
from pywino.models.mobilenet import MobileNetV2, mobilenet_v2
from pywino.models.weights import load_weights

STRIDE = 32  # of the coarsest scale: sides of images are multiples of it
# COCO's, by k-means, in pixels at 416 x 416; (stride 8), (stride 16), (stride 32).
COCO_ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
# In the order of the published weights.
COCO_CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat"),
    *("dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack"),
    *("umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball"),
    *("kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket"),
    *("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair"),
    *("couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse"),
    *("remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink"),
    *("refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier"),
    "toothbrush",
)
# For objects of a tenth to two thirds of a side of 320 pixels; (stride 16), (stride 32).
SMALL_ANCHORS = (((32, 32), (56, 48), (56, 88)), ((104, 80), (120, 144), (208, 184)))
_LARGEST_LOG = 8.0  # of a side over its anchor: exp stays finite in every dtype

Anchors = Sequence[Sequence[tuple[float, float]]]


class Detections(NamedTuple):
    """What was found in an image, by falling score: boxes (K, 4) as x1, y1, x2, y2 in pixels,
    scores (K,) in 0..1, classes (K,) int64."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor


class _Conv(nn.Sequential):
    """Darknet's convolution: without a bias, BatchNorm, leaky ReLU of slope 0.1."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(channels, eps=1e-6),
            nn.LeakyReLU(0.1, inplace=True),
        )


class _Residual(nn.Sequential):
    """x + conv3x3(conv1x1(x)), through half of the channels."""

    def __init__(self, channels: int):
        super().__init__(
            _Conv(channels, channels // 2, 1),
            _Conv(channels // 2, channels, 3),
        )

    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


class Darknet53(nn.Module):
    """YOLOv3's trunk: (N, 3, H, W) in 0..1 -> 256, 512 and 1024 channels at 1/8, 1/16, 1/32."""

    channels = (256, 512, 1024)

    def __init__(self):
        super().__init__()
        self.stem = _Conv(3, 32, 3)
        for stage, count in enumerate((1, 2, 8, 8, 4), 1):
            width = 32 << stage
            down = _Conv(width // 2, width, 3, stride=2)
            blocks = [_Residual(width) for _ in range(count)]
            self.add_module(f"stage{stage}", nn.Sequential(down, *blocks))

    def forward(self, input: Tensor) -> list[Tensor]:
        at8 = self.stage3(self.stage2(self.stage1(self.stem(input))))
        at16 = self.stage4(at8)
        return [at8, at16, self.stage5(at16)]


class MobileNetTrunk(nn.Module):
    """MobileNetV2's features up to 320 channels: (N, 3, H, W) in 0..1 -> 96 and 320 channels at
    1/16 and 1/32. Normalises by ImageNet's mean and deviation."""

    channels = (96, 320)

    def __init__(self, network: MobileNetV2 | None = None):
        super().__init__()
        network = MobileNetV2() if network is None else network
        self.features = network.features[:18]

    def forward(self, input: Tensor) -> list[Tensor]:
        mean, std = input.new_tensor(((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x, maps = (input - mean[:, None, None]) / std[:, None, None], []
        for i, layer in enumerate(self.features, 1):
            x = layer(x)
            if i in (14, 18):
                maps.append(x)
        return maps


class _Scale(nn.Module):
    """A detection block: the coarser block's map, twice as large, joins the trunk's; then 1x1 and
    3x3 convolutions in turn.

    (trunk, coarser) -> (map for the next scale, raw predictions)"""

    def __init__(
        self, trunk: int, channels: int, outputs: int, pairs: int, coarser: int | None = None
    ):
        super().__init__()
        self.up = None if coarser is None else _Conv(coarser, channels, 1)
        width = trunk if coarser is None else trunk + channels
        body: list[nn.Module] = [_Conv(width, channels, 1)]
        for _ in range(pairs):
            body += [_Conv(channels, 2 * channels, 3), _Conv(2 * channels, channels, 1)]
        self.body = nn.Sequential(*body)
        self.head = nn.Sequential(
            _Conv(channels, 2 * channels, 3), nn.Conv2d(2 * channels, outputs, 1)
        )

    def forward(self, trunk: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.up is not None:
            trunk = torch.cat((F.interpolate(self.up(coarser), scale_factor=2.0), trunk), 1)
        body = self.body(trunk)
        return body, self.head(body)


@torch.fx.wrap  # a size decides, which a trace (of `pywino.fuse_`) cannot follow
def _check_sides(input: Tensor) -> None:
    height, width = input.shape[-2:]
    if height % STRIDE or width % STRIDE:
        raise ValueError(
            f"yolo: input must have sides that are multiples of {STRIDE}, got {width} x {height}; "
            "pywino.data.letterbox makes such"
        )


class YOLO(nn.Module):
    """A trunk that gives one map a scale, and a detection block for each.

    Input (N, 3, H, W), RGB in 0..1, sides multiples of 32. Output: a list of raw predictions,
    coarsest scale first, (N, 3 (5 + num_classes), H / s, W / s) for s = 32, 16, …; `decode`,
    `detect` and `loss` read them.

    anchors: three (width, height) in pixels a scale, finest first. widths: the channels of the
    blocks, finest first. pairs: of convolutions in a block.
    """

    def __init__(
        self,
        trunk: nn.Module,
        num_classes: int,
        anchors: Anchors,
        widths: Sequence[int],
        pairs: int,
    ):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"yolo: num_classes must be at least 1, got {num_classes!r}")
        self.num_classes = num_classes
        anchors = tuple(tuple((float(w), float(h)) for w, h in scale) for scale in anchors)
        if len(anchors) != len(trunk.channels) or any(
            len(scale) != 3 or min(min(scale)) <= 0 for scale in anchors
        ):
            raise ValueError(
                f"yolo: anchors must be three (width, height) above 0 for each of "
                f"{len(trunk.channels)} scales, got {anchors!r}"
            )
        self.anchors = anchors[::-1]
        self.strides = tuple(STRIDE >> i for i in range(len(anchors)))
        self.trunk = trunk
        blocks, coarser = [], None
        for channels, width in zip(trunk.channels[::-1], widths[::-1]):
            blocks.append(_Scale(channels, width, 3 * (5 + num_classes), pairs, coarser))
            coarser = width
        self.scales = nn.ModuleList(blocks)
        self._initialise()

    def _initialise(self):
        """Almost everything is background at the start: objectness of 1 %, classes alike."""
        for scale in self.scales:
            output = scale.head[-1]
            nn.init.normal_(output.weight, 0, 0.01)
            with torch.no_grad():
                bias = output.bias.zero_().view(3, -1)
                bias[:, 4] = -math.log(99)
                bias[:, 5:] = -math.log(max(1, self.num_classes - 1))

    def forward(self, input: Tensor) -> list[Tensor]:
        _check_sides(input)
        maps, coarser, outputs = self.trunk(input), None, []
        for i, scale in enumerate(self.scales, 1):
            coarser, output = scale(maps[-i], coarser)
            outputs.append(output)
        return outputs

    # ------------------------------------------------------------------------ from maps to boxes

    def _cells(self, outputs: list[Tensor]) -> list[Tensor]:
        """Each scale as (N, 3, H, W, 5 + classes), float32 or the outputs' wider type."""
        cells = []
        for output in outputs:
            n, _, h, w = output.shape
            output = output.to(torch.promote_types(output.dtype, torch.float32))
            cells.append(output.view(n, 3, 5 + self.num_classes, h, w).permute(0, 1, 3, 4, 2))
        return cells

    def _boxes(self, cells: Tensor, scale: int) -> Tensor:
        """x1, y1, x2, y2 of every cell and anchor of a scale: (N, 3, H, W, 4)."""
        h, w = cells.shape[2:4]
        rows, columns = (torch.arange(n, device=cells.device) for n in (h, w))
        corner = torch.stack((columns.expand(h, w), rows[:, None].expand(h, w)), -1)
        anchors = cells.new_tensor(self.anchors[scale])[:, None, None]
        centre = (cells[..., :2].sigmoid() + corner) * self.strides[scale]
        half = anchors * cells[..., 2:4].clamp(max=_LARGEST_LOG).exp() / 2
        return torch.cat((centre - half, centre + half), -1)

    def decode(self, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes (N, P, 4) in pixels and scores (N, P, num_classes) of all P cells and anchors."""
        boxes, scores = [], []
        for scale, cells in enumerate(self._cells(outputs)):
            boxes.append(self._boxes(cells, scale).flatten(1, 3))
            scores.append((cells[..., 4:5].sigmoid() * cells[..., 5:].sigmoid()).flatten(1, 3))
        return torch.cat(boxes, 1), torch.cat(scores, 1)

    @torch.no_grad()
    def detect(
        self,
        input: Tensor,
        *,
        threshold: float = 0.25,
        overlap: float = 0.45,
        candidates: int = 1000,
    ) -> list[Detections]:
        """What is in each image. Call it in eval mode.

        threshold: the least score. overlap: of two boxes of one class whose IoU is above it, the
        one of the lower score goes. candidates: so many, the best of an image, take part in that.
        Boxes are cut at the image's border."""
        height, width = input.shape[-2:]
        border = input.new_tensor((width, height, width, height))
        found = []
        for boxes, scores in zip(*self.decode(self(input))):
            place, classes = (scores > threshold).nonzero(as_tuple=True)
            values = scores[place, classes]
            if len(values) > candidates:
                values, best = values.topk(candidates)
                place, classes = place[best], classes[best]
            boxes = torch.minimum(boxes[place].clamp(min=0), border.to(boxes.dtype))
            kept = box.non_maximum_suppression(boxes, values, classes, overlap)
            found.append(Detections(boxes[kept], values[kept], classes[kept]))
        return found

    # ---------------------------------------------------------------------------------- the loss

    def loss(
        self,
        outputs: list[Tensor],
        targets: Tensor,
        *,
        ignore: float = 0.5,
        match: float = 0.4,
    ) -> Tensor:
        """YOLOv3's loss, with CIoU for the boxes in place of squared errors of t; a mean over
        images of the sums over cells.

            sum over positives of (2 - w h / (W H)) (1 - CIoU(b, truth)) + BCE(k, one-hot class)
            + sum over positives of BCE(o, 1) + sum over negatives of BCE(o, 0)

        targets (N, M, 5): x1, y1, x2, y2 in pixels and the class; rows of class -1 are padding.

        A truth belongs to the cell of its centre and the anchor of the best IoU with it (both
        centred), and to every other anchor with such an IoU of at least `match`, at that anchor's
        scale; match=1 is the paper's rule, the best alone. Those cells are positive. Others are
        negative unless their own box has an IoU above `ignore` with a truth."""
        n = len(targets)
        if targets.ndim != 3 or targets.shape[2] != 5 or n != len(outputs[0]):
            raise ValueError(
                f"yolo.loss: targets must be ({len(outputs[0])}, M, 5), got {tuple(targets.shape)}"
            )
        cells = self._cells(outputs)
        targets = targets.to(cells[0])
        real = targets[..., 4] >= 0
        image, _ = real.nonzero(as_tuple=True)
        truth, classes = targets[real][:, :4], targets[real][:, 4].long()
        size = truth[:, 2:] - truth[:, :2]
        centre = (truth[:, :2] + truth[:, 2:]) / 2
        height, width = (side * self.strides[0] for side in cells[0].shape[2:4])
        importance = 2 - size.prod(1) / (height * width)

        anchors = targets.new_tensor(self.anchors).flatten(0, 1)
        common = torch.minimum(size[:, None], anchors).prod(2)
        fit = common / (size.prod(1)[:, None] + anchors.prod(1) - common + 1e-9)
        belongs = fit >= match
        if len(fit):
            belongs.scatter_(1, fit.argmax(1, keepdim=True), True)

        total = targets.new_zeros(())
        for scale, (cell, mine) in enumerate(zip(cells, belongs.split(3, 1))):
            boxes = self._boxes(cell, scale)
            which, anchor = mine.nonzero(as_tuple=True)
            column, row = (centre[which] / self.strides[scale]).long().unbind(1)
            row, column = row.clamp(0, cell.shape[2] - 1), column.clamp(0, cell.shape[3] - 1)
            place = (image[which], anchor, row, column)

            overlap = box.complete_iou(boxes[place], truth[which])
            wanted = F.one_hot(classes[which], self.num_classes).to(cell.dtype)
            logits = cell[place][:, 5:]
            total = total + (importance[which] * (1 - overlap)).sum()
            total = total + F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")

            with torch.no_grad():
                objectness = torch.zeros_like(cell[..., 4])
                objectness[place] = 1
                # Padding is a box without an area somewhere, which meets nothing.
                near = box.iou(boxes.flatten(1, 3), targets[..., :4]) * real[:, None]
                best = near.amax(2) if targets.shape[1] else near.sum(2)
                counts = (objectness == 1) | (best.view_as(objectness) <= ignore)
            total = total + F.binary_cross_entropy_with_logits(
                cell[..., 4], objectness, counts.to(cell.dtype), reduction="sum"
            )
        return total / max(1, n)


def as_targets(found: Sequence[Detections]) -> Tensor:
    """Detections as the targets of `YOLO.loss`: (N, M, 5), padded with rows of class -1."""
    most = max((len(one.scores) for one in found), default=0)
    targets = torch.full((len(found), most, 5), -1.0)
    targets[..., :4] = 0
    for row, one in zip(targets, found):
        row[: len(one.scores)] = torch.cat((one.boxes, one.classes[:, None]), 1)
    return targets.to(found[0].boxes.device) if len(found) else targets


def yolov3(
    weights: str | os.PathLike | None = None,
    num_classes: int = 80,
    anchors: Anchors = COCO_ANCHORS,
) -> YOLO:
    """YOLOv3 on Darknet-53: 61,949,149 parameters for COCO's 80 classes, random or those of a file:
    Darknet's `.weights`, or one of `load_weights`."""
    model = YOLO(Darknet53(), num_classes, anchors, widths=(128, 256, 512), pairs=2)
    if weights is None:
        return model
    load = load_darknet if os.fspath(weights).endswith(".weights") else load_weights
    return load(model, weights)


def small_yolo(
    num_classes: int = 4,
    weights: str | os.PathLike | None = None,
    anchors: Anchors = SMALL_ANCHORS,
    *,
    imagenet: str | os.PathLike | None = None,
) -> YOLO:
    """The small detector: MobileNetV2 up to 1/32, two scales (1/16 and 1/32), one pair of
    convolutions a block.

    weights: a file of this model. imagenet: torchvision's file of MobileNetV2, for the trunk."""
    trunk = MobileNetTrunk(None if imagenet is None else mobilenet_v2(weights=imagenet))
    model = YOLO(trunk, num_classes, anchors, widths=(64, 128), pairs=1)
    return model if weights is None else load_weights(model, weights)
