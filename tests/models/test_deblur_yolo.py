# SPDX-License-Identifier: BSD-3-Clause
"""Deblur-YOLO's generator: counts, equations, any size, both families of checkpoints."""

import copy
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pywino
from pywino.data import blur, trajectory_kernels
from pywino.losses import psnr
from pywino.models import deblur_yolo, mobilenet_v2


@pytest.fixture(scope="module")
def net():
    """With statistics that are not 0 and 1, in eval mode."""
    torch.manual_seed(0)
    model = deblur_yolo(trim=True)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d | nn.InstanceNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.3, 1)
    return model.eval()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_counts():
    with torch.device("meta"):
        assert parameters(deblur_yolo()) == 3_312_707
        assert parameters(deblur_yolo(trim=True)) == 2_106_627


def reference(state, x, dilation):
    """The equations of the module's head, once more, on a state_dict in eval mode."""

    def norm(x, name):
        mean, deviation = state[f"{name}.running_mean"], state[f"{name}.running_var"].add(1e-5)
        x = (x - mean[:, None, None]) / deviation.sqrt()[:, None, None]
        if f"{name}.weight" in state:
            x = x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]
        return x

    def conv(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    def block(x, name, padding=1):
        return norm(conv(x, f"{name}.0", padding=padding, dilation=padding), f"{name}.1").relu()

    def up(x, factor=2):
        return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)

    def head(x, name):
        for part in ("block0", "block1"):
            x = conv(x, f"{name}.{part}", padding=1).relu()
        return x

    height, width = x.shape[2:]
    rows = torch.arange(-(-height // 32) * 32).clamp_max(height - 1)
    columns = torch.arange(-(-width // 32) * 32).clamp_max(width - 1)
    x = (2 * x - 1)[:, :, rows][..., columns]
    name = "fpn.features"
    e = F.relu6(norm(conv(x, f"{name}.0.0", stride=2, padding=1), f"{name}.0.1"))
    encoded = []
    for i in range(1, 16):
        at, y, part = f"{name}.{i}.conv", e, 0
        if i > 1:
            y, part = F.relu6(norm(conv(y, f"{at}.0.0"), f"{at}.0.1")), 1
        stride, depth = 1 + (i in (2, 4, 7, 14)), y.shape[1]
        y = conv(y, f"{at}.{part}.0", stride=stride, padding=1, groups=depth)
        y = F.relu6(norm(y, f"{at}.{part}.1"))
        y = norm(conv(y, f"{at}.{part + 1}"), f"{at}.{part + 2}")
        e = y + e if y.shape == e.shape else y
        if i in (1, 3, 6, 10, 15):
            encoded.append(conv(e, f"fpn.lateral{len(encoded)}"))
    l0, l1, l2, l3, m4 = encoded
    m3 = block(l3 + up(m4), "fpn.td1", dilation)
    m2 = block(l2 + up(m3), "fpn.td2", dilation)
    m1 = block(l1 + up(m2), "fpn.td3", dilation)
    maps = [up(head(m, f"head{i}"), 2 ** (i - 1)) for i, m in ((4, m4), (3, m3), (2, m2), (1, m1))]
    s = block(up(block(torch.cat(maps, 1), "smooth")) + l0, "smooth2")
    y = (x + conv(up(s), "final", padding=1).tanh()).clamp(-1, 1)
    return y[..., :height, :width] / 2 + 0.5


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [(64, 96), (33, 50), (1, 1)])
def test_it_is_its_equations(net, dilation, restored, size):
    model = deblur_yolo(dilation=dilation, trim=True)
    model.load_state_dict(net.state_dict())
    model = model.double().eval()
    if restored:
        pywino.restore_(model, strict=True)
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        wanted = reference(model.state_dict(), x, dilation)
        assert (wanted - x).abs().max() > 0.01  # not the identity
        torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)


def test_on_pywinos_and_on_torchs_layers(net):
    """One function and one state_dict, whatever the memory format; and dilated where it must be."""
    model = copy.deepcopy(net)
    dilated = [name for name, m in model.named_modules() if type(m) is pywino.DilatedConv2d]
    assert dilated == ["fpn.td1.0", "fpn.td2.0", "fpn.td3.0"]
    assert {model.get_submodule(name).dilation for name in dilated} == {(2, 2)}
    assert sum(isinstance(m, pywino.WinogradConv2d) for m in model.modules()) == 14
    x = torch.rand(1, 3, 75, 100)
    with torch.no_grad():
        ours = model(x)
        lines = model(x.contiguous(memory_format=torch.channels_last))
        torchs = pywino.restore_(model, strict=True)
        assert list(torchs.state_dict()) == list(net.state_dict())
        assert not any(type(m).__module__.startswith("pywino.nn") for m in torchs.modules())
        assert (ours - torchs(x)).abs().max() <= 1e-4
        assert (ours - lines).abs().max() <= 1e-4


def test_fused_is_the_same(net):
    """fuse_ takes every norm and every ReLU but the encoder's ReLU6 into the convolutions."""
    x = torch.rand(1, 3, 64, 70)
    fused = pywino.fuse_(copy.deepcopy(net))
    assert not any(isinstance(m, nn.BatchNorm2d | nn.InstanceNorm2d) for m in fused.modules())
    convolutions = [m for m in fused.modules() if isinstance(m, pywino.WinogradConv2d)]
    assert [m.activation for m in convolutions].count("relu") == 13  # all but the last
    with torch.no_grad():
        expected = net(x)
        assert (fused(x) - expected).abs().max() <= 1e-4
        # Back on torch's layers, the ReLUs of dilated layers too; the norms stay in the weights.
        assert (pywino.restore_(fused, strict=True)(x) - expected).abs().max() <= 1e-4


def test_any_dtype_transform_and_graph(net):
    x = torch.rand(2, 3, 40, 33)
    with torch.no_grad():
        expected = net(x)
        assert net(x[:0]).shape == (0, 3, 40, 33)
        compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(pickle.loads(pickle.dumps(net))(x), expected)
        torch.testing.assert_close(torch.vmap(lambda t: net(t[None])[0])(x), expected)
        half = copy.deepcopy(net).to(torch.bfloat16)
        torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("restored", [False, True])
def test_it_trains(restored):
    """Every parameter that is used gets a gradient, and the statistics of its norms move."""
    torch.manual_seed(0)
    model = deblur_yolo()
    if restored:
        pywino.restore_(model)
    model(torch.rand(2, 3, 64, 64)).square().mean().backward()
    for name, parameter in model.named_parameters():
        used = not re.match(r"fpn\.features\.1[678]\.", name)
        assert (parameter.grad is not None) == used, name
    assert model.smooth[1].running_mean.abs().sum() > 0


# ------------------------------------------------------------------------------------- checkpoints


def in_a_row(state):
    """A state_dict as DeblurGAN-v2 writes it: the layers of a block numbered through, the encoder
    twice, `module.` in front."""
    result = {}
    for name, value in state.items():
        if match := re.match(r"(fpn\.features\.(\d+)\.conv)\.(\d)\.(.*)", name):
            block, number, part, rest = match.groups()
            wide = int(number) > 1
            if "." in rest:  # a part of its own: convolution 0 or norm 1
                layer, rest = rest.split(".")
                place = 3 * int(part) + int(layer)
            else:
                place = 3 * (1 + wide) + int(part) - (1 + wide)
            name = f"{block}.{place}.{rest}"
        result[name] = value
    bounds = {0: (0, 2), 1: (2, 4), 2: (4, 7), 3: (7, 11), 4: (11, 16)}
    for name, value in list(result.items()):
        if match := re.match(r"fpn\.features\.(\d+)\.(.*)", name):
            for level, (first, end) in bounds.items():
                if first <= int(match[1]) < end:
                    result[f"fpn.enc{level}.{int(match[1]) - first}.{match[2]}"] = value
    return {"module." + name: value for name, value in result.items()}


@pytest.mark.parametrize("trim", [False, True])
def test_deblurganv2s_files_load(tmp_path, trim):
    torch.manual_seed(1)
    source = deblur_yolo(dilation=1)
    state = in_a_row(source.state_dict())
    assert "module.fpn.features.1.conv.4.bias" in state
    assert "module.fpn.enc4.4.conv.7.running_var" in state
    torch.save({"model": state}, tmp_path / "fpn_mobilenet.h5")
    got = deblur_yolo(tmp_path / "fpn_mobilenet.h5", dilation=1, trim=trim).state_dict()
    for name, value in got.items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_files_and_refusals(tmp_path):
    from safetensors.torch import save_file

    source = deblur_yolo(trim=True)
    save_file(source.state_dict(), tmp_path / "own.safetensors")
    got = deblur_yolo(tmp_path / "own.safetensors", trim=True).state_dict()
    assert all(torch.equal(a, b) for a, b in zip(got.values(), source.state_dict().values()))
    with pytest.raises(RuntimeError, match=r"fpn\.features\.16\.conv\.0\.0\.weight is missing"):
        deblur_yolo(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match="deblur_yolo: dilation must be"):
        deblur_yolo(dilation=0)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        deblur_yolo(encoder=tmp_path / "nothing.pth")


@pytest.mark.parametrize("trim", [False, True])
def test_encoder(tmp_path, trim):
    torch.manual_seed(2)
    trunk = mobilenet_v2()
    torch.save(trunk.state_dict(), tmp_path / "mobilenet.pth")
    model = deblur_yolo(encoder=tmp_path / "mobilenet.pth", trim=trim)
    for name, value in model.fpn.features.state_dict().items():
        assert torch.equal(value, trunk.features.state_dict()[name]), name


def test_published_encoder():
    path = os.environ.get("PYWINO_MOBILENET")
    if path is None or not Path(path).is_file():
        pytest.skip("set PYWINO_MOBILENET to torchvision's mobilenet_v2-b0353104.pth")
    mean = deblur_yolo(encoder=path).fpn.features[0][1].running_mean
    assert mean.abs().max() > 0


def test_weights_of_our_own():
    """They sharpen photos of another source than their training's, on average."""
    pictures = pytest.importorskip("skimage.data")
    photos = [pictures.astronaut(), pictures.coffee(), pictures.chelsea(), pictures.rocket()]
    corners = ((0, 0), (100, 100), (50, 200))
    crops = [p[y : y + 192, x : x + 192] for p in photos for y, x in corners]
    sharp = torch.stack([torch.from_numpy(c.copy()).permute(2, 0, 1) / 255 for c in crops])
    blurred = blur(sharp, trajectory_kernels(12, torch.Generator().manual_seed(0))).clamp(0, 1)
    with torch.inference_mode():
        restored = deblur_yolo("pywino-blur", trim=True).eval()(blurred)
    gain = psnr(restored, sharp) - psnr(blurred, sharp)
    assert float(gain.mean()) > 0.3
