# SPDX-License-Identifier: BSD-3-Clause
"""``pywino deblur IN OUT``: Deblur-YOLO's generator on a picture, a folder of them, or a video."""

import click
import torch

import pywino
from pywino import models
from pywino.cli import restore

TILE = 640  # the generator keeps about 1 KB a pixel
OVERLAP = 128
GRID = 32  # of its features


@click.command()
@restore.options(TILE, OVERLAP)
@click.option(
    "--weights",
    default="pywino-blur",
    show_default=True,
    help="A file of the generator, .safetensors or .pth; or DeblurGAN-v2's, fpn_mobilenet.h5.",
)
@click.option(
    "--deblurgan-v2", is_flag=True,
    help="The weights are DeblurGAN-v2's: no dilation, and every tile is normalised by its own "
    "statistics, as its authors run it.",
)  # fmt: skip
def command(weights, deblurgan_v2, tile, **options):
    """Take motion blur out of a picture, of all pictures and videos of a folder, or of a video.

    Sub-folders are mirrored, names and formats stay. Outputs that exist are kept, so an interrupted
    folder goes on. What cannot be read is named and skipped; the exit code is 1 then.
    """

    def build():
        dilation = 1 if deblurgan_v2 else 2
        model = models.deblur_yolo(weights, dilation=dilation, trim=True)
        if not deblurgan_v2:
            model = pywino.fuse_(model.eval())
        return restore.Tiled(model.to(memory_format=torch.channels_last), tile, OVERLAP, GRID)

    restore.run(build, **options)
