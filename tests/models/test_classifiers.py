# SPDX-License-Identifier: BSD-3-Clause
"""The networks that are trained here, in their three kinds of convolution."""

import pytest
import torch
from torch import nn

import pywino
from pywino.models import alexnet, all_cnn_c, convpool_cnn_c, resnet18, resnet32, vgg16

SMALL = {  # (builder, images that it takes)
    "alexnet": (alexnet, (1, 28, 28)),
    "vgg16": (lambda *a, **k: vgg16(*a, image_size=32, **k), (3, 32, 32)),
    "resnet32": (resnet32, (3, 32, 32)),
    "convpool_cnn_c": (convpool_cnn_c, (3, 32, 32)),
    "all_cnn_c": (all_cnn_c, (3, 32, 32)),
}


def count(model, kind=nn.Module):
    return sum(
        p.numel()
        for module in model.modules()
        if isinstance(module, kind)
        for p in module.parameters(recurse=False)
    )


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (lambda: resnet32(10), 464_154),
        (lambda: resnet32(100), 470_004),
        (lambda: convpool_cnn_c(10), 1_369_738),
        (lambda: convpool_cnn_c(100), 1_387_108),
        (lambda: all_cnn_c(10), 1_369_738),
        (lambda: all_cnn_c(100), 1_387_108),
        (lambda: vgg16(10, image_size=32), 14_723_136 + 5130),
        (lambda: vgg16(10, image_size=32).features, 14_723_136),
        # By hand: 9 (1 64 + 64 192 + 192 384 + 384 256 + 256 256) + BatchNorm + three linear layers
        (lambda: alexnet(10), 2_249_280 + 2 * 1152 + 2305 * 1024 + 1025 * 1024 + 10_250),
        (lambda: vgg16(), 138_357_544),
        # Liu's: 7x7 stem, sixteen 3x3, four 1x1 shortcuts, BatchNorm in blocks and shortcuts, fc
        (lambda: resnet18(), 9408 + 10_985_472 + 176_128 + 10_624 + 1920 + 513_000),
    ],
)
def test_parameter_counts(build, wanted):
    with torch.device("meta"):
        assert count(build()) == wanted


@pytest.mark.parametrize("name", SMALL)
def test_winograd_relu_has_sixteen_ninths(name):
    """Of every 3x3 convolution but the first; everything else stays."""
    build, (channels, _, _) = SMALL[name]
    with torch.device("meta"):
        dense, relu = (build(10, channels, conv) for conv in ("dense", "winograd_relu"))
    convs = [m for m in dense.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    layers = [m for m in relu.modules() if isinstance(m, pywino.WinogradReLUConv2d)]
    assert len(layers) == len(convs) - 1
    for conv, layer in zip(convs[1:], layers):
        assert layer.weight.numel() == conv.weight.numel() * 16 // 9
    changed = sum(conv.weight.numel() for conv in convs[1:])
    assert count(relu) - count(dense) == changed * 7 // 9


@pytest.mark.parametrize("name", SMALL)
def test_winograd_is_the_same_function(name):
    build, size = SMALL[name]
    torch.manual_seed(1)
    dense = build(10, size[0]).eval()
    torch.manual_seed(1)
    winograd = build(10, size[0], conv="winograd").eval()
    assert any(isinstance(module, pywino.WinogradConv2d) for module in winograd.modules())
    assert list(dense.state_dict()) == list(winograd.state_dict())
    x = torch.randn(2, *size)
    with torch.no_grad():
        torch.testing.assert_close(winograd(x), dense(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("conv", ["dense", "winograd", "winograd_relu"])
@pytest.mark.parametrize("name", SMALL)
def test_trains(name, conv):
    """Every parameter gets a gradient, and one step makes the loss smaller."""
    build, size = SMALL[name]
    options = {"width": 0.25} if "cnn_c" in name else {}
    model = build(4, size[0], conv, dropout=0.0, **options)
    x, y = torch.randn(4, *size), torch.arange(4)
    losses = []
    for _ in range(2):
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter_name, p in model.named_parameters():
                assert p.grad is not None, parameter_name
                p -= 1e-3 * p.grad
    assert losses[1] < losses[0]


class _SpatialReLU(nn.Module):
    """What a Winograd-ReLU layer must see: inputs that were not cut at zero."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.least = []
        for module in model.modules():
            if isinstance(module, pywino.WinogradReLUConv2d):
                module.register_forward_pre_hook(
                    lambda _, args: self.least.append(float(args[0].min()))
                )


@pytest.mark.parametrize("name", SMALL)
def test_no_relu_stands_before_a_winograd_relu_layer(name):
    build, size = SMALL[name]
    watch = _SpatialReLU(build(10, size[0], "winograd_relu"))
    watch.model(torch.randn(4, *size))
    assert watch.least
    assert max(watch.least) < 0


def test_liu_resnet18():
    """Two stages at 14 x 14, every 3x3 layer of the Winograd-ReLU kind."""
    model = resnet18(10, conv="winograd_relu").eval()
    assert sum(isinstance(m, pywino.WinogradReLUConv2d) for m in model.modules()) == 16
    assert not [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    shapes = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        layer.register_forward_hook(lambda _, args, output: shapes.append(tuple(output.shape[1:])))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 10)
    assert shapes == [(64, 28, 28), (128, 14, 14), (256, 14, 14), (512, 14, 14)]


@pytest.mark.parametrize("conv", ["dense", "winograd_relu"])
@pytest.mark.parametrize("size", [(33, 45), (32, 32)])
def test_odd_sizes(conv, size):
    for name in ("resnet32", "all_cnn_c", "vgg16"):
        model = SMALL[name][0](10, 3, conv).eval()
        assert model(torch.randn(1, 3, *size)).shape == (1, 10)


def test_dropout_is_between_convolutions():
    model = alexnet(dropout=0.2)
    assert [type(m) for m in model.modules()].count(nn.Dropout) == 4
    assert not [m for m in alexnet().modules() if isinstance(m, nn.Dropout)]


@pytest.mark.parametrize(
    "build",
    [alexnet, resnet32, resnet18, convpool_cnn_c, all_cnn_c, vgg16],
    ids=lambda build: build.__name__,
)
def test_unknown_kind(build):
    with pytest.raises(ValueError, match="conv must be one of dense, winograd, winograd_relu"):
        build(conv="fast")


def test_unknown_image_size():
    with pytest.raises(ValueError, match="image_size must be 32 or 224, got 28"):
        vgg16(image_size=28)
