# SPDX-License-Identifier: BSD-3-Clause
"""The convolution of the pixels of a mask."""

from torch import nn

from pywino.functional.masked_conv import run_masked_conv2d
from pywino.nn.winograd import Cached, FilterCache


class MaskedConv2d(Cached, nn.Conv2d):
    """An `nn.Conv2d` of stride 1 and one group that is called with a mask, and reads and writes the
    mask's pixels alone (`pywino.masked_conv2d`).

    Args: those of nn.Conv2d, with padding="same" by default, then
        backend: "auto" | "cpu" | "aten" | "cuda" | "triton".

    Parameters and state_dict are those of nn.Conv2d. Without gradients the packed weight is kept
    until the weight changes."""

    def __init__(self, in_channels, out_channels, kernel_size, *args, backend="auto", **kwargs):
        if len(args) < 2:  # stride, padding
            kwargs.setdefault("padding", "same")
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        for name, must in (("stride", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != must:
                raise RuntimeError(
                    f"pywino.MaskedConv2d: {name} must be {must}, got {getattr(self, name)}; mask "
                    "the input of a torch.nn.Conv2d"
                )
        self.backend = backend
        self._filters = FilterCache()

    def forward(self, input, mask):
        """(N, C, H, W) or (C, H, W), and a bool (N or 1, 1, H, W) -> (N, K, H, W) or (K, H, W)."""
        return run_masked_conv2d(
            input,
            mask,
            self.weight,
            self.bias,
            self.padding,
            self.dilation,
            self.backend,
            self._filters,
        )

    def extra_repr(self):
        text = super().extra_repr()
        return text if self.backend == "auto" else f"{text}, backend={self.backend}"
