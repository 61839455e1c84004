# SPDX-License-Identifier: BSD-3-Clause
"""`pywino.nn.InstanceNorm2d`: PyTorch's numbers, and the input's layout."""

import pytest
import torch

from pywino.nn import InstanceNorm2d


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_is_torchs(affine, track, training):
    arguments = {"affine": affine, "track_running_stats": track}
    ours, torchs = (cls(3, **arguments) for cls in (InstanceNorm2d, torch.nn.InstanceNorm2d))
    for tensor in ours.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 5, 7)
    for input in (x, x.contiguous(memory_format=torch.channels_last), x[0]):
        results = []
        for norm in (ours.train(training), torchs.train(training)):
            leaf = input.clone().requires_grad_()
            output = norm(leaf)
            results.append((output, *torch.autograd.grad(output.square().sum(), leaf)))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, torchs.state_dict()[name], msg=name)


def test_keeps_channels_last_with_running_statistics():
    x = torch.randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
    norm = InstanceNorm2d(3, track_running_stats=True).eval()
    assert norm(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:input's size at dim=1")
def test_refuses_what_torch_refuses():
    norm = InstanceNorm2d(3, track_running_stats=True).eval()
    for shape in ((2, 4, 5, 7), (5, 7)):
        with pytest.raises(Exception) as theirs:
            super(InstanceNorm2d, norm).forward(torch.randn(shape))
        with pytest.raises(theirs.type):
            norm(torch.randn(shape))
