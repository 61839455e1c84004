# SPDX-License-Identifier: BSD-3-Clause
"""swap_ finds attention modules by what is in them, and leaves what computes something else."""

import copy

import pytest
import torch
from torch import nn

import pywino
from pywino.swap import last_report


class SE(nn.Module):
    """As the paper's first implementations have it."""

    def __init__(self, channels=16, bias=False):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 4, bias=bias),
            nn.ReLU(inplace=True),
            nn.Linear(channels // 4, channels, bias=bias),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return x * self.fc(self.avg_pool(x).flatten(1))[:, :, None, None]


class Convolutional(nn.Module):
    """As torchvision and timm have it."""

    def __init__(self, activation=nn.ReLU, gate=nn.Sigmoid):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.activation, self.scale = activation(), gate()

    def forward(self, x):
        return x * self.scale(self.fc2(self.activation(self.fc1(self.avgpool(x)))))


class Around(Convolutional):
    def forward(self, x):
        return x + super().forward(x)


class Maximum(Convolutional):
    def forward(self, x):
        return x * self.scale(self.fc2(self.activation(self.fc1(x.amax((2, 3), keepdim=True)))))


class Dropout(Convolutional):
    def forward(self, x):
        z = nn.functional.dropout(x, 0.5, self.training)
        return x * self.scale(self.fc2(self.activation(self.fc1(self.avgpool(z)))))


class TwoArguments(Convolutional):
    def forward(self, x, y):
        return super().forward(x) + y


@pytest.mark.parametrize("make", [SE, lambda: SE(bias=True), Convolutional], ids=["se", "b", "tv"])
def test_swap_and_back(make):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), make(), nn.ReLU())
    before, x = copy.deepcopy(net), torch.randn(2, 3, 9, 8)
    parameters = list(net.parameters())
    calls = []
    net[1].register_forward_hook(lambda *_: calls.append(1))
    assert pywino.swap_(net) is net
    assert type(net[1]) is pywino.ChannelResidualAttention
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert list(net.state_dict()) == list(before.state_dict())
    torch.testing.assert_close(net(x), before(x))
    assert calls == [1]
    torch.testing.assert_close(copy.deepcopy(net)(x), before(x))
    assert pywino.swap_(net)[1] is net[1]
    assert type(pywino.restore_(net, strict=True)[1]) is type(before[1])
    torch.testing.assert_close(net(x), before(x))
    assert vars(net[1]).keys() == vars(before[1]).keys()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: Around(), "something else"),
        (lambda: Maximum(), "something else"),
        (lambda: Dropout().eval(), "something else"),
        (lambda: SE().to("meta"), "meta device"),
        (lambda: TwoArguments(), "cannot be called with an image alone"),
    ],
)
def test_what_computes_something_else_stays(module, reason):
    net = nn.Sequential(module())
    with pytest.warns(UserWarning, match="changed nothing"):
        pywino.swap_(net, pywino.Attention())
    assert type(net[0]) is not pywino.ChannelResidualAttention
    assert any(reason in row.reason for row in last_report(net))
    with pytest.raises(RuntimeError, match=reason):
        pywino.swap_(net, pywino.Attention(), strict=True)


def test_hooks_inside_stay():
    net = nn.Sequential(SE())
    net[0].fc[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="has hooks"):
        pywino.swap_(net, pywino.Attention())
    assert type(net[0]) is SE


def test_other_activations_are_not_even_named():
    net = nn.Sequential(Convolutional(nn.SiLU), Convolutional(nn.ReLU, nn.Hardsigmoid))
    with pytest.warns(UserWarning, match="changed nothing"):
        pywino.swap_(net, pywino.Attention())
    assert not list(last_report(net))


def test_globs_choose():
    net = nn.Sequential(SE(), SE())
    pywino.swap_(net, {"1": pywino.Attention()})
    assert [type(m) for m in net] == [SE, pywino.ChannelResidualAttention]


@pytest.mark.native
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_mean_that_is_known_takes_the_place_of_the_pass(channels_last):
    layer = pywino.ChannelResidualAttention(32)
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 32, 9, 11).contiguous(memory_format=format)
    residual = torch.randn(2, 32, 9, 11)
    with torch.no_grad():
        expected = layer(x, "relu", residual, "relu")
        actual = layer(x, "relu", residual, "relu", x.mean((2, 3)))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        # It is what is read: another one gives another gate.
        other = layer(x, mean=torch.zeros(2, 32))
        torch.testing.assert_close(other, x / 2, rtol=1e-5, atol=1e-6)
        with pytest.raises(RuntimeError, match=r"mean must be \(2, 32\) in float32, got \(3, 32\)"):
            layer(x, mean=torch.zeros(3, 32))
        mean, gate = x.mean((2, 3)), layer.gate(x.mean((2, 3)))
        torch.testing.assert_close(layer(x), x * gate[:, :, None, None], rtol=1e-5, atol=1e-6)
        over = x.clone(memory_format=torch.preserve_format)
        assert layer(over, "relu", residual, "relu", mean, inplace=True) is over
        torch.testing.assert_close(over, expected, rtol=1e-5, atol=1e-6)
    # Where gradients are wanted it is made anew.
    torch.testing.assert_close(layer(x, mean=torch.zeros(2, 32)), layer(x), rtol=1e-5, atol=1e-6)
