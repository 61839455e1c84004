# SPDX-License-Identifier: BSD-3-Clause
"""SAPNet whole, its residual block, its training step and its memory: tables 2 to 4 of its talk on
this machine, with the default allocator. The gate alone is in bench_channel_attention.py, the
dilated convolutions are in bench_dilated_conv.py."""

import copy
import os
import subprocess
import sys
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
V1 = (1,) * 5  # the first version's dilation
# Tables 2 to 4: parameters, PSNR / SSIM on Rain100H, seconds at 481 x 321 and 512 x 512; then what
# it is here.
TALK = {
    "table 2, Model1": (None, "28.05 / 0.883", 0.129, None, (None, V1)),
    "table 2, Model2 (URSS)": (None, "28.11 / 0.886", 0.131, None, (None, V1)),
    "table 2, Model3 (URSS, Canny)": (None, "28.16 / 0.884", 0.130, None, (None, V1)),
    "table 2, Model4 (URSS, Canny, CRA)": (None, "29.03 / 0.894", 0.150, None, ("cra", V1)),
    "table 3, SAPNet-SE": (170_243, "28.74 / 0.890", 0.166, None, ("se", V1)),
    "table 3, SAPNet-CA": (170_243, "28.89 / 0.892", 0.149, None, ("ca", V1)),
    "table 3, SAPNet-CRA": (180_483, "29.03 / 0.894", 0.150, None, ("cra", V1)),
    "table 4, DetailNet": (57_369, "12.65 / 0.420", 0.161, 0.528, None),
    "table 4, RESCAN": (149_823, "27.43 / 0.841", 0.498, 0.865, None),
    "table 4, PReNet": (168_963, "28.06 / 0.884", 0.128, 0.177, (None, V1)),
    "table 4, MSPFN": (15_823_424, "26.29 / 0.798", 0.327, 0.555, None),
    "table 4, SAPNet": (180_483, "29.03 / 0.894", 0.150, 0.203, ("cra", V1)),
}


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


@pytest.mark.benchmark(group="sapnet_published")
def test_published(report):
    """SAPNet as tables 2 to 4 of its talk report it, and its parameters here"""

    def rows():
        found = {}
        for name, (parameters, scores, *seconds, here) in TALK.items():
            times = ["" if s is None else f"{s:.3f}" for s in seconds]
            found[name] = {
                "parameters, talk": "" if parameters is None else f"{parameters:,}",
                "PSNR / SSIM on Rain100H, talk": scores,
                "seconds 481 x 321, talk": times[0],
                "seconds 512 x 512, talk": times[1],
                "parameters, here": "" if here is None else _count(*here),
            }
        return found

    report(rows, note="The talk's device is not named. Seconds here: table sapnet.")


def _count(attention, dilation):
    return f"{sum(p.numel() for p in sapnet(attention, dilation).parameters()):,}"


# What a child process runs: the network on a picture. Prints the most memory that it ever had, of
# /proc: getrusage's would be its parent's, where that had more.
_PEAK = """
import re, sys, torch, pywino
from pywino.cli.derain import OVERLAP
from pywino.cli.restore import Tiled
from pywino.models import sapnet

layers, tile, height, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(int(sys.argv[5]))
net = sapnet(weights="pywino-rain", stages=6).eval().to(memory_format=torch.channels_last)
if layers == "PyTorch":
    pywino.restore_(net)
clean = Tiled(net, tile or max(height, width), OVERLAP)(torch.rand(3, height, width))
assert clean.shape == (3, height, width) and bool(clean.isfinite().all())
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 2**20)
"""


@pytest.mark.benchmark(group="sapnet_memory")
@pytest.mark.full_only
def test_memory(report, native):
    """Most memory of a process that derains one picture of 2048 x 1536 in six stages, PyTorch and
    all libraries included, in tiles of 640 pixels (`pywino derain`) and whole"""

    def peak(layers, tile):
        arguments = (layers, tile, 1536, 2048, torch.get_num_threads())
        command = [sys.executable, "-c", _PEAK, *map(str, arguments)]
        environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return f"{float(done.stdout):.2f}"

    def rows():
        return {
            f"{layers}, {name}": {"GB": peak(layers, tile)}
            for name, tile in (("tiles", 640), ("whole", 0))
            for layers in ("pywino", "PyTorch")
        }

    report(rows, note="2^30 bytes a GB; with the default allocator, as the command runs.")
