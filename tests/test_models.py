# SPDX-License-Identifier: BSD-3-Clause
"""The reference models: geometry, names and counts of the published ones, and checkpoints that go
in safely."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import pywino
from pywino.data import RAIN
from pywino.losses import psnr
from pywino.models import load_weights, resnet50, sapnet, vgg16


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def data():
    """The folder with data that is not part of the project."""
    folder = Path(os.environ.get("PYWINO_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "sapnet" / "net_latest.pth").exists():
        pytest.skip(f"SAPNet's published weights are not in {folder}/sapnet; set PYWINO_DATA")
    return folder


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (vgg16, 138_357_544),
        (resnet50, 25_557_032),
        (sapnet, 180_483),
        (lambda: sapnet("ca"), 170_243),
        (lambda: sapnet("se"), 170_243),
        (lambda: sapnet(None), 168_963),
        (lambda: vgg16(num_classes=10, in_channels=1), 138_357_544 - 990 * 4097 - 64 * 9 * 2),
        (lambda: resnet50(num_classes=10, in_channels=1), 25_557_032 - 990 * 2049 - 64 * 49 * 2),
    ],
)
def test_parameter_counts(build, count):
    with torch.device("meta"):
        assert parameters(build()) == count


def test_vgg16_names_and_shapes():
    """torchvision's: the indices count ReLUs and pools too."""
    with torch.device("meta"):
        model = vgg16()
        state = model.state_dict()
        convolutions = [n for n in state if n.startswith("features.") and n.endswith(".weight")]
        assert convolutions == [
            f"features.{i}.weight" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
        ]
        assert [n for n in state if n.startswith("classifier.") and n.endswith(".bias")] == [
            f"classifier.{i}.bias" for i in (0, 3, 6)
        ]
        assert state["features.28.weight"].shape == (512, 512, 3, 3)
        assert state["classifier.0.weight"].shape == (4096, 25088)
        assert model.features(torch.empty(1, 3, 224, 224)).shape == (1, 512, 7, 7)
        assert model(torch.empty(2, 3, 96, 64)).shape == (2, 1000)


def test_resnet50_names_and_shapes():
    """torchvision's, the stride in the 3x3 convolution."""
    with torch.device("meta"):
        model = resnet50()
        state = model.state_dict()
        assert len(state) == 320
        assert {"conv1.weight", "bn1.running_var", "fc.bias"} <= set(state)
        assert state["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
        assert state["layer3.5.conv2.weight"].shape == (256, 256, 3, 3)
        assert state["layer4.0.downsample.1.num_batches_tracked"].shape == ()
        assert "layer2.1.downsample.0.weight" not in state
        assert model.layer2[0].conv2.stride == (2, 2)
        assert model.layer2[0].conv1.stride == (1, 1)
        assert model(torch.empty(2, 3, 64, 96)).shape == (2, 1000)


def reference_sapnet(state, y, dilation, stages):
    """The network written once more from the paper's equations, on a state_dict."""

    def conv(x, name, d=1):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=d, dilation=d)

    def attention(x, name):
        z = x.mean((2, 3))
        w1, w2, w3 = (
            state[f"{name}.{k}.weight"].flatten(1) for k in ("conv_du.0", "conv_du.2", "conv_1_1")
        )
        return x * torch.sigmoid(torch.relu(z @ w1.T) @ w2.T + z @ w3.T)[:, :, None, None]

    x = y
    h = c = torch.zeros(y.shape[0], 32, *y.shape[2:], dtype=y.dtype)
    outputs = []
    for _ in range(stages):
        a = torch.cat([torch.relu(conv(torch.cat([y, x], 1), "conv0.0")), h], 1)
        i, f, o = (torch.sigmoid(conv(a, f"conv_{gate}.0")) for gate in "ifo")
        c = f * c + i * torch.tanh(conv(a, "conv_g.0"))
        h = s = o * torch.tanh(c)
        for block, d in enumerate(dilation, 1):
            u = s
            for index in (0, 3):
                name = f"res_conv{block}"
                u = torch.relu(attention(conv(u, f"{name}.{index}", d), f"{name}.{index + 1}"))
            s = torch.relu(u + s)
        x = conv(s, "conv.0") + y
        outputs.append(x)
    return outputs


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("dilation", [(1, 2, 4, 8, 16), (1, 1, 1, 1, 1)])
def test_sapnet_is_its_equations(dilation, restored):
    torch.manual_seed(0)
    model = sapnet(dilation=dilation, stages=3).double().eval()
    if restored:
        pywino.restore_(model, strict=True)
    y = torch.rand(2, 3, 21, 34, dtype=torch.float64)
    with torch.no_grad():
        got = model(y, return_stages=True)
        wanted = reference_sapnet(model.state_dict(), y, dilation, 3)
        assert len(got) == 3
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert torch.equal(model(y), got[-1])


