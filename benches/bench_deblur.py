# SPDX-License-Identifier: BSD-3-Clause
"""Deblur-YOLO: the generator on pywino's layers and fused, against the same on PyTorch's layers,
eager and compiled; its convolutions one by one; and the tables of the paper's talk beside ours.

Pictures are named by the environment: PYWINO_SET5 is the folder of Set5's five, PYWINO_PHOTOS the
wheel of ai-benchmark 0.1.2. A table without them has the talk's rows alone, and says so.
"""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from layers import DEBLUR

import pywino
from pywino.data import Pairs, blur, photos, trajectory_kernels
from pywino.losses import psnr, ssim
from pywino.models import deblur_yolo
from pywino.train import DeblurRecipe

SIZES = {"256x256": (256, 256), "720x1280": (720, 1280)}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
RUNS = Path(__file__).parent / "runs"

# The talk's tables: seconds on a device that it does not name, the size of the file in MiB (its
# column "Params"), PSNR and SSIM on COCO 2014 and on Set5, mAP on COCO 2014.
TALK = {
    "blurred": (None, None, (21.02, 0.701), (24.20, 0.66), 29.7),
    "DeepDeblur": (1.5495, 47.4, (24.86, 0.823), (28.36, 0.81), 51.7),
    "DynamicDeblur": (1.5247, 47.8, (27.19, 0.873), (29.10, 0.85), 56.0),
    "SRN": (0.3790, 86.9, (24.61, 0.815), (28.07, 0.80), 52.3),
    "DeblurGAN-v2 (Inception-ResNet)": (0.1589, 233.0, (20.29, 0.687), (26.64, 0.74), 42.0),
    "DeblurGAN-v2 (MobileNet)": (0.0769, 12.8, (20.34, 0.687), (27.06, 0.77), 40.8),
    "Deblur-YOLO": (0.0772, 12.9, (23.94, 0.817), (29.39, 0.88), 47.5),
}
# AP of its twenty classes: clean, blurred, deblurred by Deblur-YOLO.
TALK_CLASSES = {
    "mAP": (58.5, 29.7, 47.5), "aero": (73.7, 43.3, 55.5), "bike": (46.9, 16.9, 33.8),
    "bird": (44.4, 15.3, 30.0), "boat": (40.6, 14.8, 37.7), "bottle": (42.3, 10.4, 29.7),
    "bus": (75.2, 51.8, 67.7), "car": (58.5, 34.5, 51.1), "cat": (73.0, 40.4, 62.6),
    "chair": (39.8, 13.5, 31.2), "cow": (52.3, 12.6, 39.5), "table": (41.4, 26.9, 41.2),
    "dog": (73.2, 31.7, 51.4), "horse": (77.5, 30.9, 54.7), "mbike": (61.7, 28.2, 44.9),
    "person": (69.1, 42.8, 56.1), "plant": (42.4, 19.0, 33.6), "sheep": (59.9, 23.7, 53.9),
    "sofa": (52.1, 33.7, 50.2), "train": (75.4, 57.6, 72.8), "tv": (69.9, 45.4, 52.2),
}  # fmt: skip


# ---------------------------------------------------------------------------------- the generator


