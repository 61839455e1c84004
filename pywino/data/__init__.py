# SPDX-License-Identifier: BSD-3-Clause
"""Small image data sets from files that are already on this machine; nothing is downloaded.

    train, test = fashion_mnist()             # of Debian's package, or fashion_mnist("folder")
    train, test = cifar10("cifar-10-batches-py")
    train, test = image_folder("pictures.tar")

Each reader checks what it reads and names a damaged file. Files are not trusted: pickles may hold
arrays and lists only, and nothing of an archive is ever written to disk.
"""

from pywino.data.blur import averaged_frames, blur, linear_kernels, trajectory_kernels
from pywino.data.cifar import cifar10, cifar100
from pywino.data.fashion_mnist import fashion_mnist
from pywino.data.folder import image_folder
from pywino.data.images import Images

__all__ = [
    "Images",
    "averaged_frames",
    "blur",
    "cifar10",
    "cifar100",
    "fashion_mnist",
    "image_folder",
    "linear_kernels",
    "trajectory_kernels",
]
