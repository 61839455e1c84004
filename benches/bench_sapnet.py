# SPDX-License-Identifier: BSD-3-Clause
"""SAPNet whole, its residual block, and its training step: tables 3 and 4 of its talk on this
machine, with the default allocator. The gate alone is in bench_channel_attention.py, the dilated
convolutions are in bench_dilated_conv.py."""

import copy
from dataclasses import dataclass

import pytest
import torch

import pywino
from pywino.losses import ssim_loss
from pywino.models import sapnet

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Seconds and parameters of the talk; its device is not named.
PUBLISHED = {
    ("none", 481): 0.128,
    ("none", 512): 0.177,
    ("se", 481): 0.166,
    ("ca", 481): 0.149,
    ("cra", 481): 0.150,
    ("cra", 512): 0.203,
}
PARAMETERS = {"none": 168_963, "se": 170_243, "ca": 170_243, "cra": 180_483}


@dataclass(frozen=True)
class Network:
    attention: str
    height: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.attention}-{self.height}x{self.width}"

    __str__ = name.fget


NETWORKS = tuple(
    Network(attention, *size) for size in ((481, 321), (512, 512)) for attention in PARAMETERS
)


def _network(attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return sapnet(None if attention == "none" else attention).eval()


def _calls(module, x, suffix=""):
    """Functions of the module on x, in both memory formats."""
    calls = {}
    for name, memory_format in FORMATS.items():
        own = copy.deepcopy(module).to(memory_format=memory_format)
        own_x = x.contiguous(memory_format=memory_format)
        run = torch.compile(own, dynamic=False) if suffix else own
        calls[name + suffix] = lambda run=run, own_x=own_x: run(own_x)
    return calls


@pytest.mark.benchmark(group="sapnet")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.layers(full=NETWORKS, default=NETWORKS[1:2])
@torch.inference_mode()
def test_sapnet(compare, native, full, layer):
    """SAPNet with four kinds of attention, six stages, fp32, batch 1, on pywino's layers against
    PyTorch's, the better of two memory formats on both sides"""
    x = torch.rand(1, 3, layer.height, layer.width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(False):  # parameters of a module must be ordinary tensors
        ours = _network(layer.attention)
        plain = pywino.restore_(copy.deepcopy(ours))
        exact = copy.deepcopy(plain).double()
        peers = _calls(plain, x)
        if full:
            peers |= _calls(plain, x, " compiled")
        candidates = _calls(ours, x)
    parameters = sum(p.numel() for p in ours.parameters())
    assert parameters == PARAMETERS[layer.attention]
    seconds = PUBLISHED.get((layer.attention, layer.height))
    published = "" if seconds is None else f", {seconds} s in the talk (device unknown)"
    compare(
        candidates,
        peers,
        reference=lambda: exact(x.double()),
        limit=1e-4,  # 100 layers in a row
        denominator=tuple(FORMATS),
        note=f"{layer}: {parameters:,} parameters{published}.",
    )


@dataclass(frozen=True)
class Block:
    dilation: int

    @property
    def name(self) -> str:
        return f"d{self.dilation}"

    __str__ = name.fget


BLOCKS = tuple(Block(d) for d in (1, 2, 4, 8, 16))


@pytest.mark.benchmark(group="sapnet_block")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.layers(full=BLOCKS, default=BLOCKS[1::2])
@torch.inference_mode()
def test_block(compare, native, layer):
    """one residual block (two dilated convolutions, two gates, the sum), 32 channels, 481 x 321,
    fp32, the better of two memory formats on both sides"""
    x = torch.randn(1, 32, 481, 321, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(False):
        torch.manual_seed(0)
        ours = sapnet(dilation=(layer.dilation,) * 5).eval().res_conv1
        plain = pywino.restore_(copy.deepcopy(ours))
        exact = copy.deepcopy(plain).double()
        calls = [_calls(module, x) for module in (ours, plain)]
    compare(*calls, reference=lambda: exact(x.double()), limit=1e-5)


@pytest.mark.benchmark(group="sapnet_training")
@pytest.mark.environment(GLIBC_TUNABLES=None)
def test_training(compare, native):
    """a training step of SAPNet (forward, backward, Adam), 4 crops of 100 x 100, fp32, six stages,
    the better of two memory formats on both sides"""
    generator = torch.Generator().manual_seed(0)
    rainy, clean = torch.rand(2, 4, 3, 100, 100, generator=generator)

    def step(network, memory_format):
        network = copy.deepcopy(network).train().to(memory_format=memory_format)
        # A learning rate of 0 costs what any other does, and lets every step compute the same.
        optimizer = torch.optim.Adam(network.parameters(), lr=0.0)
        x = rainy.contiguous(memory_format=memory_format)

        def run():
            optimizer.zero_grad()
            loss = ssim_loss(network(x), clean)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run

    ours = _network("cra")
    plain = pywino.restore_(copy.deepcopy(ours))
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()
        loss = ssim_loss(exact(rainy.double()), clean.double())
    compare(
        {name: step(ours, memory_format) for name, memory_format in FORMATS.items()},
        {name: step(plain, memory_format) for name, memory_format in FORMATS.items()},
        reference=lambda: loss,
        limit=1e-4,
        note="Errors are those of the loss.",
    )
