# SPDX-License-Identifier: BSD-3-Clause
"""Reference models in plain `torch.nn`; `pywino.swap_` turns their convolutions. Those that are
trained here also come with pywino's layers: `conv="winograd"` or `"winograd_relu"`.

Parameter names of VGG (224), ResNet-50, MobileNetV2 and SAPNet are those of the published
checkpoints (torchvision's, the authors'), so weights go in and out unchanged, before and after a
swap.
"""

from pywino.models.alexnet import AlexNet, alexnet
from pywino.models.all_conv import AllConv, all_cnn_c, convpool_cnn_c
from pywino.models.darknet import load_darknet
from pywino.models.deblur_yolo import DeblurYOLO, deblur_yolo
from pywino.models.discriminators import PatchDiscriminator, patch_discriminator
from pywino.models.mobilenet import MobileNetV2, mobilenet_v2
from pywino.models.resnet import ResNet, resnet18, resnet32, resnet50
from pywino.models.sapnet import SAPNet, sapnet
from pywino.models.stack import WeightedAverageStack
from pywino.models.vgg import VGG, vgg16
from pywino.models.weights import load_weights
from pywino.models.yolo import YOLO, Detections, small_yolo, yolov3

__all__ = [
    "VGG",
    "YOLO",
    "AlexNet",
    "AllConv",
    "DeblurYOLO",
    "Detections",
    "MobileNetV2",
    "PatchDiscriminator",
    "ResNet",
    "SAPNet",
    "WeightedAverageStack",
    "alexnet",
    "all_cnn_c",
    "convpool_cnn_c",
    "deblur_yolo",
    "load_darknet",
    "load_weights",
    "mobilenet_v2",
    "patch_discriminator",
    "resnet18",
    "resnet32",
    "resnet50",
    "sapnet",
    "small_yolo",
    "vgg16",
    "yolov3",
]
