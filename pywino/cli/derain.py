# SPDX-License-Identifier: BSD-3-Clause
"""``pywino derain IN OUT``: SAPNet on a picture, a folder of them, or a video."""

import click
import torch

from pywino import models
from pywino.cli import restore

TILE = 640  # SAPNet keeps about 1.5 KB a pixel: 0.6 GB a tile
OVERLAP = 96  # its attention sees one tile's means, not the whole picture's


@click.command()
@restore.options(TILE, OVERLAP)
@click.option(
    "--weights",
    default="pywino-rain",
    show_default=True,
    help="SAPNet's weights, .pth (the authors' file) or .safetensors.",
)
@click.option(
    "--stages",
    type=click.IntRange(1, 6),
    help="Fewer are faster. Default: as in the weights' training.",
)
def command(weights, stages, tile, **options):
    """Take the rain out of a picture, of all pictures and videos of a folder, or of a video.

    Sub-folders are mirrored, names and formats stay. Outputs that exist are kept, so an interrupted
    folder goes on. What cannot be read is named and skipped; the exit code is 1 then.
    """

    def build():
        model = models.sapnet(stages=stages, weights=weights).eval()
        return restore.Tiled(model.to(memory_format=torch.channels_last), tile, OVERLAP)

    restore.run(build, **options)
