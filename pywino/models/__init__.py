# SPDX-License-Identifier: BSD-3-Clause
"""Reference models in plain `torch.nn`; `pywino.swap_` turns their convolutions.

Parameter names are those of the published checkpoints (torchvision's for VGG and ResNet, the
authors' for SAPNet), so weights go in and out unchanged, before and after a swap.
"""

from pywino.models.resnet import ResNet, resnet50
from pywino.models.sapnet import SAPNet, sapnet
from pywino.models.vgg import VGG, vgg16
from pywino.models.weights import load_weights

__all__ = ["VGG", "ResNet", "SAPNet", "load_weights", "resnet50", "sapnet", "vgg16"]
