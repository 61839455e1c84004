# SPDX-License-Identifier: BSD-3-Clause
"""Instance normalisation that leaves channels_last as it is."""

from torch import Tensor, nn
from torch.nn import functional as F


class InstanceNorm2d(nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d`, with its arguments, results and state_dict.

    With running statistics it is an affine map of each channel in eval mode. PyTorch's converts a
    channels_last input to NCHW for it, and what follows runs in NCHW; this one does not."""

    def forward(self, input: Tensor) -> Tensor:
        own = self.training or self.running_mean is None  # each picture's own mean and deviation
        if own or input.dim() != 4 or input.shape[1] != self.num_features:
            return super().forward(input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )
