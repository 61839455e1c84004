# SPDX-License-Identifier: BSD-3-Clause
"""YOLOv3 against Darknet's description of it, its decoding and loss by hand, and what it learns."""

import itertools
import struct

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pywino
from pywino.models import boxes as box
from pywino.models import load_darknet, mobilenet_v2, small_yolo, yolov3
from pywino.models.yolo import COCO_ANCHORS, YOLO, Detections, as_targets

# ------------------------------------------------------------------------------- Darknet's network


def darknet_cfg(classes):
    """yolov3.cfg: ("conv", filters, size, stride) with BatchNorm, ("out", filters) without;
    ("add", k): plus the output of k layers ago; ("cat", layers); ("up",); ("yolo",)."""
    layers = [("conv", 32, 3, 1)]
    for filters, blocks in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        layers.append(("conv", filters, 3, 2))
        for _ in range(blocks):
            layers += [("conv", filters // 2, 1, 1), ("conv", filters, 3, 1), ("add", -3)]
    for filters, route in ((512, None), (256, 61), (128, 36)):
        if route is not None:
            layers += [("cat", -4), ("conv", filters, 1, 1), ("up",), ("cat", -1, route)]
        for _ in range(3):
            layers += [("conv", filters, 1, 1), ("conv", 2 * filters, 3, 1)]
        layers += [("out", 3 * (5 + classes)), ("yolo",)]
    return layers


def run_darknet(layers, x):
    """(inputs of the yolo layers, all numbers in the file's order) of a network of random ones."""
    outputs, found, numbers = [], [], []

    def draw(*shape, positive=False):
        spread = 1.2 * np.prod(shape[1:]) ** -0.5
        values = spread * torch.randn(shape)
        numbers.append(values.abs() + 0.5 if positive else values)
        return numbers[-1]

    for kind, *arguments in layers:
        if kind == "conv":
            filters, size, stride = arguments
            bias, scale = draw(filters), draw(filters, positive=True)
            mean, variance = draw(filters), draw(filters, positive=True)
            weight = draw(filters, x.shape[1], size, size)
            x = F.conv2d(x, weight, None, stride, size // 2)
            x = (x - mean.view(-1, 1, 1)) / (variance.sqrt().view(-1, 1, 1) + 1e-6)
            x = F.leaky_relu(x * scale.view(-1, 1, 1) + bias.view(-1, 1, 1), 0.1)
        elif kind == "out":
            bias = draw(*arguments)
            x = F.conv2d(x, draw(*arguments, x.shape[1], 1, 1), bias)
        elif kind == "add":
            x = x + outputs[arguments[0]]
        elif kind == "cat":
            x = torch.cat([outputs[i] for i in arguments], 1)
        elif kind == "up":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        else:
            found.append(x)
        outputs.append(x)
    return found, torch.cat([values.flatten() for values in numbers])


def header(version=(0, 2, 5)):
    seen = struct.pack("<q", 7) if version >= (0, 2, 0) else struct.pack("<i", 7)
    return struct.pack("<3i", *version) + seen


def numbers_of(model):
    return sum(value.numel() for name, value in model.state_dict().items() if "num_b" not in name)


def test_counts():
    """The published files: yolov3.weights has 248,007,048 bytes, darknet53.conv.74 162,482,580."""
    with torch.device("meta"):
        model = yolov3()
        assert sum(p.numel() for p in model.parameters()) == 61_949_149
        assert 20 + 4 * numbers_of(model) == 248_007_048
        assert 20 + 4 * numbers_of(model.trunk) == 162_482_580
        shapes = [tuple(o.shape) for o in model(torch.empty(2, 3, 416, 608))]
    assert shapes == [(2, 255, 13, 19), (2, 255, 26, 38), (2, 255, 52, 76)]


def test_a_weights_file_makes_darknets_network(tmp_path):
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected, numbers = run_darknet(darknet_cfg(2), x)
        path = tmp_path / "y.weights"
        path.write_bytes(header() + numbers.numpy().astype("<f4").tobytes())
        model = yolov3(path, num_classes=2).eval()
        path.unlink()
        for a, b in zip(model(x), expected, strict=True):
            assert b.std() > 0.01 * b.abs().max()
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
        wanted = model(x)
        pywino.swap_(model)
        assert sum(isinstance(m, pywino.WinogradConv2d) for m in model.modules()) == 33
        for a, b in zip(model(x), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def little():
    """Conv with BatchNorm, conv with a bias: 2 (4 + 27) + 4 (1 + 2) = 74 numbers."""
    return nn.Sequential(
        nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2), nn.LeakyReLU(0.1), nn.Conv2d(2, 4, 1)
    )


@pytest.mark.parametrize("version", [(0, 1, 0), (0, 2, 0), (0, 2, 5), (1, 0, 0)])
def test_header_versions(tmp_path, version):
    path = tmp_path / "w.weights"
    path.write_bytes(header(version) + np.arange(74, dtype="<f4").tobytes())
    model = load_darknet(little(), path)
    state = model.state_dict()
    assert state["1.bias"].tolist() == [0, 1]
    assert state["1.weight"].tolist() == [2, 3]
    assert state["1.running_mean"].tolist() == [4, 5]
    assert state["1.running_var"].tolist() == [6, 7]
    assert state["0.weight"].flatten().tolist() == list(range(8, 62))
    assert state["3.bias"].tolist() == [62, 63, 64, 65]
    assert state["3.weight"].flatten().tolist() == list(range(66, 74))


numbers = np.arange(74, dtype="<f4")
poisoned = numbers.copy()
poisoned[63] = np.nan


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header() + numbers[:-1].tobytes(), "too short: it ends in 3, Sequential has 74 numbers"),
        (header() + numbers[:3].tobytes(), "too short: it ends in BatchNorm after 0"),
        (header() + numbers.tobytes()[:-1], "too short: it ends in 3"),
        (header(), "too short"),
        (header() + numbers.tobytes() + b"\0", "too long"),
        (header() + np.zeros(100, "<f4").tobytes(), "too long: .* has 74 numbers"),
        (header()[:15], "must begin with a header of 16 or 20 bytes, got 15"),
        (b"", "must begin with a header"),
        (b"\x89PNG\r\n\x1a\n" + bytes(400), "must begin with a version such as 0.2.5"),
        (header() + poisoned.tobytes(), "must be finite, got others in 3"),
    ],
)
def test_weights_files_that_are_refused(tmp_path, content, message):
    path, model = tmp_path / "w.weights", little()
    path.write_bytes(content)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        load_darknet(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_darknet(model, tmp_path / "absent.weights")


# --------------------------------------------------------------------------------------- detection


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return small_yolo(3).eval()


def raw(model, height=64, width=96):
    """Outputs that say nothing: no box anywhere."""
    outputs = []
    for stride in model.strides:
        output = torch.zeros(1, 3, 8, height // stride, width // stride)
        output[:, :, 4] = -20
        outputs.append(output)
    return outputs


def flat(outputs):
    return [output.flatten(1, 2) for output in outputs]


def test_decode_by_hand(detector):
    outputs = raw(detector)
    # Stride 16, anchor 1 (56 x 48), row 1, column 2; twice as wide, half as high.
    t = torch.tensor([0.0, np.log(3), np.log(2), -np.log(2), 0.0, np.log(3), -9.0, 0.0])
    outputs[1][0, 1, :, 1, 2] = t
    boxes, scores = detector.decode(flat(outputs))
    assert boxes.shape == (1, 3 * (2 * 3 + 4 * 6), 4)
    place = 3 * 2 * 3 + 1 * 4 * 6 + 1 * 6 + 2
    x, y = (0.5 + 2) * 16, (0.75 + 1) * 16
    torch.testing.assert_close(boxes[0, place], torch.tensor([x - 56, y - 12, x + 56, y + 12]))
    expected = 0.5 * torch.tensor([0.75, torch.tensor(-9.0).sigmoid(), 0.5])
    torch.testing.assert_close(scores[0, place], expected)
    assert scores.sum() == pytest.approx(float(expected.sum()), abs=1e-5)


def test_a_side_never_overflows(detector):
    outputs = raw(detector)
    outputs[0][:, :, 2:4] = 1e4
    assert detector.decode(flat(outputs))[0].isfinite().all()


def test_detect(detector, monkeypatch):
    """Two boxes of one class at one place are one; another class there stays; so does one below
    the threshold not."""
    outputs = raw(detector)
    for anchor, objectness, label in ((1, 9.0, 0), (0, 5.0, 0), (2, 0.5, 2)):
        outputs[1][0, anchor, 4, 1, 2] = objectness
        outputs[1][0, anchor, 5:, 1, 2] = -9
        outputs[1][0, anchor, 5 + label, 1, 2] = 3
        outputs[1][0, anchor, 2:4, 1, 2] = (
            torch.tensor([48.0, 48]).log() - torch.tensor(detector.anchors[1][anchor]).log()
        )
    monkeypatch.setattr(detector, "forward", lambda x: flat(outputs))
    (found,) = detector.detect(torch.zeros(1, 3, 64, 96), threshold=0.5)
    assert found.classes.tolist() == [0, 2]
    assert found.scores[0] > found.scores[1] > 0.5
    torch.testing.assert_close(found.boxes, torch.tensor([[16.0, 0, 64, 48]] * 2))
    (all_of_them,) = detector.detect(torch.zeros(1, 3, 64, 96), threshold=0.5, overlap=1.0)
    assert all_of_them.classes.tolist() == [0, 0, 2]
    (none,) = detector.detect(torch.zeros(1, 3, 64, 96), threshold=0.999)
    assert none.boxes.shape == (0, 4)


def test_candidates_are_bounded(detector, monkeypatch):
    """All cells speak at once: no more than so many, the best, are compared."""
    outputs = [torch.randn(1, 3 * 8, 64 // s, 96 // s) for s in detector.strides]
    monkeypatch.setattr(detector, "forward", lambda x: outputs)
    (found,) = detector.detect(torch.zeros(1, 3, 64, 96), threshold=0.0, candidates=7, overlap=1.0)
    best = detector.decode(outputs)[1].flatten().sort(descending=True).values[:7]
    torch.testing.assert_close(found.scores, best)


def test_loss_by_hand(detector):
    """A truth that sits right on an anchor: its own box is right, everything else is background."""
    outputs = raw(detector)
    # (56, 48) at stride 16; the next anchors, (56, 88) and (32, 32), have an IoU below 0.6.
    truth = torch.tensor([[[40.0 - 28, 24 - 24, 40 + 28, 24 + 24, 1], [0, 0, 0, 0, -1]]])
    outputs[1][0, 1, 2, 1, 2] = np.log(0.5)  # half as wide
    outputs[1][0, 1, 4:, 1, 2] = torch.tensor([0.3, -1.0, 2.0, 0.5])
    # CIoU: half of the area, centres alike, w / h of 28 / 48 against 56 / 48.
    v = 4 / np.pi**2 * (np.arctan(56 / 48) - np.arctan(28 / 48)) ** 2
    overlap = 0.5 - v * v / (1 - 0.5 + v)
    softplus = np.log1p(np.exp([-0.3, -1.0, -2.0, 0.5]))  # BCE of a 1 at 0.3, 0 at -1, 1 at 2, ...
    expected = (2 - 56 * 48 / (64 * 96)) * (1 - overlap) + softplus.sum()
    got = detector.loss(flat(outputs), truth, match=0.6)
    assert float(got) == pytest.approx(expected, abs=1e-4)


def test_background_that_covers_a_truth_is_ignored(detector):
    outputs = raw(detector)
    truth = torch.tensor([[[12.0, 0, 68, 48, 1]]])
    before = detector.loss(flat(outputs), truth, match=1.0)
    outputs[1][0, 1, 4, 1, 3] = 4  # the neighbour: 16 to the right, IoU 40 / 72
    assert float(detector.loss(flat(outputs), truth, match=1.0)) == pytest.approx(float(before))
    more = detector.loss(flat(outputs), truth, match=1.0, ignore=0.6) - before
    assert float(more) == pytest.approx(np.log1p(np.exp(4)), abs=1e-4)


def test_anchors_that_fit_well_share_a_truth(detector):
    outputs = raw(detector)
    truth = torch.tensor([[[10.0, 5, 10 + 60, 5 + 50, 0]]])
    one, two = (float(detector.loss(flat(outputs), truth, match=m)) for m in (1.0, 0.5))
    # A positive at objectness -20 costs 20; (56, 48) and (56, 88) have IoUs of 0.90 and 0.55.
    assert 20 < one < 30
    assert 40 < two < 55


def test_a_loss_is_a_mean_over_images_and_padding_is_nothing(detector):
    x = torch.rand(3, 3, 64, 96)
    targets = torch.tensor(
        [[[5.0, 5, 50, 60, 0], [20, 10, 90, 50, 2]], [[9, 9, 40, 40, 1]] * 2, [[0, 0, 0, 0, 0]] * 2]
    )
    targets[1, 1, 4] = targets[2, :, 4] = -1
    with torch.no_grad():
        outputs = detector(x)
        targets[2, :, :4] = detector.decode(outputs)[0][2, :2]  # padding may be any box
        whole = detector.loss(outputs, targets)
        parts = [
            detector.loss([o[i : i + 1] for o in outputs], targets[i : i + 1, :m])
            for i, m in enumerate((2, 1, 0))
        ]
    torch.testing.assert_close(whole, sum(parts) / 3)


def test_loss_refuses(detector):
    with torch.no_grad():
        outputs = detector(torch.rand(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"targets must be \(2, M, 5\), got \(1, 3, 5\)"):
        detector.loss(outputs, torch.zeros(1, 3, 5))


def test_truths_at_the_border_have_a_cell(detector):
    outputs = raw(detector)
    truth = torch.tensor([[[90.0, 60, 102, 68, 1]]])  # its centre is the image's corner
    assert detector.loss(flat(outputs), truth).isfinite()


class Trunk(nn.Module):
    """Three maps of few channels, for YOLOv3's heads."""

    channels = (16, 24, 32)

    def __init__(self):
        super().__init__()
        widths = (3, 8, 16, 16, 24, 32)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        )

    def forward(self, x):
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps[2:]


@pytest.mark.parametrize(
    ("build", "steps"),
    [
        (lambda: small_yolo(3), 140),
        (lambda: YOLO(Trunk(), 3, COCO_ANCHORS, (16, 32, 64), pairs=2), 120),
    ],
    ids=["small", "three scales"],
)
def test_one_batch_is_learnt(build, steps):
    """The loss falls, and what is detected is what was there."""
    model = build()
    x = torch.rand(2, 3, 64, 64) * 0.2
    targets = torch.tensor(
        [[[6.0, 8, 36, 38, 0], [34, 30, 62, 62, 2]], [[20, 4, 60, 58, 1], [0, 0, 0, 0, -1]]]
    )
    for image, boxes in zip(x, targets.int().tolist()):
        for x1, y1, x2, y2, label in boxes:
            image[label, y1:y2, x1:x2] += 0.6
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(steps):
        loss = model.loss(model(x), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    for module in model.modules():  # this batch's own statistics, for eval mode
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        model(x)
    found = model.eval().detect(x, threshold=0.5)
    for one, wanted in zip(found, targets):
        wanted = wanted[wanted[:, 4] >= 0]
        wanted = wanted[wanted[:, 4].argsort()]
        order = one.classes.argsort()
        assert one.classes[order].tolist() == wanted[:, 4].tolist()
        # So few steps leave up to 5 pixels; AP@.75 counts such boxes as found.
        assert box.iou(one.boxes[order], wanted[:, :4]).diagonal().min() > 0.75
    with torch.no_grad():
        assert model.loss(model(x), as_targets(found)) < losses[0] / 5


def test_targets_of_detections():
    found = [
        Detections(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0.9]), torch.tensor([2])),
        Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)),
    ]
    expected = torch.tensor([[[1.0, 2, 3, 4, 2]], [[0, 0, 0, 0, -1]]])
    assert torch.equal(as_targets(found), expected)
    assert as_targets(found[1:]).shape == (1, 0, 5)


def test_small_yolo_takes_a_trunk_and_normalises(tmp_path):
    torch.save(mobilenet_v2().state_dict(), tmp_path / "m.pth")
    network = mobilenet_v2(weights=tmp_path / "m.pth").eval()
    model = small_yolo(imagenet=tmp_path / "m.pth").eval()
    x = torch.rand(1, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        features = network.features[:18]((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        torch.testing.assert_close(model.trunk(x)[1], features)
        assert model.trunk(x)[0].shape == (1, 96, 4, 4)
    with torch.device("meta"):
        assert sum(p.numel() for p in small_yolo(4).parameters()) == 2_662_198


def test_small_yolo_swaps_fuses_and_compiles(detector):
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        wanted = detector(x)
        compiled = torch.compile(detector, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(x), wanted):
            torch.testing.assert_close(a, b)
        pywino.fuse_(pywino.swap_(detector))
        assert not any(
            isinstance(m, nn.BatchNorm2d) for scale in detector.scales for m in scale.modules()
        )
        assert sum(isinstance(m, pywino.WinogradConv2d) for m in detector.modules()) == 4
        for a, b in zip(detector(x), wanted):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small_yolo(0), "num_classes must be at least 1, got 0"),
        (lambda: small_yolo(anchors=COCO_ANCHORS), "anchors must be three .* each of 2 scales"),
        (lambda: yolov3(anchors=((),) * 3), "anchors must be three"),
        (lambda: small_yolo(anchors=(((1, 1), (2, 2), (0, 3)),) * 2), "anchors must be three"),
        (lambda: small_yolo()(torch.rand(1, 3, 64, 80)), "multiples of 32, got 80 x 64"),
    ],
)
def test_arguments_that_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