def _built(fused: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = deblur_yolo(trim=True)
    with torch.no_grad():
        model.train()(torch.rand(2, 3, 64, 64))  # statistics that are not 0 and 1
    return pywino.fuse_(model.eval()) if fused else model.eval()


def _contenders(model, x):
    """One in each memory format."""

    def contender(memory_format):
        own = copy.deepcopy(model).to(memory_format=memory_format)
        y = x.contiguous(memory_format=memory_format)
        return lambda: own(y)

    return {name: contender(memory_format) for name, memory_format in FORMATS.items()}


def _measure(compare, size, dtype, fused, compiled):
    x = torch.rand(1, 3, *SIZES[size], generator=torch.Generator().manual_seed(0)).to(dtype)
    model = _built(fused).to(dtype)
    plain = pywino.restore_(_built(False))
    exact = copy.deepcopy(plain).double()
    plain = plain.to(dtype)
    if compiled:
        plain = torch.compile(plain, fullgraph=True)
    peers = _contenders(plain, x) if not compiled else {"compiled": lambda: plain(x)}
    compare(
        _contenders(model, x),
        peers,
        reference=lambda: exact(x.double()),
        # The output is an image in 0..1; PyTorch's own error stands beside ours in the table.
        limit=1e-4 if dtype is torch.float32 else 3e-2,
        note="Random weights. Convolutions other than 3x3 of stride 1 and one group are PyTorch's.",
    )


@pytest.mark.benchmark(group="deblur")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "fused",
    [
        pytest.param(False, marks=pytest.mark.full_only, id="as built"),
        pytest.param(True, id="fused"),
    ],
)
@torch.no_grad()
def test_deblur(compare, native, size, fused):
    """Deblur-YOLO's generator, fp32, batch 1, as built and after `pywino.fuse_`, against eager
    PyTorch, the better of two memory formats on both sides"""
    _measure(compare, size, torch.float32, fused, compiled=False)


@pytest.mark.benchmark(group="deblur_bf16")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.full_only
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_deblur_bf16(compare, native, size):
    """Deblur-YOLO's generator, bf16, batch 1, fused, against eager PyTorch"""
    _measure(compare, size, torch.bfloat16, fused=True, compiled=False)


@pytest.mark.benchmark(group="deblur_compiled")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.full_only
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_deblur_compiled(compare, native, size, dtype):
    """Deblur-YOLO's generator, batch 1, fused, against compiled PyTorch"""
    _measure(compare, size, dtype, fused=True, compiled=True)


@pytest.mark.benchmark(group="deblur_layers")
@pytest.mark.layers(full=DEBLUR, default=(DEBLUR[2], DEBLUR[7], DEBLUR[8]))
@torch.inference_mode()
def test_deblur_layers(compare, native, layer):
    """3x3 convolutions of Deblur-YOLO's generator on 720 x 1280, fp32, channels_last, against
    F.conv2d in the better of two layouts"""
    d = layer.dilation
    x, weight, bias = layer.tensors(memory_format=torch.channels_last)
    with torch.inference_mode(False):
        ours = pywino.DilatedConv2d(layer.c, layer.k, 3, padding=d, dilation=d).eval()
        ours = ours.to(memory_format=torch.channels_last)
        ours.load_state_dict({"weight": weight.clone(), "bias": bias.clone()})
    peers = {}
    for name, memory_format in FORMATS.items():
        tensors = layer.tensors(memory_format=memory_format)
        peers[name] = lambda tensors=tensors: F.conv2d(*tensors, padding=d, dilation=d)
    compare(
        lambda: ours(x),
        peers,
        reference=lambda: F.conv2d(
            x.double(), weight.double(), bias.double(), padding=d, dilation=d
        ),
        limit=7e-6,
        note="Transformed filters are kept, as in a layer that does not train.",
    )


# ------------------------------------------------------------------------------- the talk's tables


def _set5() -> Pairs | None:
    """Each picture with a kernel of seed 0, in the order of their names."""
    if not os.environ.get("PYWINO_SET5"):
        return None
    found = photos(os.environ["PYWINO_SET5"])
    kernels = iter(trajectory_kernels(len(found), torch.Generator().manual_seed(0)))
    return Pairs(found, lambda sharp, _: blur(sharp[None], next(kernels)[None])[0].clamp(0, 1))


def _photos() -> Pairs | None:
    """The photos that pywino-blur has not seen, blurred as in its training."""
    if not os.environ.get("PYWINO_PHOTOS"):
        return None
    only = ("*/enhancement/*", "*/classification/*")
    return DeblurRecipe(data=os.environ["PYWINO_PHOTOS"], only=only).read_data()[1]


