# SPDX-License-Identifier: BSD-3-Clause
"""What a detector makes of restored images: Deblur-YOLO's L_D."""

from torch import Tensor, nn

from pywino.models.yolo import YOLO, as_targets


class DetectionLoss(nn.Module):
    """The loss of a frozen detector on restored images, whose targets are what it finds in the
    sharp ones. The paper gives L_D by its weight alone; that it is this is our choice.

    detector: a `pywino.models.YOLO`. threshold: the least score of what counts as found."""

    def __init__(self, detector: YOLO, threshold: float = 0.25):
        super().__init__()
        self.detector = detector.eval().requires_grad_(False)
        self.threshold = threshold

    def train(self, mode: bool = True):
        """The detector stays in eval mode."""
        return super().train(False)

    def forward(self, restored: Tensor, sharp: Tensor, targets: Tensor | None = None) -> Tensor:
        """A number, for (N, 3, H, W) in 0..1 with sides that the detector takes. targets: the
        truth, as `YOLO.loss` takes it, in the place of what is found in `sharp`."""
        if targets is None:
            targets = as_targets(self.detector.detect(sharp, threshold=self.threshold))
        return self.detector.loss(self.detector(restored), targets)
