# SPDX-License-Identifier: BSD-3-Clause
"""Boxes drawn on pictures, with Pillow."""

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

TRUTH = (255, 255, 255)


def color_of(label: int) -> tuple[int, int, int]:
    """Colours of neighbouring classes are far apart: hues a golden angle from one another."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.9, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def to_image(pixels: Tensor) -> "Image.Image":
    """A Pillow image of (3, H, W) in 0..1."""
    from PIL import Image

    values = pixels.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    return Image.fromarray(values.contiguous().cpu().numpy())


def draw_boxes(
    image: "Image.Image",
    boxes: Sequence[Sequence[float]],
    texts: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
) -> None:
    """Draws x1, y1, x2, y2 in pixels, each with a text in its upper left corner, into the image."""
    from PIL import ImageDraw, ImageFont

    draw = ImageDraw.Draw(image)
    line = max(1, round(max(image.size) / 320))
    font = ImageFont.load_default(max(10, round(max(image.size) / 40)))
    for (x1, y1, x2, y2), text, color in zip(boxes, texts, colors):
        # The last pixels inside: x2 and y2 are the first ones outside.
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=color, width=line)
        if text:
            plate = draw.textbbox((x1 + line, y1 + line), text, font=font)
            draw.rectangle(plate, fill=color)
            draw.text((x1 + line, y1 + line), text, fill=(0, 0, 0), font=font)