@torch.inference_mode()
def _scores(net, pairs: Pairs, largest: int | None) -> list[str]:
    """PSNR and SSIM on RGB, means: of the blurred pictures, of the restored ones."""
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for i in range(len(pairs)):
        blurred, sharp = (x[None] for x in pairs.picture(i, largest))
        blurred = blurred.mul(255).round().div(255).contiguous(memory_format=torch.channels_last)
        for side, x in enumerate((blurred, net(blurred).clamp(0, 1))):
            sums[side] += torch.stack((psnr(x, sharp)[0], ssim(x, sharp, "valid")[0]))
    return [f"{decibels:.2f} / {similarity:.3f}" for decibels, similarity in sums / len(pairs)]


@pytest.mark.benchmark(group="deblur_published")
def test_published(report):
    """Deblur-YOLO as its talk reports it, and here: time, size, PSNR / SSIM, mAP@.5"""

    def rows():
        found = {}
        for name, (seconds, size, coco, set5, precision) in TALK.items():
            found[f"{name}, talk"] = {
                "seconds": "" if seconds is None else f"{seconds:.4f}",
                "parameters": "",
                "MiB": "" if size is None else f"{size:.1f}",
                "COCO 2014": "{:.2f} / {:.3f}".format(*coco),
                "photos": "",
                "Set5": "{:.2f} / {:.2f}".format(*set5),
                "mAP on COCO 2014": f"{precision:.1f}",
            }
        net = deblur_yolo("pywino-blur", trim=True).eval()
        used, whole = (sum(p.numel() for p in m.parameters()) for m in (net, deblur_yolo()))
        size = sum(x.nbytes for x in deblur_yolo().state_dict().values()) / 2**20
        ours = {"parameters": f"{whole:,} ({used:,} used)", "MiB": f"{size:.1f}"}
        blurred = {}
        net = pywino.fuse_(net).to(memory_format=torch.channels_last)
        for column, pairs, largest in (("photos", _photos(), 256), ("Set5", _set5(), None)):
            if pairs is not None:
                blurred[column], ours[column] = _scores(net, pairs, largest)
        if blurred:
            found |= {"blurred, here": blurred, "pywino-blur, here": ours}
        return found

    note = (
        'The talk\'s blur is not described, its device not named; its "Params" are the MiB of a '
        "file. photos: 40 of ai-benchmark's that were held out, the centre's 256 x 256. Our blur "
        "is that of `trajectory_kernels`. Seconds here: table deblur."
    )
    for name in ("PYWINO_SET5", "PYWINO_PHOTOS"):
        if not os.environ.get(name):
            note += f" {name} is not set: what stands here is of an earlier run."
    report(rows, note=note)


@pytest.mark.benchmark(group="deblur_detection")
def test_detection(report):
    """AP@.5 on pictures as they are, blurred, and deblurred, by class; and how much of what the
    blur took came back"""

    def rows():
        log = json.loads((RUNS / "pywino-blur-detection-3" / "detection.json").read_text())
        columns = {
            "clean": "sharp",
            "blurred": "blurred",
            "pywino-blur": "content",
            "deblurred": "deblurred",
        }
        found = {"all, here": {c: 100 * log[kind]["map50"] for c, kind in columns.items()}}
        for name in log["sharp"]["classes"]:
            found[f"{name}, here"] = {
                c: 100 * log[kind]["classes"][name] for c, kind in columns.items()
            }
        for name, values in TALK_CLASSES.items():
            found[f"{name}, talk"] = dict(zip(("clean", "blurred", "deblurred"), values))
        for values in found.values():
            lost, gained = (values[c] - values["blurred"] for c in ("clean", "deblurred"))
            for column in columns:
                values[column] = f"{values[column]:.1f}" if column in values else ""
            values["came back"] = f"{gained / lost:.0%}"
        return found

    report(
        rows,
        note="Here: 200 scenes of cut-outs and photos that the small detector has not seen, nor, "
        "in its training with L_D, the generator, whose weights before that are `pywino-blur`. "
        "From benches/runs/pywino-blur-detection-3. The talk: COCO 2014, YOLOv3, Deblur-YOLO.",
    )
