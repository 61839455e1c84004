# SPDX-License-Identifier: BSD-3-Clause
"""Training steps of whole models, batch 128, and what the dynamic batch costs a step."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pywino import models
from pywino.optim import DynamicBatchController, DynamicBatchSampler, DynamicBatchSGDM

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Functions of pywino.models and the images that they are trained on.
IMAGES = {"alexnet": (1, 28, 28), "resnet32": (3, 32, 32)}
BATCH = 128


def _batch(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, *IMAGES[name], generator=generator)
    return x, torch.arange(BATCH) % 10


def _model(name, conv):
    torch.manual_seed(0)
    return getattr(models, name)(10, IMAGES[name][0], conv).train()


def _step(name, conv, memory_format):
    """Forward and backward pass and update; the loss. A learning rate of 0 costs what any other
    does, and lets every step compute the same."""
    model = _model(name, conv).to(memory_format=memory_format)
    opt = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    x, y = _batch(name)
    x = x.contiguous(memory_format=memory_format)

    def step():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        return loss.detach()

    return step


def _exact(name, conv):
    x, y = _batch(name)
    with torch.no_grad():
        return F.cross_entropy(_model(name, conv).double()(x.double()), y)


@pytest.mark.benchmark(group="training")
@pytest.mark.environment(GLIBC_TUNABLES=None)
@pytest.mark.parametrize("conv", ["winograd", "winograd_relu"])
@pytest.mark.parametrize("name", IMAGES)
def test_training(compare, native, name, conv):
    """training steps (forward, backward, SGD with momentum), fp32, batch 128, the better of two
    memory formats on both sides; winograd_relu with tile 2 is another function than dense"""
    compare(
        {key: _step(name, conv, memory_format) for key, memory_format in FORMATS.items()},
        {key: _step(name, "dense", memory_format) for key, memory_format in FORMATS.items()},
        reference=lambda: _exact(name, conv),
        same=conv == "winograd",
        limit=1e-4,  # of the loss, after 5 to 31 layers with BatchNorm
        note="Errors are those of the loss.",
    )


@pytest.mark.benchmark(group="dynamic_batch")
def test_dynamic_batch(compare):
    """a step of the optimizer with sampler and controller, against the optimizer alone, on one
    parameter of one number"""

    def steps(dynamic):
        parameter = nn.Parameter(torch.zeros(1))
        parameter.grad = torch.ones(1)
        opt = DynamicBatchSGDM([parameter], lr=0.02)
        if not dynamic:
            return opt.step
        sampler = DynamicBatchSampler(1 << 20, opt)
        DynamicBatchController(opt, 1 << 30)  # stays in its warm-up, which works in every step
        batches = iter(sampler)

        def step():
            nonlocal batches
            if next(batches, None) is None:
                batches = iter(sampler)
            opt.step()

        return step

    compare(
        steps(dynamic=True),
        {"alone": steps(dynamic=False)},
        calls=200,
        overhead=True,
        note="Making a batch's list of indices is in it.",
    )
