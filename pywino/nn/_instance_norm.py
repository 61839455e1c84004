# SPDX-License-Identifier: BSD-3-Clause
"""Instance normalisation that leaves channels_last as it is."""

from torch import Tensor, nn
from torch.nn import functional as F


class InstanceNorm2d(nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d`, with its arguments, results and state_dict.

    With running statistics it is an affine map of each channel in eval mode. PyTorch's converts a
    channels_last input to NCHW for it, and what follows runs in NCHW; this one does not."""

    def to_dense(self) -> nn.InstanceNorm2d:
        """The `nn.InstanceNorm2d` that shares this one's Parameters, buffers and hooks."""
        norm = nn.InstanceNorm2d.__new__(nn.InstanceNorm2d)
        norm.__dict__.update(self.__dict__)
        return norm

    def forward(self, input: Tensor) -> Tensor:
        own = self.training or self.running_mean is None  # each picture's own mean and deviation
        if own or input.dim() != 4 or input.shape[1] != self.num_features:
            return super().forward(input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )
