# SPDX-License-Identifier: BSD-3-Clause
"""Images from files that are already on this machine; nothing is downloaded. Small labelled ones:

    train, test = fashion_mnist()             # of Debian's package, or fashion_mnist("folder")
    train, test = cifar10("cifar-10-batches-py")
    train, test = image_folder("pictures.tar")

Photographs, and pairs of a degraded and a clean one:

    train, held_out = Pairs(photos("photos"), RAIN["heavy"]).split(0.2)
    train, held_out = paired_photos("Rain100H").split(0.2)

Pictures with boxes, of YOLO's folders or composed of photos and cut-outs:

    train, held_out = LabelledPictures("coco128", 320).split(0.2)
    scenes = Scenes(photos("photos"), Stamps("stamps"), 320)

Each reader checks what it reads and names a damaged file. Files are not trusted: pickles may hold
arrays and lists only, and nothing of an archive is ever written to disk.
"""

from pywino.data.blur import averaged_frames, blur, linear_kernels, trajectory_kernels
from pywino.data.cifar import cifar10, cifar100
from pywino.data.detection import LabelledPictures, Scenes, Stamps, letterbox
from pywino.data.fashion_mnist import fashion_mnist
from pywino.data.folder import image_folder
from pywino.data.images import Images
from pywino.data.pairs import Pairs, paired_photos
from pywino.data.photos import Photos, photos
from pywino.data.rain import RAIN, Rain

__all__ = [
    "RAIN",
    "Images",
    "LabelledPictures",
    "Pairs",
    "Photos",
    "Rain",
    "Scenes",
    "Stamps",
    "averaged_frames",
    "blur",
    "cifar10",
    "cifar100",
    "fashion_mnist",
    "image_folder",
    "letterbox",
    "linear_kernels",
    "paired_photos",
    "photos",
    "trajectory_kernels",
]
