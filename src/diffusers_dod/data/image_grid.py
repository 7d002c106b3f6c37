# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""Grids of images, with captions."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


FONT_SIZE = 11
LINE = 16  # height of a line of captions, in pixels
MARGIN = 4  # between captions at the side and images


def make_grid(
    rows: list[list[Image.Image]],
    scale: int = 1,
    gap: int = 2,
    title: str | None = None,
    column_names: Sequence[str] | None = None,
    row_names: Sequence[str] | None = None,
) -> Image.Image:
    """
    Puts images of one size into rows, on white, with captions above and on the left.

    Args:
        rows (`list[list[PIL.Image.Image]]`): The images. Rows may differ in length.
        scale (`int`, defaults to 1): Factor by which each image is enlarged, without smoothing.
        gap (`int`, defaults to 2): White pixels between neighbours.
        title (`str`, *optional*): Caption of all.
        column_names (`Sequence[str]`, *optional*): Caption of each column, cut to its width.
        row_names (`Sequence[str]`, *optional*): Caption of each row.

    Returns:
        `PIL.Image.Image`: The grid. The images lie in its lower right corner.
    """
    font = ImageFont.load_default(FONT_SIZE)
    width, height = (side * scale for side in rows[0][0].size)
    left = 0 if row_names is None else max(int(font.getlength(name)) for name in row_names) + 2 * MARGIN
    top = LINE * ((title is not None) + (column_names is not None))
    size = max(len(row) for row in rows) * (width + gap) - gap, len(rows) * (height + gap) - gap
    grid = Image.new("RGB", (left + size[0], top + size[1]), "white")
    draw = ImageDraw.Draw(grid)
    if title is not None:
        draw.text((MARGIN, LINE / 2), _shorten(title, font, grid.width - MARGIN), "black", font, anchor="lm")
    for j, name in enumerate(column_names or ()):
        place = left + j * (width + gap) + width / 2, top - LINE / 2
        draw.text(place, _shorten(name, font, width), "black", font, anchor="mm")
    for i, name in enumerate(row_names or ()):
        draw.text((MARGIN, top + i * (height + gap) + height / 2), name, "black", font, anchor="lm")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (left + j * (width + gap), top + i * (height + gap)))
    return grid


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The first names in a `text` that `width` has room for; of a single name that is too long, its start."""
    text = " ".join(text.split())
    while font.getlength(text) > width and "," in text:
        text = text.rpartition(",")[0]
    while font.getlength(text) > width and text:
        text = text.rstrip(".")[:-1] + "." if len(text.rstrip(".")) > 1 else ""
    return text