def test_sapnet_attentions():
    """SE and CA are one function; without attention the gates are gone."""
    torch.manual_seed(0)
    ca, se, none = (sapnet(kind, stages=1).eval() for kind in ("ca", "se", None))
    state = se.state_dict()
    for name, value in ca.state_dict().items():
        renamed = name.replace("conv_du", "fc")
        state[renamed] = value.flatten(1) if "conv_du" in name else value
    se.load_state_dict(state)
    y = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ca(y), se(y))
        assert not torch.allclose(none(y), se(y))
    assert not any("fc" in name or "conv_du" in name for name in none.state_dict())


def test_sapnet_keeps_channels_last():
    """Every convolution that is called as a module gets what the input is."""
    for built, called in ((sapnet(stages=2), 11), (pywino.restore_(sapnet(stages=2)), 16)):
        model = built.to(memory_format=torch.channels_last).eval()
        assert _formats_of_inputs(model) == [True] * 2 * called


def test_sapnet_works_in_channels_last_and_answers_in_the_inputs_format():
    model, y = sapnet(stages=2).eval(), torch.rand(2, 3, 20, 30)
    seen = []
    model.res_conv3[0].register_forward_pre_hook(
        lambda m, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    with torch.no_grad():
        planes = model(y, return_stages=True)
        lines = model(y.contiguous(memory_format=torch.channels_last), return_stages=True)
    assert seen == [True] * 4
    for a, b in zip(planes, lines, strict=True):
        assert a.is_contiguous()
        assert b.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a, b)


