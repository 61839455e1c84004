# SPDX-License-Identifier: BSD-3-Clause
"""Average precision of detections, as COCO defines it."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

_MOST = 100  # detections of an image that count, the best of all classes


def average_precision(
    found: Sequence[tuple[Tensor, Tensor, Tensor]],
    targets: Sequence[Tensor],
    classes: Sequence[str],
) -> dict:
    """{"map50", "map", "images", "objects", "classes": name -> AP at an IoU of 0.5}.

    found: of each image (boxes (K, 4), scores (K,), classes (K,)), as `YOLO.detect` gives them.
    targets: of each image (M, 5), x1, y1, x2, y2 and the class; rows of class -1 are padding.

    AP is the mean of the interpolated precision at the recalls 0, 0.01, …, 1; map50 its mean over
    the classes that have a target, at an IoU of 0.5; map also the mean over IoUs of 0.5, 0.55, …,
    0.95. Classes without a target are NaN, and so are both where there is no target at all. Needs
    faster-coco-eval: `pip install 'pywino[detect]'`."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise RuntimeError(
            "pywino.metrics.average_precision: it needs faster-coco-eval; type "
            "`pip install 'pywino[detect]'`"
        ) from error
    if len(found) != len(targets):
        raise ValueError(
            "pywino.metrics.average_precision: found must be one an image "
            f"({len(targets)}), got {len(found)}"
        )
    for name, labels in (
        ("found", [one[2] for one in found]),
        ("targets", [boxes[boxes[:, 4] >= 0, 4] for boxes in targets]),
    ):
        for image, of_image in enumerate(labels):
            _check_classes(f"{name}[{image}]", of_image, len(classes))
    truths, answers = [], []
    for image, (one, boxes) in enumerate(zip(found, targets), 1):
        for box in boxes[boxes[:, 4] >= 0].tolist():
            truths.append(_annotation(image, box[:4], int(box[4])) | {"id": len(truths) + 1})
        for box, score, label in zip(*(part.tolist() for part in one)):
            answers.append(_annotation(image, box, int(label)) | {"score": score})
    precision = np.full((10, 101, len(classes)), -1.0)
    if truths and answers:
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image} for image in range(1, len(targets) + 1)],
            "annotations": truths,
            "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
        }
        truth.createIndex()
        evaluation = COCOeval_faster(truth, truth.loadRes(answers), "bbox")
        evaluation.params.maxDets = [1, 10, _MOST]
        evaluation.evaluate()
        evaluation.accumulate()
        # IoU, recall, class, area (all), detections (100); -1 where a class has no target.
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
    with_truth = {one["category_id"] for one in truths}
    of_class = [
        max(0.0, float(precision[0, :, i].mean())) if i in with_truth else math.nan
        for i in range(len(classes))
    ]
    known = sorted(with_truth)
    return {
        "map50": float(np.mean([of_class[i] for i in known])) if known else math.nan,
        "map": float(precision[:, :, known].clip(min=0).mean()) if known else math.nan,
        "images": len(targets),
        "objects": len(truths),
        "classes": dict(zip(classes, of_class)),
    }


def _check_classes(name, labels, count):
    wrong = labels[(labels < 0) | (labels >= count)]
    if wrong.numel():
        raise ValueError(
            f"pywino.metrics.average_precision: {name} must have classes in 0 to {count - 1}, got "
            f"{int(wrong[0])}; classes must name each of them"
        )


def _annotation(image, box, label):
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1
    return {
        "image_id": image,
        "category_id": label,
        "bbox": [x1, y1, width, height],
        "area": width * height,
        "iscrowd": 0,
    }