def _formats_of_inputs(model):
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_pre_hook(
                lambda m, args: seen.append(
                    args[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    with torch.no_grad():
        model(torch.rand(1, 3, 20, 30).contiguous(memory_format=torch.channels_last))
    return seen


@pytest.mark.parametrize("attention", ["cra", "ca", "se", None])
def test_sapnet_on_pywinos_and_on_torchs_layers(attention):
    """One function, one state_dict, one set of parameters; back again by swap_."""
    torch.manual_seed(0)
    model = sapnet(attention, stages=2).eval()
    kinds = {type(m) for m in model.modules() if "pywino.nn" in type(m).__module__}
    assert kinds >= {pywino.WinogradConv2d, pywino.DilatedConv2d}
    assert (pywino.ChannelResidualAttention in kinds) == (attention is not None)
    names, y = list(model.state_dict()), torch.rand(1, 3, 24, 20)
    with torch.no_grad():
        ours = model(y)
        before = list(model.parameters())
        torchs = pywino.restore_(model, strict=True)
        assert list(torchs.state_dict()) == names
        assert all(a is b for a, b in zip(before, torchs.parameters(), strict=True))
        pywinos = (pywino.WinogradConv2d, pywino.ChannelResidualAttention)
        assert not any(isinstance(m, pywinos) for m in torchs.modules())
        torch.testing.assert_close(torchs(y), ours)
        again = pywino.swap_(torchs)
        assert type(again.conv0[0]) is pywino.WinogradConv2d
        torch.testing.assert_close(again(y), ours)


def test_sapnet_computes_the_inputs_part_of_conv0_once(monkeypatch):
    module = sys.modules["pywino.models.sapnet"]  # its name in the package is the function's
    seen = []
    run = module._run
    monkeypatch.setattr(module, "_run", lambda *a: (seen.append(a[2].shape[1]), run(*a))[1])
    with torch.no_grad():
        sapnet(stages=3)(torch.rand(1, 3, 12, 12))
    assert seen == [3, 3, 3, 3]  # one of the input, one for each stage's estimate


def test_sapnet_gradients_are_those_of_torchs_layers():
    torch.manual_seed(0)
    model = sapnet(stages=2)
    y = torch.rand(2, 3, 20, 20)

    def gradients():
        return torch.autograd.grad(model(y).square().mean(), list(model.parameters()))

    ours = gradients()
    pywino.restore_(model, strict=True)
    for a, b in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_sapnet_of_every_dtype_size_and_transform():
    torch.manual_seed(0)
    model, y = sapnet(stages=2).eval(), torch.rand(2, 3, 24, 20)
    with torch.no_grad():
        expected = model(y)
        torch.testing.assert_close(torch.vmap(lambda t: model(t[None])[0])(y), expected)
        assert model(y[:0]).shape == (0, 3, 24, 20)
        assert model(y[..., :1, :1]).shape == (2, 3, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(y).float(), expected, rtol=0, atol=0.02)
        half = pickle.loads(pickle.dumps(model)).to(torch.bfloat16)
        for images in (y, y[:1]):  # one image: its convolutions sum their outputs for the gates
            actual = half(images.bfloat16()).float()
            torch.testing.assert_close(actual, expected[: len(images)], rtol=0, atol=0.02)


def test_sapnet_compiles_whole_and_pickles():
    torch.manual_seed(0)
    model, y = sapnet(stages=2).eval(), torch.rand(1, 3, 20, 24)
    with torch.no_grad():
        expected = model(y)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(y), expected)
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(y), expected)


@pytest.mark.parametrize("hooked", ["res_conv3", "res_conv2.3", "conv"])
def test_sapnet_overwrites_nothing_that_a_hook_keeps(hooked):
    torch.manual_seed(0)
    model = sapnet(stages=3).eval()
    y, kept = torch.rand(1, 3, 33, 29), []

    def keep(module, arguments, output):
        kept.append((arguments[0], arguments[0].clone(), output, output.clone()))

    with torch.no_grad():
        expected = model(y)
        model.get_submodule(hooked).register_forward_hook(keep)
        torch.testing.assert_close(model(y), expected, rtol=1e-5, atol=1e-6)
    assert kept or hooked == "conv"  # its layer is called, not the Sequential around it
    for input, before, output, then in kept:
        assert torch.equal(input, before)
        assert torch.equal(output, then)


@pytest.mark.parametrize("restored", [False, True])
def test_sapnet_trains(restored):
    """Every parameter gets a gradient, in-place ReLUs included."""
    torch.manual_seed(0)
    model = sapnet(stages=2)
    if restored:
        pywino.restore_(model)
    model(torch.rand(2, 3, 20, 20)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A gate's two hidden units may both be off by chance.
        assert parameter.grad.abs().sum() > 0 or "conv_du" in name, name


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"attention": "sea"}, "attention"),
        ({"dilation": (1, 2, 4, 8)}, "dilation"),
        ({"dilation": (1, 2, 4, 8, 0)}, "dilation"),
        ({"dilation": (1, 2, 4, 8, 1.5)}, "dilation"),
        ({"stages": 0}, "stages"),
    ],
)
def test_sapnet_refuses(arguments, word):
    with pytest.raises(ValueError, match=f"sapnet: {word} must be"):
        sapnet(**arguments)


# ------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("restored", [False, True])
def test_published_weights(data, restored):
    """They load by name, take the rain out of the authors' own example, and give what the authors'
    network gives in exact arithmetic, to what float32 allows."""
    from PIL import Image

    path = data / "sapnet" / "net_latest.pth"
    model = sapnet(weights=path).eval()
    if restored:
        pywino.restore_(model, strict=True)

    def image(name):
        return (
            np.asarray(Image.open(data / "sapnet" / name).convert("RGB")).astype(np.float32) / 255
        )

    rainy, derained = image("rain-064.jpg"), image("Ours-064.jpg")
    y = torch.from_numpy(rainy).permute(2, 0, 1)[None].contiguous()
    with torch.no_grad():
        output = model(y)
        part = y[..., :96, :128]
        state = {k: v.double() for k, v in sapnet(weights=path).state_dict().items()}
        exact = reference_sapnet(state, part.double(), (1, 2, 4, 8, 16), 6)[-1]
        assert (model(part) - exact).abs().max() <= (1e-5 if restored else 3e-5)
    output = output.clamp(0, 1)[0].permute(1, 2, 0).numpy()

    def psnr(a):
        return -10 * np.log10(((a - derained) ** 2).mean())

    # Their picture is a JPEG with other tones, so the two never agree to the bit; undilated blocks
    # stay near 20 dB, one stage near 19.
    assert psnr(rainy) < 13
    assert psnr(output) > 24


@pytest.mark.parametrize(("rain", "gain"), [("heavy", 11), ("light", 1.8)])
def test_weights_of_our_own(rain, gain):
    """They take the rain out of photos of another source than their training's, decibels."""
    pictures = pytest.importorskip("skimage.data")
    photos = [pictures.astronaut(), pictures.coffee(), pictures.chelsea()]
    clean = torch.stack(
        [torch.from_numpy(p[40:232, 100:292].copy()).permute(2, 0, 1) / 255 for p in photos]
    )
    rainy = torch.stack(
        [RAIN[rain](c, torch.Generator().manual_seed(i)) for i, c in enumerate(clean)]
    )
    with torch.inference_mode():
        output = sapnet(weights="pywino-rain").eval()(rainy).clamp(0, 1)
    assert float((psnr(output, clean) - psnr(rainy, clean)).mean()) > gain


def test_a_file_says_how_many_stages(tmp_path):
    from safetensors.torch import save_file

    state = sapnet(stages=1).state_dict()
    for name, metadata, wanted in (("a", {"stages": "2"}, 2), ("b", {}, 6), ("c", None, 6)):
        path = tmp_path / f"{name}.safetensors"
        save_file(state, path, metadata)
        assert sapnet(weights=path).stages == wanted
        assert sapnet(weights=path, stages=4).stages == 4


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_round_trip(tmp_path, suffix, prefix):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    source = sapnet()
    state = {prefix + name: value for name, value in source.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    loaded = sapnet(weights=str(path))
    assert all(torch.equal(v, source.state_dict()[n]) for n, v in loaded.state_dict().items())


def test_weights_in_a_checkpoint(tmp_path):
    source = sapnet()
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "c.pth")
    loaded = load_weights(sapnet(), tmp_path / "c.pth")
    assert torch.equal(loaded.conv[0].weight, source.conv[0].weight)


class _Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def test_weights_never_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("trap.pth", "wb") as file:
        pickle.dump({"conv0.0.weight": _Trap()}, file)
    torch.save({"conv0.0.weight": _Trap()}, "trap2.pth")
    for name in ("trap.pth", "trap2.pth"):
        with pytest.raises(RuntimeError, match="cannot be read as a file of tensors"):
            sapnet(weights=name)
    assert not Path("trapped").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv0.0.bias"), "conv0.0.bias is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is unknown"),
        (
            lambda s: s.update({"conv.0.weight": torch.zeros(3, 32, 1, 1)}),
            r"conv.0.weight must be \(3, 32, 3, 3\), got \(3, 32, 1, 1\)",
        ),
        (lambda s: [s.pop(n) for n in list(s) if "res_conv" in n], "and 45 more"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    model = sapnet()
    state = dict(model.state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pth")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", bytes(100)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_are_no_weights(tmp_path, suffix, content):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match="cannot be read as a file of tensors"):
        sapnet(weights=path)


def test_weights_of_the_wrong_kind(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match="must hold a state_dict"):
        sapnet(weights=tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError, match=r"no file .*; weights in the package are pywino-"):
        sapnet(weights=tmp_path / "absent.pth")
